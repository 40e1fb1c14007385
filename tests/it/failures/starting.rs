//! A server's first start, which fails in time and says why.

use crate::support::{PATIENCE, Peer, PrivateBroker, Process, fibrpc, order, run, unique};
use amiquip::{ConsumerOptions, QueueDeclareOptions};
use std::net::TcpListener;

#[test]
fn a_server_that_was_never_connected_gives_up_with_exit_6() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let server =
        run(fibrpc(&format!("amqp://{address}"), "q").args(["server", "--connect-timeout", "1s"]));
    assert_eq!(server.code(), Some(6));
    assert!(
        server.stderr.contains(&address.to_string()),
        "{}",
        server.stderr
    );
    assert_eq!(server.stdout, "");
}

#[test]
fn a_server_that_cannot_serve_says_why_at_its_first_start_and_ends_with_6() {
    let broker = PrivateBroker::configured("channel_max = 8\n", &[]);
    broker.eval(&order::add_user("writer", "secret-of-the-test"));
    broker.eval(&order::permit("writer", [".*", ".*", "^$"]));
    let writer = broker
        .url
        .replace("guest:guest", "writer:secret-of-the-test");
    let taken = unique("taken");
    let peer = Peer::connect(&broker.url);
    peer.channel
        .queue_declare(&*taken, QueueDeclareOptions::default())
        .unwrap();
    let exclusive = ConsumerOptions {
        exclusive: true,
        ..ConsumerOptions::default()
    };
    let consumer = peer.channel.basic_consume(&*taken, exclusive).unwrap();
    for (url, queue, workers, said) in [
        (
            &broker.url,
            taken.clone(),
            "1",
            "another consumer has it for itself",
        ),
        (&writer, unique("may-not-consume"), "1", "set_permissions"),
        (&broker.url, unique("too-many"), "16", "channel"),
    ] {
        let arguments = ["server", "--connect-timeout", "2s", "--workers", workers];
        let server = run(fibrpc(url, &queue).args(arguments));
        assert_eq!(server.code(), Some(6), "{said}: {}", server.stderr);
        assert!(server.stderr.contains(said), "{said}: {}", server.stderr);
        assert!(!server.stderr.contains("secret"), "{}", server.stderr);
        assert_eq!(server.stdout, "");
        let told = server.stderr.matches("error: ").count();
        assert_eq!(told, 1, "once: {}", server.stderr);
        assert!(!server.stderr.contains("stopping"), "{}", server.stderr);
    }
    // A broker that refuses a user takes its time, and the last attempt is cut off.
    let wrong = broker.url.replace("guest:guest", "guest:hunter2");
    let server = run(fibrpc(&wrong, "q").args(["server", "--connect-timeout", "5s"]));
    assert_eq!(server.code(), Some(6));
    let last = server
        .stderr
        .lines()
        .rfind(|line| line.starts_with("error: "));
    assert!(
        last.unwrap().contains("refused the user"),
        "{}",
        server.stderr
    );
    // amiquip's trap: never drop a live consumer.
    consumer.cancel().unwrap();
}

#[test]
fn a_first_start_ends_in_time_though_the_queue_does_not_answer() {
    let broker = PrivateBroker::start();
    let queue = unique("hangs");
    let peer = Peer::connect(&broker.url);
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    // The broker is alive, and the queue's process is not.
    broker.eval(&order::suspend_queue(&queue));
    let server = run(fibrpc(&broker.url, &queue).args(["server", "--connect-timeout", "2s"]));
    assert_eq!(server.code(), Some(6), "{}", server.stderr);
    assert!(
        server.stderr.contains("does not answer"),
        "{}",
        server.stderr
    );
}

#[test]
fn a_server_told_to_stop_while_it_connects_stops() {
    // A socket that accepts and never speaks.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqp://{}", mute.local_addr().unwrap());
    let mut server = Process::spawn(fibrpc(&url, "q").args(["server", "--connect-timeout", "10m"]));
    let _connection = mute.accept().unwrap();
    server.signal("TERM");
    assert_eq!(server.wait(PATIENCE).code(), Some(0));
}
