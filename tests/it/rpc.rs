//! The tutorial's system, and a server that survives its callers.

mod odd;
mod serving;

use crate::fib;
use crate::support::{
    Message, PATIENCE, Peer, client, eventually, fibrpc, local, run, server, unique, url,
};
use amiquip::{AmqpProperties, AmqpValue, QueueDeclareOptions};
use crossbeam_channel::bounded;
use fibrpc::Error;
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
fn without_a_request_queue_a_call_ends_at_once_with_no_server() {
    let queue = unique("no-queue");
    let call = run(fibrpc(&url(), &queue).args(["call", "--timeout", "20s", "30"]));
    assert_eq!(call.code(), Some(5), "{}", call.stderr);
    assert!(call.stderr.contains(&queue), "{}", call.stderr);
    assert!(
        call.took < PATIENCE,
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
    let (done, is_done) = bounded::<()>(0);
    let _busy = local(
        &queue,
        |server| server.workers(1),
        move |_| {
            let _ = is_done.recv_timeout(2 * PATIENCE);
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
    drop(done);
}

#[test]
fn a_timeout_tells_of_replies_that_belong_to_no_call() {
    let peer = Peer::connect(&url());
    let queue = unique("strangers");
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, Duration::from_secs(6));
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
