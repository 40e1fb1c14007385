//! The AMQP 0-9-1 frames that we write ourselves: all that is said on a channel. Pure; no I/O.
//!
//! Why write frames beside an AMQP library? A publish through amiquip is three messages to its
//! I/O thread, and up to three wake-ups, three writes and three TCP segments; with the
//! acknowledgement four. Written here, a reply and its ack are one buffer and one write, made by
//! the thread that has computed the reply (see [`super::outbox`]). And nobody has to wait: a
//! channel is opened, set up and consumed on in one write, and what the broker says to it comes
//! back as events ([`super::incoming`]).
//!
//! Source of the layout: AMQP 0-9-1 specification, sections 2.3.5 (frames) and 4.2 (grammar),
//! and RabbitMQ's errata for the types of a field table.

use std::fmt::Debug;
use std::sync::Arc;

/// A frame's type octet.
pub(crate) const METHOD: u8 = 1;
pub(crate) const HEADER: u8 = 2;
pub(crate) const BODY: u8 = 3;
/// The octet that ends every frame.
pub(crate) const END: u8 = 0xCE;

/// Octets before a frame's payload: type, channel, size.
pub(crate) const PREFIX_LEN: usize = 7;
/// All octets of a frame that are not payload.
pub(crate) const OVERHEAD: usize = PREFIX_LEN + 1;

/// The longest frame that every peer must accept, in octets (`frame-min-size`).
pub(crate) const FRAME_MIN: usize = 4096;

/// The longest frame that we ask for and accept, in octets: RabbitMQ's own, unless configured
/// otherwise. A broker that sets no limit would send each message in a single frame.
pub(crate) const FRAME_MAX: usize = 128 << 10;

/// The longest frame of a content header that we accept, in octets. RabbitMQ never splits one, and
/// adds to one that a peer has filled up to [`FRAME_MAX`], when it dead-letters or redelivers the
/// message. Who refused that would get it again on each connection.
pub(crate) const HEADER_MAX: usize = 1 << 20;

pub(crate) const CLASS_CHANNEL: u16 = 20;
const CHANNEL_OPEN: u16 = 10;
pub(crate) const CHANNEL_OPEN_OK: u16 = 11;
pub(crate) const CHANNEL_CLOSE: u16 = 40;
pub(crate) const CHANNEL_CLOSE_OK: u16 = 41;

pub(crate) const CLASS_QUEUE: u16 = 50;
const QUEUE_DECLARE: u16 = 10;
pub(crate) const QUEUE_DECLARE_OK: u16 = 11;

pub(crate) const CLASS_BASIC: u16 = 60;
const BASIC_QOS: u16 = 10;
pub(crate) const BASIC_QOS_OK: u16 = 11;
const BASIC_CONSUME: u16 = 20;
pub(crate) const BASIC_CONSUME_OK: u16 = 21;
pub(crate) const BASIC_CANCEL: u16 = 30;
pub(crate) const BASIC_CANCEL_OK: u16 = 31;
const BASIC_PUBLISH: u16 = 40;
pub(crate) const BASIC_RETURN: u16 = 50;
pub(crate) const BASIC_DELIVER: u16 = 60;
pub(crate) const BASIC_ACK: u16 = 80;
pub(crate) const BASIC_NACK: u16 = 120;

pub(crate) const CLASS_CONFIRM: u16 = 85;
const CONFIRM_SELECT: u16 = 10;
pub(crate) const CONFIRM_SELECT_OK: u16 = 11;

/// AMQP reply codes, as RabbitMQ uses them.
/// Source: <https://www.rabbitmq.com/amqp-0-9-1-reference#constants>.
pub(crate) mod reply_code {
    pub const REPLY_SUCCESS: u16 = 200;
    pub const CONNECTION_FORCED: u16 = 320;
    pub const ACCESS_REFUSED: u16 = 403;
    pub const NOT_FOUND: u16 = 404;
    pub const RESOURCE_LOCKED: u16 = 405;
    pub const PRECONDITION_FAILED: u16 = 406;
    pub const NOT_ALLOWED: u16 = 530;
    pub const INTERNAL_ERROR: u16 = 541;
}

/// The tag of our consumers. Tags need to differ within a channel only, and none of ours has two.
const CONSUMER_TAG: &[u8] = b"fibrpc";

/// The longest AMQP short string, in bytes: names of queues, correlation ids.
pub(crate) const SHORT_STRING_MAX: usize = 255;

/// The properties of a message that we send. Each but the headers is at most [`SHORT_STRING_MAX`]
/// bytes.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Properties<'a> {
    pub content_type: Option<&'a [u8]>,
    /// Names and values, with names of at most [`SHORT_STRING_MAX`] bytes.
    pub headers: &'a [(String, String)],
    pub correlation_id: Option<&'a [u8]>,
    pub reply_to: Option<&'a [u8]>,
    /// How long the message may wait in a queue: milliseconds, in decimal.
    pub expiration: Option<&'a [u8]>,
}

/// Something with a body that is to be sent. It is shared with whoever needs it after that.
pub(crate) trait Content: Debug + Send + Sync {
    fn body(&self) -> &[u8];
}

impl Content for Vec<u8> {
    fn body(&self) -> &[u8] {
        self
    }
}

/// A message to the default exchange, which routes it to the queue that its key names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Publish<'a> {
    pub routing_key: &'a [u8],
    /// Whether the broker returns the message if no queue has that name.
    pub mandatory: bool,
    pub properties: Properties<'a>,
    pub content: &'a Arc<dyn Content>,
}

/// A queue to be declared, or to be asked after.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Declare<'a> {
    /// Empty: the broker chooses one.
    pub name: &'a [u8],
    /// Whether only to ask after it.
    pub passive: bool,
    pub durable: bool,
    /// Whether it is for this connection alone, and gone with it.
    pub exclusive: bool,
    /// Whether it is gone with its last consumer.
    pub auto_delete: bool,
    /// Names and values of its arguments, with names of at most [`SHORT_STRING_MAX`] bytes.
    pub arguments: &'a [(&'a str, &'a str)],
}

/// Appends `channel.open`. The broker answers [`CHANNEL_OPEN_OK`].
pub(crate) fn put_open(out: &mut Vec<u8>, channel: u16) {
    put_method(out, channel, CLASS_CHANNEL, CHANNEL_OPEN, |out| {
        put_short_string(out, b""); // reserved
    });
}

/// Appends `channel.close`. The broker answers [`CHANNEL_CLOSE_OK`], once it has done all that it
/// was told before on this channel.
pub(crate) fn put_close(out: &mut Vec<u8>, channel: u16) {
    put_method(out, channel, CLASS_CHANNEL, CHANNEL_CLOSE, |out| {
        put_u16(out, reply_code::REPLY_SUCCESS);
        put_short_string(out, b"");
        out.extend_from_slice(&[0; 4]); // no method was the cause
    });
}

/// Appends `channel.close-ok`, the answer to the broker's [`CHANNEL_CLOSE`].
pub(crate) fn put_close_ok(out: &mut Vec<u8>, channel: u16) {
    put_method(out, channel, CLASS_CHANNEL, CHANNEL_CLOSE_OK, |_| {});
}

/// Appends `queue.declare`. The broker answers [`QUEUE_DECLARE_OK`], or closes the channel.
pub(crate) fn put_declare(out: &mut Vec<u8>, channel: u16, queue: &Declare<'_>) {
    put_method(out, channel, CLASS_QUEUE, QUEUE_DECLARE, |out| {
        put_u16(out, 0); // reserved
        put_short_string(out, queue.name);
        out.push(
            u8::from(queue.passive)
                | u8::from(queue.durable) << 1
                | u8::from(queue.exclusive) << 2
                | u8::from(queue.auto_delete) << 3,
        );
        put_table(out, queue.arguments.iter().copied());
    });
}

/// Appends `confirm.select`: from now on the broker says of each message published on this channel
/// that it has it, [`BASIC_ACK`], or has not, [`BASIC_NACK`]. It answers [`CONFIRM_SELECT_OK`].
pub(crate) fn put_confirm_select(out: &mut Vec<u8>, channel: u16) {
    put_method(out, channel, CLASS_CONFIRM, CONFIRM_SELECT, |out| {
        out.push(0); // with an answer
    });
}

/// Appends `basic.publish` and the content header. The frames of the body must follow, if it is not
/// empty: [`put_body`].
pub(crate) fn put_publish(out: &mut Vec<u8>, channel: u16, message: &Publish<'_>) {
    put_method(out, channel, CLASS_BASIC, BASIC_PUBLISH, |out| {
        put_u16(out, 0); // reserved
        put_short_string(out, b""); // the default exchange
        put_short_string(out, message.routing_key);
        out.push(u8::from(message.mandatory));
    });
    put_frame(out, HEADER, channel, |out| {
        put_u16(out, CLASS_BASIC);
        put_u16(out, 0); // weight, unused
        let body_len = message.content.body().len() as u64;
        out.extend_from_slice(&body_len.to_be_bytes());
        put_properties(out, &message.properties);
    });
}

/// Appends the frames of a body, each of at most `frame_max` octets.
pub(crate) fn put_body(out: &mut Vec<u8>, channel: u16, frame_max: usize, body: &[u8]) {
    for payload in body.chunks(frame_max - OVERHEAD) {
        put_frame(out, BODY, channel, |out| out.extend_from_slice(payload));
    }
}

/// What stands before the payload of a body frame; [`END`] stands behind it.
pub(crate) fn body_prefix(channel: u16, payload_len: usize) -> [u8; PREFIX_LEN] {
    let [high, low] = channel.to_be_bytes();
    let [a, b, c, d] = (payload_len as u32).to_be_bytes();
    [BODY, high, low, a, b, c, d]
}

/// Appends `basic.ack` for one delivery.
pub(crate) fn put_ack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64) {
    put_method(out, channel, CLASS_BASIC, BASIC_ACK, |out| {
        out.extend_from_slice(&delivery_tag.to_be_bytes());
        out.push(0); // this one only
    });
}

/// Appends `basic.nack`, which puts one delivery back into its queue. To a quorum queue, from
/// RabbitMQ 4.3, `basic.reject` would mean that it was tried and failed, and a message that has
/// failed 20 times is dropped.
/// Source: <https://www.rabbitmq.com/docs/4.3/nack>.
pub(crate) fn put_requeue(out: &mut Vec<u8>, channel: u16, delivery_tag: u64) {
    put_method(out, channel, CLASS_BASIC, BASIC_NACK, |out| {
        out.extend_from_slice(&delivery_tag.to_be_bytes());
        out.push(0b10); // requeue; this one only
    });
}

/// Appends `basic.qos`: how many deliveries a consumer may have that are not acknowledged. The
/// broker answers [`BASIC_QOS_OK`], once it has done all that it was told before on this channel.
pub(crate) fn put_qos(out: &mut Vec<u8>, channel: u16, prefetch: u16) {
    put_method(out, channel, CLASS_BASIC, BASIC_QOS, |out| {
        out.extend_from_slice(&[0; 4]); // no limit in bytes
        put_u16(out, prefetch);
        out.push(0); // for each consumer, not for the whole connection
    });
}

/// Appends `basic.consume`. The broker answers [`BASIC_CONSUME_OK`], or closes the channel.
pub(crate) fn put_consume(out: &mut Vec<u8>, channel: u16, queue: &[u8], no_ack: bool) {
    put_method(out, channel, CLASS_BASIC, BASIC_CONSUME, |out| {
        put_u16(out, 0); // reserved
        put_short_string(out, queue);
        put_short_string(out, CONSUMER_TAG);
        out.push(u8::from(no_ack) << 1);
        out.extend_from_slice(&[0; 4]); // no arguments
    });
}

/// Appends `basic.cancel`, the end of what [`put_consume`] began. The broker answers
/// [`BASIC_CANCEL_OK`].
pub(crate) fn put_cancel(out: &mut Vec<u8>, channel: u16) {
    put_method(out, channel, CLASS_BASIC, BASIC_CANCEL, |out| {
        put_short_string(out, CONSUMER_TAG);
        out.push(0); // with an answer
    });
}

fn put_method(
    out: &mut Vec<u8>,
    channel: u16,
    class: u16,
    method: u16,
    arguments: impl FnOnce(&mut Vec<u8>),
) {
    put_frame(out, METHOD, channel, |out| {
        put_u16(out, class);
        put_u16(out, method);
        arguments(out);
    });
}

fn put_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    put_u16(out, channel);
    put_sized(out, payload);
    out.push(END);
}

/// Appends what `content` appends, behind its length as four octets.
fn put_sized(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    content(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends the flags that say which properties follow, and those, in the order of the flags.
fn put_properties(out: &mut Vec<u8>, properties: &Properties<'_>) {
    let flags = u16::from(properties.content_type.is_some()) << 15
        | u16::from(!properties.headers.is_empty()) << 13
        | u16::from(properties.correlation_id.is_some()) << 10
        | u16::from(properties.reply_to.is_some()) << 9
        | u16::from(properties.expiration.is_some()) << 8;
    put_u16(out, flags);
    if let Some(content_type) = properties.content_type {
        put_short_string(out, content_type);
    }
    if !properties.headers.is_empty() {
        let headers = properties.headers.iter();
        put_table(out, headers.map(|(name, value)| (&**name, &**value)));
    }
    let rest = [
        properties.correlation_id,
        properties.reply_to,
        properties.expiration,
    ];
    for value in rest.into_iter().flatten() {
        put_short_string(out, value);
    }
}

/// Appends a field table of texts.
fn put_table<'a>(out: &mut Vec<u8>, fields: impl Iterator<Item = (&'a str, &'a str)>) {
    put_sized(out, |out| {
        for (name, value) in fields {
            put_short_string(out, name.as_bytes());
            out.push(b'S'); // a long string
            put_sized(out, |out| out.extend_from_slice(value.as_bytes()));
        }
    });
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// # Panics
///
/// If `value` is longer than its length octet can say; callers check what comes from outside.
fn put_short_string(out: &mut Vec<u8>, value: &[u8]) {
    out.push(u8::try_from(value.len()).expect("an AMQP short string has at most 255 bytes"));
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, parse_frame};
    use amq_protocol::protocol::AMQPClass;
    use amq_protocol::protocol::basic::AMQPMethod;
    use amq_protocol::types::{AMQPValue, FieldTable};
    use proptest::prelude::*;

    /// Reads frames back with the parser that amiquip uses.
    fn parse_all(mut bytes: &[u8]) -> Vec<AMQPFrame> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).expect("a well-formed frame");
            frames.push(frame);
            bytes = rest;
        }
        frames
    }

    fn content_header(frame: &AMQPFrame) -> &AMQPContentHeader {
        match frame {
            AMQPFrame::Header(_, _, header) => header,
            other => panic!("not a content header: {other:?}"),
        }
    }

    proptest! {
        #[test]
        fn a_publish_reads_back(
            channel: u16,
            key in "[a-z]{0,255}",
            mandatory: bool,
            content_type in proptest::option::of("[a-z/]{0,40}"),
            headers in proptest::collection::btree_map("[a-z-]{1,20}", "\\PC{0,40}", 0..4),
            correlation_id in proptest::option::of("[0-9a-f]{0,255}"),
            reply_to in proptest::option::of("[a-z.]{0,255}"),
            expiration in proptest::option::of("[0-9]{1,9}"),
            body in proptest::collection::vec(any::<u8>(), 0..10_000),
            frame_max in FRAME_MIN..=12_000,
        ) {
            let headers: Vec<_> = headers.into_iter().collect();
            let content: Arc<dyn Content> = Arc::new(body.clone());
            let message = Publish {
                routing_key: key.as_bytes(),
                mandatory,
                properties: Properties {
                    content_type: content_type.as_ref().map(String::as_bytes),
                    headers: &headers,
                    correlation_id: correlation_id.as_ref().map(String::as_bytes),
                    reply_to: reply_to.as_ref().map(String::as_bytes),
                    expiration: expiration.as_ref().map(String::as_bytes),
                },
                content: &content,
            };
            let mut out = Vec::new();
            put_publish(&mut out, channel, &message);
            put_body(&mut out, channel, frame_max, &body);
            let frames = parse_all(&out);
            let AMQPFrame::Method(c, AMQPClass::Basic(AMQPMethod::Publish(publish))) = &frames[0] else {
                panic!("not a publish: {:?}", frames[0]);
            };
            prop_assert_eq!(*c, channel);
            prop_assert_eq!(&publish.exchange, "");
            prop_assert_eq!(&publish.routing_key, &key);
            prop_assert_eq!(publish.mandatory, mandatory);
            prop_assert!(!publish.immediate);
            let read = content_header(&frames[1]);
            prop_assert_eq!(read.body_size, body.len() as u64);
            prop_assert_eq!(read.properties.content_type(), &content_type);
            prop_assert_eq!(read.properties.correlation_id(), &correlation_id);
            prop_assert_eq!(read.properties.reply_to(), &reply_to);
            prop_assert_eq!(read.properties.expiration(), &expiration);
            let headers: FieldTable = headers
                .into_iter()
                .map(|(name, value)| (name, AMQPValue::LongString(value)))
                .collect();
            prop_assert_eq!(
                read.properties.headers(),
                &Some(headers).filter(|headers| !headers.is_empty())
            );
            let mut content = Vec::new();
            for frame in &frames[2..] {
                let AMQPFrame::Body(_, bytes) = frame else { panic!("not a body: {frame:?}") };
                prop_assert!(bytes.len() + OVERHEAD <= frame_max);
                content.extend_from_slice(bytes);
            }
            prop_assert_eq!(content, body);
        }
    }

    #[test]
    fn what_a_consumer_says_reads_back() {
        let mut out = Vec::new();
        put_ack(&mut out, 7, u64::MAX);
        put_requeue(&mut out, 7, 3);
        put_qos(&mut out, 7, 16);
        put_consume(&mut out, 7, b"rpc_queue", true);
        put_cancel(&mut out, 7);
        let frames = parse_all(&out);
        let [
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Ack(ack))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Nack(nack))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Qos(qos))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Consume(consume))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Cancel(cancel))),
        ] = &frames[..]
        else {
            panic!("unexpected frames: {frames:?}");
        };
        assert_eq!((ack.delivery_tag, ack.multiple), (u64::MAX, false));
        assert_eq!(
            (nack.delivery_tag, nack.multiple, nack.requeue),
            (3, false, true)
        );
        assert_eq!(
            (qos.prefetch_size, qos.prefetch_count, qos.global),
            (0, 16, false)
        );
        assert_eq!(consume.queue, "rpc_queue");
        // The parser loses flags with a hyphen in their names, so no-ack is looked for by hand.
        let mut consume_frame = Vec::new();
        put_consume(&mut consume_frame, 7, b"rpc_queue", true);
        let flags = consume_frame[consume_frame.len() - 1 - 4 - 1];
        assert_eq!(flags, 0b0010);
        assert!(!consume.exclusive && !consume.nowait && !consume.no_local);
        assert_eq!(consume.consumer_tag, cancel.consumer_tag);
        assert!(!cancel.nowait);
    }
}
