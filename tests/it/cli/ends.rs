//! How a command ends: its exit code, without a broker, with a wrong one, and by a signal.

use super::with_password;
use crate::support::{
    PATIENCE, Peer, Process, Slow, client, eventually, fibrpc, run, server, unique, url,
};
use amiquip::QueueDeclareOptions;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

#[test]
fn several_urls_are_tried_in_turn() {
    let queue = unique("turn");
    let both = format!("amqp://127.0.0.1:1,{}", url());
    let _server = server(&both, &queue, &["--quiet"]);
    let call = run(fibrpc(&both, &queue).args(["call", "--output", "raw", "10"]));
    assert_eq!(call.stdout, "55\n", "{}", call.stderr);
}

#[test]
fn the_exit_code_is_that_of_the_first_failure_and_6_without_a_broker() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap().to_string();
    drop(closed);
    let call = run(fibrpc(&format!("amqp://u:hunter2@{address}"), "q").args(["call", "1", "2"]));
    assert_eq!(call.code(), Some(6));
    assert!(
        call.stderr.contains(&address) && call.stderr.contains("hint"),
        "{}",
        call.stderr
    );
    assert!(!call.stderr.contains("hunter2"), "{}", call.stderr);
}

#[test]
fn a_name_that_does_not_resolve_ends_with_6() {
    let call = run(fibrpc("amqp://no-such-host.invalid", "q").args(["call", "1"]));
    assert_eq!(call.code(), Some(6));
    assert!(
        call.stderr.contains("no-such-host.invalid"),
        "{}",
        call.stderr
    );
}

#[test]
fn wrong_credentials_and_a_wrong_vhost_end_with_6() {
    let call = run(fibrpc(&with_password("hunter2"), "q").args(["call", "1"]));
    assert_eq!(call.code(), Some(6), "{}", call.stderr);
    assert!(
        call.stderr.contains("refused the user 'guest'"),
        "{}",
        call.stderr
    );
    assert!(!call.stderr.contains("hunter2"), "{}", call.stderr);
    let mut nowhere = url::Url::parse(&url()).unwrap();
    nowhere.set_path("/no-such-vhost");
    let call = run(fibrpc(nowhere.as_str(), "q").args(["call", "1"]));
    assert_eq!(call.code(), Some(6), "{}", call.stderr);
    assert!(call.stderr.contains("no-such-vhost"), "{}", call.stderr);
}

#[test]
fn the_timeout_covers_a_broker_that_accepts_and_never_speaks() {
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}", mute.local_addr().unwrap());
    let call = run(fibrpc(&url, "q").args(["call", "--timeout", "1s", "1", "2", "3"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("still connecting"), "{}", call.stderr);
    assert!(call.took < PATIENCE, "all three at once: {:?}", call.took);
}

#[test]
fn a_port_that_speaks_something_else_is_told_at_once() {
    for (answer, shown) in [
        (&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], "HTTP/1.1 400"),
        // A port for TLS, and a broker of another version.
        (b"\x15\x03\x01\x00\x02\x02\x46", "not AMQP 0-9-1"),
        (b"AMQP\x03\x01\x00\x00", "not AMQP 0-9-1"),
        // It closes, having said nothing.
        (b"", "AMQP handshake"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("amqp://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            if !answer.is_empty() {
                peer.read_exact(&mut [0; 8]).unwrap();
                peer.write_all(answer).unwrap();
                // Does not close.
                let _ = peer.read_to_end(&mut Vec::new());
            }
        });
        let call = run(fibrpc(&url, "q").args(["call", "1"]));
        assert_eq!(call.code(), Some(6), "{shown}: {}", call.stderr);
        assert!(call.stderr.contains(shown), "{shown}: {}", call.stderr);
        assert!(call.stderr.contains("amqps://"), "{shown}: {}", call.stderr);
    }
}

#[test]
fn an_interrupted_call_ends_with_130_and_says_so() {
    let queue = unique("interrupted");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    for name in ["INT", "TERM"] {
        let mut call = Process::spawn(fibrpc(&url(), &queue).args(["call", "30"]));
        assert_eq!(call.line(), " [x] Requesting fib(30)");
        let request = peer.receive(&queue);
        assert_eq!(request.body, b"30");
        call.signal(name);
        assert_eq!(call.wait(PATIENCE).code(), Some(130));
        let (_, stderr) = call.output();
        assert!(stderr.contains("interrupted"), "{stderr}");
    }
}

fn wait_until_nobody_consumes(queue: &str) {
    let peer = Peer::connect(&url());
    eventually("nobody consumes", || peer.count(queue).1 == 0);
}

#[test]
fn a_server_ends_with_0_when_told_to_and_with_130_when_told_twice() {
    let queue = unique("signals");
    for name in ["INT", "TERM"] {
        let mut idle = server(&url(), &queue, &["--workers", "2"]);
        idle.signal(name);
        assert_eq!(idle.wait(PATIENCE).code(), Some(0), "{name}");
    }
    let mut busy = server(&url(), &queue, &["--workers", "1", "--max-n", "60"]);
    let _call = Process::spawn(fibrpc(&url(), &queue).args(["call", "60"]));
    busy.wait_for(" [.] fib(60)");
    busy.signal("INT");
    // It has stopped consuming, and still computes, for hours.
    wait_until_nobody_consumes(&queue);
    busy.signal("INT");
    assert_eq!(busy.wait(PATIENCE).code(), Some(130));
}

#[test]
fn a_server_told_to_stop_answers_what_it_has_begun() {
    let queue = unique("finish");
    let slow = Slow::new();
    let mut busy = slow.server(&url(), &queue, &["--workers", "1"]);
    let client = client(&url(), &queue, 2 * PATIENCE);
    let begun = slow.begin(&client);
    busy.signal("TERM");
    wait_until_nobody_consumes(&queue);
    slow.release();
    assert_eq!(begun.join().unwrap().unwrap(), b"slow");
    assert_eq!(busy.wait(PATIENCE).code(), Some(0));
}

#[test]
fn a_drain_timeout_that_passes_is_told_by_the_exit_code() {
    let queue = unique("drain");
    let mut busy = server(
        &url(),
        &queue,
        &[
            "--workers",
            "1",
            "--drain-timeout",
            "200ms",
            "--max-n",
            "60",
        ],
    );
    let _call = Process::spawn(fibrpc(&url(), &queue).args(["call", "60"]));
    busy.wait_for(" [.] fib(60)");
    busy.signal("TERM");
    assert_eq!(busy.wait(PATIENCE).code(), Some(4));
    let (_, stderr) = busy.output();
    assert!(stderr.contains("drain timeout"), "{stderr}");
}
