//! The RPC with bare amiquip: one connection, a channel and a thread for each worker. amiquip does not set TCP_NODELAY,
//! so the socket is opened here. See ../../README.md for the arguments.

use amiquip::{
    AmqpProperties, Auth, Channel, Connection, ConnectionOptions, ConnectionTuning, Consumer, ConsumerMessage,
    ConsumerOptions, Delivery, Publish, QueueDeclareOptions,
};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use std::{net, process, thread};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Between a thread and amiquip's: the default of 16 costs a fifth of the rate.
const MEM_CHANNEL_BOUND: usize = 256;

fn fib(n: u32) -> u64 {
    if n < 2 { n.into() } else { fib(n - 1) + fib(n - 2) }
}

fn connect(url: &str) -> Result<Connection> {
    let url = url::Url::parse(url)?;
    let socket = net::TcpStream::connect((url.host_str().unwrap_or("localhost"), url.port().unwrap_or(5672)))?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    let stream = mio::net::TcpStream::from_stream(socket)?;
    let tuning = ConnectionTuning::default().mem_channel_bound(MEM_CHANNEL_BOUND);
    Ok(Connection::insecure_open_stream(stream, ConnectionOptions::<Auth>::default(), tuning)?)
}

fn delivery(message: ConsumerMessage) -> Result<Delivery> {
    match message {
        ConsumerMessage::Delivery(delivery) => Ok(delivery),
        other => Err(format!("{other:?}").into()),
    }
}

fn work(channel: &Channel, queue: &str, ready: &std::sync::Barrier) -> Result<()> {
    channel.queue_declare(queue, QueueDeclareOptions::default())?;
    channel.qos(0, 1, false)?;
    let consumer = channel.basic_consume(queue, ConsumerOptions::default())?;
    ready.wait();
    loop {
        let request = delivery(consumer.receiver().recv()?)?;
        let n = std::str::from_utf8(&request.body)?.parse()?;
        let reply_to = request.properties.reply_to().clone().ok_or("no reply_to")?;
        let correlation_id = request.properties.correlation_id().clone().ok_or("no correlation_id")?;
        let properties = AmqpProperties::default()
            .with_correlation_id(correlation_id)
            .with_content_type("text/plain".to_owned());
        let answer = fib(n).to_string();
        channel.basic_publish("", Publish::with_properties(answer.as_bytes(), reply_to, properties))?;
        consumer.ack(request)?;
    }
}

fn server(url: &str, queue: &str, workers: usize) -> Result<()> {
    let mut connection = connect(url)?;
    let ready = std::sync::Arc::new(std::sync::Barrier::new(workers + 1));
    for _ in 0..workers {
        let channel = connection.open_channel(None)?;
        let (queue, ready) = (queue.to_owned(), std::sync::Arc::clone(&ready));
        thread::spawn(move || {
            eprintln!("{:?}", work(&channel, &queue, &ready));
            process::exit(1);
        });
    }
    ready.wait();
    println!("ready");
    loop {
        thread::park();
    }
}

fn run(
    channel: &Channel,
    queue: &str,
    callback: &str,
    replies: &Consumer<'_>,
    requests: usize,
    in_flight: usize,
) -> Result<f64> {
    let mut open = HashSet::new();
    let begin = Instant::now();
    let mut sent = 0;
    for answered in 0..requests {
        while sent < requests && sent - answered < in_flight {
            let properties = AmqpProperties::default()
                .with_correlation_id(sent.to_string())
                .with_reply_to(callback.to_owned())
                .with_content_type("text/plain".to_owned());
            channel.basic_publish("", Publish::with_properties(b"1", queue, properties))?;
            open.insert(sent);
            sent += 1;
        }
        let reply = delivery(replies.receiver().recv_timeout(Duration::from_secs(60))?)?;
        let id = reply.properties.correlation_id().as_ref().ok_or("no correlation_id")?;
        if !open.remove(&id.parse()?) || reply.body != b"1" {
            return Err("a wrong answer".into());
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}

fn client(url: &str, queue: &str, requests: usize, in_flight: usize) -> Result<()> {
    let mut connection = connect(url)?;
    let channel = connection.open_channel(None)?;
    let exclusive = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let callback = channel.queue_declare("", exclusive)?;
    let replies = callback.consume(ConsumerOptions { no_ack: true, ..ConsumerOptions::default() })?;
    run(&channel, queue, callback.name(), &replies, requests / 10 + 1, in_flight)?;
    println!("{:.6}", run(&channel, queue, callback.name(), &replies, requests, in_flight)?);
    // Dropping a consumer that is alive may end in an error; there is nothing left to do.
    process::exit(0);
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["server", url, queue, workers] => server(url, queue, workers.parse()?),
        ["client", url, queue, requests, in_flight] => client(url, queue, requests.parse()?, in_flight.parse()?),
        _ => Err("see bench/peers/README.md".into()),
    }
}
