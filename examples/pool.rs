//! One client, many threads: they share its connection, and each waits for its own answers only.
//!
//! ```text
//! scripts/broker with-broker cargo run --release --example pool
//! ```

use crossbeam_channel::bounded;
use fibrpc::{Client, ClientConfig, Endpoints, Server, ServerConfig};
use std::error::Error;
use std::time::{Duration, Instant};
use std::{env, thread};

const THREADS: u32 = 16;
const CALLS: u32 = 1_000;

fn main() -> Result<(), Box<dyn Error>> {
    let endpoints = match env::var("AMQP_URL") {
        Ok(url) => url.parse()?,
        Err(_) => Endpoints::default(),
    };
    let mut config = ServerConfig::default();
    config.endpoints = endpoints.clone();
    config.queue = "pool".to_owned();
    let server = Server::new(config)?;
    let (stop, stopped) = bounded::<()>(0);
    let serving = thread::spawn(move || server.run(|request| Ok(request.body), || (), stopped));

    let mut config = ClientConfig::default();
    config.endpoints = endpoints;
    config.queue = "pool".to_owned();
    config.timeout = Duration::from_secs(10);
    // The server may still be about to declare the queue.
    config.wait_for_server = true;
    let client = Client::new(config)?;
    let began = Instant::now();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            // A clone is a handle on the same connection.
            let client = client.clone();
            scope.spawn(move || {
                for call in 0..CALLS {
                    let request = format!("{thread}/{call}").into_bytes();
                    match client.call(&request) {
                        Ok(answer) => assert_eq!(answer, request),
                        Err(error) => eprintln!("{thread}/{call}: {error}"),
                    }
                }
            });
        }
    });
    let rate = f64::from(THREADS * CALLS) / began.elapsed().as_secs_f64();
    println!("{THREADS} threads, {CALLS} calls each: {rate:.0} calls per second");

    drop(stop);
    serving.join().expect("the server does not panic")?;
    Ok(())
}
