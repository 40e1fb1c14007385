//! What a peer may put into a message, and what we make of it: requests, replies, errors.

use crate::amqp::frame::{
    BASIC_DELIVER, CLASS_BASIC, Content, END, FRAME_MIN, HEADER, METHOD, Properties, Publish,
    put_body, put_publish,
};
use crate::amqp::incoming::{Incoming, Message, frame_len};
use crate::bytes::assembled::assemble;
use crate::bytes::bounds::{in_memory, in_time};
use crate::message::headers::Headers;
use crate::message::{RemoteError, Reply, Response, TEXT_PLAIN, return_address};
use crate::server::request::Request;
use std::iter::once;
use std::sync::Arc;
use std::time::Instant;

/// A message is read as a request and as a reply, and what comes of it reads the same once it was
/// sent on. The input is the length of the properties in two octets, those, and the body.
pub fn message(input: &[u8]) {
    let Some((&[high, low], rest)) = input.split_first_chunk() else {
        return;
    };
    let head_len = usize::from(u16::from_be_bytes([high, low])).min(rest.len());
    let (head, body) = rest.split_at(head_len);
    let message = delivered(&content(head, body));
    assert_eq!(message.body, body);
    let (request, reply) = in_time(input.len(), 0, || (request(&message), reply(&message)));
    in_memory(input.len(), memory(request.headers()));

    let received = message.head.properties();
    let address = return_address(&received);
    assert_eq!(request.correlation_id(), address.and_then(|(_, id)| id));
    assert!(request.time_left().is_none() || received.expiration.is_some());
    assert_eq!(
        request.content_type().is_some(),
        received.content_type.is_some()
    );
    let id = received.correlation_id;
    let echo = in_time(input.len(), 0, || Response::from(&request));
    if let Ok(echo) = echo.checked() {
        let sent = send_on(&echo, id).expect("it is marked as no error");
        assert_eq!(sent.body, body);
        assert_eq!(sent.headers, *echo.headers());
    }
    match reply {
        Ok(reply) => {
            assert_eq!(reply.headers, *request.headers());
            assert_eq!(reply.content_type.as_deref(), request.content_type());
            if let Ok(response) = Response::from(reply.clone()).checked() {
                let text = TEXT_PLAIN.to_owned();
                let content_type = reply.content_type.clone().or(Some(text));
                let sent = send_on(&response, id);
                let expected = Reply {
                    content_type,
                    ..reply
                };
                assert_eq!(sent, Ok(expected));
            }
        }
        Err(error) => {
            let kind = error.kind_sent().to_owned();
            let sent = send_on(&error.into_response(), id).unwrap_err();
            assert!(sent.has_valid_kind());
            assert_eq!(sent.kind(), kind);
        }
    }
}

fn request(message: &Message) -> Request {
    let received = message.head.properties();
    Request::read(&received, message.body.clone(), false, Instant::now())
}

fn reply(message: &Message) -> Result<Reply, RemoteError> {
    Reply::read(&message.head.properties(), message.body.clone())
}

/// What its receiver makes of a response. It writes the same again.
fn send_on(response: &Response, id: Option<&[u8]>) -> Result<Reply, RemoteError> {
    let sent = written(response.properties(id), response.body());
    let message = delivered(&sent);
    let received = message.head.properties();
    assert_eq!(received.correlation_id, id);
    let headers = Headers::read(received.headers);
    let properties = Properties {
        content_type: received.content_type,
        headers: headers.fields(),
        correlation_id: received.correlation_id,
        reply_to: received.reply_to,
        expiration: received.expiration,
    };
    assert_eq!(written(properties, &message.body), sent);
    Reply::read(&received, message.body.clone())
}

/// The frames of a message's content, as we write them.
fn written(properties: Properties<'_>, body: &[u8]) -> Vec<u8> {
    let content: Arc<dyn Content> = Arc::new(body.to_vec());
    let message = Publish {
        routing_key: b"",
        mandatory: false,
        properties,
        content: &content,
    };
    let mut out = Vec::new();
    put_publish(&mut out, 1, &message);
    put_body(&mut out, 1, FRAME_MIN, body);
    let method = frame_len(&out).unwrap().unwrap();
    out.split_off(method)
}

/// The frames of a message's content with any properties.
fn content(head: &[u8], body: &[u8]) -> Vec<u8> {
    let mut payload = CLASS_BASIC.to_be_bytes().to_vec();
    payload.extend([0; 2]); // weight, unused
    payload.extend((body.len() as u64).to_be_bytes());
    payload.extend(head);
    let mut out = framed(HEADER, &payload);
    put_body(&mut out, 1, FRAME_MIN, body);
    out
}

/// The message that arrives with that content.
fn delivered(content: &[u8]) -> Message {
    let mut payload = [CLASS_BASIC.to_be_bytes(), BASIC_DELIVER.to_be_bytes()].concat();
    payload.extend([0; 11]); // no tag of a consumer, the delivery's tag, not again, no key
    let mut stream = framed(METHOD, &payload);
    stream.extend(content);
    let mut assembled = assemble(once(&*stream));
    match assembled.incoming.pop() {
        Some(Incoming::Delivery(delivery)) => delivery.message,
        other => panic!("not a delivery: {other:?}"),
    }
}

fn framed(kind: u8, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    [&[kind, 0, 1], &len[..], payload, &[END]].concat()
}

/// How much memory headers hold, in bytes.
fn memory(headers: &Headers) -> usize {
    let fields = headers.fields().iter();
    let held = fields.map(|field| size_of_val(field) + field.0.capacity() + field.1.capacity());
    held.sum()
}
