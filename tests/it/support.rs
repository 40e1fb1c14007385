//! What the tests need: the broker, the binary as a process, and a bare AMQP peer.
//!
//! A broker is required. Without one every test fails, and says how to get one.

use amiquip::{
    AmqpProperties, Channel, ConsumerMessage, ConsumerOptions, Publish, QueueDeclareOptions,
};
use crossbeam_channel::{Receiver, unbounded};
use fibrpc::{
    Client, ClientBuilder, Error, HandlerError, Request, Response, Server, ServerStats, Serving,
};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything in a test may take before it counts as hung. Generous: machines are shared.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The broker that the tests share.
pub fn url() -> String {
    std::env::var("FIBRPC_TEST_URL").unwrap_or_else(|_| {
        panic!(
            "these tests need a RabbitMQ broker: run `make test`, which starts one, or name one \
             in FIBRPC_TEST_URL"
        )
    })
}

/// A queue name that no other test uses, in this run or another on the same broker.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("fibrpc.test.{name}.{}.{count}", std::process::id())
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The binary under test, against a broker, without anything from the tester's environment.
pub fn fibrpc(url: &str, queue: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fibrpc"));
    command
        .env_remove("RUST_LOG")
        .env("AMQP_URL", url)
        .env("FIBRPC_QUEUE", queue)
        .stdin(Stdio::null());
    command
}

/// Runs a command to its end, and kills it if it does not come to one.
pub fn run(command: &mut Command) -> Finished {
    let began = Instant::now();
    let mut process = Process::spawn(command);
    let status = process.wait(PATIENCE);
    let took = began.elapsed();
    let (stdout, stderr) = process.output();
    Finished {
        status,
        stdout,
        stderr,
        took,
    }
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Finished {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

/// A process whose output is read as it comes. Killed when dropped.
pub struct Process {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Process {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        let stdout = lines_of(child.stdout.take().unwrap());
        let stderr = lines_of(child.stderr.take().unwrap());
        Process {
            child,
            stdout,
            stderr,
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its stdin, if that was piped; closed when dropped.
    pub fn stdin(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("stdin is piped")
    }

    /// The next line of stdout.
    pub fn line(&self) -> String {
        self.stdout.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            panic!(
                "no line on stdout; stderr: {:?}",
                self.stderr.try_iter().collect::<Vec<_>>()
            )
        })
    }

    /// Reads stdout up to a line that contains `text`.
    pub fn wait_for(&self, text: &str) {
        while !self.line().contains(text) {}
    }

    /// Reads stderr up to a line that contains `text`, and returns that line.
    pub fn wait_for_stderr(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self.stderr.recv_deadline(deadline);
            let line = line.unwrap_or_else(|_| panic!("no line with '{text}' on stderr"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Sends a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for the end.
    pub fn wait(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the process does not end within {patience:?}"
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// What it has printed and nobody has read yet, once it has ended.
    pub fn output(self) -> (String, String) {
        let rest = |lines: &Receiver<String>| lines.iter().map(|line| line + "\n").collect();
        (rest(&self.stdout), rest(&self.stderr))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (lines, read) = unbounded();
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    read
}

/// Sends a signal to a process, by its name without SIG.
pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill")
        .args(["-s", name, &pid.to_string()])
        .status();
    assert!(status.unwrap().success(), "cannot send {name} to {pid}");
}

/// A server process that consumes.
pub fn server(url: &str, queue: &str, arguments: &[&str]) -> Process {
    let process = Process::spawn(fibrpc(url, queue).arg("server").args(arguments));
    assert_eq!(process.line(), " [x] Awaiting RPC requests");
    process
}

/// Starts a server of the library in this process; back when it consumes.
pub fn local<R: Into<Response>>(
    queue: &str,
    configure: impl FnOnce(Server) -> Server,
    handler: impl Fn(&Request) -> Result<R, HandlerError> + Send + Sync + 'static,
) -> Serving {
    let server = Server::new(url()).unwrap().queue(queue);
    configure(server).start(handler).unwrap()
}

/// Stops a server that is expected to drain.
pub fn stop(serving: Serving) -> ServerStats {
    serving.stop().unwrap()
}

/// A client of the library that calls one queue.
#[derive(Clone)]
pub struct Caller {
    pub client: Client,
    pub queue: String,
}

impl Caller {
    pub fn new(
        url: &str,
        queue: &str,
        configure: impl FnOnce(ClientBuilder) -> ClientBuilder,
    ) -> Caller {
        Caller {
            client: configure(Client::builder(url).unwrap()).build().unwrap(),
            queue: queue.to_owned(),
        }
    }

    /// Calls; the reply's body.
    pub fn call(&self, body: impl Into<Vec<u8>>) -> Result<Vec<u8>, Error> {
        self.client.call(&self.queue, body).map(|reply| reply.body)
    }

    /// A request to the queue.
    pub fn request(&self) -> fibrpc::RequestBuilder<'_> {
        self.client.request(&self.queue)
    }

    pub fn stats(&self) -> fibrpc::ClientStats {
        self.client.stats()
    }
}

/// A client of the library, with a timeout.
pub fn client(url: &str, queue: &str, timeout: Duration) -> Caller {
    Caller::new(url, queue, |client| client.timeout(timeout))
}

/// A bare AMQP peer, for messages that our client would not send.
pub struct Peer {
    // Before the connection, which closes it.
    pub channel: Channel,
    _connection: amiquip::Connection,
}

/// A message as a peer receives it.
#[derive(Debug)]
pub struct Message {
    pub body: Vec<u8>,
    pub properties: AmqpProperties,
    pub redelivered: bool,
}

impl Peer {
    pub fn connect(url: &str) -> Peer {
        let mut connection = amiquip::Connection::insecure_open(url).unwrap();
        let channel = connection.open_channel(None).unwrap();
        Peer {
            channel,
            _connection: connection,
        }
    }

    /// A new queue of our own; returns its name.
    pub fn callback_queue(&self) -> String {
        let options = QueueDeclareOptions {
            exclusive: true,
            ..QueueDeclareOptions::default()
        };
        self.channel
            .queue_declare("", options)
            .unwrap()
            .name()
            .to_owned()
    }

    pub fn publish(&self, queue: &str, body: &[u8], properties: AmqpProperties) {
        self.channel
            .basic_publish("", Publish::with_properties(body, queue, properties))
            .unwrap();
    }

    /// Takes the next message of a queue, waiting for it.
    pub fn receive(&self, queue: &str) -> Message {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(got) = self.channel.basic_get(queue, true).unwrap() {
                let delivery = got.delivery;
                return Message {
                    redelivered: delivery.redelivered,
                    body: delivery.body,
                    properties: delivery.properties,
                };
            }
            assert!(Instant::now() < deadline, "no message in '{queue}'");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether a queue has nothing to give.
    pub fn is_empty(&self, queue: &str) -> bool {
        self.channel.basic_get(queue, true).unwrap().is_none()
    }

    /// How many messages wait in a queue, and how many consumers it has.
    pub fn count(&self, queue: &str) -> (u32, u32) {
        let queue = self.channel.queue_declare_passive(queue).unwrap();
        (
            queue.declared_message_count().unwrap(),
            queue.declared_consumer_count().unwrap(),
        )
    }

    /// One request in the manner of the tutorial, and the message that answers it.
    pub fn ask(&self, queue: &str, body: &[u8], properties: AmqpProperties) -> Message {
        let callback = self.callback_queue();
        self.publish(queue, body, properties.with_reply_to(callback.clone()));
        self.receive(&callback)
    }
}

/// A peer that writes bytes, for messages that no AMQP library would make: properties that are
/// not UTF-8, tables nested without end.
pub struct RawPeer {
    socket: std::net::TcpStream,
}

impl RawPeer {
    /// Opens a connection and its channel 1.
    pub fn connect(url: &str) -> RawPeer {
        let url = url::Url::parse(url).unwrap();
        let host = url
            .host_str()
            .filter(|host| !host.is_empty())
            .unwrap_or("localhost");
        let socket = std::net::TcpStream::connect((host, url.port().unwrap_or(5672))).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.set_nodelay(true).unwrap();
        let mut peer = RawPeer { socket };
        peer.socket.write_all(b"AMQP\0\0\x09\x01").unwrap();
        peer.expect_method(10, 10); // start
        let user = if url.username().is_empty() {
            "guest"
        } else {
            url.username()
        };
        let response = format!("\0{user}\0{}", url.password().unwrap_or("guest"));
        let mut start_ok = long_string(b""); // no client properties
        start_ok.extend(short_string(b"PLAIN"));
        start_ok.extend(long_string(response.as_bytes()));
        start_ok.extend(short_string(b"en_US"));
        peer.send_method(0, 10, 11, &start_ok);
        let tune = peer.expect_method(10, 30);
        peer.send_method(0, 10, 31, &[&tune[..6], &[0, 0]].concat()); // no heartbeats
        peer.send_method(0, 10, 40, b"\x01/\0\0"); // open the virtual host /
        peer.expect_method(10, 41);
        peer.send_method(1, 20, 10, b"\0"); // open channel 1
        peer.expect_method(20, 11);
        peer
    }

    /// Publishes to a queue. `properties` are the bytes that `flags` announces, as they are.
    pub fn publish(&mut self, queue: &str, flags: u16, properties: &[u8], body: &[u8]) {
        let mut arguments = vec![0, 0, 0]; // reserved, the default exchange
        arguments.extend(short_string(queue.as_bytes()));
        arguments.push(0);
        self.send_method(1, 60, 40, &arguments);
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties);
        self.send(2, 1, &header);
        for chunk in body.chunks(100_000) {
            self.send(3, 1, chunk);
        }
    }

    /// Takes a message from a queue; returns its content header's payload, as it is.
    pub fn get_header(&mut self, queue: &str) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let arguments = [&[0, 0], &short_string(queue.as_bytes())[..], &[1]].concat();
            self.send_method(1, 60, 70, &arguments);
            let method = self.read_frame();
            if method[..4] == [0, 60, 0, 71] {
                return self.read_frame();
            }
            assert!(Instant::now() < deadline, "no message in {queue}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Declares a queue of our own that keeps its ten newest messages; returns its name.
    pub fn declare_bounded_queue(&mut self) -> String {
        let mut arguments = vec![0, 0];
        arguments.extend(short_string(b""));
        arguments.push(1 << 2); // exclusive
        let limit = [
            &short_string(b"x-max-length")[..],
            b"I",
            &10_u32.to_be_bytes(),
        ]
        .concat();
        arguments.extend(long_string(&limit));
        self.send_method(1, 50, 10, &arguments);
        let declared = self.expect_method(50, 11);
        let len = usize::from(declared[0]);
        String::from_utf8(declared[1..=len].to_vec()).unwrap()
    }

    /// Waits until the broker has taken all that was sent; panics if it has closed the channel.
    pub fn flush(&mut self) {
        self.send_method(1, 60, 10, &[0, 0, 0, 0, 0, 1, 0]); // qos, a round trip
        self.expect_method(60, 11);
    }

    fn send_method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        self.send(1, channel, &payload);
    }

    fn send(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(long_string(payload));
        frame.push(0xCE);
        self.socket.write_all(&frame).unwrap();
    }

    /// Reads the next frame: its payload, and the octet that ends it.
    fn read_frame(&mut self) -> Vec<u8> {
        let mut prefix = [0; 7];
        self.socket.read_exact(&mut prefix).unwrap();
        let len = u32::from_be_bytes(*prefix.last_chunk().unwrap());
        let mut payload = vec![0; len as usize + 1];
        self.socket.read_exact(&mut payload).unwrap();
        payload
    }

    /// Reads the next frame, which must be this method; returns its arguments.
    fn expect_method(&mut self, class: u16, method: u16) -> Vec<u8> {
        let mut payload = self.read_frame();
        let expected = [class.to_be_bytes(), method.to_be_bytes()].concat();
        let text = String::from_utf8_lossy(&payload).into_owned();
        assert_eq!(
            payload[..4],
            expected,
            "expected method {class}.{method}, got {text:?}"
        );
        payload.drain(..4);
        payload
    }
}

/// Bytes behind their length as one octet, as in a property or a queue's name.
pub fn short_string(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

/// Bytes behind their length as four octets, as in a table.
pub fn long_string(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A broker of the test's own, to be killed, stopped and blocked. Gone when dropped.
pub struct PrivateBroker {
    folder: PathBuf,
    plugins: String,
    pub url: String,
    _parent: tempfile::TempDir,
}

impl PrivateBroker {
    pub fn start() -> PrivateBroker {
        PrivateBroker::configured("", &[])
    }

    /// With settings of `rabbitmq.conf`, and plugins.
    pub fn configured(settings: &str, plugins: &[&str]) -> PrivateBroker {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("broker");
        fs::write(parent.path().join("settings"), settings).unwrap();
        let mut broker = PrivateBroker {
            folder,
            plugins: plugins.join(","),
            url: String::new(),
            _parent: parent,
        };
        broker.boot();
        broker
    }

    /// Boots it, the first time or again, on the same port and with the same data.
    pub fn boot(&mut self) {
        let output = self.script(&["start"]);
        self.url = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    }

    /// Crashes it.
    pub fn kill(&self) {
        self.script(&["kill"]);
    }

    /// Stops it, as a machine that hangs would; back when it really has.
    pub fn freeze(&self) {
        let pid = self.pid();
        signal(pid, "STOP");
        eventually("the broker is stopped", || {
            let state = Command::new("ps")
                .args(["-o", "stat=", "-p", &pid.to_string()])
                .output();
            state.unwrap().stdout.starts_with(b"T")
        });
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        signal(self.pid(), "CONT");
    }

    /// The Erlang VM's process.
    fn pid(&self) -> u32 {
        String::from_utf8(self.script(&["pid"]).stdout)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    }

    /// Runs rabbitmqctl; returns what it prints.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        String::from_utf8(self.script(&[&["ctl"], arguments].concat()).stdout).unwrap()
    }

    /// Runs rabbitmqctl, which may fail.
    pub fn try_ctl(&self, arguments: &[&str]) -> Output {
        self.run_script(&[&["ctl"], arguments].concat())
    }

    /// Deletes every callback queue, as no operator could: they are exclusive.
    pub fn delete_callback_queues(&self) {
        self.ctl(&["eval", &format!("{DELETE_CALLBACK_QUEUES}.")]);
    }

    /// Does so several times a second, in the broker itself: rabbitmqctl takes a second to start.
    pub fn delete_callback_queues_over_and_over(&self) {
        let forever = format!(
            "register(deleter, spawn(fun() -> \
             [begin {DELETE_CALLBACK_QUEUES}, timer:sleep(300) end || _ <- lists:seq(1, 10000)] end))."
        );
        self.ctl(&["eval", &forever]);
    }

    /// Ends that.
    pub fn leave_callback_queues_alone(&self) {
        self.ctl(&["eval", "exit(whereis(deleter), kill)."]);
    }

    fn script(&self, arguments: &[&str]) -> Output {
        let output = self.run_script(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "scripts/broker {arguments:?}: {said}"
        );
        output
    }

    fn run_script(&self, arguments: &[&str]) -> Output {
        Command::new(root().join("scripts/broker"))
            .args(arguments)
            .env("BROKER_DIR", &self.folder)
            .env("BROKER_SETTINGS", self.folder.with_file_name("settings"))
            .env("BROKER_PLUGINS", &self.plugins)
            .output()
            .unwrap()
    }
}

/// An Erlang expression for the broker to evaluate.
const DELETE_CALLBACK_QUEUES: &str = "[rabbit_amqqueue:delete(Q, false, false, <<\"test\">>) || \
    Q <- rabbit_amqqueue:list(<<\"/\">>), \
    binary:match(element(4, element(2, Q)), <<\"amq.gen-\">>) =/= nomatch]";

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        let _ = Command::new(root().join("scripts/broker"))
            .arg("stop")
            .env("BROKER_DIR", &self.folder)
            .env("BROKER_SETTINGS", self.folder.with_file_name("settings"))
            .env("BROKER_PLUGINS", &self.plugins)
            .output();
    }
}

/// Takes deliveries from a queue with acknowledgement, as a consumer that never acks: a stand-in
/// for a server that takes requests and dies.
pub fn swallow(peer: &Peer, queue: &str, count: usize) {
    let consumer = peer
        .channel
        .basic_consume(queue, ConsumerOptions::default())
        .unwrap();
    for _ in 0..count {
        match consumer.receiver().recv_timeout(PATIENCE) {
            Ok(ConsumerMessage::Delivery(_)) => {}
            other => panic!("expected a delivery, got {other:?}"),
        }
    }
    // amiquip's trap: never drop a live consumer.
    consumer.cancel().unwrap();
    while let Ok(ConsumerMessage::Delivery(_)) = consumer.receiver().recv() {}
}
