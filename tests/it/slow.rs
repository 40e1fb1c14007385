//! What a slow line does to us: a large message takes seconds to leave.

use crate::support::{Caller, Line, PATIENCE, PrivateBroker, client, eventually, unique};
use fibrpc::{Calls, Error, HandlerError, Request, Server};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// A line that takes so much, in bytes a second, that a write always makes progress.
const STEADY: usize = 50 << 20;

/// A line that takes so little that the kernel's buffers are full.
const FULL: usize = 10 << 20;

/// How long a line is still when a message begins to leave, for the message to be left to the I/O
/// thread.
const STILL: Duration = Duration::from_millis(100);

/// A request that takes 2.4 s to leave by a steady line, and longer where the line waits for a
/// processor.
const LARGE: usize = 120 << 20;

/// A broker that takes it: RabbitMQ 4 would not, by itself.
fn broker() -> PrivateBroker {
    PrivateBroker::configured("max_message_size = 134217728\n", &[])
}

/// Submits a large request; and when that began.
fn submit_large<'c>(caller: &'c Caller, timeout: Duration) -> (Calls<'c, ()>, Instant) {
    let request = caller.request().body(vec![b'1'; LARGE]);
    let mut calls = caller.client.calls();
    let began = Instant::now();
    calls.submit((), request.timeout(timeout));
    (calls, began)
}

/// How long a large request has taken to leave.
fn time_to_leave(line: &Line, began: Instant) -> Duration {
    eventually("it has left", || line.passed() >= LARGE);
    began.elapsed()
}

#[test]
fn a_large_request_holds_neither_its_sender_nor_its_deadline() {
    let broker = broker();
    let line = Line::slow(&broker.url, STEADY, Duration::ZERO);
    let queue = unique("slow-sender");
    let server = Server::new(&broker.url).unwrap().queue(&queue).workers(1);
    let _serving = server.start(|_| Ok("done")).unwrap();
    let caller = client(&line.url, &queue, PATIENCE);
    caller.call("").unwrap();
    let (calls, began) = submit_large(&caller, Duration::from_secs(1));
    let submitted = began.elapsed();
    for answer in calls {
        match answer.result {
            Err(Error::Timeout { .. }) => {}
            other => panic!("it cannot have left in time: {other:?}"),
        }
    }
    let ended = began.elapsed();
    let left = time_to_leave(&line, began);
    assert!(submitted < left * 3 / 4, "{submitted:?} of {left:?}");
    assert!(ended < left, "{ended:?} of {left:?}");
}

#[test]
fn answers_come_while_a_large_request_leaves() {
    let broker = broker();
    let line = Line::slow(&broker.url, STEADY, STILL);
    let queue = unique("slow-request");
    let (begun, told) = mpsc::channel();
    let work = move |request: &Request| {
        let _ = begun.send(());
        let time = std::str::from_utf8(request.body()).unwrap();
        thread::sleep(Duration::from_millis(time.parse().unwrap_or(0)));
        Ok("done")
    };
    let server = Server::new(&broker.url).unwrap().queue(&queue).workers(3);
    let _serving = server.start(work).unwrap();
    let caller = client(&line.url, &queue, PATIENCE);
    let call = |time: &str| {
        let (caller, time) = (caller.clone(), time.to_owned());
        let call = thread::spawn(move || caller.call(time).map(|_| Instant::now()));
        told.recv_timeout(PATIENCE).unwrap();
        call
    };
    // The first one reads for both, and leaves. Then nobody reads but the I/O thread.
    let (first, second) = (call("500"), call("1000"));
    let (_calls, began) = submit_large(&caller, PATIENCE);
    let answered = [first, second].map(|call| call.join().unwrap().unwrap() - began);
    let left = time_to_leave(&line, began);
    for answered in answered {
        assert!(answered < left, "{answered:?} of {left:?}");
    }
}

#[test]
fn a_large_reply_holds_up_no_other_worker() {
    let broker = broker();
    let line = Line::slow(&broker.url, FULL, STILL);
    let queue = unique("slow-reply");
    let begun = Arc::new(AtomicUsize::new(0));
    let answer = {
        let begun = Arc::clone(&begun);
        move |request: &Request| -> Result<Vec<u8>, HandlerError> {
            begun.fetch_add(1, Ordering::Relaxed);
            Ok(match request.body() {
                b"large" => vec![1; LARGE / 2], // 6 s
                small => small.to_vec(),
            })
        }
    };
    let server = Server::new(&*line.url).unwrap().queue(&queue);
    let _serving = server.workers(2).prefetch(16).start(answer).unwrap();
    let caller = client(&broker.url, &queue, PATIENCE);
    let mut calls = caller.client.calls();
    calls.submit("large", caller.request().body("large"));
    eventually("its reply begins to leave", || line.passed() > 1 << 20);
    // The acknowledgements wait behind the large reply, so there are no more than are prefetched.
    for _ in 0..20 {
        calls.submit("small", caller.request().body("small"));
    }
    eventually("all have begun", || begun.load(Ordering::Relaxed) == 21);
    assert!(line.passed() < LARGE / 2, "the large reply still leaves");
    for answer in calls {
        let len = answer.result.unwrap().body.len();
        assert_eq!(len, if answer.key == "large" { LARGE / 2 } else { 5 });
    }
}

#[test]
fn a_server_that_is_stopped_lets_a_large_reply_leave() {
    let broker = broker();
    let line = Line::slow(&broker.url, FULL, STILL);
    let queue = unique("slow-drain");
    let server = Server::new(&*line.url).unwrap().queue(&queue).workers(2);
    let serving = server.start(|_| Ok(vec![1; LARGE / 2])).unwrap();
    let caller = client(&broker.url, &queue, PATIENCE);
    let call = thread::spawn({
        let caller = caller.clone();
        move || caller.call("").map(|body| body.len())
    });
    eventually("its reply begins to leave", || line.passed() > 1 << 20);
    assert_eq!(serving.stop().unwrap().answered, 1);
    assert_eq!(call.join().unwrap().unwrap(), LARGE / 2);
}
