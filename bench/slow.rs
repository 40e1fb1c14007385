//! A server that takes its time: answers fib(n) after so many milliseconds, and computes next to
//! nothing meanwhile.
//!
//! ```text
//! slow --url URL --queue Q --workers W --prefetch P --delay-ms N
//! ```
//!
//! `cargo run --release --example slow` builds and runs it.

#[allow(dead_code)] // it has options for others, too
#[path = "peers/common.rs"]
mod common;

use common::{Options, options};
use fibrpc::{Error, Request, Server};
use std::process::exit;
use std::thread;

fn main() {
    let options = options(std::env::args().skip(1));
    if let Err(error) = serve(options) {
        common::die("server", &error.to_string());
    }
    exit(0)
}

fn serve(options: Options) -> Result<(), Error> {
    let server = Server::new(&*options.url)?
        .queue(&options.queue)
        .workers(options.workers.into())
        .prefetch(options.prefetch);
    let serving = server.start(move |request: &Request| {
        thread::sleep(options.delay);
        Ok(options.answer(request.body().to_vec()))
    })?;
    println!(" [x] Awaiting RPC requests");
    serving.wait()?;
    Ok(())
}
