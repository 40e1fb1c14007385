//! Threads that share one [`fibrpc::Client`], each of which makes one call after the other.
//!
//! ```text
//! threads --url URL --queue Q --requests N --warmup M --threads T
//! ```
//!
//! All together make M calls and then N that count, of fib(1), and every answer is checked. Prints
//! the line of JSON that the peers print. `cargo run --release --example threads` builds and runs it.

#[allow(dead_code)] // it has options for others, too
#[path = "peers/common.rs"]
mod common;

use common::{Options, die, options, report};
use fibrpc::Client;
use std::process::exit;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

fn main() {
    let options = options(std::env::args().skip(1));
    let client = Client::new(&options.url).unwrap_or_else(|error| die("--url", &error.to_string()));
    let (warmed_up, made) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // The main thread is one more, for its clock.
    let ready = Barrier::new(options.threads + 1);
    let (began, runs) = thread::scope(|scope| {
        let thread = || {
            run(&client, &options, &warmed_up, options.warmup);
            ready.wait();
            run(&client, &options, &made, options.requests)
        };
        let threads: Vec<_> = (0..options.threads).map(|_| scope.spawn(thread)).collect();
        ready.wait();
        let began = Instant::now();
        let runs: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        (began, runs)
    });
    let time = began.elapsed();
    let (mut ok, mut latencies) = (0, Vec::with_capacity(options.requests));
    for run in runs {
        let (right, times) = run.unwrap_or_else(|_| die("thread", "it panicked"));
        ok += right;
        latencies.extend(times);
    }
    exit(report(ok, time, latencies))
}

/// One thread's share of the calls: one after the other until all threads together have made so
/// many. How many were answered right, and how long each took.
fn run(
    client: &Client,
    options: &Options,
    made: &AtomicUsize,
    calls: usize,
) -> (usize, Vec<Duration>) {
    let (mut ok, mut latencies) = (0, Vec::new());
    while made.fetch_add(1, Ordering::Relaxed) < calls {
        let sent = Instant::now();
        match client.call(&options.queue, "1") {
            Ok(reply) => ok += usize::from(reply.body == b"1"),
            Err(error) => die("call", &error.to_string()),
        }
        latencies.push(sent.elapsed());
    }
    (ok, latencies)
}
