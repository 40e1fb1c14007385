//! What the tests need: the broker, a line to it, the binary as a process, and a bare AMQP
//! peer.
//!
//! A broker is required. Without one every test fails, and says how to get one.

mod broker;
mod line;
pub mod order;
mod peer;

pub use broker::{NodeFolder, PrivateBroker};
pub use line::{Line, Weather};
pub use peer::{Message, Peer, RawPeer, long_string, short_string, swallow};

use crossbeam_channel::{Receiver, unbounded};
use fibrpc::{Client, ClientBuilder, Error, HandlerError, Request, Response, Server, Serving};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything in a test may take before it counts as hung. Generous: machines are shared. Less
/// than the minute and more for which tests have somebody sleep who is not to be waited for.
pub const PATIENCE: Duration = Duration::from_secs(50);

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

/// One of the Python scripts in tests/peers.
pub fn python(script: &str, arguments: &[&str]) -> Command {
    let python = root().join("target/peers/bin/python");
    assert!(
        python.exists(),
        "these tests need a Python peer: run `make test`, which installs it"
    );
    let mut command = Command::new(python);
    command
        .arg(root().join("tests/peers").join(script))
        .args(arguments);
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

/// Runs a command with something on its stdin.
pub fn run_with_input(command: &mut Command, input: &[u8]) -> Finished {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(input).unwrap();
    file.rewind().unwrap();
    run(command.stdin(file))
}

/// The JSON objects that a command has printed, one a line.
pub fn json_lines(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
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

/// Server processes that answer with what they are asked; a request `slow` takes as long as the test
/// wants, on any machine, because it waits for the test instead of computing something.
pub struct Slow(TempDir);

impl Slow {
    const BODY: &str = "slow";

    pub fn new() -> Slow {
        let slow = Slow(tempfile::tempdir().unwrap());
        slow.hold();
        slow
    }

    /// Starts one; back when it consumes.
    pub fn server(&self, url: &str, queue: &str, arguments: &[&str]) -> Process {
        // It ends as well when the test has ended, and the folder is gone; and after minutes, if the
        // test was killed and the folder stays.
        let line = r#"body=$(cat) left=5000
            [ "$body" != slow ] || { touch "$0/begun"
                while [ -e "$0/held" ] && [ $((left -= 1)) -gt 0 ]; do sleep 0.05; done; }
            printf %s "$body""#;
        let mut fibrpc = fibrpc(url, queue);
        fibrpc.arg("reply").args(arguments);
        let process = Process::spawn(fibrpc.args(["--", "sh", "-c", line]).arg(self.0.path()));
        assert_eq!(process.line(), " [x] Awaiting RPC requests");
        process
    }

    /// Calls for a slow answer; back when that is being made.
    pub fn begin(&self, client: &Caller) -> JoinHandle<Result<Vec<u8>, Error>> {
        let call = client.begin(Slow::BODY);
        self.wait_until_begun();
        call
    }

    /// Waits until another slow request is being executed than those waited for before.
    pub fn wait_until_begun(&self) {
        let begun = self.0.path().join("begun");
        eventually("the slow request is executed", || begun.exists());
        fs::remove_file(begun).unwrap();
    }

    /// Lets slow requests end, from now on.
    pub fn release(&self) {
        fs::remove_file(self.0.path().join("held")).unwrap();
    }

    /// Has the next slow requests wait.
    pub fn hold(&self) {
        let _ = fs::remove_file(self.0.path().join("begun"));
        fs::write(self.0.path().join("held"), "").unwrap();
    }
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

    /// Calls in a thread; its end is the call's.
    pub fn begin(&self, body: &'static str) -> JoinHandle<Result<Vec<u8>, Error>> {
        let client = self.clone();
        thread::spawn(move || client.call(body))
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

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
