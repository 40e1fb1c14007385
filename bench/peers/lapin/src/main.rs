//! Tutorial six (RPC) in Rust with lapin on tokio: the server and the client of the benchmark.
//!
//! ```text
//! lapin-peer server --url URL --queue Q --workers W --prefetch P [--echo 1]
//! lapin-peer client --url URL --queue Q --requests N --warmup M --concurrency C --argument n
//!                                                                            or --size BYTES
//! ```
//!
//! With `amqps://`, `--ca FILE` names the authority that signed the broker's certificate; TLS is
//! rustls with ring, as in fibrpc.
//!
//! What makes it fast:
//!
//! - lapin sets TCP_NODELAY, and writes all frames it has with one system call, in a thread of
//!   its own. So it is enough to hand frames over without waiting for each one's write: a publish
//!   hands them over when its future is first polled ([`poll_once`]).
//! - All tasks share one thread (`current_thread`). There is nothing to compute in parallel at
//!   small n, and a wake-up across tokio's threads costs more than the work.

#[allow(dead_code)] // it has options for other peers, too
#[path = "../../common.rs"]
mod common;

use common::{CONTENT_TYPE, Options, REPLY_TIMEOUT, Run, arguments, die};
use futures_lite::StreamExt;
use futures_lite::future::poll_once;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::runtime::default_runtime;
use lapin::tcp::OwnedTLSConfig;
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer, Result};
use std::fs;
use std::process::exit;
use tokio::task::JoinSet;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (role, options) = arguments();
    let done = match role.as_str() {
        "server" => server(&options).await,
        "client" => client(&options).await,
        _ => die(&role, "neither server nor client"),
    };
    match done {
        // Without closing the connection: the broker notices.
        Ok(code) => exit(code),
        Err(error) => die(&role, &error.to_string()),
    }
}

async fn connect(options: &Options) -> Result<Connection> {
    let cert_chain = options
        .ca
        .as_ref()
        .map(|file| fs::read_to_string(file).unwrap_or_else(|error| die(file, &error.to_string())));
    let tls = OwnedTLSConfig {
        cert_chain,
        ..Default::default()
    };
    let (properties, runtime) = (ConnectionProperties::default(), default_runtime()?);
    Connection::connect_with_config(&options.url, properties, tls, runtime).await
}

async fn consume(channel: &Channel, queue: &ShortString, no_ack: bool) -> Result<Consumer> {
    let options = BasicConsumeOptions {
        no_ack,
        ..Default::default()
    };
    channel
        .basic_consume(queue.clone(), "".into(), options, FieldTable::default())
        .await
}

// --- Server --------------------------------------------------------------------------------------

async fn server(options: &Options) -> Result<i32> {
    let connection = connect(options).await?;
    let queue = ShortString::from(options.queue.as_str());
    let mut workers = JoinSet::new();
    for _ in 0..options.workers {
        let channel = connection.create_channel().await?;
        let transient = QueueDeclareOptions::default();
        channel
            .queue_declare(queue.clone(), transient, FieldTable::default())
            .await?;
        channel
            .basic_qos(options.prefetch, BasicQosOptions::default())
            .await?;
        let consumer = consume(&channel, &queue, false).await?;
        workers.spawn(work(channel, consumer, options.clone()));
    }
    println!(" [x] Awaiting RPC requests");
    match workers.join_next().await {
        Some(Ok(Err(error))) => Err(error),
        _ => die("server", "a worker ended"),
    }
}

async fn work(channel: Channel, mut requests: Consumer, options: Options) -> Result<()> {
    while let Some(request) = requests.next().await {
        let Delivery {
            delivery_tag,
            properties,
            data,
            ..
        } = request?;
        let reply_to = properties.reply_to().clone().unwrap_or_default();
        let mut reply = BasicProperties::default().with_content_type(CONTENT_TYPE.into());
        if let Some(id) = properties.correlation_id() {
            reply = reply.with_correlation_id(id.clone());
        }
        let body = options.answer(data);
        let publish = BasicPublishOptions::default();
        // This waits until the reply is written. It must: lapin lets methods such as the ack
        // overtake messages in its queue, and the ack is to come second.
        channel
            .basic_publish("".into(), reply_to, publish, &body, reply)
            .await?;
        // The ack need not have been written before the next request is looked at.
        poll_once(channel.basic_ack(delivery_tag, BasicAckOptions::default()))
            .await
            .transpose()?;
    }
    Ok(())
}

// --- Client --------------------------------------------------------------------------------------

async fn client(options: &Options) -> Result<i32> {
    let connection = connect(options).await?;
    let channel = connection.create_channel().await?;
    let own = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..Default::default()
    };
    let callback = channel
        .queue_declare("".into(), own, FieldTable::default())
        .await?;
    let mut replies = consume(&channel, callback.name(), true).await?;

    let caller = Caller {
        channel,
        queue: options.queue.as_str().into(),
        body: options.body(),
        properties: BasicProperties::default()
            .with_content_type(CONTENT_TYPE.into())
            .with_reply_to(callback.name().clone()),
    };
    caller
        .call(&mut replies, Run::start(0, options.warmup, options))
        .await?;
    let run = Run::start(options.warmup, options.requests, options);
    Ok(caller.call(&mut replies, run).await?.report())
}

struct Caller {
    channel: Channel,
    queue: ShortString,
    body: Vec<u8>,
    properties: BasicProperties,
}

impl Caller {
    async fn call(&self, replies: &mut Consumer, mut run: Run) -> Result<Run> {
        while !run.is_done() {
            while let Some(id) = run.next_id() {
                self.send(id).await?;
            }
            let Ok(reply) = tokio::time::timeout(REPLY_TIMEOUT, replies.next()).await else {
                die("client", "no reply came in time");
            };
            take(&mut run, reply)?;
            // All that have come in, so that the next requests can leave together, too.
            while let Some(reply) = poll_once(replies.next()).await {
                take(&mut run, reply)?;
            }
        }
        Ok(run)
    }

    async fn send(&self, id: String) -> Result<()> {
        let publish = self.channel.basic_publish(
            "".into(),
            self.queue.clone(),
            BasicPublishOptions::default(),
            &self.body,
            self.properties.clone().with_correlation_id(id.into()),
        );
        poll_once(publish).await.transpose().map(drop)
    }
}

fn take(run: &mut Run, reply: Option<Result<Delivery>>) -> Result<()> {
    let Some(reply) = reply.transpose()? else {
        die(
            "client",
            "the broker cancelled the callback queue's consumer",
        );
    };
    let id = reply.properties.correlation_id().as_ref();
    run.take(id.map(ShortString::as_str), &reply.data);
    Ok(())
}
