//! Requests and replies that are not as they should be: malformed, unanswerable, hostile.

use super::{kind, with_id};
use crate::support::{
    PATIENCE, Peer, Process, RawPeer, client, fibrpc, local, long_string, server, short_string,
    unique, url,
};
use amiquip::{AmqpValue, QueueDeclareOptions};
use fibrpc::{Error, RemoteError};

#[test]
fn bad_requests_are_answered_with_their_kind_and_the_next_is_served() {
    let queue = unique("bad");
    let _server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    let huge = vec![b'9'; 1 << 20];
    for (body, expected) in [
        (&b""[..], "invalid-argument"),
        (b"abc", "invalid-argument"),
        (b"3.5", "invalid-argument"),
        (b" 30", "invalid-argument"),
        (&[0xff, 0xfe, 0x00], "invalid-argument"),
        (&huge, "invalid-argument"),
        (b"-1", "out-of-range"),
        (b"46", "out-of-range"),
        (
            b"99999999999999999999999999999999999999999999",
            "out-of-range",
        ),
    ] {
        let reply = peer.ask(&queue, body, with_id("bad"));
        assert_eq!(
            kind(&reply).as_deref(),
            Some(expected),
            "{:?}",
            &body[..body.len().min(20)]
        );
        assert_eq!(reply.properties.correlation_id().as_deref(), Some("bad"));
        let sentence = String::from_utf8(reply.body).unwrap();
        assert!(!sentence.is_empty() && sentence.len() < 300, "{sentence}");
        assert_eq!(peer.ask(&queue, b"10", with_id("good")).body, b"55");
    }
}

#[test]
fn a_request_that_was_to_be_delivered_at_once_or_not_at_all_is_executed() {
    let queue = unique("at-once");
    let _server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    let at_once = with_id("1").with_expiration("0".to_owned());
    assert_eq!(peer.ask(&queue, b"10", at_once).body, b"55");
}

#[test]
fn a_request_without_reply_to_is_acked_and_logged() {
    let queue = unique("no-reply-to");
    let server = server(&url(), &queue, &["--workers", "1"]);
    let peer = Peer::connect(&url());
    peer.publish(&queue, b"10", with_id("1"));
    peer.publish(&queue, b"10", with_id("1").with_reply_to(String::new()));
    server.wait_for_stderr("without reply_to");
    server.wait_for_stderr("without reply_to");
    assert_eq!(peer.ask(&queue, b"10", with_id("2")).body, b"55");
    server.signal("TERM");
    let mut server = server;
    assert!(server.wait(PATIENCE).success());
    assert_eq!(peer.count(&queue), (0, 0), "nothing was put back");
}

#[test]
fn a_reply_to_that_no_longer_exists_harms_nobody() {
    let queue = unique("gone");
    let _server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    for gone in [
        "no.such.queue",
        "amq.rabbitmq.reply-to.bogus",
        "amq.gen-gone",
        &"x".repeat(255),
    ] {
        peer.publish(&queue, b"10", with_id("1").with_reply_to(gone.to_owned()));
        assert_eq!(
            peer.ask(&queue, b"10", with_id("2")).body,
            b"55",
            "after {gone}"
        );
    }
}

#[test]
fn a_header_table_nested_20000_deep_does_not_abort_the_server() {
    let queue = unique("nested");
    let mut server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    let callback = peer.callback_queue();
    // Each level is an empty key, 'F' for a table, and the length of the rest.
    const LEVELS: u32 = 20_000;
    let mut properties = (LEVELS * 6).to_be_bytes().to_vec();
    for level in 1..=LEVELS {
        properties.extend([0, b'F']);
        properties.extend(((LEVELS - level) * 6).to_be_bytes());
    }
    properties.extend(short_string(callback.as_bytes()));
    const HEADERS_AND_REPLY_TO: u16 = 1 << 13 | 1 << 9;
    let mut raw = RawPeer::connect(&url());
    raw.publish(&queue, HEADERS_AND_REPLY_TO, &properties, b"10");
    raw.flush();
    assert_eq!(peer.receive(&callback).body, b"55");
    assert_eq!(peer.ask(&queue, b"20", with_id("flat")).body, b"6765");
    server.signal("TERM");
    assert!(
        server.wait(PATIENCE).success(),
        "the same process is still there"
    );
}

#[test]
fn a_correlation_id_that_is_no_text_comes_back_as_it_was() {
    let queue = unique("bytes");
    let _server = server(&url(), &queue, &["--workers", "1"]);
    let mut raw = RawPeer::connect(&url());
    let callback = raw.declare_bounded_queue();
    let id = [0xff, 0x00, 0x80, b'\'', 0xc3];
    let properties = [short_string(&id), short_string(callback.as_bytes())].concat();
    raw.publish(&queue, 1 << 10 | 1 << 9, &properties, b"30");
    let header = raw.get_header(&callback);
    // Behind class, weight and body size: the flags, content type and correlation id.
    let flags_and_properties = &header[12..];
    let expected = [
        &[0x84, 0][..],
        &short_string(b"text/plain"),
        &short_string(&id),
    ]
    .concat();
    assert!(
        flags_and_properties.starts_with(&expected),
        "{flags_and_properties:?}"
    );
}

#[test]
fn properties_that_are_not_utf8_do_not_keep_a_request_from_its_answer() {
    let queue = unique("not-utf8");
    let _server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    let mut raw = RawPeer::connect(&url());
    let callback = peer.callback_queue();
    let reply_to = short_string(callback.as_bytes());
    let bad = short_string(&[0xff, 0xfe, 0x80, b'x']);
    const CONTENT_TYPE: u16 = 1 << 15;
    const HEADERS: u16 = 1 << 13;
    const CORRELATION_ID: u16 = 1 << 10;
    const REPLY_TO: u16 = 1 << 9;
    let bad_headers = long_string(&[&bad[..], b"S", &long_string(&[0xff; 9])].concat());
    for (flags, properties) in [
        (CONTENT_TYPE | REPLY_TO, [&bad[..], &reply_to].concat()),
        (CORRELATION_ID | REPLY_TO, [&bad[..], &reply_to].concat()),
        (HEADERS | REPLY_TO, [&bad_headers[..], &reply_to].concat()),
        (
            CONTENT_TYPE | HEADERS | REPLY_TO,
            [&bad[..], &bad_headers, &reply_to].concat(),
        ),
    ] {
        raw.publish(&queue, flags, &properties, b"10");
        raw.flush();
        assert_eq!(peer.receive(&callback).body, b"55", "flags {flags:#x}");
    }
    // To a queue that is not there, as far as we can read its name: no answer, no harm.
    raw.publish(&queue, REPLY_TO, &bad, b"10");
    raw.flush();
    assert_eq!(peer.ask(&queue, b"20", with_id("next")).body, b"6765");
}

#[test]
fn a_request_whose_headers_the_broker_has_made_longer_than_a_frame_is_answered() {
    let queue = unique("long-headers");
    let _server = server(&url(), &queue, &["--quiet", "--workers", "1"]);
    let peer = Peer::connect(&url());
    // What comes here goes on to the server, with a header that says so.
    let text = |text: &str| AmqpValue::LongString(text.to_owned());
    let arguments = [
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(&queue)),
        ("x-message-ttl", AmqpValue::LongInt(0)),
    ];
    let options = QueueDeclareOptions {
        exclusive: true,
        arguments: arguments
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        ..QueueDeclareOptions::default()
    };
    let first = unique("dead-letters");
    peer.channel.queue_declare(&*first, options).unwrap();
    let callback = peer.callback_queue();
    let reply_to = short_string(callback.as_bytes());
    const HEADERS: u16 = 1 << 13;
    const REPLY_TO: u16 = 1 << 9;
    // As long a content header as the broker takes, with all that is around the text.
    let around = 8 + 14 + 4 + 2 + 1 + 4 + reply_to.len();
    let filling = long_string(&vec![b'x'; (128 << 10) - around]);
    let headers = long_string(&[&b"\x01hS"[..], &filling].concat());
    let mut raw = RawPeer::connect(&url());
    raw.publish(
        &first,
        HEADERS | REPLY_TO,
        &[&headers[..], &reply_to].concat(),
        b"10",
    );
    raw.flush();
    assert_eq!(peer.receive(&callback).body, b"55");
}

#[test]
fn a_handler_that_panics_answers_internal_and_the_next_is_served() {
    let queue = unique("panic");
    let server = local(
        &queue,
        |server| server.workers(1),
        |request| match request.body() {
            b"panic" => panic!("deliberate, in a test"),
            _ => Ok(request.body().to_vec()),
        },
    );
    let client = client(&url(), &queue, PATIENCE);
    match client.call(b"panic") {
        Err(Error::Remote(error)) => {
            assert_eq!(error.kind(), RemoteError::INTERNAL);
            assert!(error.message().contains("deliberate"), "{error}");
        }
        other => panic!("expected an internal error, got {other:?}"),
    }
    assert_eq!(client.call(b"fine").unwrap(), b"fine");
    let stats = server.stop().unwrap();
    assert_eq!((stats.answered, stats.refused), (1, 1));
}

#[test]
fn an_error_reply_in_the_manner_of_other_ports_is_a_remote_error() {
    let queue = unique("foreign-error");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let call = Process::spawn(fibrpc(&url(), &queue).args(["call", "30"]));
    let request = peer.receive(&queue);
    let callback = request.properties.reply_to().clone().unwrap();
    peer.publish(
        &callback,
        b"",
        with_id(request.properties.correlation_id().as_ref().unwrap()),
    );
    let mut call = call;
    assert_eq!(call.wait(PATIENCE).code(), Some(3));
    assert!(call.output().1.contains("empty"));
}
