//! RabbitMQ's sixth tutorial on bare amiquip: the client. It asks for each number in turn.
//!
//! ```text
//! AMQP_URL=... cargo run --example tutorial_client 30
//! ```
//!
//! `docs/tutorial.md` explains it line by line. It is as naive as the tutorial, on purpose: it waits
//! for ever, and whatever goes wrong ends it. `docs/ten-ways-it-breaks.md` shows what does.

mod tutorial;

use amiquip::{AmqpProperties, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions};
use std::env;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = env::args().skip(1);
    if numbers.len() == 0 {
        return Err("usage: tutorial_client N...".into());
    }
    let mut connection = tutorial::connect()?;
    let channel = connection.open_channel(None)?;

    // The callback queue: the broker makes up a name; it is ours alone, and gone when we are.
    let ours_alone = QueueDeclareOptions {
        exclusive: true,
        ..Default::default()
    };
    let callback = channel.queue_declare("", ours_alone)?;
    let no_ack = ConsumerOptions {
        no_ack: true,
        ..Default::default()
    };
    let replies = callback.consume(no_ack)?;

    for n in numbers {
        println!(" [x] Requesting fib({n})");
        // A mark that no other call has: the server copies it into the reply.
        let id = format!("{:032x}", rand::random::<u128>());
        let properties = AmqpProperties::default()
            .with_reply_to(callback.name().to_owned())
            .with_correlation_id(id.clone());
        let request = Publish::with_properties(n.as_bytes(), tutorial::queue(), properties);
        channel.basic_publish("", request)?;

        let reply = loop {
            match replies.receiver().recv()? {
                ConsumerMessage::Delivery(reply)
                    if reply.properties.correlation_id().as_ref() == Some(&id) =>
                {
                    break reply;
                }
                ConsumerMessage::Delivery(_) => {} // not the answer to this call: drop it
                ended => return Err(format!("no more replies: {ended:?}").into()),
            }
        };
        println!(" [.] Got {}", str::from_utf8(&reply.body)?);
    }
    Ok(connection.close()?)
}
