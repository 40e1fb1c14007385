//! Queues that are deleted, purged, not there yet, or forbidden.

use super::patient_client;
use crate::support::{
    Caller, PATIENCE, Peer, PrivateBroker, Process, Slow, client, eventually, fibrpc, order, run,
    server, unique, url,
};
use amiquip::QueueDeclareOptions;
use fibrpc::{Error, ReplyTo, Retry};
use std::thread;
use std::time::Duration;

#[test]
fn a_queue_deleted_under_a_running_server_is_declared_again() {
    let broker = PrivateBroker::start();
    let queue = unique("deleted");
    let slow = Slow::new();
    let server = slow.server(&broker.url, &queue, &["--workers", "4"]);
    let client = patient_client(&broker.url, &queue);
    assert_eq!(client.call("first").unwrap(), b"first");
    // One that is being executed is still answered.
    let begun = slow.begin(&client);
    broker.eval(&order::delete_queue(&queue));
    server.wait_for_stderr("declaring it again");
    assert_eq!(client.call("next").unwrap(), b"next");
    slow.release();
    assert_eq!(begun.join().unwrap().unwrap(), b"slow");
    assert_eq!(
        client.stats().connections,
        1,
        "the client's connection is not concerned"
    );
}

#[test]
fn a_callback_queue_deleted_by_an_operator_is_made_again_and_the_call_answered() {
    let broker = PrivateBroker::start();
    let queue = unique("callback-deleted");
    let slow = Slow::new();
    let _server = slow.server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    let begun = slow.begin(&client);
    broker.eval(&order::delete_callback_queues());
    slow.release();
    assert_eq!(begun.join().unwrap().unwrap(), b"slow");
    assert_eq!(client.stats().connections, 2);
}

#[test]
fn a_channel_error_is_told_and_the_server_comes_back_when_its_cause_is_gone() {
    let broker = PrivateBroker::start();
    broker.eval(&order::add_user("limited", "secret-of-the-test"));
    broker.eval(&order::permit("limited", [".*", "^$", ".*"]));
    let queue = unique("403");
    let url = broker
        .url
        .replace("guest:guest", "limited:secret-of-the-test");
    // It may consume, and not publish: the first reply ends its channel.
    let server = server(&url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    let pending = client.begin("10");
    let said = server.wait_for_stderr("lost a channel");
    assert!(said.contains("403"), "{said}");
    assert!(!said.contains("secret"), "{said}");
    broker.eval(&order::permit("limited", order::ALL));
    assert_eq!(pending.join().unwrap().unwrap(), b"55");
}

#[test]
fn a_caller_that_may_not_publish_is_told_at_once_what_it_lacks() {
    let broker = PrivateBroker::start();
    broker.eval(&order::add_user("limited", "secret-of-the-test"));
    broker.eval(&order::permit("limited", [".*", "^amq.gen", ".*"]));
    let url = broker
        .url
        .replace("guest:guest", "limited:secret-of-the-test");
    let queue = unique("may-not");
    let _server = server(&broker.url, &queue, &["--workers", "1"]);
    let call = run(fibrpc(&url, &queue).args(["call", "10"]));
    assert_eq!(call.code(), Some(6), "{}", call.stderr);
    assert!(call.stderr.contains("403"), "{}", call.stderr);
    assert!(call.stderr.contains("set_permissions"), "{}", call.stderr);
    assert!(!call.stderr.contains("secret"), "{}", call.stderr);
}

#[test]
fn a_call_waits_for_a_queue_that_does_not_exist_yet_if_told_to() {
    let queue = unique("wait");
    let call = Process::spawn(fibrpc(&url(), &queue).args([
        "call",
        "--wait-for-server",
        "--timeout",
        "2m",
        "--output",
        "raw",
        "10",
    ]));
    // It has been returned at least once by now; that it waits is what the answer shows.
    thread::sleep(Duration::from_millis(300));
    let _server = server(&url(), &queue, &["--quiet"]);
    assert_eq!(call.line(), "55");
    let in_vain = run(fibrpc(&url(), &unique("never")).args([
        "call",
        "--wait-for-server",
        "--timeout",
        "1s",
        "10",
    ]));
    assert_eq!(in_vain.code(), Some(4));
    assert!(
        in_vain.stderr.contains("does not exist yet"),
        "{}",
        in_vain.stderr
    );
}

#[test]
fn a_request_whose_caller_has_given_up_is_not_executed() {
    let queue = unique("expired");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let client = client(&url(), &queue, Duration::from_millis(300));
    assert!(matches!(client.call(b"20"), Err(Error::Timeout { .. })));
    // It may get to a busy broker late, which counts the time from then: at the latest before this
    // one, on the same channel, comes back.
    let nowhere = unique("nowhere");
    let returned = client.client.request(&nowhere).timeout(PATIENCE).send("");
    assert!(matches!(returned, Err(Error::NoServer { .. })));
    eventually("the broker has dropped it", || peer.count(&queue).0 == 0);
    let server = server(&url(), &queue, &["--workers", "1"]);
    assert_eq!(
        run(fibrpc(&url(), &queue).args(["call", "--output", "raw", "21"])).stdout,
        "10946\n"
    );
    assert_eq!(
        server.line(),
        " [.] fib(21)",
        "the expired fib(20) was never seen"
    );
}

#[test]
fn a_request_that_was_purged_is_sent_again_if_the_client_is_told_to() {
    for reply_to in [ReplyTo::Queue, ReplyTo::Direct] {
        let queue = unique("purged");
        let peer = Peer::connect(&url());
        peer.channel
            .queue_declare(&*queue, QueueDeclareOptions::default())
            .unwrap();
        let retry = Retry::Unanswered(Duration::from_millis(300));
        let client = Caller::new(&url(), &queue, |client| {
            client.timeout(PATIENCE).reply_to(reply_to).retry(retry)
        });
        let call = client.begin("20");
        // Twice: what is sent again can be lost again.
        for _ in 0..2 {
            eventually("the request is in the queue", || peer.count(&queue).0 > 0);
            peer.channel.queue_purge(&*queue).unwrap();
        }
        let _server = server(&url(), &queue, &["--workers", "1"]);
        assert_eq!(call.join().unwrap().unwrap(), b"6765", "{reply_to:?}");
        assert!(client.stats().republished >= 2, "{:?}", client.stats());
        assert_eq!(client.stats().connections, 1);
    }
}
