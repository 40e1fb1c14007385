//! What is done to the system: by an operator at the broker and the servers, and by weather on the
//! lines. Each has a schedule of its own, and both are made of one seed.

use crate::chaos::history::{Event, Fault, FaultKind, History, Micros, Party, now};
use crate::chaos::server::ServerProcess;
use crate::support::{Line, PATIENCE, PrivateBroker, Weather, order};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often the broker is told again to do something that it has refused: the leader of a queue may
/// not be elected yet.
const TELL_AGAIN: Duration = Duration::from_millis(500);

/// How long a queue may take to elect its leader after a boot.
const ELECTION_TIME: Duration = Duration::from_secs(5);

/// The user as whom all clients and servers connect.
const USER: &str = "chaos";

/// What an operator may do.
pub const OPERATOR: [FaultKind; 14] = [
    FaultKind::ServerKilled,
    FaultKind::ServerStopped,
    FaultKind::BrokerKilled,
    FaultKind::BrokerStopped,
    FaultKind::ConnectionsClosed,
    FaultKind::ConnectionClosed,
    FaultKind::QueueDeleted,
    FaultKind::QueuePurged,
    FaultKind::MemoryAlarm,
    FaultKind::MaxLengthPolicy,
    FaultKind::TtlPolicy,
    FaultKind::PermissionsTaken,
    FaultKind::PasswordRotated,
    // Likelier than the others, because what follows depends on the moment.
    FaultKind::ServerKilled,
];

/// What may happen to a line.
pub const WEATHER: [FaultKind; 7] = [
    FaultKind::LineDelayed,
    FaultKind::LineDribbling,
    FaultKind::LineCut,
    FaultKind::LineCut,
    FaultKind::LineSilentToBroker,
    FaultKind::LineSilentFromBroker,
    FaultKind::LineThin,
];

/// In a run that is long enough, faults for so long, and then for so long none: what goes wrong
/// then has no excuse.
const STORM: u64 = 35;
const CALM: u64 = 25;

/// How often the machine is watched, and how late it must be to count as stalled.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
const STALL: Duration = Duration::from_secs(1);

/// When there are faults.
#[derive(Debug)]
pub struct Plan {
    began: Instant,
    seconds: u64,
    /// A fault could not be caused. What is broken beside that proves nothing.
    failed: AtomicBool,
}

impl Plan {
    /// From now on.
    pub fn new(seconds: u64) -> Plan {
        Plan {
            began: Instant::now(),
            seconds,
            failed: AtomicBool::new(false),
        }
    }

    fn is_over(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
            || self.began.elapsed() >= Duration::from_secs(self.seconds)
    }

    fn is_calm(&self) -> bool {
        self.seconds >= STORM + CALM && self.began.elapsed().as_secs() % (STORM + CALM) >= STORM
    }

    /// Lets faults happen, in an order of chance; every kind once before any comes again.
    pub fn follow(
        &self,
        kinds: &[FaultKind],
        rng: &mut StdRng,
        mut inflict: impl FnMut(FaultKind, &mut StdRng),
    ) {
        let mut left = Vec::new();
        while !self.is_over() {
            if self.is_calm() {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
            if left.is_empty() {
                left.extend_from_slice(kinds);
                left.shuffle(rng);
            }
            let kind = left.pop().unwrap();
            println!("{:6.1} s: {kind:?}", self.began.elapsed().as_secs_f64());
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| inflict(kind, rng))) {
                self.failed.store(true, Ordering::Relaxed);
                resume_unwind(panic);
            }
            thread::sleep(Duration::from_millis(rng.random_range(100..1000)));
        }
    }
}

/// Writes down when the machine gave this process no time, or no disk: a durable queue needs both.
pub fn watch_for_stalls(history: &History, over: impl Fn() -> bool) {
    let mut file = tempfile::tempfile().unwrap();
    while !over() {
        let (from, began) = (now(), Instant::now());
        thread::sleep(WATCH_INTERVAL);
        file.write_all(b"x")
            .and_then(|()| file.sync_data())
            .unwrap();
        if began.elapsed() > WATCH_INTERVAL + STALL {
            write(history, FaultKind::MachineStalled, from, Struck::default());
        }
    }
}

/// Whom a fault strikes; nobody in particular, if it strikes all.
#[derive(Debug, Clone, Default)]
struct Struck {
    party: Option<Party>,
    queue: Option<String>,
    detail: String,
}

impl Struck {
    fn party(party: Party, detail: String) -> Struck {
        Struck {
            party: Some(party),
            detail,
            ..Struck::default()
        }
    }

    fn queue(queue: String, detail: String) -> Struck {
        Struck {
            queue: Some(queue),
            detail,
            ..Struck::default()
        }
    }

    fn all(detail: impl Into<String>) -> Struck {
        Struck {
            detail: detail.into(),
            ..Struck::default()
        }
    }
}

/// Writes down a fault that is over.
fn write(history: &History, kind: FaultKind, from: Micros, struck: Struck) {
    let Struck {
        party,
        queue,
        detail,
    } = struck;
    history.write(&Event::Fault(Fault {
        kind,
        from,
        until: now(),
        party,
        queue,
        detail,
    }));
}

/// How one party reaches the broker.
pub struct Wire {
    pub party: Party,
    pub line: Line,
    /// Where its URL is.
    pub url_file: PathBuf,
    /// The line when nothing else is wrong with it.
    pub usual: Weather,
    /// In seconds.
    pub heartbeat: u32,
}

impl Wire {
    /// Tells the party the password, in place of an older one.
    fn tell(&self, password: &str) {
        let mut url = url::Url::parse(&self.line.url).unwrap();
        url.set_username(USER).unwrap();
        url.set_password(Some(password)).unwrap();
        url.set_query(Some(&format!("heartbeat={}", self.heartbeat)));
        // Whoever reads it reads all of the one or all of the other.
        let beside = self.url_file.with_extension("new");
        fs::write(&beside, url.as_str()).unwrap();
        fs::rename(&beside, &self.url_file).unwrap();
    }

    pub fn reset(&self) {
        self.line.set_to_broker(self.usual);
        self.line.set_from_broker(self.usual);
    }

    /// Lets the weather be so for a while; what it was, in words.
    pub fn suffer(&self, kind: FaultKind, rng: &mut StdRng) -> String {
        // Some silences are longer than two heartbeats of those who have short ones.
        let longest = match kind {
            FaultKind::LineSilentToBroker | FaultKind::LineSilentFromBroker => 9000,
            _ => 4000,
        };
        let time = Duration::from_millis(rng.random_range(500..longest));
        let mut bad = self.usual;
        let (to_broker, from_broker) = match kind {
            FaultKind::LineDelayed => {
                bad.delay = Duration::from_millis(rng.random_range(5..400));
                (true, true)
            }
            FaultKind::LineDribbling => {
                bad.piece = Some(rng.random_range(1..8));
                (true, true)
            }
            FaultKind::LineCut => {
                // As often within the first 32 bytes as within the next.
                bad.cut_after = Some(rng.random_range(0.0_f64..16.0).exp2() as usize);
                let there: bool = rng.random();
                (there, !there)
            }
            FaultKind::LineSilentToBroker => {
                bad.silent = true;
                (true, false)
            }
            FaultKind::LineSilentFromBroker => {
                bad.silent = true;
                (false, true)
            }
            FaultKind::LineThin => {
                bad.rate = Some(rng.random_range(16 << 10..128 << 10));
                (true, true)
            }
            other => panic!("{other:?} is no weather"),
        };
        if to_broker {
            self.line.set_to_broker(bad);
        }
        if from_broker {
            self.line.set_from_broker(bad);
        }
        thread::sleep(time);
        self.reset();
        format!("{bad:?}, to broker: {to_broker}, from broker: {from_broker}")
    }
}

/// Lets weather strike one of the lines.
pub fn storm(history: &History, wires: &[Wire], kind: FaultKind, rng: &mut StdRng) {
    let wire = wires.choose(rng).unwrap();
    let from = now();
    let detail = wire.suffer(kind, rng);
    write(history, kind, from, Struck::party(wire.party, detail));
}

/// Whoever harms the broker and the servers.
pub struct Operator<'h> {
    pub history: &'h History,
    pub broker: PrivateBroker,
    pub servers: Vec<ServerProcess>,
    pub queues: Vec<String>,
    pub wires: &'h [Wire],
    /// How often the password was changed.
    pub passwords: u32,
}

impl Operator<'_> {
    /// Makes the user, and tells everyone.
    pub fn introduce(&mut self) {
        self.insist(&order::add_user(USER, &self.password()));
        self.permit();
        self.tell_password();
    }

    fn password(&self) -> String {
        format!("password-{}", self.passwords)
    }

    fn tell_password(&self) {
        for wire in self.wires {
            wire.tell(&self.password());
        }
    }

    fn permit(&self) {
        self.insist(&order::permit(USER, order::ALL));
    }

    /// Causes a fault, and ends it if it does not end by itself.
    pub fn inflict(&mut self, kind: FaultKind, rng: &mut StdRng) {
        let from = now();
        let struck = self.strike(kind, rng);
        write(self.history, kind, from, struck);
    }

    fn strike(&mut self, kind: FaultKind, rng: &mut StdRng) -> Struck {
        let time = Duration::from_millis(rng.random_range(500..3000));
        let victim = rng.random_range(0..self.servers.len());
        let queue = self.queues.choose(rng).unwrap().clone();
        match kind {
            FaultKind::ServerKilled => {
                let role = self.servers[victim].role.clone();
                self.servers[victim].signal("KILL");
                self.servers[victim] = role.spawn();
                self.servers[victim].wait_until_ready();
                Struck::party(role.party, "SIGKILL, and another in its place".to_owned())
            }
            FaultKind::ServerStopped => {
                self.servers[victim].signal("STOP");
                thread::sleep(time);
                self.servers[victim].signal("CONT");
                Struck::party(self.servers[victim].role.party, format!("for {time:?}"))
            }
            FaultKind::BrokerKilled => {
                self.broker.kill();
                self.broker.boot();
                let mended = self.mend_queues();
                Struck::all(format!("SIGKILL, and booted again; {mended} queues mended"))
            }
            FaultKind::BrokerStopped => {
                self.broker.freeze();
                thread::sleep(time);
                self.broker.thaw();
                Struck::all(format!("for {time:?}"))
            }
            FaultKind::ConnectionsClosed => {
                self.insist(&order::close_connections("chaos"));
                Struck::all("all")
            }
            FaultKind::ConnectionClosed => {
                let any = rng.random_range(0..1000);
                self.insist(&format!(
                    r#"All = rabbit_networking:connections(), One = 1 + {any} rem max(1, length(All)),
                    catch rabbit_networking:close_connection(lists:nth(One, All), "chaos")"#
                ));
                Struck::all("one, it is not known whose")
            }
            FaultKind::QueueDeleted => {
                self.insist(&order::with_queue_if_there(&queue, order::DELETE));
                Struck::queue(queue, String::new())
            }
            FaultKind::QueuePurged => {
                let purge = "rabbit_amqqueue:purge(Queue)";
                self.insist(&order::with_queue_if_there(&queue, purge));
                Struck::queue(queue, String::new())
            }
            FaultKind::MemoryAlarm => {
                self.insist(&order::memory_alarm(true));
                thread::sleep(time);
                self.insist(&order::memory_alarm(false));
                Struck::all(format!("for {time:?}"))
            }
            FaultKind::MaxLengthPolicy => {
                let length = rng.random_range(0..3);
                let overflow = ["drop-head", "reject-publish"].choose(rng).unwrap();
                let policy = format!(r#"{{"max-length":{length},"overflow":"{overflow}"}}"#);
                self.keep_policy(&queue, &policy, time);
                Struck::queue(queue, policy)
            }
            FaultKind::TtlPolicy => {
                let policy = format!(r#"{{"message-ttl":{}}}"#, rng.random_range(0..20));
                self.keep_policy(&queue, &policy, time);
                Struck::queue(queue, policy)
            }
            FaultKind::PermissionsTaken => {
                self.insist(&order::forbid(USER));
                thread::sleep(time);
                self.permit();
                Struck::all(format!("for {time:?}"))
            }
            FaultKind::PasswordRotated => {
                self.passwords += 1;
                self.insist(&order::change_password(USER, &self.password()));
                self.insist(&order::close_connections("chaos"));
                thread::sleep(time);
                self.tell_password();
                Struck::all(format!("and told {time:?} later"))
            }
            other => panic!("no operator causes {other:?}"),
        }
    }

    /// Has the broker evaluate an expression, as soon as it can; its value.
    fn insist(&self, expression: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.broker.try_eval(expression) {
                Ok(value) => return value,
                Err(refusal) => assert!(Instant::now() < deadline, "{expression}: {refusal}"),
            }
            thread::sleep(TELL_AGAIN);
        }
    }

    /// Deletes queues that nobody can use, as an operator would. RabbitMQ 3.10.8, when it is killed
    /// while it deletes a quorum queue, knows the queue again afterwards, but has no process for it:
    /// who consumes it is sent away with 541, and its state is `down`. How many those were.
    fn mend_queues(&self) -> usize {
        let down = r#"[Queue || Queue <- rabbit_amqqueue:list(),
            (catch rabbit_amqqueue:info(Queue, [state])) =:= [{state, down}]]"#;
        let count = || -> usize {
            let count = self.insist(&format!("length({down})"));
            count.trim().parse().expect("a number")
        };
        // One that is whole only has to elect its leader.
        let deadline = Instant::now() + ELECTION_TIME;
        let mut left = count();
        while left > 0 && Instant::now() < deadline {
            thread::sleep(TELL_AGAIN);
            left = count();
        }
        if left > 0 {
            self.insist(&format!(
                "[{{ok, _}} = {} || Queue <- {down}]",
                order::DELETE
            ));
        }
        left
    }

    fn keep_policy(&self, queue: &str, policy: &str, time: Duration) {
        let pattern = format!("^{queue}$");
        let policy = policy.replace('"', r#"\""#);
        self.insist(&format!(
            r#"ok = rabbit_policy:parse_set(<<"/">>, <<"chaos">>, <<"{pattern}">>, <<"{policy}">>,
                <<"0">>, <<"queues">>, <<"chaos">>)"#
        ));
        thread::sleep(time);
        self.insist(r#"rabbit_policy:delete(<<"/">>, <<"chaos">>, <<"chaos">>)"#);
    }
}

/// A node of a cluster that is away, from before it is killed until it is back.
pub fn node_killed<T>(history: &History, node: usize, away: impl FnOnce() -> T) -> T {
    let from = now();
    let result = away();
    let detail = format!("node{node}");
    write(history, FaultKind::NodeKilled, from, Struck::all(detail));
    result
}
