//! What goes wrong between here and there, caused for real: each test that harms a broker has
//! one of its own.

use crate::support::{
    Caller, PATIENCE, Peer, PrivateBroker, Process, client, eventually, fibrpc, run, server,
    unique, url,
};
use amiquip::{ConsumerOptions, QueueDeclareOptions};
use fibrpc::{Error, ReplyTo, Retry, WaitingFor};
use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

/// A client whose calls wait for broker and queue.
fn patient_client(url: &str, queue: &str) -> Caller {
    Caller::new(url, queue, |client| {
        client.timeout(2 * PATIENCE).wait_for_server(true)
    })
}

/// Runs one call in a thread; the receiver gets its end.
fn begin(client: &Caller, n: &str) -> thread::JoinHandle<Result<Vec<u8>, Error>> {
    let (client, n) = (client.clone(), n.to_owned());
    thread::spawn(move || client.call(n.as_bytes()))
}

#[test]
fn calls_and_server_survive_a_broker_killed_and_restarted() {
    let mut broker = PrivateBroker::start();
    let queue = unique("killed");
    let server = server(&broker.url, &queue, &["--workers", "2"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    assert_eq!(client.call(b"10").unwrap(), b"55");
    let slow = begin(&client, "42");
    server.wait_for(" [.] fib(42)");
    broker.kill();
    let said = server.wait_for_stderr("lost the connection");
    assert!(said.contains("127.0.0.1"), "{said}");
    // One begun while there is no broker at all waits, too.
    let late = begin(&client, "11");
    server.wait_for_stderr("trying again");
    broker.boot();
    assert_eq!(slow.join().unwrap().unwrap(), b"267914296");
    assert_eq!(late.join().unwrap().unwrap(), b"89");
    assert_eq!(client.call(b"12").unwrap(), b"144");
    assert_eq!(client.stats().connections, 2);
}

#[test]
fn without_retry_a_lost_connection_ends_the_call_with_its_outcome_unknown() {
    let broker = PrivateBroker::start();
    let queue = unique("no-retry");
    let server = server(&broker.url, &queue, &["--workers", "1"]);
    let mut call = Process::spawn(fibrpc(&broker.url, &queue).args([
        "call",
        "--no-retry",
        "--timeout",
        "60s",
        "44",
    ]));
    server.wait_for(" [.] fib(44)");
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
    // The broker must not give the server up while that is stopped.
    let url = format!("{}?heartbeat=600", broker.url);
    let server = server(&url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    for round in 1..=2 {
        let slow = begin(&client, "41");
        server.wait_for(" [.] fib(41)");
        // rabbitmqctl takes a while; the answer must not be quicker.
        server.signal("STOP");
        broker.ctl(&["close_all_connections", "maintenance"]);
        server.signal("CONT");
        let said = server.wait_for_stderr("lost the connection");
        assert!(
            said.contains("320") && said.contains("maintenance"),
            "{said}"
        );
        assert_eq!(slow.join().unwrap().unwrap(), b"165580141", "round {round}");
    }
    assert!(client.stats().republished >= 2, "{:?}", client.stats());
}

#[test]
fn a_stopped_broker_holds_no_call_past_its_deadline_and_is_used_again_when_it_goes_on() {
    let broker = PrivateBroker::start();
    let queue = unique("stopped");
    let _server = server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, Duration::from_secs(2));
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
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    // Not connected yet: the socket opens, and nothing is said on it.
    let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "1s", "10"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("still connecting"), "{}", call.stderr);
    assert!(call.took < Duration::from_secs(3), "{:?}", call.took);
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
    let pending = begin(&client, "11");
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
    let client = client(&broker.url, &queue, Duration::from_secs(2));
    assert_eq!(client.call(b"10").unwrap(), b"55");
    broker.ctl(&["set_vm_memory_high_watermark", "0"]);
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
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    // A process that starts now connects, publishes, and is blocked; it must end in time, too.
    let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "2s", "10"]));
    assert_eq!(call.code(), Some(4));
    assert!(call.stderr.contains("blocked"), "{}", call.stderr);
    assert!(call.took < Duration::from_secs(4), "{:?}", call.took);
    broker.ctl(&["set_vm_memory_high_watermark", "0.8"]);
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
    broker.ctl(&["set_vm_memory_high_watermark", "0"]);
    // On a connection that was there before, and from processes that connect now. The broker says
    // that it blocks only in answer to a message: so on the first, fib(20) is sent, and may be
    // executed later.
    let hurried = Duration::from_millis(500);
    for n in ["20", "21", "22"] {
        match caller.request().timeout(hurried).send(n) {
            Err(Error::Timeout {
                waiting_for: WaitingFor::BlockedBroker { .. },
                ..
            }) => {}
            other => panic!("fib({n}): {other:?}"),
        }
    }
    for n in ["23", "24"] {
        let call = run(fibrpc(&broker.url, &queue).args(["call", "--timeout", "1s", n]));
        assert_eq!(call.code(), Some(4));
        assert!(call.stderr.contains("blocked"), "{}", call.stderr);
    }
    // Nor does one count that nobody looks after until the broker reads again.
    let mut calls = caller.client.calls();
    calls.submit((), caller.request().timeout(hurried).body("25"));
    thread::sleep(hurried);
    // These have time enough, and are sent when the broker reads again.
    let patient = begin(&caller, "11");
    let process = Process::spawn(fibrpc(&broker.url, &queue).args(["call", "12"]));
    process.wait_for("Requesting");
    broker.ctl(&["set_vm_memory_high_watermark", "0.8"]);
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
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "{:?}",
        began.elapsed()
    );
    broker.thaw();
}

#[test]
fn a_queue_deleted_under_a_running_server_is_declared_again() {
    let broker = PrivateBroker::start();
    let queue = unique("deleted");
    let server = server(&broker.url, &queue, &["--workers", "4"]);
    let client = patient_client(&broker.url, &queue);
    assert_eq!(client.call(b"10").unwrap(), b"55");
    // One that is being executed is still answered.
    let slow = begin(&client, "41");
    server.wait_for(" [.] fib(41)");
    server.signal("STOP");
    broker.ctl(&["delete_queue", &queue]);
    server.signal("CONT");
    server.wait_for_stderr("declaring it again");
    assert_eq!(client.call(b"11").unwrap(), b"89");
    assert_eq!(slow.join().unwrap().unwrap(), b"165580141");
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
    let server = server(&broker.url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    let slow = begin(&client, "41");
    server.wait_for(" [.] fib(41)");
    server.signal("STOP");
    broker.delete_callback_queues();
    server.signal("CONT");
    assert_eq!(slow.join().unwrap().unwrap(), b"165580141");
    assert_eq!(client.stats().connections, 2);
}

#[test]
fn a_channel_error_is_told_and_the_server_comes_back_when_its_cause_is_gone() {
    let broker = PrivateBroker::start();
    broker.ctl(&["add_user", "limited", "secret-of-the-test"]);
    broker.ctl(&["set_permissions", "limited", ".*", "^$", ".*"]);
    let queue = unique("403");
    let url = broker
        .url
        .replace("guest:guest", "limited:secret-of-the-test");
    // It may consume, and not publish: the first reply ends its channel.
    let server = server(&url, &queue, &["--workers", "1"]);
    let client = client(&broker.url, &queue, 2 * PATIENCE);
    let pending = begin(&client, "10");
    let said = server.wait_for_stderr("lost a channel");
    assert!(said.contains("403"), "{said}");
    assert!(!said.contains("secret"), "{said}");
    broker.ctl(&["set_permissions", "limited", ".*", ".*", ".*"]);
    assert_eq!(pending.join().unwrap().unwrap(), b"55");
}

#[test]
fn a_caller_that_may_not_publish_is_told_at_once_what_it_lacks() {
    let broker = PrivateBroker::start();
    broker.ctl(&["add_user", "limited", "secret-of-the-test"]);
    broker.ctl(&["set_permissions", "limited", ".*", "^amq.gen", ".*"]);
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
    broker.ctl(&["add_user", "writer", "secret-of-the-test"]);
    broker.ctl(&["set_permissions", "writer", ".*", ".*", "^$"]);
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
    broker.eval(&format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
         sys:suspend(amqqueue:get_pid(Q))"
    ));
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
    broker.delete_callback_queues_over_and_over();
    let deadline = Instant::now() + 6 * PATIENCE;
    while lasting.stats().connections <= RECONNECTS {
        assert_eq!(lasting.call(b"2").unwrap(), b"1");
        assert!(
            Instant::now() < deadline,
            "too few reconnects: {:?}",
            lasting.stats()
        );
    }
    broker.leave_callback_queues_alone();
    // It is connected only when it has to be.
    assert_eq!(lasting.call(b"2").unwrap(), b"1");
    let count = |what: &str| broker.ctl(&["-q", what]).lines().count();
    eventually("the broker has only what is in use", || {
        (count("list_connections"), count("list_queues")) == (2 + 1, 2 + 1) // and a heading each
    });
    let channels = broker.ctl(&["-q", "list_channels", "pid"]).lines().count();
    assert_eq!(
        channels,
        4 + 1,
        "two for the client, two for the workers, a heading"
    );
    if let Some(before) = before {
        // Other tests run in this process at the same time and have some of their own.
        let after = (descriptors().unwrap(), threads().unwrap());
        assert!(
            after.0 < before.0 + 200 && after.1 < before.1 + 100,
            "{before:?} -> {after:?}"
        );
    }
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
        let call = begin(&client, "20");
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
