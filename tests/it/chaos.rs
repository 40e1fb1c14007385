//! Everything at once: a steady load of checked calls from several clients, among them one with
//! bodies of all sizes, one that takes its time for each answer, and one behind a slow line; three
//! servers, and faults from a seeded schedule. `make chaos` runs it for a minute and prints the
//! table; a short run is part of `make test`.
//!
//! The promise: with deadlines longer than the outages, nothing wrong, nothing lost, nothing hung.

use crate::fib;
use crate::support::{Caller, PATIENCE, PrivateBroker, Process, SlowLine, fibrpc, server, unique};
use fibrpc::{ClientStats, Request, Retry, Server};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the faults go on, unless `CHAOS_SECONDS` says otherwise; in any case until each kind
/// has come once.
const SECONDS: u64 = 15;

/// The schedule unless `CHAOS_SEED` says otherwise.
const SEED: u64 = 42;

/// What the clients are, by the queue that they call; the first is there three times.
const KINDS: [Kind; 6] = [
    Kind::Steady,
    Kind::Steady,
    Kind::Steady,
    Kind::AllSizes,
    Kind::SlowCaller,
    Kind::SlowLine,
];

/// The longest body, in bytes; that behind a slow line; and what such a line passes on, in bytes a
/// second.
const BODY_MAX: usize = 8 << 20;
const SLOW_BODY_MAX: usize = 256 << 10;
const SLOW_RATE: usize = 4 << 20;

/// Each call's deadline: longer than any outage, which is at most a broker's reboot on a busy
/// machine and the two waits between attempts to connect.
const TIMEOUT: Duration = Duration::from_secs(90);

/// A purged or deleted queue takes its requests along; this is when they are sent again.
const RESEND_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    ServerKilled,
    BrokerKilled,
    BrokerStopped,
    ConnectionsClosed,
    QueueDeleted,
    QueuePurged,
    MemoryAlarm,
}

const FAULTS: [Fault; 7] = [
    Fault::ServerKilled,
    Fault::BrokerKilled,
    Fault::BrokerStopped,
    Fault::ConnectionsClosed,
    Fault::QueueDeleted,
    Fault::QueuePurged,
    Fault::MemoryAlarm,
];

/// What a client asks for, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Fibonacci numbers.
    Steady,
    /// The same, and takes up to 0.2 s for each answer.
    SlowCaller,
    /// Bodies of any length, which come back as they are.
    AllSizes,
    /// Shorter ones, by a slow line.
    SlowLine,
}

impl Kind {
    /// Whether it wants its own bodies back.
    fn is_echo(self) -> bool {
        matches!(self, Kind::AllSizes | Kind::SlowLine)
    }

    /// How many calls it has in flight.
    fn window(self) -> usize {
        match self {
            Kind::Steady | Kind::SlowCaller => 8,
            Kind::AllSizes | Kind::SlowLine => 2,
        }
    }

    /// A request, and the answer to it.
    fn ask(self, rng: &mut StdRng) -> (Vec<u8>, Vec<u8>) {
        let body_max = match self {
            Kind::Steady | Kind::SlowCaller => {
                let n = rng.random_range(0..=fib::FAST_N_MAX);
                let answer = fib::fast(n).unwrap().to_string();
                return (n.to_string().into(), answer.into());
            }
            Kind::AllSizes => BODY_MAX,
            Kind::SlowLine => SLOW_BODY_MAX,
        };
        // As many of one length as of twice that.
        let longest = (body_max as f64).log2();
        let len = rng.random_range(-1.0..=longest).exp2() as usize;
        let (first, step) = (rng.random::<u8>(), rng.random::<u8>());
        let body: Vec<u8> = (0..len)
            .map(|at| first.wrapping_add(step.wrapping_mul((at >> 4) as u8)))
            .collect();
        (body.clone(), body)
    }
}

/// What became of one client's calls.
#[derive(Debug, Default)]
pub struct Tally {
    pub made: u64,
    /// What came back of it, in bytes.
    bytes: u64,
    pub right: u64,
    pub wrong: u64,
    pub failed: BTreeMap<String, u64>,
    overrun: Duration,
    longest: Duration,
}

pub fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number"))
    })
}

/// Calls, and checks every answer, until it is over; `answered` is told how long each took.
pub fn load(
    client: &Caller,
    kind: Kind,
    seed: u64,
    over: &AtomicBool,
    answered: impl Fn(Duration),
) -> Tally {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut tally = Tally::default();
    let mut calls = client.client.calls();
    loop {
        while calls.len() < kind.window() && !over.load(Ordering::Relaxed) {
            let (body, expected) = kind.ask(&mut rng);
            calls.submit(expected, client.request().body(body));
            tally.made += 1;
        }
        let Some(answer) = calls.next() else {
            return tally;
        };
        answered(answer.latency);
        tally.overrun = tally.overrun.max(answer.latency.saturating_sub(TIMEOUT));
        tally.longest = tally.longest.max(answer.latency);
        match answer.result {
            Ok(reply) if reply.body == answer.key => {
                tally.right += 1;
                tally.bytes += reply.body.len() as u64;
            }
            Ok(_) => tally.wrong += 1,
            Err(error) => *tally.failed.entry(error.to_string()).or_default() += 1,
        }
        if kind == Kind::SlowCaller {
            thread::sleep(Duration::from_millis(rng.random_range(0..200)));
        }
    }
}

/// The part that is harmed.
struct System {
    broker: PrivateBroker,
    queue: String,
    /// The queue of a server that sends back what it gets.
    echo: String,
    servers: Vec<Process>,
    rng: StdRng,
}

impl System {
    fn start_server(&self) -> Process {
        let arguments = [
            "server",
            "--workers",
            "2",
            "--quiet",
            "--algorithm",
            "fast",
            "--connect-timeout",
            "2m",
        ];
        Process::spawn(fibrpc(&self.broker.url, &self.queue).args(arguments))
    }

    fn any_queue(&mut self) -> String {
        let queues = [&self.queue, &self.echo];
        (*queues.choose(&mut self.rng).unwrap()).clone()
    }

    fn inflict(&mut self, fault: Fault) {
        let while_it_lasts = Duration::from_millis(self.rng.random_range(500..3000));
        match fault {
            Fault::ServerKilled => {
                let victim = self.rng.random_range(0..self.servers.len());
                self.servers[victim].signal("KILL");
                self.servers[victim] = self.start_server();
            }
            Fault::BrokerKilled => {
                self.broker.kill();
                self.broker.boot();
            }
            Fault::BrokerStopped => {
                self.broker.freeze();
                thread::sleep(while_it_lasts);
                self.broker.thaw();
            }
            Fault::ConnectionsClosed => drop(self.broker.ctl(&["close_all_connections", "chaos"])),
            // The queue may be gone already, with a broker just rebooted.
            Fault::QueueDeleted => {
                let queue = self.any_queue();
                self.broker.try_ctl(&["delete_queue", &queue]);
            }
            Fault::QueuePurged => {
                let queue = self.any_queue();
                self.broker.try_ctl(&["purge_queue", &queue]);
            }
            Fault::MemoryAlarm => {
                self.broker.ctl(&["set_vm_memory_high_watermark", "0"]);
                thread::sleep(while_it_lasts);
                self.broker.ctl(&["set_vm_memory_high_watermark", "0.8"]);
            }
        }
    }
}

#[test]
fn with_deadlines_longer_than_the_outages_nothing_is_wrong_lost_or_hung() {
    let seconds = from_environment("CHAOS_SECONDS", SECONDS);
    let seed = from_environment("CHAOS_SEED", SEED);
    let broker = PrivateBroker::start();
    let queue = unique("chaos");
    let servers = (0..2)
        .map(|_| {
            server(
                &broker.url,
                &queue,
                &["--workers", "2", "--quiet", "--algorithm", "fast"],
            )
        })
        .collect();
    let echo = unique("chaos-echo");
    let echoing = Server::new(&broker.url).unwrap().queue(&echo).workers(2);
    let echoing = echoing.start(|request: &Request| Ok(request.body().to_vec()));
    let echoing = echoing.unwrap();
    let line = SlowLine::both_ways(&broker.url, SLOW_RATE);
    let mut system = System {
        broker,
        queue,
        echo,
        servers,
        rng: StdRng::seed_from_u64(seed),
    };
    let url = system.broker.url.clone();
    let (queue, echo) = (system.queue.clone(), system.echo.clone());
    let over = AtomicBool::new(false);
    let mut faults = BTreeMap::new();
    let began = Instant::now();
    let (tallies, stats): (Vec<Tally>, Vec<ClientStats>) = thread::scope(|scope| {
        let loads: Vec<_> = (seed..)
            .zip(KINDS)
            .map(|(seed, kind)| {
                let url = if kind == Kind::SlowLine {
                    &line.url
                } else {
                    &url
                };
                let queue = if kind.is_echo() { &echo } else { &queue };
                let over = &over;
                scope.spawn(move || {
                    let client = Caller::new(url, queue, |client| {
                        client
                            .timeout(TIMEOUT)
                            .retry(Retry::Unanswered(RESEND_AFTER))
                            .wait_for_server(true)
                    });
                    (load(&client, kind, seed, over, |_| ()), client.stats())
                })
            })
            .collect();
        // Whatever happens to the schedule, the clients must come to an end.
        let schedule = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while began.elapsed() < Duration::from_secs(seconds) || faults.len() < FAULTS.len() {
                thread::sleep(Duration::from_millis(system.rng.random_range(300..1500)));
                // Every kind once, in an order of chance, before any comes again by chance.
                let left: Vec<Fault> = FAULTS
                    .into_iter()
                    .filter(|fault| !faults.contains_key(fault))
                    .collect();
                let fault = *left
                    .choose(&mut system.rng)
                    .unwrap_or_else(|| FAULTS.choose(&mut system.rng).unwrap());
                println!("{:5.1} s: {fault:?}", began.elapsed().as_secs_f64());
                *faults.entry(fault).or_insert(0_u32) += 1;
                system.inflict(fault);
            }
        }));
        over.store(true, Ordering::Relaxed);
        let ended = loads.into_iter().map(|load| load.join().unwrap()).unzip();
        schedule.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ended
    });
    let sum = |count: fn(&Tally) -> u64| tallies.iter().map(count).sum::<u64>();
    let failed: Vec<_> = tallies.iter().flat_map(|tally| &tally.failed).collect();
    let most = |time: fn(&Tally) -> Duration| tallies.iter().map(time).max().unwrap();
    println!("\n| | chaos of {seconds} s, seed {seed} |\n|---|---|");
    for (fault, count) in &faults {
        println!("| fault: {fault:?} | {count} |");
    }
    for (kind, tally) in KINDS.iter().zip(&tallies) {
        let (right, made, mib) = (tally.right, tally.made, tally.bytes >> 20);
        println!("| {kind:?}: answered right, of calls made | {right} of {made}, {mib} MiB |");
    }
    println!("| calls made | {} |", sum(|tally| tally.made));
    println!("| answered right | {} |", sum(|tally| tally.right));
    println!("| answered wrong | {} |", sum(|tally| tally.wrong));
    println!(
        "| failed or timed out | {} |",
        sum(|tally| tally.failed.values().sum())
    );
    println!(
        "| connections made by {} clients | {} |",
        KINDS.len(),
        stats.iter().map(|s| s.connections).sum::<u64>()
    );
    println!(
        "| requests sent again | {} |",
        stats.iter().map(|s| s.republished).sum::<u64>()
    );
    println!(
        "| duplicate replies dropped | {} |",
        stats.iter().map(|s| s.dropped_replies).sum::<u64>()
    );
    println!("| slowest call | {:.1?} |", most(|tally| tally.longest));
    println!(
        "| longest overrun of a deadline | {:.1?} |\n",
        most(|tally| tally.overrun)
    );
    assert_eq!(failed, Vec::<(&String, &u64)>::new());
    assert_eq!(sum(|tally| tally.wrong), 0);
    assert_eq!(sum(|tally| tally.right), sum(|tally| tally.made));
    assert!(sum(|tally| tally.right) > 100, "it was a load");
    echoing.stop().unwrap();
    for server in &system.servers {
        server.signal("TERM");
    }
    for server in &mut system.servers {
        assert!(server.wait(PATIENCE).success());
    }
}
