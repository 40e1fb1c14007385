//! The RPC with lapin on tokio: one connection, a channel and a task for each worker. lapin sets TCP_NODELAY by itself.
//! See ../../README.md for the arguments.

use futures_lite::StreamExt;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use std::collections::HashSet;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn fib(n: u32) -> u64 {
    if n < 2 { n.into() } else { fib(n - 1) + fib(n - 2) }
}

async fn connect(url: &str) -> Result<Connection> {
    Ok(Connection::connect(url, ConnectionProperties::default()).await?)
}

async fn work(channel: Channel, mut requests: Consumer) -> Result<()> {
    while let Some(request) = requests.next().await {
        let request = request?;
        let n = std::str::from_utf8(&request.data)?.parse()?;
        let reply_to = request.properties.reply_to().clone().ok_or("no reply_to")?;
        let correlation_id = request.properties.correlation_id().clone().ok_or("no correlation_id")?;
        let properties = BasicProperties::default()
            .with_correlation_id(correlation_id)
            .with_content_type("text/plain".into());
        let answer = fib(n).to_string();
        // The publish is queued when this returns; what it returns is for publisher confirms.
        channel
            .basic_publish("".into(), reply_to, BasicPublishOptions::default(), answer.as_bytes(), properties)
            .await?;
        request.ack(BasicAckOptions::default()).await?;
    }
    Err("the channel is closed".into())
}

async fn server(url: &str, queue: &str, workers: usize) -> Result<()> {
    let connection = connect(url).await?;
    let mut tasks = Vec::new();
    for _ in 0..workers {
        let channel = connection.create_channel().await?;
        channel.queue_declare(queue.into(), QueueDeclareOptions::default(), FieldTable::default()).await?;
        channel.basic_qos(1, BasicQosOptions::default()).await?;
        let requests = channel
            .basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        tasks.push(tokio::spawn(work(channel, requests)));
    }
    println!("ready");
    for task in tasks {
        task.await??;
    }
    Ok(())
}

async fn run(
    channel: &Channel,
    queue: &str,
    callback: &str,
    replies: &mut Consumer,
    requests: usize,
    in_flight: usize,
) -> Result<f64> {
    let mut open = HashSet::new();
    let begin = Instant::now();
    let mut sent = 0;
    for answered in 0..requests {
        while sent < requests && sent - answered < in_flight {
            let properties = BasicProperties::default()
                .with_correlation_id(sent.to_string().into())
                .with_reply_to(callback.into())
                .with_content_type("text/plain".into());
            channel
                .basic_publish("".into(), queue.into(), BasicPublishOptions::default(), b"1", properties)
                .await?;
            open.insert(sent);
            sent += 1;
        }
        let reply = replies.next().await.ok_or("the channel is closed")??;
        let id = reply.properties.correlation_id().as_ref().ok_or("no correlation_id")?;
        if !open.remove(&id.as_str().parse()?) || reply.data != b"1" {
            return Err("a wrong answer".into());
        }
    }
    Ok(begin.elapsed().as_secs_f64())
}

async fn client(url: &str, queue: &str, requests: usize, in_flight: usize) -> Result<()> {
    let connection = connect(url).await?;
    let channel = connection.create_channel().await?;
    let exclusive = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare("".into(), exclusive, FieldTable::default()).await?;
    let callback = declared.name().as_str();
    let no_ack = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let mut replies = channel.basic_consume(callback.into(), "".into(), no_ack, FieldTable::default()).await?;
    run(&channel, queue, callback, &mut replies, requests / 10 + 1, in_flight).await?;
    println!("{:.6}", run(&channel, queue, callback, &mut replies, requests, in_flight).await?);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["server", url, queue, workers] => server(url, queue, workers.parse()?).await,
        ["client", url, queue, requests, in_flight] => client(url, queue, requests.parse()?, in_flight.parse()?).await,
        _ => Err("see bench/peers/README.md".into()),
    }
}
