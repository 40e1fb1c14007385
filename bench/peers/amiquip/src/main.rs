//! Tutorial six (RPC) in Rust with amiquip alone: the server and the client of the benchmark.
//!
//! ```text
//! amiquip-peer server --url URL --queue Q --workers W --prefetch P
//! amiquip-peer client --url URL --queue Q --requests N --warmup M --concurrency C --argument n
//! ```
//!
//! What makes it fast:
//!
//! - amiquip never sets TCP_NODELAY. Here the socket is opened outside, with it.
//! - Between a thread and amiquip's I/O thread lies a queue of 16 messages unless one says
//!   otherwise; with 256, neither waits for the other.
//! - The server has one connection, and a thread with a channel of its own for each worker. That
//!   beats a connection each.

#[allow(dead_code)] // it has options for other peers, too
#[path = "../../common.rs"]
mod common;

use amiquip::{
    AmqpProperties, Auth, Channel, Connection, ConnectionOptions, ConnectionTuning, Consumer,
    ConsumerMessage, ConsumerOptions, Delivery, Publish, QueueDeclareOptions,
};
use common::{CONTENT_TYPE, Options, REPLY_TIMEOUT, Run, arguments, die};
use percent_encoding::percent_decode_str;
use std::error::Error;
use std::mem::take;
use std::net::TcpStream;
use std::process::exit;
use std::sync::mpsc;
use std::thread;
use url::Url;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How many messages may lie between a thread and amiquip's I/O thread.
const MEM_CHANNEL_BOUND: usize = 256;

fn main() {
    let (role, options) = arguments();
    let done = match role.as_str() {
        "server" => server(&options),
        "client" => client(&options),
        _ => die(&role, "neither server nor client"),
    };
    if let Err(error) = done {
        die(&role, &error.to_string());
    }
}

fn connect(options: &Options) -> Result<Connection> {
    let url = Url::parse(&options.url)?;
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let host = url.host_str().ok_or("--url names no host")?;
    let socket = TcpStream::connect((host, url.port().unwrap_or(5672)))?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    let vhost = decode(url.path().strip_prefix('/').unwrap_or("/"));
    let options = ConnectionOptions::default()
        .virtual_host(vhost)
        .auth(Auth::Plain {
            username: decode(url.username()),
            password: decode(url.password().unwrap_or_default()),
        });
    let tuning = ConnectionTuning::default().mem_channel_bound(MEM_CHANNEL_BOUND);
    let socket = mio::net::TcpStream::from_stream(socket)?;
    Ok(Connection::insecure_open_stream(socket, options, tuning)?)
}

fn delivery(message: ConsumerMessage) -> Result<Delivery> {
    match message {
        ConsumerMessage::Delivery(delivery) => Ok(delivery),
        other => Err(format!("the consumer has ended: {other:?}").into()),
    }
}

// --- Server --------------------------------------------------------------------------------------

fn server(options: &Options) -> Result<()> {
    let mut connection = connect(options)?;
    let (ready, others) = mpsc::channel();
    for _ in 0..options.workers {
        let channel = connection.open_channel(None)?;
        let (options, ready) = (options.clone(), ready.clone());
        thread::spawn(move || {
            // It ends only by failing.
            if let Err(error) = work(&channel, &options, &ready) {
                die("worker", &error.to_string());
            }
        });
    }
    for _ in 0..options.workers {
        others.recv()?;
    }
    println!(" [x] Awaiting RPC requests");
    loop {
        thread::park(); // and keep the connection
    }
}

fn work(channel: &Channel, options: &Options, ready: &mpsc::Sender<()>) -> Result<()> {
    channel.queue_declare(options.queue.as_str(), QueueDeclareOptions::default())?;
    channel.qos(0, options.prefetch, false)?;
    let requests = channel.basic_consume(options.queue.as_str(), ConsumerOptions::default())?;
    ready.send(())?;
    for message in requests.receiver() {
        let mut request = delivery(message)?;
        let mut properties = AmqpProperties::default().with_content_type(CONTENT_TYPE.into());
        if let Some(id) = request.properties.correlation_id() {
            properties = properties.with_correlation_id(id.clone());
        }
        let reply_to = request.properties.reply_to().clone().unwrap_or_default();
        let body = options.answer(take(&mut request.body));
        let reply = Publish::with_properties(&body, reply_to, properties);
        channel.basic_publish("", reply)?;
        requests.ack(request)?;
    }
    Err("the connection is gone".into())
}

// --- Client --------------------------------------------------------------------------------------

fn client(options: &Options) -> Result<()> {
    let mut connection = connect(options)?;
    let channel = connection.open_channel(None)?;
    let own = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..Default::default()
    };
    let callback = channel.queue_declare("", own)?;
    let no_ack = ConsumerOptions {
        no_ack: true,
        ..Default::default()
    };
    let replies = channel.basic_consume(callback.name(), no_ack)?;

    let caller = Caller {
        channel: &channel,
        replies: &replies,
        queue: &options.queue,
        body: options.body(),
        properties: AmqpProperties::default()
            .with_content_type(CONTENT_TYPE.into())
            .with_reply_to(callback.name().to_owned()),
    };
    caller.call(Run::start(0, options.warmup, options))?;
    let code = caller
        .call(Run::start(options.warmup, options.requests, options))?
        .report();
    // Without unwinding: dropping a consumer with amiquip can fail, and the broker sees the
    // connection's end either way.
    exit(code)
}

struct Caller<'a> {
    channel: &'a Channel,
    replies: &'a Consumer<'a>,
    queue: &'a str,
    body: Vec<u8>,
    properties: AmqpProperties,
}

impl Caller<'_> {
    fn call(&self, mut run: Run) -> Result<Run> {
        let receiver = self.replies.receiver();
        while !run.is_done() {
            while let Some(id) = run.next_id() {
                let properties = self.properties.clone().with_correlation_id(id);
                let request = Publish::with_properties(&self.body, self.queue, properties);
                self.channel.basic_publish("", request)?;
            }
            let first = receiver.recv_timeout(REPLY_TIMEOUT)?;
            // With it all that have come in, so that the next requests can leave together, too.
            for message in std::iter::once(first).chain(receiver.try_iter()) {
                let reply = delivery(message)?;
                run.take(reply.properties.correlation_id().as_deref(), &reply.body);
            }
        }
        Ok(run)
    }
}
