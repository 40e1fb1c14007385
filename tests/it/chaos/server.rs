//! Servers that write down what they execute: in this process, or in one that can be killed.

use crate::chaos::history::{Began, Event, History, Micros, Party, digest, micros, now};
use crate::support::Process;
use fibrpc::{Endpoints, QueueType, Request, Response, Server, Serving};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Which call a request belongs to, and a reply.
pub const CALL: &str = "x-chaos-call";

/// How long the handler is to take, in milliseconds.
pub const WORK: &str = "x-chaos-work";

/// What a server process is told, as JSON in its environment.
const VARIABLE: &str = "CHAOS_SERVER";

/// What a server process says on stdout once every worker consumes.
const READY: &str = "every worker consumes";

/// How long a server tries to connect before it says so, and tries anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How long it may be until it consumes: longer than a broker's boot on a busy machine.
const READY_TIME: Duration = Duration::from_secs(180);

/// What a server is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Role {
    pub party: Party,
    pub queue: String,
    pub queue_type: Kind,
    pub workers: usize,
    pub prefetch: u16,
    /// Where the broker's URL is.
    pub url_file: PathBuf,
    /// Where it writes what it executes.
    pub history: PathBuf,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub enum Kind {
    Transient,
    Classic,
    Quorum,
}

impl From<Kind> for QueueType {
    fn from(kind: Kind) -> QueueType {
        match kind {
            Kind::Transient => QueueType::Transient,
            Kind::Classic => QueueType::Classic,
            Kind::Quorum => QueueType::Quorum,
        }
    }
}

impl Role {
    /// Serves in this process; back when every worker consumes.
    ///
    /// # Errors
    ///
    /// The broker, or the permissions at it, are away for too long.
    pub fn start(&self, history: Arc<History>) -> Result<Serving, fibrpc::Error> {
        let party = self.party;
        Server::new(Endpoints::from_file(&self.url_file)?)?
            .queue(&self.queue)
            .queue_type(self.queue_type.into())
            .workers(self.workers)
            .prefetch(self.prefetch)
            .connect_timeout(CONNECT_TIMEOUT)
            .start(move |request: &Request| Ok(execute(&history, party, request)))
    }

    /// Serves in a process of its own: this program again, with one test that is none.
    pub fn spawn(&self) -> ServerProcess {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["chaos::server::serve", "--exact", "--ignored"])
            .arg("--nocapture")
            .env(VARIABLE, serde_json::to_string(self).unwrap())
            .stdin(Stdio::piped());
        let mut process = Process::spawn(&mut command);
        ServerProcess {
            stdin: Some(process.stdin()),
            process,
            role: self.clone(),
        }
    }
}

/// A server that can be killed. When it is dropped, it is.
pub struct ServerProcess {
    pub role: Role,
    process: Process,
    /// It drains when this is closed, so also when this process ends in whatever way.
    stdin: Option<std::process::ChildStdin>,
}

impl ServerProcess {
    pub fn wait_until_ready(&self) {
        let deadline = Instant::now() + READY_TIME;
        loop {
            let line = self.process.line();
            if line.contains(READY) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "the server cannot consume: {line}"
            );
        }
    }

    /// Sends a signal, by its name without SIG.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Has it drain, and waits for its end, which must be a success.
    pub fn stop(mut self, patience: Duration) {
        self.stdin = None;
        let status = self.process.wait(patience);
        let output = self.process.output();
        assert!(status.success(), "a server has ended: {status}, {output:?}");
    }
}

#[test]
#[ignore = "is no test: the chaos runs its servers with it, in processes that can be killed"]
fn serve() {
    let Ok(role) = std::env::var(VARIABLE) else {
        return;
    };
    let role: Role = serde_json::from_str(&role).unwrap();
    let history = Arc::new(History::go_on(&role.history));
    // The broker may refuse us at the moment: permissions and passwords come and go.
    let serving = loop {
        match role.start(Arc::clone(&history)) {
            Ok(serving) => break serving,
            Err(error) => println!("not yet: {error}"),
        }
        thread::sleep(Duration::from_millis(300));
    };
    println!("{READY}");
    let _ = std::io::stdin().read(&mut [0]);
    serving.stop().unwrap();
}

/// What the right answer to a question is: its second half, then its first.
pub fn answer_to(question: &[u8]) -> Vec<u8> {
    let (first, second) = question.split_at(question.len() / 2);
    [second, first].concat()
}

fn execute(history: &History, server: Party, request: &Request) -> Response {
    let left = request.time_left().map(micros);
    let at = now();
    let number = |name| request.header(name).and_then(|text| text.parse().ok());
    let call = number(CALL);
    history.write(&Event::Began(Began {
        call,
        server,
        at,
        question: digest(request.body()),
        left,
        redelivered: request.redelivered(),
    }));
    thread::sleep(Duration::from_millis(number(WORK).unwrap_or(0)));
    let response = Response::new(answer_to(request.body()));
    let at: Micros = now();
    history.write(&Event::Finished { call, server, at });
    match call {
        Some(call) => response.with_header(CALL, call.to_string()),
        None => response,
    }
}
