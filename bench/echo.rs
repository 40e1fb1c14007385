//! A peer as those in `bench/peers`, on fibrpc's public interface: bodies of any size, and answers
//! that take their time.
//!
//! ```text
//! echo server --url URL --queue Q --workers W --prefetch P [--echo 1] [--delay-ms N]
//! echo client --url URL --queue Q --requests N --warmup M --concurrency C --argument n
//!                                                                      or --size BYTES
//! ```
//!
//! With `--echo 1` the server replies with the request's body, otherwise with fib(n); it waits N ms
//! before it does. With `amqps://`, `--ca FILE` names the authority that signed the broker's
//! certificate. `cargo run --release --example echo` builds and runs it.

#[allow(dead_code)] // it has options for other peers, too
#[path = "peers/common.rs"]
mod common;

use common::{Options, Run, arguments, die};
use fibrpc::{Answer, Client, Endpoints, Error, Request, Server, TlsOptions};
use std::process::exit;
use std::thread;
use std::time::Instant;

fn main() {
    let (role, options) = arguments();
    let done = match role.as_str() {
        "server" => server(options),
        "client" => client(&options),
        _ => die(&role, "neither server nor client"),
    };
    match done {
        Ok(code) => exit(code),
        Err(error) => die(&role, &error.to_string()),
    }
}

fn brokers(options: &Options) -> Result<Endpoints, Error> {
    let brokers: Endpoints = options.url.parse()?;
    Ok(match &options.ca {
        Some(file) => brokers.with_tls(TlsOptions::new().ca_file(file)),
        None => brokers,
    })
}

fn server(options: Options) -> Result<i32, Error> {
    let server = Server::new(brokers(&options)?)?
        .queue(&options.queue)
        .workers(options.workers.into())
        .prefetch(options.prefetch);
    let serving = server.start(move |request: &Request| {
        if !options.delay.is_zero() {
            thread::sleep(options.delay);
        }
        Ok(options.answer(request.body().to_vec()))
    })?;
    println!(" [x] Awaiting RPC requests");
    serving.wait()?;
    Ok(0)
}

fn client(options: &Options) -> Result<i32, Error> {
    let client = Client::new(brokers(options)?)?;
    call(&client, options, Run::start(0, options.warmup, options));
    let run = Run::start(options.warmup, options.requests, options);
    Ok(call(&client, options, run).report())
}

fn call(client: &Client, options: &Options, mut run: Run) -> Run {
    let body = options.body();
    let mut calls = client.calls();
    while !run.is_done() {
        let mut requests = Vec::new();
        while let Some(id) = run.next_id() {
            requests.push((id, client.request(&options.queue).body(&*body)));
        }
        calls.extend(requests);
        let Some(answer) = calls.next() else {
            die("client", "a call had no answer");
        };
        take(&mut run, answer);
        // What has come in with it.
        while let Some(answer) = calls.next_before(Instant::now()) {
            take(&mut run, answer);
        }
    }
    run
}

fn take(run: &mut Run, answer: Answer<String>) {
    match answer.result {
        Ok(reply) => run.take(Some(&answer.key), &reply.body),
        Err(error) => die("client", &error.to_string()),
    }
}
