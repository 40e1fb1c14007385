//! A broker that is there and says nothing, or reads nothing: it is stopped, or blocks.

use crate::support::{
    PATIENCE, Peer, PrivateBroker, Process, client, eventually, fibrpc, order, run, server, unique,
};
use amiquip::QueueDeclareOptions;
use fibrpc::{Error, WaitingFor};
use std::thread;
use std::time::{Duration, Instant};

/// A deadline that passes, and yet leaves a slow machine the time to connect and to be told that the
/// broker blocks.
const HURRY: Duration = Duration::from_secs(3);

#[test]
fn a_stopped_broker_holds_no_call_past_its_deadline_and_is_used_again_when_it_goes_on() {
    let broker = PrivateBroker::start();
    let queue = unique("stopped");
    let _server = server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, HURRY);
    assert_eq!(client.call(b"10").unwrap(), b"55");
    broker.freeze();
    // Connected already: the request is sent, and nothing comes.
    let began = Instant::now();
    match client.call(b"10") {
        Err(Error::Timeout {
            waiting_for: WaitingFor::SilentBroker { .. },
            ..
        }) => {}
        other => panic!("expected a timeout waiting for an answer, got {other:?}"),
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    // Not connected yet: the socket opens, and nothing is said on it.
    let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "1s", "10"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("still connecting"), "{}", call.stderr);
    assert!(call.took < PATIENCE, "{:?}", call.took);
    broker.thaw();
    eventually("the client is answered again", || {
        client.call(b"10").is_ok()
    });
}

#[test]
fn a_broker_that_falls_silent_is_given_up_after_two_heartbeats() {
    let broker = PrivateBroker::start();
    let queue = unique("silent");
    let url = format!("{}?heartbeat=2", broker.url);
    let server = server(&url, &queue, &["--workers", "1"]);
    let client = client(&url, &queue, 2 * PATIENCE);
    assert_eq!(client.call(b"10").unwrap(), b"55");
    broker.freeze();
    let pending = client.begin("11");
    let said = server.wait_for_stderr("lost the connection");
    assert!(said.contains("fallen silent"), "{said}");
    broker.thaw();
    assert_eq!(pending.join().unwrap().unwrap(), b"89");
}

#[test]
fn a_memory_alarm_is_named_by_the_timeout_and_over_when_it_is_over() {
    let broker = PrivateBroker::start();
    let queue = unique("alarm");
    let server = server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, HURRY);
    assert_eq!(client.call(b"10").unwrap(), b"55");
    broker.eval(&order::memory_alarm(true));
    let began = Instant::now();
    match client.call(b"10") {
        Err(Error::Timeout {
            waiting_for: WaitingFor::BlockedBroker { reason },
            ..
        }) => {
            assert!(reason.contains("memory"), "{reason}");
        }
        other => panic!("expected a timeout for a blocked broker, got {other:?}"),
    }
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    // A process that starts now connects, publishes, and is blocked; it must end in time, too.
    let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "5s", "10"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("blocked"), "{}", call.stderr);
    assert!(call.took < PATIENCE, "{:?}", call.took);
    broker.eval(&order::memory_alarm(false));
    eventually("the client is answered again", || {
        client.call(b"10").is_ok()
    });
    server.signal("TERM");
    let mut server = server;
    assert!(server.wait(PATIENCE).success());
}

#[test]
fn what_is_submitted_while_the_broker_blocks_is_sent_in_time_or_never() {
    let broker = PrivateBroker::start();
    let queue = unique("held-back");
    let server = server(&broker.url, &queue, &["--workers", "1"]);
    let caller = client(&broker.url, &queue, 2 * PATIENCE);
    assert_eq!(caller.call("10").unwrap(), b"55");
    broker.eval(&order::memory_alarm(true));
    // On a connection that was there before, and from processes that connect now. The broker says
    // that it blocks only in answer to a message: so on the first, fib(20) is sent, and may be
    // executed later.
    for n in ["20", "21", "22"] {
        match caller.request().timeout(HURRY).send(n) {
            Err(Error::Timeout {
                waiting_for: WaitingFor::BlockedBroker { .. },
                ..
            }) => {}
            other => panic!("fib({n}): {other:?}"),
        }
    }
    for n in ["23", "24"] {
        let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "5s", n]));
        assert_eq!(call.code(), Some(4));
        assert!(call.stderr.contains("blocked"), "{}", call.stderr);
    }
    // Nor does one count that nobody looks after until the broker reads again.
    let mut calls = caller.client.calls();
    calls.submit((), caller.request().timeout(HURRY).body("25"));
    thread::sleep(HURRY);
    // These have time enough, and are sent when the broker reads again.
    let patient = caller.begin("11");
    let process = Process::spawn(fibrpc(&broker.url, &queue).args(["call", "12"]));
    process.wait_for("Requesting");
    broker.eval(&order::memory_alarm(false));
    assert_eq!(patient.join().unwrap().unwrap(), b"89");
    process.wait_for(" [.] Got 144");
    assert_eq!(caller.call("13").unwrap(), b"233");
    let given_up = calls.next().unwrap().result;
    assert!(
        matches!(given_up, Err(Error::Timeout { .. })),
        "{given_up:?}"
    );
    assert_eq!(caller.stats().connections, 1);
    // Everything else that the server was ever given.
    server.signal("TERM");
    let mut server = server;
    assert!(server.wait(PATIENCE).success());
    let lines = server.output().0;
    let mut executed: Vec<_> = lines.lines().collect();
    executed.retain(|line| *line != " [.] fib(20)");
    executed.sort_unstable();
    assert_eq!(
        executed,
        ["10", "11", "12", "13"].map(|n| format!(" [.] fib({n})"))
    );
}

#[test]
fn a_full_socket_holds_no_call_past_its_deadline() {
    let broker = PrivateBroker::start();
    let queue = unique("full");
    let peer = Peer::connect(&broker.url);
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&broker.url, &queue, Duration::from_secs(2));
    assert!(matches!(client.call(b"1"), Err(Error::Timeout { .. })));
    broker.freeze();
    // Far more than the kernel's buffers and ours take.
    let request = vec![b'1'; 8 << 20];
    let began = Instant::now();
    let mut calls = client.client.calls();
    for call in 0..8 {
        calls.submit(call, client.request().body(&*request));
    }
    let mut unsent = 0;
    for answer in calls {
        match answer.result {
            Err(Error::Timeout {
                waiting_for: WaitingFor::Room,
                ..
            }) => unsent += 1,
            Err(Error::Timeout { .. }) => {}
            other => panic!(
                "expected a timeout, got {:?}",
                other.map(|reply| reply.body.len())
            ),
        }
    }
    assert!(unsent > 0, "some could not be sent");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    broker.thaw();
}
