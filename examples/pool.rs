//! One client, many threads: they share its connection, and each waits for its own answers only.
//!
//! ```text
//! scripts/broker with-broker cargo run --release --example pool
//! ```

use fibrpc::{Client, Request, Server};
use std::thread;
use std::time::{Duration, Instant};

const THREADS: u32 = 16;
const CALLS: u32 = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = std::env::var("AMQP_URL").unwrap_or("amqp://localhost".to_owned());
    let serving = Server::new(&broker)?
        .queue("pool")
        .start(|request: &Request| Ok(request.body().to_vec()))?;

    let client = Client::builder(&broker)?
        .timeout(Duration::from_secs(10))
        .build()?;
    let began = Instant::now();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            // A clone is a handle on the same connection.
            let client = client.clone();
            scope.spawn(move || {
                for call in 0..CALLS {
                    let request = format!("{thread}/{call}");
                    match client.call("pool", request.as_str()) {
                        Ok(reply) => assert_eq!(reply.body, request.as_bytes()),
                        Err(error) => eprintln!("{request}: {error}"),
                    }
                }
            });
        }
    });
    let rate = f64::from(THREADS * CALLS) / began.elapsed().as_secs_f64();
    println!("{THREADS} threads, {CALLS} calls each: {rate:.0} calls per second");
    println!("{} connection", client.stats().connections);

    serving.stop()?;
    Ok(())
}
