//! The library alone, as a program without our command uses it: this file builds and passes with
//! any set of features.

use fibrpc::{
    Client, Error, HandlerError, RemoteError, Request, Response, Retry, Server, Serving, Status,
    WaitingFor,
};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn url() -> String {
    std::env::var("FIBRPC_TEST_URL")
        .expect("these tests need a broker: run them with `make test`, or set FIBRPC_TEST_URL")
}

fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("fibrpc.library.{name}.{}.{count}", std::process::id())
}

fn server(queue: &str, workers: usize) -> Server {
    Server::new(url()).unwrap().queue(queue).workers(workers)
}

fn serve<R: Into<Response>>(
    queue: &str,
    workers: usize,
    handler: impl Fn(&Request) -> Result<R, HandlerError> + Send + Sync + 'static,
) -> Serving {
    server(queue, workers).start(handler).unwrap()
}

fn echo(request: &Request) -> Result<Vec<u8>, HandlerError> {
    Ok(request.body().to_vec())
}

fn client() -> Client {
    Client::new(url()).unwrap()
}

/// What a handler waits for, and the sender that lets all of them go on when it is dropped.
fn gate() -> (mpsc::Sender<()>, impl Fn() + Send + Sync + 'static) {
    let (open, opened) = mpsc::channel();
    let opened = std::sync::Mutex::new(opened);
    (open, move || {
        let _ = opened.lock().unwrap().recv();
    })
}

#[test]
fn a_function_of_ones_own_is_called_from_many_threads() {
    let queue = unique("echo");
    let serving = serve(&queue, 4, |request| Ok(request.body().to_ascii_uppercase()));
    let client = client();
    thread::scope(|scope| {
        for thread in 0..8 {
            let (client, queue) = (client.clone(), &queue);
            scope.spawn(move || {
                for call in 0..100 {
                    let reply = client.call(queue, format!("t{thread}c{call}")).unwrap();
                    assert_eq!(reply.body, format!("T{thread}C{call}").into_bytes());
                }
            });
        }
    });
    let requests = ["a", "b", "c"].map(|body| client.request(&queue).body(body));
    let many: Vec<_> = client
        .call_many(requests, 2)
        .map(|answer| (answer.key, answer.result.unwrap().body))
        .collect();
    assert_eq!(
        many,
        [(0, b"A".to_vec()), (1, b"B".to_vec()), (2, b"C".to_vec())]
    );
    assert_eq!(client.stats().connections, 1);
    assert_eq!(serving.stats().answered, 803);
    assert_eq!(serving.stop().unwrap().answered, 803);
}

#[test]
fn one_client_calls_any_number_of_queues_on_one_connection() {
    let (first, second, missing) = (unique("first"), unique("second"), unique("missing"));
    let _first = serve(&first, 1, |_| Ok("first"));
    let _second = serve(&second, 1, |_| Ok("second"));
    let client = client();
    let mut calls = client.calls();
    for queue in [&first, &second] {
        calls.submit(queue, client.request(queue));
    }
    // Nobody serves this one: it ends, and the others do not.
    calls.submit(&missing, client.request(&missing));
    for answer in calls {
        match answer.result {
            Ok(reply) if *answer.key == first => assert_eq!(reply.body, b"first"),
            Ok(reply) => assert_eq!((answer.key, &*reply.body), (&second, &b"second"[..])),
            Err(Error::NoServer { queue }) => {
                assert_eq!((answer.key, &queue), (&missing, &missing))
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(client.stats().connections, 1);
}

#[test]
fn headers_content_type_and_time_left_reach_the_handler_and_its_own_reach_the_caller() {
    let queue = unique("headers");
    let _serving = serve(&queue, 1, |request| {
        let left = request.time_left().ok_or("no expiration")?;
        assert!(left > Duration::from_secs(1) && left <= Duration::from_secs(20));
        let id = request.correlation_id().ok_or("no correlation id")?;
        assert_eq!(id.len(), 32);
        assert!(!request.redelivered());
        let seen: Vec<_> = request.headers().iter().collect();
        let seen = format!("{} {seen:?}", request.content_type().unwrap_or("none"));
        Ok(Response::new(seen)
            .with_content_type("text/x-seen")
            .with_header("x-version", "3"))
    });
    let client = client();
    let reply = client
        .request(&queue)
        .header("traceparent", "00-1")
        .header("ünï", "✓")
        .content_type("application/json")
        .timeout(Duration::from_secs(20))
        .send("{}")
        .unwrap();
    assert_eq!(
        String::from_utf8(reply.body.clone()).unwrap(),
        r#"application/json [("traceparent", "00-1"), ("ünï", "✓")]"#
    );
    assert_eq!(reply.content_type.as_deref(), Some("text/x-seen"));
    assert_eq!(reply.header("x-version"), Some("3"));
    assert_eq!(reply.header("x-other"), None);
    let reply = client
        .request(&queue)
        .timeout(PATIENCE / 2)
        .send("")
        .unwrap();
    assert!(reply.body.starts_with(b"text/plain []"), "the default");
}

#[test]
fn an_empty_request_and_an_empty_reply_are_like_any_other() {
    let queue = unique("empty");
    let serving = serve(&queue, 1, |request| {
        assert!(request.body().is_empty());
        Ok(())
    });
    assert_eq!(client().call(&queue, "").unwrap().body, b"");
    assert_eq!(serving.stop().unwrap().answered, 1);
}

#[test]
fn a_handlers_error_and_its_panic_are_the_callers_error() {
    /// A panic that does not go quietly.
    struct Awkward;
    impl Drop for Awkward {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let queue = unique("errors");
    let serving = serve(&queue, 1, |request| match request.body() {
        b"panic" => panic!("on purpose"),
        b"payload" => std::panic::panic_any(Awkward),
        b"text" => Ok(Err("just words")?),
        b"parse" => Ok(str::from_utf8(request.body())?.parse::<u32>()?.to_string()),
        b"bad kind" => Err(RemoteError::new("Not A Kind", "still told"))?,
        _ => Err(RemoteError::new("too-much", "more than there is").into()),
    });
    let client = client();
    let error_of = |body: &str| match client.call(&queue, body) {
        Err(Error::Remote(error)) => (error.kind().to_owned(), error.message().to_owned()),
        other => panic!("{other:?}"),
    };
    for (body, kind, said) in [
        ("any", "too-much", "more than there is"),
        ("text", "internal", "just words"),
        ("parse", "internal", "invalid digit"),
        ("panic", "internal", "on purpose"),
        ("payload", "internal", "no message"),
        ("bad kind", "internal", "still told"),
    ] {
        let (found, message) = error_of(body);
        assert_eq!(found, kind, "{body}");
        assert!(message.contains(said), "{body}: {message}");
    }
    assert!(serving.stats().connected);
    let stats = serving.stop().unwrap();
    assert_eq!((stats.refused, stats.internal), (6, 5));
    assert!(!stats.connected);
}

#[test]
fn whatever_of_the_users_panics_is_answered_and_no_worker_is_lost() {
    struct Awkward(&'static str);
    impl From<Awkward> for Response {
        fn from(awkward: Awkward) -> Response {
            panic!("{}", awkward.0)
        }
    }
    #[derive(Debug)]
    struct Speechless;
    impl std::fmt::Display for Speechless {
        fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            panic!("no words")
        }
    }
    impl std::error::Error for Speechless {}
    let queue = unique("panics");
    let _serving = serve(&queue, 1, |request| match request.body() {
        b"error" => Err(Speechless.into()),
        _ => Ok(Awkward("no bytes")),
    });
    let client = client();
    for (body, said) in [("error", "no words"), ("result", "no bytes")].repeat(3) {
        match client.call(&queue, body) {
            Err(Error::Remote(error)) => assert!(error.message().contains(said), "{error}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_handler_that_blocks_keeps_its_own_worker_and_nothing_else() {
    let queue = unique("blocks");
    let (open, wait) = gate();
    let serving = serve(&queue, 2, move |request| {
        if request.body() == b"block" {
            wait();
        }
        Ok(())
    });
    let client = client();
    let mut calls = client.calls();
    calls.submit((), client.request(&queue).body("block"));
    for _ in 0..50 {
        client.call(&queue, "").unwrap();
    }
    assert_eq!(serving.stats().answered, 50);
    // The drain waits for it, and for nothing else.
    let stopper = serving.stopper();
    stopper.stop();
    drop(open);
    assert_eq!(serving.wait().unwrap().answered, 51);
    assert!(calls.next().unwrap().result.is_ok());
}

#[test]
fn a_request_has_a_deadline_of_its_own_which_says_what_was_waited_for() {
    let queue = unique("deadline");
    let (open, wait) = gate();
    let serving = serve(&queue, 1, move |_| {
        wait();
        Ok(())
    });
    let client = client();
    let second = Duration::from_secs(1);
    // On a busy machine, the broker may not say in time how the queue is.
    let status = (0..20).find_map(|_| {
        let began = Instant::now();
        let result = client.request(&queue).timeout(second).send("1");
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "not the client's"
        );
        match result {
            Err(Error::Timeout {
                after,
                waiting_for: WaitingFor::Answer { status, .. },
            }) if after == second => status,
            other => panic!("{other:?}"),
        }
    });
    assert_eq!(status.map(|status| status.consumers), Some(1));
    drop(open);
    serving.stop().unwrap();
}

#[test]
fn an_answer_that_came_in_time_is_one_however_late_its_caller_looks() {
    let queue = unique("late");
    let _serving = serve(&queue, 2, |request| {
        if request.body() == b"slow" {
            thread::sleep(Duration::from_millis(1500));
        }
        Ok(())
    });
    let client = client();
    let second = Duration::from_secs(1);
    let mut calls = client.calls();
    for body in ["quick", "slow"] {
        calls.submit(body, client.request(&queue).body(body).timeout(second));
    }
    thread::sleep(2 * second);
    // Both are there, and one came too late.
    let now = Instant::now();
    while let Some(answer) = calls.next_before(now) {
        match answer.result {
            Ok(_) => assert_eq!(answer.key, "quick"),
            Err(Error::Timeout { .. }) => assert_eq!(answer.key, "slow"),
            Err(other) => panic!("{other}"),
        }
        if answer.key == "quick" {
            assert!(answer.latency < second, "{:?}", answer.latency);
        }
    }
    assert!(calls.is_empty());
}

#[test]
fn many_calls_of_a_slow_iterator_are_answered_while_it_takes_its_time() {
    const CALLS: u64 = 30;
    let queue = unique("slow-iterator");
    let _serving = serve(&queue, 2, echo);
    let client = client();
    let asked = std::cell::Cell::new(0);
    let requests = (0..CALLS).map(|number| {
        asked.set(asked.get() + 1);
        thread::sleep(Duration::from_millis(50));
        let request = client.request(&queue).body(number.to_string());
        request.timeout(Duration::from_secs(1))
    });
    let mut given = 0;
    for answer in client.call_many(requests, 64) {
        assert_eq!(
            answer.result.unwrap().body,
            answer.key.to_string().as_bytes()
        );
        given += 1;
        if given == 1 {
            assert!(asked.get() < CALLS, "the first was given out at the end");
        }
    }
    assert_eq!(given, CALLS);
}

#[test]
fn many_calls_keep_their_window_full_while_their_caller_takes_its_time() {
    const CALLS: u32 = 20;
    let queue = unique("window");
    let _serving = serve(&queue, 4, echo);
    let client = client();
    let asked = std::cell::Cell::new(0);
    let requests = (0..CALLS).map(|_| {
        asked.set(asked.get() + 1);
        client.request(&queue)
    });
    let mut before = 0;
    for answer in client.call_many(requests, 4) {
        answer.result.unwrap();
        assert!(
            asked.get() > before || asked.get() == CALLS,
            "no other was sent for the one that was given out"
        );
        before = asked.get();
        thread::sleep(Duration::from_millis(20)); // meanwhile all are answered
    }
    assert_eq!(asked.get(), CALLS);
}

#[test]
fn calls_that_time_out_tell_each_of_its_own_queue() {
    let (busy, idle) = (unique("busy"), unique("idle"));
    let (open, wait) = gate();
    let serving = serve(&busy, 3, move |_| {
        wait();
        Ok(())
    });
    drop(serve(&idle, 1, echo)); // declares it, and is gone
    let client = client();
    let mut calls = client.calls();
    for queue in [&busy, &idle] {
        let request = client.request(queue).timeout(Duration::from_secs(1));
        calls.submit(queue.clone(), request);
    }
    for answer in calls {
        let expected = if answer.key == busy { 3 } else { 0 };
        match answer.result {
            Err(Error::Timeout {
                waiting_for:
                    WaitingFor::Answer {
                        queue,
                        status: Some(status),
                        ..
                    },
                ..
            }) => assert_eq!((queue, status.consumers), (answer.key, expected)),
            other => panic!("{}: {other:?}", answer.key),
        }
    }
    drop(open);
    serving.stop().unwrap();
}

#[test]
fn what_could_never_work_is_an_invalid_argument_at_once() {
    let client = client();
    let long = "q".repeat(256);
    for (request, said) in [
        (client.request(""), "queue's name is empty"),
        (client.request(&long), "256 bytes"),
        (client.request("q").timeout(Duration::ZERO), "timeout"),
        (
            client.request("q").retry(Retry::Unanswered(Duration::ZERO)),
            "sent again",
        ),
        (client.request("q").header("", "1"), "name is empty"),
        (client.request("q").header("x-error-kind", "1"), "reserved"),
        (client.request("q").content_type(&long), "content type"),
        (
            (0..16_000).fold(client.request("q"), |request, number| {
                request.header(format!("{number:x}"), "")
            }),
            "the headers have",
        ),
    ] {
        match request.send("") {
            Err(Error::InvalidArgument(reason)) => assert!(reason.contains(said), "{reason}"),
            other => panic!("{said}: {other:?}"),
        }
    }
    for server in [
        server("", 1),
        server(&long, 1),
        server("q", 0),
        server("q", 1).prefetch(0),
    ] {
        assert!(matches!(server.start(echo), Err(Error::InvalidArgument(_))));
    }
    assert_eq!(client.stats().connections, 0);
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let server = Server::new(format!("amqp://{address}")).unwrap();
    match server
        .connect_timeout(Duration::from_millis(300))
        .start(echo)
    {
        Err(Error::Unreachable { endpoint, .. }) => {
            assert!(endpoint.contains(&address.to_string()), "{endpoint}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_stopper_ends_a_start_that_is_still_connecting() {
    // A socket that accepts and never speaks.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::new(format!("amqp://{}", mute.local_addr().unwrap())).unwrap();
    let stopper = server.stopper();
    let starting = thread::spawn(move || server.connect_timeout(20 * PATIENCE).start(echo));
    let _connection = mute.accept().unwrap();
    stopper.stop();
    assert!(matches!(starting.join().unwrap(), Err(Error::Stopped)));
}

#[test]
fn a_stopper_in_another_thread_ends_the_wait_and_what_was_begun_is_answered() {
    let queue = unique("stopper");
    let (open, wait) = gate();
    let (begun, is_begun) = mpsc::channel();
    let serving = serve(&queue, 1, move |_| {
        let _ = begun.send(());
        wait();
        Ok("answered")
    });
    let stopper = serving.stopper();
    let call = thread::spawn({
        let queue = queue.clone();
        move || client().call(&queue, "")
    });
    is_begun.recv_timeout(PATIENCE).unwrap();
    let waiting = thread::spawn(move || serving.wait());
    stopper.stop();
    stopper.stop(); // changes nothing
    drop(open);
    assert_eq!(waiting.join().unwrap().unwrap().answered, 1);
    assert_eq!(call.join().unwrap().unwrap().body, b"answered");
}

#[test]
fn a_server_that_is_dropped_drains() {
    let queue = unique("dropped");
    let (begun, is_begun) = mpsc::channel();
    let serving = serve(&queue, 1, move |_| {
        let _ = begun.send(());
        thread::sleep(Duration::from_millis(300));
        Ok("answered")
    });
    let client = client();
    let mut calls = client.calls();
    calls.submit((), client.request(&queue));
    is_begun.recv_timeout(PATIENCE).unwrap();
    drop(serving);
    assert_eq!(calls.next().unwrap().result.unwrap().body, b"answered");
    let status = Status::of(url(), &queue, PATIENCE).unwrap();
    assert_eq!(status.queue.unwrap().consumers, 0);
}

#[test]
fn a_prefetched_request_whose_caller_has_given_up_is_not_begun() {
    let queue = unique("outlived");
    let (open, wait) = gate();
    let (begun, begins) = mpsc::channel();
    let serving = server(&queue, 1)
        .prefetch(10)
        .start(move |request: &Request| {
            let _ = begun.send(request.body().to_vec());
            wait();
            Ok(())
        })
        .unwrap();
    let client = client();
    let mut calls = client.calls();
    for call in 0..10 {
        let request = client.request(&queue).timeout(Duration::from_secs(1));
        calls.submit((), request.body(format!("{call}")));
    }
    for answer in calls {
        assert!(matches!(answer.result, Err(Error::Timeout { .. })));
    }
    assert_eq!(begins.recv_timeout(PATIENCE).unwrap(), b"0");
    // The broker has kept none: all ten are here.
    let status = Status::of(url(), &queue, PATIENCE).unwrap();
    assert_eq!(status.queue.unwrap().ready, 0);
    drop(open);
    client.call(&queue, "next").unwrap();
    assert_eq!(begins.recv_timeout(PATIENCE).unwrap(), b"next");
    let stats = serving.stop().unwrap();
    assert_eq!((stats.answered, stats.expired), (2, 9));
    let status = Status::of(url(), &queue, PATIENCE).unwrap();
    assert_eq!(status.queue.unwrap().ready, 0, "they were acknowledged");
}

#[test]
fn what_is_submitted_has_left_though_its_caller_does_not_look() {
    let queue = unique("submitted");
    let (begun, seen) = mpsc::channel();
    let serving = serve(&queue, 2, move |request| {
        let _ = begun.send(request.body().to_vec());
        Ok(request.body().to_vec())
    });
    let client = client();
    for round in 0..20 {
        let mut calls = client.calls();
        calls.extend(["a", "b", "c"].map(|body| (body, client.request(&queue).body(body))));
        // Others are there already when the next are submitted.
        thread::sleep(Duration::from_millis(20));
        assert!(calls.next().unwrap().result.is_ok());
        calls.submit("d", client.request(&queue).body("d"));
        calls.extend([("e", client.request(&queue).body("e"))]);
        let mut bodies: Vec<_> = (0..5)
            .map(|_| seen.recv_timeout(PATIENCE).unwrap())
            .collect();
        bodies.sort();
        assert_eq!(bodies, [b"a", b"b", b"c", b"d", b"e"], "round {round}");
    }
    serving.stop().unwrap();
}

#[test]
fn each_call_tries_as_hard_as_it_is_told() {
    let queue = unique("retry");
    let client = Client::builder(url())
        .unwrap()
        .retry(Retry::Never)
        .timeout(PATIENCE)
        .build()
        .unwrap();
    drop(serve(&queue, 1, echo)); // declares the queue
    let mut calls = client.calls();
    let hundred = Duration::from_millis(100);
    calls.submit(
        "again",
        client.request(&queue).retry(Retry::Unanswered(hundred)),
    );
    calls.submit("once", client.request(&queue));
    let limit = Instant::now() + 10 * hundred;
    assert!(calls.next_before(limit).is_none());
    let again = client.stats().republished;
    assert!((1..=5).contains(&again), "after 0.1, 0.3, 0.7 s: {again}");
    let status = Status::of(url(), &queue, PATIENCE).unwrap();
    assert_eq!(u64::from(status.queue.unwrap().ready), 2 + again);
}

#[test]
fn a_closed_client_ends_its_calls() {
    let queue = unique("closed");
    let (open, wait) = gate();
    let serving = serve(&queue, 1, move |_| {
        wait();
        Ok(())
    });
    let client = client();
    let call = thread::spawn({
        let (client, queue) = (client.clone(), queue.clone());
        move || client.call(&queue, "")
    });
    while client.stats().connections == 0 {
        thread::yield_now();
    }
    client.close();
    assert!(matches!(call.join().unwrap(), Err(Error::Closed)));
    assert!(matches!(client.call(&queue, ""), Err(Error::Closed)));
    drop(open);
    serving.stop().unwrap();
}

#[test]
fn a_status_tells_whether_somebody_serves() {
    let queue = unique("status");
    let endpoints: fibrpc::Endpoints = url().parse().unwrap();
    let before = Status::of(&endpoints, &queue, PATIENCE).unwrap();
    assert_eq!(before.queue, None);
    assert!(before.broker.starts_with("RabbitMQ "), "{}", before.broker);
    let serving = serve(&queue, 3, echo);
    let with_server = Status::of(&endpoints, &queue, PATIENCE)
        .unwrap()
        .queue
        .unwrap();
    assert_eq!((with_server.consumers, with_server.ready), (3, 0));
    serving.stop().unwrap();
}
