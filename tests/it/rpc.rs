//! The tutorial's system, and a server that survives its callers.

use crate::fib;
use crate::support::{
    Message, PATIENCE, Peer, Process, RawPeer, client, eventually, fibrpc, local, long_string, run,
    server, short_string, swallow, unique, url,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable, QueueDeclareOptions, QueueDeleteOptions};
use crossbeam_channel::bounded;
use fibrpc::{Error, RemoteError};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

fn with_id(id: &str) -> AmqpProperties {
    AmqpProperties::default().with_correlation_id(id.to_owned())
}

fn kind(message: &Message) -> Option<String> {
    match message.properties.headers().as_ref()?.get("x-error-kind")? {
        AmqpValue::LongString(kind) => Some(kind.clone()),
        other => panic!("x-error-kind is {other:?}"),
    }
}

#[test]
fn a_call_is_answered_as_the_tutorial_prints_it() {
    let queue = unique("tutorial");
    let server = server(&url(), &queue, &["--workers", "4"]);
    let call = run(fibrpc(&url(), &queue).args(["call", "30"]));
    assert_eq!(call.stdout, " [x] Requesting fib(30)\n [.] Got 832040\n");
    assert_eq!((call.code(), call.stderr.as_str()), (Some(0), ""));
    assert_eq!(server.line(), " [.] fib(30)");
}

#[test]
fn a_reply_carries_the_correlation_id_verbatim_and_is_text() {
    let queue = unique("verbatim");
    let _server = server(&url(), &queue, &["--quiet"]);
    let peer = Peer::connect(&url());
    for id in ["1", "", "not hex, ünïcode", &"x".repeat(255)] {
        let reply = peer.ask(&queue, b"10", with_id(id));
        assert_eq!(reply.body, b"55");
        assert_eq!(reply.properties.correlation_id().as_deref(), Some(id));
        assert_eq!(
            reply.properties.content_type().as_deref(),
            Some("text/plain")
        );
        assert_eq!(kind(&reply), None);
    }
    let by_message_id = AmqpProperties::default().with_message_id("m-1".to_owned());
    let reply = peer.ask(&queue, b"10", by_message_id);
    assert_eq!(reply.properties.correlation_id().as_deref(), Some("m-1"));
    let reply = peer.ask(&queue, b"10", AmqpProperties::default());
    assert_eq!(reply.properties.correlation_id(), &None);
}

#[test]
fn a_request_says_what_the_contract_says() {
    let queue = unique("request");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, Duration::from_secs(20));
    let caller = thread::spawn(move || client.call(b"30"));
    let request = peer.receive(&queue);
    assert_eq!(request.body, b"30");
    let properties = &request.properties;
    assert_eq!(properties.content_type().as_deref(), Some("text/plain"));
    assert_eq!(properties.correlation_id().as_ref().unwrap().len(), 32);
    let expiration: u64 = properties.expiration().as_ref().unwrap().parse().unwrap();
    assert!((10_000..=20_000).contains(&expiration), "{expiration}");
    let callback = properties.reply_to().clone().unwrap();
    assert!(
        callback.starts_with("amq.gen-"),
        "named by the broker: {callback}"
    );
    let id = properties.correlation_id().clone().unwrap();
    // A reply that nobody waits for is dropped; the right one is still found.
    peer.publish(&callback, b"1", with_id("unknown"));
    peer.publish(&callback, b"2", AmqpProperties::default());
    peer.publish(&callback, b"3", with_id(&"f".repeat(32)));
    peer.publish(&callback, b"832040", with_id(&id));
    peer.publish(&callback, b"4", with_id(&id));
    assert_eq!(caller.join().unwrap().unwrap(), b"832040");
}

#[test]
fn all_calls_of_a_client_share_one_callback_queue_and_have_ids_of_their_own() {
    let queue = unique("callback");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, Duration::from_secs(1));
    let callers: Vec<_> = (0..5)
        .map(|_| {
            let client = client.clone();
            thread::spawn(move || client.call(b"1"))
        })
        .collect();
    let requests: Vec<_> = (0..5).map(|_| peer.receive(&queue)).collect();
    let mut callbacks: Vec<_> = requests
        .iter()
        .map(|r| r.properties.reply_to().clone())
        .collect();
    callbacks.dedup();
    assert_eq!(callbacks.len(), 1);
    let mut ids: Vec<_> = requests
        .iter()
        .map(|r| r.properties.correlation_id().clone())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 5);
    for caller in callers {
        assert!(matches!(caller.join().unwrap(), Err(Error::Timeout { .. })));
    }
}

#[test]
fn a_thousand_pipelined_calls_come_back_in_order() {
    let queue = unique("order");
    let _server = server(
        &url(),
        &queue,
        &["--quiet", "--workers", "4", "--algorithm", "fast"],
    );
    let numbers: Vec<String> = (0..1000).map(|i| (i % 187).to_string()).collect();
    let call = run(fibrpc(&url(), &queue)
        .args(["call", "--output", "raw"])
        .args(&numbers));
    assert_eq!(call.code(), Some(0), "{}", call.stderr);
    let expected: String = (0..1000)
        .map(|i| format!("{}\n", fib::fast(i % 187).unwrap()))
        .collect();
    assert_eq!(call.stdout, expected);
}

#[test]
fn many_threads_share_one_client_and_one_connection() {
    let queue = unique("threads");
    let _server = server(
        &url(),
        &queue,
        &["--quiet", "--workers", "2", "--algorithm", "fast"],
    );
    let client = client(&url(), &queue, PATIENCE);
    thread::scope(|scope| {
        for thread in 0..8 {
            let client = &client;
            scope.spawn(move || {
                for i in 0..200_u32 {
                    let n = (thread * 23 + i) % 187;
                    let answer = client.call(n.to_string().as_bytes()).unwrap();
                    assert_eq!(answer, fib::fast(n).unwrap().to_string().as_bytes());
                }
            });
        }
    });
    assert_eq!(client.stats().connections, 1);
    assert_eq!(client.stats().dropped_replies, 0);
}

#[test]
fn direct_reply_to_works_too() {
    let queue = unique("direct");
    let _server = server(&url(), &queue, &["--quiet"]);
    let call = run(fibrpc(&url(), &queue).args([
        "call",
        "--reply-to",
        "direct",
        "--output",
        "raw",
        "20",
        "21",
    ]));
    assert_eq!(
        (call.code(), call.stdout.as_str()),
        (Some(0), "6765\n10946\n"),
        "{}",
        call.stderr
    );
}

#[test]
fn several_servers_share_the_load() {
    let queue = unique("share");
    let servers = [
        server(&url(), &queue, &["--workers", "1"]),
        server(&url(), &queue, &["--workers", "1"]),
    ];
    let numbers = vec!["25"; 40];
    let call = run(fibrpc(&url(), &queue)
        .args(["call", "--output", "raw"])
        .args(&numbers));
    assert_eq!(call.code(), Some(0), "{}", call.stderr);
    for server in servers {
        server.signal("TERM");
        let mut server = server;
        server.wait(PATIENCE);
        let lines = server.output().0.lines().count();
        assert!((5..=35).contains(&lines), "one server had {lines} of 40");
    }
}

#[test]
fn what_a_killed_server_had_not_acknowledged_is_delivered_again() {
    let queue = unique("redelivery");
    let first = server(&url(), &queue, &["--workers", "1"]);
    let url = url();
    let call = Process::spawn(fibrpc(&url, &queue).args(["call", "--output", "raw", "40"]));
    first.wait_for(" [.] fib(40)");
    first.signal("KILL");
    let second = server(&url, &queue, &["--workers", "1"]);
    second.wait_for(" [.] fib(40)");
    assert_eq!(call.line(), "102334155");
}

#[test]
fn a_request_is_acknowledged_only_after_its_reply() {
    let queue = unique("ack");
    let (go, wait) = bounded::<()>(0);
    let server = local(
        &queue,
        |server| server.workers(1),
        move |request| {
            let _ = wait.recv();
            Ok(request.body().to_vec())
        },
    );
    let peer = Peer::connect(&url());
    let callback = peer.callback_queue();
    peer.publish(&queue, b"1", with_id("1").with_reply_to(callback.clone()));
    peer.publish(&queue, b"2", with_id("2").with_reply_to(callback.clone()));
    // One is being executed and unacknowledged, so with prefetch 1 the other stays ready.
    eventually("one request is delivered", || peer.count(&queue) == (1, 1));
    assert!(peer.is_empty(&callback));
    drop(go);
    peer.receive(&callback);
    peer.receive(&callback);
    let stats = server.stop().unwrap();
    assert_eq!(
        (stats.answered, stats.refused, stats.unanswerable),
        (2, 0, 0)
    );
    assert_eq!(peer.count(&queue), (0, 0), "both were acknowledged");
}

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

#[test]
fn without_a_request_queue_a_call_ends_at_once_with_no_server() {
    let queue = unique("no-queue");
    let call = run(fibrpc(&url(), &queue).args(["call", "--timeout", "20s", "30"]));
    assert_eq!(call.code(), Some(5), "{}", call.stderr);
    assert!(call.stderr.contains(&queue), "{}", call.stderr);
    assert!(
        call.took < Duration::from_secs(10),
        "it did not wait for the timeout: {:?}",
        call.took
    );
}

#[test]
fn with_a_queue_and_no_consumer_a_call_waits_and_says_so() {
    let queue = unique("no-consumer");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let call = run(fibrpc(&url(), &queue).args(["call", "--timeout", "1s", "30"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("nobody consumes"), "{}", call.stderr);
    assert!(call.took >= Duration::from_secs(1));
    eventually("the broker has dropped the expired request", || {
        peer.count(&queue).0 == 0
    });
}

#[test]
fn a_timeout_says_how_many_consume_and_wait() {
    let queue = unique("busy");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    // Requests of somebody else's, waiting before ours, and a server that answers nobody.
    let _busy = local(
        &queue,
        |server| server.workers(1),
        |_| {
            thread::sleep(Duration::from_secs(3));
            Ok(b"late".to_vec())
        },
    );
    for _ in 0..4 {
        peer.publish(
            &queue,
            b"1",
            with_id("1").with_reply_to("nobody".to_owned()),
        );
    }
    eventually("one is taken", || peer.count(&queue).0 == 3);
    let call = run(fibrpc(&url(), &queue).args(["call", "--timeout", "1s", "30"]));
    assert_eq!(call.code(), Some(4));
    assert!(
        call.stderr.contains("1 consumer and 4 requests waiting"),
        "{}",
        call.stderr
    );
}

#[test]
fn a_timeout_tells_of_replies_that_belong_to_no_call() {
    let peer = Peer::connect(&url());
    let queue = unique("strangers");
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, Duration::from_secs(2));
    let call = thread::spawn(move || client.call("1"));
    // A server that forgets the correlation id.
    let request = peer.receive(&queue);
    let reply_to = request.properties.reply_to().clone().unwrap();
    for _ in 0..2 {
        peer.publish(&reply_to, b"1", AmqpProperties::default());
    }
    let said = call.join().unwrap().unwrap_err().to_string();
    assert!(
        said.contains("2 replies came that belong to no call"),
        "{said}"
    );
}

#[test]
fn a_stream_is_refused_and_any_other_queue_served() {
    let peer = Peer::connect(&url());
    let queue = unique("stream");
    let mut arguments = FieldTable::new();
    let stream = AmqpValue::LongString("stream".to_owned());
    arguments.insert("x-queue-type".to_owned(), stream);
    let options = QueueDeclareOptions {
        durable: true,
        arguments,
        ..QueueDeclareOptions::default()
    };
    peer.channel.queue_declare(&*queue, options).unwrap();
    let refused = run(fibrpc(&url(), &queue).arg("server"));
    assert_eq!(refused.code(), Some(6), "{}", refused.stderr);
    assert!(refused.stderr.contains("is a stream"), "{}", refused.stderr);
    peer.channel
        .queue_delete(&*queue, QueueDeleteOptions::default())
        .unwrap();
}

#[test]
fn a_server_uses_the_queue_that_is_there_whatever_its_type() {
    for (name, options) in [
        (
            "durable",
            QueueDeclareOptions {
                durable: true,
                ..Default::default()
            },
        ),
        (
            "auto-delete",
            QueueDeclareOptions {
                auto_delete: true,
                ..Default::default()
            },
        ),
        (
            "limited",
            QueueDeclareOptions {
                arguments: FieldTable::from([("x-max-length".to_owned(), AmqpValue::LongInt(100))]),
                ..Default::default()
            },
        ),
    ] {
        let queue = unique(name);
        let peer = Peer::connect(&url());
        peer.channel.queue_declare(&*queue, options).unwrap();
        let _server = server(&url(), &queue, &["--quiet", "--queue-type", "transient"]);
        assert_eq!(peer.ask(&queue, b"10", with_id("1")).body, b"55", "{name}");
    }
}

#[test]
fn a_server_declares_the_queue_type_it_is_told() {
    let peer = Peer::connect(&url());
    for (kind, durable, arguments) in [
        ("transient", false, FieldTable::new()),
        ("classic", true, FieldTable::new()),
        (
            "quorum",
            true,
            FieldTable::from([(
                "x-queue-type".to_owned(),
                AmqpValue::LongString("quorum".to_owned()),
            )]),
        ),
    ] {
        let queue = unique(kind);
        let server = server(&url(), &queue, &["--quiet", "--queue-type", kind]);
        assert_eq!(peer.ask(&queue, b"10", with_id("1")).body, b"55", "{kind}");
        // Declaring it in the same way is allowed, in any other it would be an error.
        let options = QueueDeclareOptions {
            durable,
            arguments,
            ..Default::default()
        };
        let declared = peer.channel.queue_declare(&*queue, options);
        assert!(declared.is_ok(), "{kind}: {:?}", declared.err());
        drop(server);
        peer.channel
            .queue_delete(&*queue, QueueDeleteOptions::default())
            .unwrap();
    }
}

#[test]
fn the_library_serves_bodies_of_any_size() {
    let queue = unique("sizes");
    let largest = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&largest);
    let _server = local(
        &queue,
        |server| server,
        move |request| {
            seen.fetch_max(request.body().len(), Ordering::Relaxed);
            Ok(request.body().iter().rev().copied().collect::<Vec<u8>>())
        },
    );
    let client = client(&url(), &queue, PATIENCE);
    for size in [1, 4087, 4088, 4089, 131_064, 131_073, 1 << 20, 16 << 20] {
        let request: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let expected: Vec<u8> = request.iter().rev().copied().collect();
        assert!(client.call(&*request).unwrap() == expected, "{size} bytes");
    }
    assert_eq!(largest.load(Ordering::Relaxed), 16 << 20);
}

#[test]
fn a_stopped_server_gives_back_what_it_has_not_begun() {
    let queue = unique("give-back");
    let (go, wait) = bounded::<()>(0);
    let (began, begun) = bounded(100);
    let server = local(
        &queue,
        |server| server.workers(1).prefetch(10),
        move |request| {
            let _ = began.send(());
            let _ = wait.recv();
            Ok(request.body().to_vec())
        },
    );
    let peer = Peer::connect(&url());
    let callback = peer.callback_queue();
    for _ in 0..5 {
        peer.publish(&queue, b"1", with_id("1").with_reply_to(callback.clone()));
    }
    begun.recv_timeout(PATIENCE).unwrap();
    eventually("all are prefetched", || peer.count(&queue).0 == 0);
    let stopped = thread::spawn(move || server.stop());
    // At once: while the worker is still busy with the one it has begun.
    eventually("four are back in the queue", || {
        peer.count(&queue) == (4, 0)
    });
    assert!(peer.is_empty(&callback));
    drop(go);
    assert_eq!(stopped.join().unwrap().unwrap().answered, 1);
    assert_eq!(peer.receive(&callback).body, b"1");
    assert_eq!(peer.count(&queue).0, 4, "nothing lost, nothing twice");
}

#[test]
fn a_handler_longer_than_the_drain_timeout_is_abandoned_and_its_request_delivered_again() {
    let queue = unique("abandon");
    let (began, begun) = bounded(100);
    let server = local(
        &queue,
        |server| server.workers(2).drain_timeout(Duration::from_millis(300)),
        move |request| {
            let _ = began.send(());
            thread::sleep(Duration::from_secs(60));
            Ok(request.body().to_vec())
        },
    );
    let peer = Peer::connect(&url());
    peer.publish(
        &queue,
        b"1",
        with_id("1").with_reply_to("nobody".to_owned()),
    );
    begun.recv_timeout(PATIENCE).unwrap();
    match server.stop() {
        Err(Error::DrainTimeout { workers: 1, .. }) => {}
        other => panic!("expected one abandoned worker, got {other:?}"),
    }
    let again = peer.receive(&queue);
    assert!(again.redelivered);
}

#[test]
fn requests_of_a_server_that_died_unacknowledged_come_back() {
    let queue = unique("swallow");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, PATIENCE);
    let caller = thread::spawn(move || client.call(b"10"));
    let dying = Peer::connect(&url());
    swallow(&dying, &queue, 1);
    drop(dying);
    let _server = server(&url(), &queue, &["--quiet"]);
    assert_eq!(caller.join().unwrap().unwrap(), b"55");
}
