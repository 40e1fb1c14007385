//! What a server does with queue and requests: shares, acknowledges, declares, gives back.

use super::with_id;
use crate::support::{
    PATIENCE, Peer, Slow, client, eventually, fibrpc, local, run, server, swallow, unique, url,
};
use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions, QueueDeleteOptions};
use crossbeam_channel::bounded;
use fibrpc::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

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
    let slow = Slow::new();
    let first = slow.server(&url(), &queue, &["--workers", "1"]);
    let client = client(&url(), &queue, 2 * PATIENCE);
    let begun = slow.begin(&client);
    first.signal("KILL");
    let _second = slow.server(&url(), &queue, &["--workers", "1"]);
    slow.wait_until_begun();
    slow.release();
    assert_eq!(begun.join().unwrap().unwrap(), b"slow");
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
