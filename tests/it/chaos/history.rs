//! What each client and each server did, and what was done to them: lines of JSON in a file.
//!
//! There is one clock for all processes, CLOCK_MONOTONIC. Each process writes to a file of its own,
//! and those of the servers are joined to that of the test at the end.

use crate::support::root;
use fibrpc::Error;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A time, in microseconds since the machine has booted.
pub type Micros = u64;

/// A client or a server, by its number.
pub type Party = u8;

/// A call: its client's number in the highest byte, then counted.
pub type CallId = u64;

/// What stands for a body.
pub type Digest = u64;

/// A line of the history.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first line.
    Run {
        seed: u64,
        at: Micros,
        /// The longest body that the broker takes, in bytes.
        body_max: u64,
    },
    Party {
        party: Party,
        name: String,
        /// The queue that it calls, or serves.
        queue: String,
    },
    Called(Called),
    Ended(Ended),
    Began(Began),
    /// A handler has returned.
    Finished {
        call: Option<CallId>,
        server: Party,
        at: Micros,
    },
    /// A client leaves, with calls open: they are abandoned, or it is closed.
    Left {
        client: Party,
        at: Micros,
    },
    Fault(Fault),
}

/// A client asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Called {
    pub call: CallId,
    pub client: Party,
    /// Just before it was submitted.
    pub at: Micros,
    /// When submitting it had returned.
    pub sent: Micros,
    pub timeout: Micros,
    pub retry: Retry,
    /// Whether the broker confirms requests to this client, so that it sends again what is not
    /// confirmed.
    pub confirms: bool,
    pub bytes: u64,
    pub question: Digest,
    /// That of the right answer.
    pub answer: Digest,
    /// How long the handler is to take, in milliseconds.
    pub work: u64,
}

impl Called {
    pub fn deadline(&self) -> Micros {
        self.at + self.timeout
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Retry {
    Never,
    LostConnection,
    /// Also when it is unanswered for so long, in microseconds.
    Unanswered(Micros),
}

impl From<Retry> for fibrpc::Retry {
    fn from(retry: Retry) -> fibrpc::Retry {
        match retry {
            Retry::Never => fibrpc::Retry::Never,
            Retry::LostConnection => fibrpc::Retry::LostConnection,
            Retry::Unanswered(time) => fibrpc::Retry::Unanswered(Duration::from_micros(time)),
        }
    }
}

/// A client learns how a call has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub call: CallId,
    pub at: Micros,
    /// Since when it had looked for answers without being away.
    pub back: Micros,
    /// As the library tells it.
    pub latency: Micros,
    pub outcome: Outcome,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Answered {
        answer: Digest,
        /// Which call it answers, as the server says.
        to: Option<CallId>,
    },
    Failed {
        kind: Failure,
        message: String,
    },
    Abandoned,
}

/// An error, as far as it matters to what explains it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    Timeout,
    ConnectionLost,
    NoServer,
    Rejected,
    Refused,
    Unreachable,
    Remote,
    Closed,
    /// What no client of these tests should ever meet with.
    Other,
}

impl Failure {
    pub fn of(error: &Error) -> Failure {
        match error {
            Error::Timeout { .. } => Failure::Timeout,
            Error::ConnectionLost { .. } => Failure::ConnectionLost,
            Error::NoServer { .. } => Failure::NoServer,
            Error::Rejected { .. } => Failure::Rejected,
            Error::QueueRefused { .. } => Failure::Refused,
            Error::Unreachable { .. } => Failure::Unreachable,
            Error::Remote(_) => Failure::Remote,
            Error::Closed => Failure::Closed,
            _ => Failure::Other,
        }
    }
}

/// A server begins to execute a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Began {
    /// Which, if it says so.
    pub call: Option<CallId>,
    pub server: Party,
    pub at: Micros,
    pub question: Digest,
    /// How much longer its caller waits, as far as the server knows.
    pub left: Option<Micros>,
    pub redelivered: bool,
}

/// What was done to the system, and from when until when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    pub kind: FaultKind,
    pub from: Micros,
    pub until: Micros,
    /// Whom it strikes alone, if it does not strike all.
    pub party: Option<Party>,
    /// The same of a queue.
    pub queue: Option<String>,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    ServerKilled,
    ServerStopped,
    BrokerKilled,
    BrokerStopped,
    NodeKilled,
    ConnectionsClosed,
    ConnectionClosed,
    QueueDeleted,
    QueuePurged,
    MemoryAlarm,
    MaxLengthPolicy,
    TtlPolicy,
    PermissionsTaken,
    PasswordRotated,
    LineDelayed,
    LineDribbling,
    LineCut,
    LineSilentToBroker,
    LineSilentFromBroker,
    LineThin,
    /// Nobody's doing: for so long the machine gave the test no time, or no disk.
    MachineStalled,
}

/// Now, by the clock of all processes.
pub fn now() -> Micros {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000 + u64::try_from(now.tv_nsec).unwrap() / 1000
}

pub fn micros(time: Duration) -> Micros {
    u64::try_from(time.as_micros()).unwrap()
}

pub fn digest(body: &[u8]) -> Digest {
    // The same in every process.
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// Where one process writes what it does.
pub struct History {
    file: Mutex<BufWriter<File>>,
    /// Whether each line is to be in the file before anything else is done, because the process may
    /// be killed.
    at_once: bool,
}

impl History {
    /// A new one, in place of an older one of that name.
    pub fn create(path: &Path) -> History {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        History::on(File::create(path).unwrap(), false)
    }

    /// That of a process that may be killed, perhaps after it was begun by another one.
    pub fn go_on(path: &Path) -> History {
        let file = OpenOptions::new().create(true).append(true).open(path);
        History::on(file.unwrap(), true)
    }

    fn on(file: File, at_once: bool) -> History {
        History {
            file: Mutex::new(BufWriter::new(file)),
            at_once,
        }
    }

    pub fn write(&self, event: &Event) {
        let line = serde_json::to_string(event).unwrap() + "\n";
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(line.as_bytes()).unwrap();
        if self.at_once {
            file.flush().unwrap();
        }
    }

    /// Ends it, with what other processes have written; their files are removed.
    pub fn join(self, others: &[PathBuf]) {
        let mut file = self.file.into_inner().unwrap();
        for path in others {
            for event in read(path) {
                writeln!(file, "{}", serde_json::to_string(&event).unwrap()).unwrap();
            }
            fs::remove_file(path).unwrap();
        }
        file.flush().unwrap();
    }
}

/// Where a server's own processes write, beside the history at `path`: nothing yet. A run that was
/// killed may have left something.
pub fn of_server(path: &Path, party: Party) -> PathBuf {
    let path = path.with_extension(format!("server-{party}"));
    let _ = fs::remove_file(&path);
    path
}

/// What is in a file. A process that was killed may have left a line that is not whole.
pub fn read(path: &Path) -> impl Iterator<Item = Event> {
    let file = File::open(path);
    let file = file.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let lines = BufReader::new(file).lines().map(Result::unwrap);
    lines.filter_map(|line| match serde_json::from_str(&line) {
        Ok(event) => Some(event),
        Err(error) if error.is_eof() => None,
        Err(error) => panic!("{error}: {line}"),
    })
}

/// Where the history of a run is, unless `CHAOS_HISTORY` says otherwise.
pub fn path(name: &str) -> PathBuf {
    std::env::var_os("CHAOS_HISTORY").map_or_else(
        || root().join("target/chaos").join(format!("{name}.jsonl")),
        PathBuf::from,
    )
}
