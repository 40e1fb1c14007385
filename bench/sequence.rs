//! One call after the other: a [`fibrpc::Client`] beside a bare loop over amiquip, in turn,
//! against the same server. Prints calls per second, the medians of several rounds, and the ratio.
//!
//! ```console
//! $ scripts/broker with-broker cargo run --release --example sequence
//! ```

use amiquip::{
    AmqpProperties, Auth, Connection, ConnectionOptions, ConnectionTuning, ConsumerMessage,
    ConsumerOptions, Publish, QueueDeclareOptions,
};
use fibrpc::{Client, Request, Server};
use std::error::Error;
use std::net::TcpStream;
use std::time::Instant;
use url::Url;

/// Rounds of each, and calls in a round.
const ROUNDS: usize = 11;
const CALLS: u32 = 2000;

const QUEUE: &str = "fibrpc.sequence";

fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::var("AMQP_URL").map_err(|_| "AMQP_URL is not set; see scripts/broker")?;
    let serving = Server::new(&url)?
        .queue(QUEUE)
        .workers(4)
        .start(|request: &Request| Ok(request.body().to_vec()))?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(client(&url)?);
        bare.push(bare_loop(&url)?);
    }
    let (ours, bare) = (median(ours), median(bare));
    println!("fibrpc::Client     {ours:6.0} calls/s");
    println!("bare amiquip loop  {bare:6.0} calls/s");
    println!("ratio              {:6.2}", ours / bare);
    serving.stop()?;
    Ok(())
}

fn client(url: &str) -> Result<f64, Box<dyn Error>> {
    let client = Client::new(url)?;
    client.call(QUEUE, "1")?; // connects
    let began = Instant::now();
    for _ in 0..CALLS {
        assert_eq!(client.call(QUEUE, "1")?.body, b"1");
    }
    Ok(f64::from(CALLS) / began.elapsed().as_secs_f64())
}

/// No deadlines, no retries, no errors: what the library itself can do, with nodelay.
fn bare_loop(url: &str) -> Result<f64, Box<dyn Error>> {
    let url = Url::parse(url)?;
    let socket = TcpStream::connect((
        url.host_str().unwrap_or("localhost"),
        url.port().unwrap_or(5672),
    ))?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    let mut connection = Connection::insecure_open_stream(
        mio::net::TcpStream::from_stream(socket)?,
        ConnectionOptions::<Auth>::default(),
        ConnectionTuning::default().mem_channel_bound(256),
    )?;
    let channel = connection.open_channel(None)?;
    let exclusive = QueueDeclareOptions {
        exclusive: true,
        ..QueueDeclareOptions::default()
    };
    let callback = channel.queue_declare("", exclusive)?;
    let no_ack = ConsumerOptions {
        no_ack: true,
        ..ConsumerOptions::default()
    };
    let consumer = callback.consume(no_ack)?;
    let began = Instant::now();
    for id in 0..CALLS {
        let properties = AmqpProperties::default()
            .with_content_type("text/plain".to_owned())
            .with_correlation_id(id.to_string())
            .with_reply_to(callback.name().to_owned());
        channel.basic_publish("", Publish::with_properties(b"1", QUEUE, properties))?;
        match consumer.receiver().recv()? {
            ConsumerMessage::Delivery(reply) => assert_eq!(reply.body, b"1"),
            other => panic!("expected a reply, got {other:?}"),
        }
    }
    let rate = f64::from(CALLS) / began.elapsed().as_secs_f64();
    consumer.cancel()?;
    while let Ok(ConsumerMessage::Delivery(_)) = consumer.receiver().recv() {}
    Ok(rate)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
