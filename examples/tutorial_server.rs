//! RabbitMQ's sixth tutorial on bare amiquip: the server.
//!
//! ```text
//! scripts/broker with-broker cargo run --example tutorial_server
//! ```
//!
//! `docs/tutorial.md` explains it line by line. It is as naive as the tutorial, on purpose: whatever
//! goes wrong ends it. `docs/ten-ways-it-breaks.md` shows what does, and the library what to do.

mod tutorial;

use amiquip::{AmqpProperties, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions};
use std::error::Error;

/// Slow on purpose: it stands for real work.
fn fib(n: u32) -> u64 {
    if n < 2 {
        n.into()
    } else {
        fib(n - 1) + fib(n - 2)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut connection = tutorial::connect()?;
    let channel = connection.open_channel(None)?;

    // Not durable: the queue is gone when the broker restarts.
    let queue = channel.queue_declare(tutorial::queue(), QueueDeclareOptions::default())?;
    // One request at a time: the broker gives us the next when we have acknowledged this one.
    channel.qos(0, 1, false)?;
    let requests = queue.consume(ConsumerOptions::default())?;
    println!(" [x] Awaiting RPC requests");

    for message in requests.receiver() {
        let ConsumerMessage::Delivery(request) = message else {
            return Err(format!("no more requests: {message:?}").into());
        };
        let n: u32 = str::from_utf8(&request.body)?.parse()?;
        println!(" [.] fib({n})");
        let answer = fib(n).to_string();

        // The request says where its caller waits, and by which mark it will know the answer.
        let caller = &request.properties;
        let reply_to = caller.reply_to().clone().ok_or("there is no reply_to")?;
        let id = caller.correlation_id().clone().unwrap_or_default();
        let properties = AmqpProperties::default().with_correlation_id(id);
        let reply = Publish::with_properties(answer.as_bytes(), reply_to, properties);
        channel.basic_publish("", reply)?;

        // Not before: if we die before this line, the broker gives the request to another server.
        requests.ack(request)?;
    }
    Err("no more requests: the connection is gone".into())
}
