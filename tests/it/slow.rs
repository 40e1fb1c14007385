//! What a slow line does to us: a large message takes seconds to leave.

use crate::support::{PATIENCE, SlowLine, client, eventually, local, unique, url};
use fibrpc::{Error, HandlerError, Request, Server};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How much a line takes, in bytes a second.
const RATE: usize = 2 << 20;

/// A message that takes several seconds to leave: far longer than the kernel's buffers hide.
const LARGE: usize = 15 << 20;

fn leaving_time() -> Duration {
    Duration::from_secs((LARGE / RATE) as u64)
}

#[test]
fn a_large_request_holds_up_neither_its_sender_nor_its_deadline_nor_what_comes_back() {
    let line = SlowLine::start(&url(), RATE);
    let queue = unique("slow-request");
    let (begun, told) = mpsc::channel();
    let work = move |request: &Request| {
        let _ = begun.send(());
        let time = std::str::from_utf8(request.body()).unwrap();
        let time = time.parse().unwrap_or(0);
        thread::sleep(Duration::from_millis(time));
        Ok("done")
    };
    let _serving = local(&queue, |server| server.workers(3), work);
    let caller = client(&line.url, &queue, PATIENCE);
    let call = |time: &str| {
        let (caller, time) = (caller.clone(), time.to_owned());
        let call = thread::spawn(move || caller.call(time).map(|_| Instant::now()));
        told.recv_timeout(PATIENCE).unwrap();
        call
    };
    // The first one reads for both, and leaves. Then nobody reads but the I/O thread.
    let first = call("500");
    let second = call("1500");
    let large = caller.request().body(vec![b'1'; LARGE]);
    let mut calls = caller.client.calls();
    let began = Instant::now();
    calls.submit((), large.timeout(Duration::from_secs(2)));
    assert!(
        began.elapsed() < leaving_time() / 4,
        "{:?}",
        began.elapsed()
    );
    for call in [first, second] {
        let answered = call.join().unwrap().unwrap() - began;
        assert!(answered < leaving_time() / 2, "{answered:?}");
    }
    match calls.next().unwrap().result {
        Err(Error::Timeout { .. }) => {}
        other => panic!("it cannot have left in time: {other:?}"),
    }
    assert!(
        began.elapsed() < leaving_time() / 2,
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn a_large_reply_holds_up_no_other_worker() {
    let line = SlowLine::start(&url(), RATE);
    let queue = unique("slow-reply");
    let begun = Arc::new(AtomicUsize::new(0));
    let answer = {
        let begun = Arc::clone(&begun);
        move |request: &Request| -> Result<Vec<u8>, HandlerError> {
            begun.fetch_add(1, Ordering::Relaxed);
            Ok(match request.body() {
                b"large" => vec![1; LARGE],
                small => small.to_vec(),
            })
        }
    };
    let server = Server::new(&*line.url).unwrap().queue(&queue);
    let _serving = server.workers(2).prefetch(16).start(answer).unwrap();
    let caller = client(&url(), &queue, PATIENCE);
    let mut calls = caller.client.calls();
    calls.submit("large", caller.request().body("large"));
    eventually("it begins", || begun.load(Ordering::Relaxed) == 1);
    // The acknowledgements wait behind the large reply, so there are no more than are prefetched.
    for _ in 0..20 {
        calls.submit("small", caller.request().body("small"));
    }
    eventually("all have begun", || begun.load(Ordering::Relaxed) == 21);
    while let Some(early) = calls.next_before(Instant::now()) {
        assert_eq!(early.key, "small", "the large reply has left already");
    }
    for answer in calls {
        let len = answer.result.unwrap().body.len();
        assert_eq!(len, if answer.key == "large" { LARGE } else { 5 });
    }
}
