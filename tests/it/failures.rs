//! A connection that is lost, and one that is made again. Each test that harms a broker has that one
//! for itself.

mod queues;
mod silent;
mod starting;

use crate::support::{
    Caller, PATIENCE, PrivateBroker, Process, Slow, client, eventually, fibrpc, order, server,
    unique, url,
};
use fibrpc::Error;
use std::thread;
use std::time::Duration;

/// A client whose calls wait for broker and queue.
fn patient_client(url: &str, queue: &str) -> Caller {
    Caller::new(url, queue, |client| {
        client.timeout(2 * PATIENCE).wait_for_server(true)
    })
}

#[test]
fn calls_and_server_survive_a_broker_killed_and_restarted() {
    let mut broker = PrivateBroker::start();
    let queue = unique("killed");
    let slow = Slow::new();
    let server = slow.server(&broker.url, &queue, &["--workers", "2"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    assert_eq!(client.call("first").unwrap(), b"first");
    let begun = slow.begin(&client);
    broker.kill();
    let said = server.wait_for_stderr("lost the connection");
    assert!(said.contains("127.0.0.1"), "{said}");
    // One begun while there is no broker at all waits, too.
    let late = client.begin("late");
    server.wait_for_stderr("trying again");
    broker.boot();
    slow.release();
    assert_eq!(begun.join().unwrap().unwrap(), b"slow");
    assert_eq!(late.join().unwrap().unwrap(), b"late");
    assert_eq!(client.call("last").unwrap(), b"last");
    assert_eq!(client.stats().connections, 2);
}

#[test]
fn without_retry_a_lost_connection_ends_the_call_with_its_outcome_unknown() {
    let broker = PrivateBroker::start();
    let queue = unique("no-retry");
    let slow = Slow::new();
    let _server = slow.server(&broker.url, &queue, &["--workers", "1"]);
    let request = ["request", "--no-retry", "--timeout", "60s", "slow"];
    let mut call = Process::spawn(fibrpc(&broker.url, &queue).args(request));
    slow.wait_until_begun();
    broker.kill();
    assert_eq!(call.wait(PATIENCE).code(), Some(7));
    let (_, stderr) = call.output();
    assert!(
        stderr.contains("may or may not have been executed"),
        "{stderr}"
    );
}

#[test]
fn a_connection_closed_by_an_operator_is_made_again_and_calls_survive() {
    let broker = PrivateBroker::start();
    let queue = unique("operator");
    let slow = Slow::new();
    let server = slow.server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    for round in 1..=2 {
        slow.hold();
        let begun = slow.begin(&client);
        broker.eval(&order::close_connections("maintenance"));
        let said = server.wait_for_stderr("lost the connection");
        assert!(
            said.contains("320") && said.contains("maintenance"),
            "{said}"
        );
        slow.release();
        assert_eq!(begun.join().unwrap().unwrap(), b"slow", "round {round}");
    }
    assert!(client.stats().republished >= 2, "{:?}", client.stats());
}

#[test]
fn server_and_patient_caller_may_be_there_before_the_broker() {
    let mut broker = PrivateBroker::start();
    broker.kill();
    let queue = unique("booting");
    let server =
        Process::spawn(fibrpc(&broker.url, &queue).args(["server", "--connect-timeout", "2m"]));
    let call = Process::spawn(fibrpc(&broker.url, &queue).args([
        "call",
        "--wait-for-server",
        "--timeout",
        "2m",
        "--output",
        "raw",
        "10",
    ]));
    server.wait_for_stderr("trying again");
    broker.boot();
    assert_eq!(server.line(), " [x] Awaiting RPC requests");
    assert_eq!(call.line(), "55");
}

#[test]
fn a_request_whose_deadline_has_passed_is_not_sent_on_the_next_connection() {
    let mut broker = PrivateBroker::start();
    let queue = unique("over");
    drop(server(&broker.url, &queue, &["--queue-type", "classic"])); // declares it, durable
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    let mut calls = client.client.calls();
    let second = Duration::from_secs(1);
    calls.submit("20", client.request().timeout(second).body("20"));
    eventually("it is sent", || client.stats().connections == 1);
    broker.kill();
    thread::sleep(second);
    // Nobody has looked after it, and another call has the client connect again.
    broker.boot();
    let server = server(&broker.url, &queue, &["--workers", "1"]);
    assert_eq!(client.call("10").unwrap(), b"55");
    assert_eq!(server.line(), " [.] fib(10)");
    assert_eq!(client.call("11").unwrap(), b"89");
    assert_eq!(server.line(), " [.] fib(11)");
    let given_up = calls.next().unwrap().result;
    assert!(
        matches!(given_up, Err(Error::Timeout { .. })),
        "{given_up:?}"
    );
}

#[test]
fn a_server_stopped_under_load_loses_and_duplicates_nothing() {
    let queue = unique("drain-load");
    let _stays = server(&url(), &queue, &["--workers", "2", "--quiet"]);
    let client = client(&url(), &queue, 2 * PATIENCE);
    let (done, is_done) = crossbeam_channel::bounded::<()>(0);
    let load = thread::spawn({
        let client = client.clone();
        move || {
            let endless = std::iter::repeat(client.request().body("20")).take_while(|_| {
                is_done.try_recv() != Err(crossbeam_channel::TryRecvError::Disconnected)
            });
            let mut answered = 0;
            for answer in client.client.call_many(endless, 64) {
                assert_eq!(answer.result.unwrap().body, b"6765");
                answered += 1;
            }
            answered
        }
    });
    for _ in 0..5 {
        let mut leaves = server(
            &url(),
            &queue,
            &["--workers", "4", "--prefetch", "8", "--quiet"],
        );
        thread::sleep(Duration::from_millis(200)); // under load for a while, not for anything
        leaves.signal("TERM");
        assert!(leaves.wait(PATIENCE).success());
    }
    drop(done);
    let answered = load.join().unwrap();
    assert!(answered > 100, "{answered}");
    assert_eq!(
        client.stats().dropped_replies,
        0,
        "nothing was answered twice"
    );
    assert_eq!(client.stats().connections, 1);
}

#[test]
fn client_lifetimes_and_reconnects_leave_nothing_behind() {
    const LIFETIMES: usize = 1000;
    const RECONNECTS: u64 = 100;
    let broker = PrivateBroker::start();
    let queue = unique("leaks");
    let _server = server(&broker.url, &queue, &["--quiet", "--workers", "2"]);
    let descriptors = || std::fs::read_dir("/proc/self/fd").map(|fds| fds.count());
    let threads = || std::fs::read_dir("/proc/self/task").map(|tasks| tasks.count());
    let lasting = client(&broker.url, &queue, 2 * PATIENCE);
    lasting.call(b"1").unwrap();
    let before = descriptors().ok().zip(threads().ok());
    for _ in 0..LIFETIMES {
        assert_eq!(
            client(&broker.url, &queue, PATIENCE).call(b"1").unwrap(),
            b"1"
        );
    }
    // Its own callback queue deleted is the client's quickest way to lose its link.
    while lasting.stats().connections <= RECONNECTS {
        broker.eval(&order::delete_callback_queues());
        assert_eq!(lasting.call(b"2").unwrap(), b"1");
    }
    // It is connected only when it has to be.
    assert_eq!(lasting.call(b"2").unwrap(), b"1");
    // Channels: two for the client, two for the workers.
    eventually("the broker has only what is in use", || {
        broker.eval(order::COUNT).trim() == "{2, 2, 4}"
    });
    if let Some(before) = before {
        // Other tests run in this process at the same time and have some of their own.
        let after = (descriptors().unwrap(), threads().unwrap());
        assert!(
            after.0 < before.0 + 200 && after.1 < before.1 + 100,
            "{before:?} -> {after:?}"
        );
    }
}
