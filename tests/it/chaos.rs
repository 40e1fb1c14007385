//! Everything at once, and judged afterwards: clients of all kinds, servers in processes of their
//! own, faults from seeded schedules at the broker, at the servers and on every line between, and a
//! history of what each did. `make chaos` runs it for a minute; a short run is part of `make test`.
//!
//! - `history`: what is written down, and where.
//! - `checker`: the rules, and what breaks them. Begin here.
//! - `faults`: what is done to the system.
//! - `load`: the clients. `server`: the servers.
//! - `report`: the table, and the stories of calls that broke a rule.

mod checker;
mod faults;
mod history;
mod load;
mod report;
mod server;

pub use checker::FIRST_SERVER;
pub use faults::node_killed;
pub use history::{
    Event, History, Party, now, of_server as history_of_server, path as history_path,
};
pub use load::{Load, Manner};
pub use server::{Kind, Role};

use crate::support::{Line, PATIENCE, PrivateBroker, Weather, unique};
use checker::{Case, Violation};
use faults::{OPERATOR, Operator, Plan, WEATHER, Wire, storm, watch_for_stalls};
use fibrpc::{ClientStats, Endpoints, Status};
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How long the faults go on, unless `CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 15;

/// The schedules, unless `CHAOS_SEED` says otherwise.
const SEED: u64 = 42;

/// The longest body that the broker takes, in bytes: what RabbitMQ 4 takes unless told otherwise.
const BODY_MAX: u64 = 16 << 20;

/// What a line that is always slow passes on, in bytes a second.
const SLOW_RATE: usize = 4 << 20;

/// The queues: of servers that may be killed, of one in this process, and of one that takes more
/// requests than it can begin in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Queue {
    Main,
    Echo,
    Lazy,
}

/// The clients.
const CLIENTS: [(&str, Manner, Queue); 10] = [
    ("steady 1", Manner::Steady, Queue::Main),
    ("steady 2", Manner::Steady, Queue::Main),
    ("slow caller", Manner::SlowCaller, Queue::Main),
    ("all sizes", Manner::AllSizes, Queue::Echo),
    ("slow line", Manner::SlowLine, Queue::Echo),
    ("hasty 1", Manner::Hasty, Queue::Main),
    ("hasty 2", Manner::Hasty, Queue::Echo),
    ("confirming", Manner::Confirming, Queue::Main),
    ("impatient", Manner::Impatient, Queue::Lazy),
    ("visitor", Manner::Visitor, Queue::Main),
];

/// The servers: with how many workers each, and how many requests given to each ahead.
const SERVERS: [(&str, Queue, usize, u16); 4] = [
    ("server 1", Queue::Main, 2, 1),
    ("server 2", Queue::Main, 2, 4),
    ("lazy server", Queue::Lazy, 1, 16),
    ("server in this process", Queue::Echo, 2, 1),
];

pub fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number"))
    })
}

/// The queues' names, and what they are declared as.
fn queues(broker: &PrivateBroker) -> BTreeMap<Queue, (String, Kind)> {
    let status = Status::of(&broker.url, "fibrpc.test.chaos", PATIENCE).unwrap();
    // RabbitMQ 3 and its version. Later ones may refuse transient queues.
    let transient = match status.broker.starts_with("RabbitMQ 3.") {
        true => Kind::Transient,
        false => Kind::Classic,
    };
    BTreeMap::from([
        (Queue::Main, (unique("chaos"), transient)),
        (Queue::Echo, (unique("chaos-echo"), Kind::Classic)),
        (Queue::Lazy, (unique("chaos-lazy"), Kind::Quorum)),
    ])
}

/// How a party reaches the broker.
fn wire(broker: &PrivateBroker, folder: &Path, party: Party, manner: Option<Manner>) -> Wire {
    let usual = match manner {
        Some(Manner::SlowLine) => Weather::slow(SLOW_RATE, Duration::ZERO),
        _ => Weather::default(),
    };
    let wire = Wire {
        party,
        line: Line::open(&broker.url),
        url_file: folder.join(format!("url-{party}")),
        usual,
        // Half of them notice within a silence that nothing comes any more.
        heartbeat: if party.is_multiple_of(2) { 3 } else { 10 },
    };
    wire.reset();
    wire
}

/// Everyone, with their numbers.
fn parties() -> impl Iterator<Item = (Party, &'static str, Queue, Option<Manner>)> {
    let clients = (1..).zip(CLIENTS);
    let clients = clients.map(|(party, (name, manner, queue))| (party, name, queue, Some(manner)));
    let servers = (FIRST_SERVER..).zip(SERVERS);
    clients.chain(servers.map(|(party, (name, queue, ..))| (party, name, queue, None)))
}

#[test]
fn what_every_client_and_server_did_under_faults_is_as_promised() {
    let seconds = from_environment("CHAOS_SECONDS", SECONDS);
    let seed = from_environment("CHAOS_SEED", SEED);
    let path = history_path(&format!("seed-{seed}"));
    let history = Arc::new(History::create(&path));
    let folder = tempfile::tempdir().unwrap();
    let broker = PrivateBroker::configured(&format!("max_message_size = {BODY_MAX}\n"), &[]);
    let queues = queues(&broker);
    let wires: Vec<Wire> = parties()
        .map(|(party, _, _, manner)| wire(&broker, folder.path(), party, manner))
        .collect();
    let mut operator = Operator {
        history: &history,
        broker,
        servers: Vec::new(),
        queues: queues.values().map(|(name, _)| name.clone()).collect(),
        wires: &wires,
        passwords: 0,
    };
    operator.introduce();
    let url_file = |party| {
        let wire = wires.iter().find(|wire| wire.party == party);
        wire.unwrap().url_file.clone()
    };
    let role = |party: Party, (_, queue, workers, prefetch)| Role {
        party,
        queue: queues[&queue].0.clone(),
        queue_type: queues[&queue].1,
        workers,
        prefetch,
        url_file: url_file(party),
        history: history_of_server(&path, party),
    };
    let mut roles: Vec<Role> = (FIRST_SERVER..)
        .zip(SERVERS)
        .map(|(party, server)| role(party, server))
        .collect();
    let here = roles.pop().unwrap().start(Arc::clone(&history)).unwrap();
    operator.servers = roles.iter().map(Role::spawn).collect();
    for server in &operator.servers {
        server.wait_until_ready();
    }
    history.write(&Event::Run {
        seed,
        at: now(),
        body_max: BODY_MAX,
    });
    for (party, name, queue, _) in parties() {
        let (name, queue) = (name.to_owned(), queues[&queue].0.clone());
        history.write(&Event::Party { party, name, queue });
    }
    let loads = (1..).zip(CLIENTS).map(|(party, (_, manner, queue))| Load {
        history: &history,
        party,
        manner,
        endpoints: Endpoints::from_file(url_file(party)).unwrap(),
        confirms: manner == Manner::Confirming,
        queue: queues[&queue].0.clone(),
        body_max: BODY_MAX,
        seed: seed.wrapping_add(u64::from(party)),
    });
    let plan = Plan::new(seconds);
    let harm = || {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut weather = StdRng::seed_from_u64(!seed);
        thread::scope(|scope| {
            scope.spawn(|| {
                plan.follow(&WEATHER, &mut weather, |kind, rng| {
                    storm(&history, &wires, kind, rng);
                });
            });
            plan.follow(&OPERATOR, &mut rng, |kind, rng| operator.inflict(kind, rng));
        });
    };
    let ((), stats) = under_load(&history, loads.collect(), |_| (), harm);
    here.stop().unwrap();
    for server in std::mem::take(&mut operator.servers) {
        server.stop(PATIENCE);
    }
    drop(operator);
    let others: Vec<_> = roles.iter().map(|role| role.history.clone()).collect();
    let history = Arc::into_inner(history).expect("nobody writes any more");
    let title = format!("chaos of {seconds} s, seed {seed}");
    assert_right(history, &path, &others, &stats, &title);
}

/// Has clients call while harm is done; back when all of them have ended, with what the library
/// says of them. `answered` is told how long each answer took.
pub fn under_load<T>(
    history: &History,
    loads: Vec<Load<'_>>,
    answered: impl Fn(Duration) + Sync,
    harm: impl FnOnce() -> T,
) -> (T, Vec<ClientStats>) {
    let (over, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| watch_for_stalls(history, || ended.load(Ordering::Relaxed)));
        let loads: Vec<_> = loads
            .into_iter()
            .map(|load| {
                let (over, answered) = (&over, &answered);
                scope.spawn(move || load.run(over, answered))
            })
            .collect();
        // Whatever happens to the schedule, the clients must come to an end.
        let harmed = catch_unwind(AssertUnwindSafe(harm));
        over.store(true, Ordering::Relaxed);
        let stats: Vec<_> = loads
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        ended.store(true, Ordering::Relaxed);
        let harmed = harmed.unwrap_or_else(|panic| resume_unwind(panic));
        let stats = stats.into_iter().flat_map(Result::unwrap).collect();
        (harmed, stats)
    })
}

/// Ends a history, judges what is in its file, and says what that is.
pub fn assert_right(
    history: History,
    path: &Path,
    others: &[PathBuf],
    stats: &[ClientStats],
    title: &str,
) {
    history.join(others);
    let case = Case::of(history::read(path));
    let violations: Vec<Violation> = case.violations();
    report::print_table(&case, &violations, stats, title, path);
    report::print_violations(&case, &violations);
    assert!(case.calls.len() > 100, "it was a load");
    let count = violations.len();
    assert!(count == 0, "{count} violations, as told above");
}
