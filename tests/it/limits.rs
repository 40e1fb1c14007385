//! What a broker allows, what somebody has set in it, and what comes of going beyond.

use crate::support::{
    Caller, Line, PATIENCE, Peer, PrivateBroker, eventually, fibrpc, order, run, server, unique,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable, QueueDeclareOptions};
use fibrpc::{
    Confirms, Error, HandlerError, RemoteError, ReplyTo, Request, Retry, Server, Serving,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Less than any broker's own.
const SMALL: &str = "max_message_size = 1000000\n";

/// How often a handler was begun.
#[derive(Clone, Default)]
struct Begun(Arc<AtomicU64>);

impl Begun {
    fn count(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A server of the library, which counts what it begins.
fn serve(
    url: &str,
    queue: &str,
    workers: usize,
    handler: impl Fn(&Request) -> Result<Vec<u8>, HandlerError> + Send + Sync + 'static,
) -> (Serving, Begun) {
    let begun = Begun::default();
    let count = begun.clone();
    let server = Server::new(url).unwrap().queue(queue).workers(workers);
    let serving = server.start(move |request: &Request| {
        count.0.fetch_add(1, Ordering::SeqCst);
        handler(request)
    });
    (serving.unwrap(), begun)
}

/// Answers after as many milliseconds as the request says, or with as many bytes after a `b`.
fn obey(request: &Request) -> Result<Vec<u8>, HandlerError> {
    let text = str::from_utf8(request.body()).unwrap_or("0");
    match text.strip_prefix('b') {
        Some(bytes) => Ok(vec![b'.'; bytes.parse()?]),
        None => {
            thread::sleep(Duration::from_millis(text.parse().unwrap_or(0)));
            Ok(request.body().to_vec())
        }
    }
}

#[test]
fn a_request_over_the_brokers_limit_ends_its_own_call_and_no_other() {
    let broker = PrivateBroker::configured(SMALL, &[]);
    for reply_to in [ReplyTo::Queue, ReplyTo::Direct] {
        let queue = unique("too-long");
        let (serving, begun) = serve(&broker.url, &queue, 4, obey);
        let client = Caller::new(&broker.url, &queue, |client| client.reply_to(reply_to));
        let mut calls = client.client.calls();
        for before in 0..10 {
            calls.submit(before, client.request().body("300"));
        }
        calls.submit(100, client.request().body(vec![b'x'; 1_000_001]));
        for after in 10..20 {
            calls.submit(after, client.request().body("1"));
        }
        for answer in calls {
            match answer.result {
                Ok(_) => assert_ne!(answer.key, 100),
                Err(Error::Rejected { reason, .. }) => {
                    assert_eq!(answer.key, 100);
                    assert!(reason.contains("1000000"), "{reason}");
                }
                Err(other) => panic!("{}: {other}", answer.key),
            }
        }
        // The next is known to be too long; one that is not goes through.
        let again = client.call(vec![b'x'; 1_000_001]);
        assert!(matches!(again, Err(Error::Rejected { .. })), "{again:?}");
        assert_eq!(client.call(vec![b'x'; 1_000_000]).unwrap().len(), 1_000_000);
        if reply_to == ReplyTo::Queue {
            assert_eq!(begun.count(), 20 + 1, "each once");
            assert_eq!(client.stats().connections, 1);
            assert_eq!(client.stats().republished, 0);
        }
        assert_eq!(serving.stop().unwrap().connections, 1);
    }
}

#[test]
fn a_request_over_the_limit_on_a_channel_that_is_used_no_more_ends_its_own_call_only() {
    let broker = PrivateBroker::configured(SMALL, &[]);
    let line = Line::slow(&broker.url, 5 << 20, Duration::ZERO);
    let queue = unique("retired");
    let (serving, _) = serve(&broker.url, &queue, 2, obey);
    let client = Caller::new(&line.url, &queue, |client| client);
    client.call("1").unwrap();
    let mut calls = client.client.calls();
    let overdue = Retry::Unanswered(Duration::from_millis(500));
    calls.submit("slow", client.request().body("3000").retry(overdue));
    // It changes the channel while the next two are on their way on the old one.
    thread::sleep(Duration::from_millis(450));
    calls.submit("too long", client.request().body(vec![b'x'; 3_000_000]));
    calls.submit("after", client.request().body("1"));
    for answer in calls {
        match answer.result {
            Ok(_) => assert_ne!(answer.key, "too long"),
            Err(Error::Rejected { .. }) => assert_eq!(answer.key, "too long"),
            Err(other) => panic!("{}: {other}", answer.key),
        }
    }
    drop(serving);
}

#[test]
fn a_reply_over_the_brokers_limit_is_an_error_that_says_so_and_the_server_stays() {
    let broker = PrivateBroker::configured(SMALL, &[]);
    let queue = unique("long-reply");
    let (serving, begun) = serve(&broker.url, &queue, 2, obey);
    let client = Caller::new(&broker.url, &queue, |client| client);
    for _ in 0..3 {
        let slow = {
            let client = client.clone();
            thread::spawn(move || client.call("300"))
        };
        match client.call("b1000001") {
            Err(Error::Remote(error)) => {
                assert_eq!(error.kind(), RemoteError::INTERNAL);
                assert!(error.message().contains("cannot be sent"), "{error}");
                assert!(error.message().contains("1000000"), "{error}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(slow.join().unwrap().unwrap(), b"300");
        assert_eq!(client.call("b1000000").unwrap().len(), 1_000_000);
    }
    assert_eq!(begun.count(), 3 * 3, "none of them twice");
    let stats = serving.stop().unwrap();
    assert_eq!((stats.connections, stats.refused), (1, 3));
}

#[test]
fn an_error_of_any_length_reaches_its_caller() {
    let broker = PrivateBroker::configured(SMALL, &[]);
    let queue = unique("long-error");
    let (serving, begun) = serve(&broker.url, &queue, 1, |request: &Request| {
        Err(match request.body() {
            b"kind" => RemoteError::new("k".repeat(200_000), "short"),
            _ => RemoteError::internal("\u{fc}".repeat(2_000_000)),
        }
        .into())
    });
    let client = Caller::new(&broker.url, &queue, |client| client);
    let message = |body: &str| match client.call(body) {
        Err(Error::Remote(error)) => error.message().to_owned(),
        other => panic!("{other:?}"),
    };
    assert_eq!(message("kind"), "short");
    let long = message("text");
    assert!(
        long.len() < 100_000 && long.ends_with("..."),
        "{}",
        long.len()
    );
    assert_eq!(begun.count(), 2);
    assert_eq!(serving.stop().unwrap().connections, 1);
}

#[test]
fn a_request_whose_reply_closes_the_connection_does_not_come_back_for_ever() {
    let broker = PrivateBroker::start();
    let queue = unique("poison");
    let (serving, begun) = serve(&broker.url, &queue, 4, obey);
    let peer = Peer::connect(&broker.url);
    let client = Caller::new(&broker.url, &queue, |client| client.timeout(4 * PATIENCE));
    let poison = || {
        // RabbitMQ 3.10 takes it for an address of its own, fails to read it, and says 541.
        let properties = AmqpProperties::default()
            .with_reply_to("amq.rabbitmq.reply-to.a.b".to_owned())
            .with_correlation_id("poison".to_owned());
        peer.publish(&queue, b"1", properties);
    };
    poison();
    eventually("it is dropped", || serving.stats().unanswerable >= 1);
    assert_eq!(begun.count(), 1);
    // Among others, which are all answered.
    let mut calls = client.client.calls();
    for n in 0..200 {
        calls.submit(n, client.request().body("1"));
        if n % 50 == 25 {
            poison();
        }
    }
    for answer in calls {
        assert_eq!(answer.result.unwrap().body, b"1");
    }
    // Or more: an acknowledgement may be lost with the connection that another one closes.
    eventually("they are dropped", || serving.stats().unanswerable >= 5);
    eventually("nothing is left", || {
        peer.channel
            .queue_declare_passive(&*queue)
            .unwrap()
            .declared_message_count()
            == Some(0)
    });
    serving.stop().unwrap();
    assert!(peer.is_empty(&queue), "all are acknowledged");
}

#[test]
fn a_broker_without_heartbeats_and_without_a_limit_for_frames_is_like_any_other() {
    let broker = PrivateBroker::configured("heartbeat = 0\nframe_max = 0\n", &[]);
    let queue = unique("no-limits");
    let url = format!("{}?heartbeat=1", broker.url);
    let server = server(&url, &queue, &["--workers", "1"]);
    let echo = unique("echo");
    let (serving, _) = serve(&url, &echo, 1, |request| Ok(request.body().to_vec()));
    let client = Caller::new(&url, &echo, |client| client.timeout(2 * PATIENCE));
    let long: Vec<u8> = (0..20 << 20).map(|n: u32| n as u8).collect();
    assert!(
        client.call(long.clone()).unwrap() == long,
        "20 MiB come back"
    );
    broker.freeze();
    let said = server.wait_for_stderr("lost the connection");
    assert!(said.contains("silent"), "{said}");
    broker.thaw();
    assert_eq!(client.call("back").unwrap(), b"back");
    drop(serving);
}

#[test]
fn a_body_comes_back_in_whatever_frames_the_broker_accepts() {
    // The least that there is, and more than we ask for.
    for frame_max in [4096, 64 << 20] {
        let broker = PrivateBroker::configured(&format!("frame_max = {frame_max}\n"), &[]);
        let queue = unique("frames");
        let (_serving, _) = serve(&broker.url, &queue, 1, |request| {
            Ok(request.body().to_vec())
        });
        let client = Caller::new(&broker.url, &queue, |client| client.timeout(PATIENCE));
        for len in [0, 4088, 4089, 131_064, 131_065, 20 << 20] {
            let body: Vec<u8> = (0..len).map(|n: u32| (n % 251) as u8).collect();
            assert!(
                client.call(body.clone()).unwrap() == body,
                "{frame_max} {len}"
            );
        }
    }
}

#[test]
fn a_server_that_needs_more_channels_than_there_are_says_so() {
    let broker = PrivateBroker::configured("channel_max = 4\n", &[]);
    let queue = unique("channels");
    let arguments = ["server", "--workers", "4", "--connect-timeout", "2s"];
    let refused = run(fibrpc(&broker.url, &queue).args(arguments));
    assert_eq!(refused.code(), Some(6), "{}", refused.stderr);
    for word in ["4 channels", "fewer workers"] {
        assert!(refused.stderr.contains(word), "{}", refused.stderr);
    }
    let _server = server(&broker.url, &queue, &["--workers", "3"]);
    let call = run(fibrpc(&broker.url, &queue).args(["call", "30"]));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
}

#[test]
fn a_question_that_costs_the_connection_is_not_asked_again() {
    let broker = PrivateBroker::start();
    broker.eval(&order::add_user("few", "secret-of-the-test"));
    broker.eval(&order::permit("few", order::ALL));
    broker.eval(&order::limit_channels("few", 2));
    let queue = unique("few-channels");
    let (serving, begun) = serve(&broker.url, &queue, 1, obey);
    let url = broker.url.replace("guest:guest", "few:secret-of-the-test");
    let client = Caller::new(&url, &queue, |client| {
        client.timeout(Duration::from_secs(2))
    });
    assert_eq!(client.call("1").unwrap(), b"1");
    for _ in 0..3 {
        let error = client.call("5000").unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    }
    assert!(client.stats().connections <= 2, "{:?}", client.stats());
    drop(serving);
    assert!(begun.count() > 0);
}

#[test]
fn a_request_that_takes_longer_than_the_broker_waits_is_executed_once_and_answered() {
    // Eight seconds in place of 30 minutes, looked at twice a second. The others need a fraction of
    // that, on a slow machine, too.
    let broker = PrivateBroker::configured("consumer_timeout = 8000\n", &[]);
    let look_every = |ms: u32| {
        broker.eval(&format!(
            "application:set_env(rabbit, channel_tick_interval, {ms})"
        ))
    };
    look_every(500);
    let queue = unique("consumer-timeout");
    let (serving, begun) = serve(&broker.url, &queue, 2, obey);
    let client = Caller::new(&broker.url, &queue, |client| client.timeout(2 * PATIENCE));
    let slow = {
        let client = client.clone();
        thread::spawn(move || client.call("20000"))
    };
    let mut others = 0;
    while !slow.is_finished() {
        assert_eq!(client.call("100").unwrap(), b"100");
        others += 1;
    }
    assert_eq!(slow.join().unwrap().unwrap(), b"20000");
    assert_eq!(begun.count(), 1 + others);
    assert_eq!(client.stats().dropped_replies, 0);
    let stats = serving.stop().unwrap();
    assert_eq!((stats.connections, stats.answered), (1, 1 + others));
    assert!(Peer::connect(&broker.url).is_empty(&queue));
    look_every(60_000);
}

/// A broker with a queue of that name, which refuses what is over a limit, and a connection to it.
fn limited(queue: &str, limit: &str, value: i32) -> (PrivateBroker, Peer) {
    let broker = PrivateBroker::start();
    let peer = Peer::connect(&broker.url);
    let mut arguments = FieldTable::new();
    arguments.insert(limit.to_owned(), AmqpValue::LongInt(value));
    let overflow = AmqpValue::LongString("reject-publish".to_owned());
    arguments.insert("x-overflow".to_owned(), overflow);
    let options = QueueDeclareOptions {
        arguments,
        ..QueueDeclareOptions::default()
    };
    peer.channel.queue_declare(queue, options).unwrap();
    (broker, peer)
}

#[test]
fn a_full_queue_rejects_a_request_at_once_where_the_broker_confirms() {
    let queue = unique("full");
    let (broker, peer) = limited(&queue, "x-max-length", 1);
    peer.publish(&queue, b"1", AmqpProperties::default());
    eventually("it is there", || peer.count(&queue).0 == 1);
    let began = Instant::now();
    let arguments = ["call", "30", "--confirm", "always", "--timeout", "2m"];
    let call = run(fibrpc(&broker.url, &queue).args(arguments));
    assert_eq!(call.code(), Some(8), "{}", call.stderr);
    assert!(call.stderr.contains("full"), "{}", call.stderr);
    assert!(began.elapsed() < Duration::from_secs(60));
    // Those to other queues are not disturbed.
    let client = Caller::new(&broker.url, &queue, |client| {
        client.confirms(Confirms::Always)
    });
    let other = unique("not-full");
    let (serving, begun) = serve(&broker.url, &other, 2, obey);
    let mut calls = client.client.calls();
    for n in 0..20 {
        calls.submit(true, client.client.request(&other).body("50"));
        if n % 4 == 0 {
            calls.submit(false, client.request().body("1"));
        }
    }
    for answer in calls {
        match answer.result {
            Ok(_) => assert!(answer.key),
            Err(Error::Rejected { .. }) => assert!(!answer.key),
            Err(error) => panic!("{error}"),
        }
    }
    // Or more: what a busy broker confirms late is sent again.
    assert!(begun.count() >= 20);
    assert_eq!(client.stats().connections, 1);
    drop(serving);
}

#[test]
fn a_request_that_no_room_is_enough_for_is_rejected_though_the_queue_is_empty() {
    let queue = unique("few-bytes");
    let (broker, _peer) = limited(&queue, "x-max-length-bytes", 10);
    let client = Caller::new(&broker.url, &queue, |client| {
        client.confirms(Confirms::Always)
    });
    // Nobody serves it, and then somebody does.
    let mut servers = Vec::new();
    for _ in 0..2 {
        let error = client.call(vec![b'x'; 100]);
        assert!(matches!(error, Err(Error::Rejected { .. })), "{error:?}");
        servers.push(serve(&broker.url, &queue, 1, obey));
    }
}

#[test]
fn a_request_that_the_broker_does_not_confirm_is_sent_again() {
    let broker = PrivateBroker::start();
    let queue = unique("unconfirmed");
    let (serving, begun) = serve(&broker.url, &queue, 1, obey);
    let client = Caller::new(&broker.url, &queue, |client| {
        client.confirms(Confirms::Always).timeout(2 * PATIENCE)
    });
    assert_eq!(client.call("1").unwrap(), b"1");
    broker.eval(&order::suspend_queue(&queue));
    let waiting = {
        let client = client.clone();
        thread::spawn(move || client.call("2"))
    };
    eventually("it is sent again", || client.stats().republished >= 2);
    broker.eval(&order::resume_queue(&queue));
    assert_eq!(waiting.join().unwrap().unwrap(), b"2");
    assert_eq!(client.stats().connections, 1);
    eventually("each copy is executed", || begun.count() >= 3);
    drop(serving);
}

#[test]
fn a_queue_that_does_not_answer_holds_up_nobody_who_calls_another() {
    let broker = PrivateBroker::start();
    let (stuck, queue) = (unique("stuck"), unique("not-stuck"));
    let (first, _) = serve(&broker.url, &stuck, 1, obey);
    let (second, begun) = serve(&broker.url, &queue, 1, obey);
    let client = Caller::new(&broker.url, &queue, |client| client);
    assert_eq!(client.client.call(&stuck, "1").unwrap().body, b"1");
    broker.eval(&order::suspend_queue(&stuck));
    let short = client
        .client
        .request(&stuck)
        .timeout(Duration::from_secs(1));
    let error = short.send("2").unwrap_err();
    // Its state was asked after, and nobody has answered; but the broker is not silent.
    let said = error.to_string();
    assert!(said.contains("does not say what state"), "{said}");
    let error = client
        .client
        .request(&stuck)
        .timeout(Duration::from_secs(1));
    let said = error.send("3").unwrap_err().to_string();
    assert!(said.contains("does not say what state"), "{said}");
    for _ in 0..10 {
        assert_eq!(client.call("1").unwrap(), b"1");
    }
    // A request that the connection manager has to send: the queue does not exist yet.
    let missing = client.client.call(&unique("missing"), "1").unwrap_err();
    assert!(matches!(missing, Error::NoServer { .. }), "{missing}");
    assert_eq!((client.stats().connections, begun.count()), (1, 10));
    broker.eval(&order::resume_queue(&stuck));
    drop((first, second));
}
