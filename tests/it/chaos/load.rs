//! Clients that write down what they ask, and what comes of it.

use crate::chaos::history::{
    CallId, Called, Ended, Event, Failure, History, Micros, Outcome, Party, Retry, digest, micros,
    now,
};
use crate::chaos::server::{CALL, WORK, answer_to};
use fibrpc::{Answer, Calls, Client, ClientStats, Confirms, Endpoints, Reply, ReplyTo};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Longer than any outage, which is at most a broker's reboot on a busy machine and the two waits
/// between attempts to connect.
pub const LONG: Duration = Duration::from_secs(90);

/// A purged or deleted queue takes its requests along; this is when they are sent again.
const RESEND_AFTER: Micros = 2_000_000;

/// How long after the deadline of its last call a client goes on waiting for what should have come
/// long before. Then it gives up, and the history has a call without an end.
const HOPELESS: Micros = 30_000_000;

/// How often a client that waits for an answer looks whether it is over.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The longest body of a client that is in a hurry, in bytes.
const SMALL: u64 = 1 << 10;

/// The longest body behind a slow line.
const SLOW_BODY_MAX: u64 = 256 << 10;

/// What a client is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Manner {
    /// Waits for longer than any outage, and keeps several calls in flight.
    Steady,
    /// The same, but takes up to 0.2 s for each answer, and now and then 3 s.
    SlowCaller,
    /// Bodies of any length up to the broker's limit, and now and then one over it.
    AllSizes,
    /// Shorter ones, by a line that is always slow.
    SlowLine,
    /// Waits for less than many an outage takes, with any retry.
    Hasty,
    /// The same; the broker confirms its requests.
    Confirming,
    /// Waits for less than its server may need for what came before.
    Impatient,
    /// Waits for as long as the library has it by default, and asks as fast as it is answered.
    Relying,
    /// Comes, asks, and goes, sometimes without waiting for the answers.
    Visitor,
}

impl Manner {
    /// How many calls it has in flight.
    fn window(self) -> usize {
        match self {
            Manner::Steady | Manner::SlowCaller | Manner::Impatient | Manner::Relying => 8,
            Manner::Hasty | Manner::Confirming | Manner::Visitor => 4,
            Manner::AllSizes | Manner::SlowLine => 2,
        }
    }

    /// How long it waits between two calls on average, so that an hour's history can be kept.
    fn pause(self) -> Duration {
        Duration::from_millis(match self {
            Manner::Relying => 0,
            Manner::Steady => 12,
            Manner::AllSizes | Manner::SlowLine | Manner::Visitor => 20,
            Manner::Hasty | Manner::Confirming | Manner::SlowCaller => 25,
            Manner::Impatient => 40,
        })
    }

    /// In seconds.
    fn timeout(self, rng: &mut StdRng) -> f64 {
        match self {
            Manner::Steady | Manner::SlowCaller | Manner::AllSizes | Manner::SlowLine => {
                LONG.as_secs_f64()
            }
            Manner::Hasty | Manner::Confirming | Manner::Visitor => rng.random_range(5.0..10.0),
            Manner::Relying => 30.0,
            Manner::Impatient => rng.random_range(0.05..0.5),
        }
    }

    fn retry(self, rng: &mut StdRng) -> Retry {
        let any = [
            Retry::Never,
            Retry::LostConnection,
            Retry::Unanswered(RESEND_AFTER / 2),
        ];
        match self {
            Manner::Steady | Manner::SlowCaller | Manner::AllSizes | Manner::SlowLine => {
                Retry::Unanswered(RESEND_AFTER)
            }
            Manner::Hasty | Manner::Confirming | Manner::Visitor => *any.choose(rng).unwrap(),
            Manner::Relying => Retry::LostConnection,
            Manner::Impatient => Retry::Never,
        }
    }

    /// How long its bodies are, in bytes.
    fn sizes(self, body_max: u64) -> RangeInclusive<u64> {
        match self {
            Manner::AllSizes => 0..=body_max,
            Manner::SlowLine => 0..=SLOW_BODY_MAX,
            _ => 0..=SMALL,
        }
    }

    /// In milliseconds.
    fn work(self, rng: &mut StdRng) -> u64 {
        match self {
            Manner::Impatient if rng.random_bool(0.02) => rng.random_range(500..3000),
            Manner::Impatient => rng.random_range(0..20),
            _ => 0,
        }
    }

    /// How long it is away before it takes the next answer.
    fn away(self, rng: &mut StdRng) -> Duration {
        Duration::from_millis(match self {
            Manner::SlowCaller if rng.random_bool(0.01) => 3000,
            Manner::SlowCaller => rng.random_range(0..200),
            _ => 0,
        })
    }
}

/// One client's part in a run.
pub struct Load<'h> {
    pub history: &'h History,
    pub party: Party,
    pub manner: Manner,
    /// The brokers, and whether they are to confirm what this client sends.
    pub endpoints: Endpoints,
    pub confirms: bool,
    pub queue: String,
    /// The longest body that the broker takes, in bytes.
    pub body_max: u64,
    pub seed: u64,
}

/// How a visit ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// After the last answer.
    Answered,
    /// The client is closed while calls are open.
    Closed,
    /// The open calls are dropped, and the client is.
    Dropped,
}

impl Load<'_> {
    /// Calls until it is over; `answered` is told how long each answer took. Returns what the
    /// library says of its clients.
    pub fn run(&self, over: &AtomicBool, answered: impl Fn(Duration)) -> Vec<ClientStats> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut calls = u64::from(self.party) << 56;
        let over = || over.load(Ordering::Relaxed);
        let mut stats = Vec::new();
        while stats.is_empty() || self.manner == Manner::Visitor && !over() {
            let reply_to = match self.manner {
                Manner::Visitor if rng.random() => ReplyTo::Direct,
                _ => ReplyTo::Queue,
            };
            let confirms = match self.confirms {
                true => Confirms::Always,
                false => Confirms::Never,
            };
            let client = Client::builder(&self.endpoints)
                .unwrap()
                .reply_to(reply_to)
                .confirms(confirms)
                .wait_for_server(self.manner != Manner::Visitor)
                .build()
                .unwrap();
            let until = match self.manner {
                Manner::Visitor => Duration::from_secs_f64(rng.random_range(0.2..3.0)),
                _ => Duration::MAX,
            };
            let came = Instant::now();
            let visit = || over() || came.elapsed() >= until;
            self.visit(&client, &mut rng, &mut calls, visit, &answered);
            stats.push(client.stats());
        }
        stats
    }

    fn visit(
        &self,
        client: &Client,
        rng: &mut StdRng,
        last: &mut CallId,
        over: impl Fn() -> bool,
        answered: &impl Fn(Duration),
    ) {
        let mut calls = client.calls();
        // With their deadlines.
        let mut open = BTreeMap::new();
        let (mut due, mut back) = (Instant::now(), now());
        let window = self.manner.window();
        while !over() {
            while calls.len() < window && Instant::now() >= due {
                *last += 1;
                open.insert(*last, self.ask(*last, client, &mut calls, rng));
                due = Instant::now() + self.manner.pause().mul_f64(rng.random_range(0.0..2.0));
            }
            let soon = Instant::now() + LOOK_INTERVAL;
            let limit = match calls.len() < window {
                true => due.min(soon),
                false => soon,
            };
            if calls.is_empty() {
                thread::sleep(limit.saturating_duration_since(Instant::now()));
            } else if let Some(call) = self.take(&mut calls, limit, back, answered) {
                open.remove(&call);
                let away = self.manner.away(rng);
                if away > Duration::ZERO {
                    thread::sleep(away);
                    back = now();
                }
            }
        }
        let any = [Leaving::Answered, Leaving::Closed, Leaving::Dropped];
        let leaving = match self.manner {
            Manner::Visitor => *any.choose(rng).unwrap(),
            _ => Leaving::Answered,
        };
        if leaving != Leaving::Answered {
            let (client, at) = (self.party, now());
            self.history.write(&Event::Left { client, at });
        }
        match leaving {
            Leaving::Answered => {}
            Leaving::Closed => client.close(),
            Leaving::Dropped => {
                drop(calls);
                return open.into_keys().for_each(|call| self.abandoned(call));
            }
        }
        let hopeless = open
            .values()
            .max()
            .map_or(0, |deadline| deadline + HOPELESS);
        while !calls.is_empty() && now() < hopeless {
            self.take(&mut calls, Instant::now() + LOOK_INTERVAL, back, answered);
        }
    }

    /// Sends one request; returns its deadline.
    fn ask(
        &self,
        call: CallId,
        client: &Client,
        calls: &mut Calls<'_, CallId>,
        rng: &mut StdRng,
    ) -> Micros {
        let body = self.question(call, rng);
        let timeout = Duration::from_secs_f64(self.manner.timeout(rng));
        let retry = self.manner.retry(rng);
        let work = self.manner.work(rng);
        let mut called = Called {
            call,
            client: self.party,
            at: 0,
            sent: 0,
            timeout: micros(timeout),
            retry,
            confirms: self.confirms,
            bytes: body.len() as u64,
            question: digest(&body),
            answer: digest(&answer_to(&body)),
            work,
        };
        let mut request = client
            .request(&self.queue)
            .header(CALL, call.to_string())
            .timeout(timeout)
            .retry(retry.into())
            .body(body);
        if work > 0 {
            request = request.header(WORK, work.to_string());
        }
        called.at = now();
        calls.submit(call, request);
        called.sent = now();
        let deadline = called.deadline();
        self.history.write(&Event::Called(called));
        deadline
    }

    /// A body that no other call has, if it is long enough for a number.
    fn question(&self, call: CallId, rng: &mut StdRng) -> Vec<u8> {
        let sizes = self.manner.sizes(self.body_max);
        // As many of one length as of twice that, and more at the ends.
        let longest = (*sizes.end() as f64).log2();
        let len = match rng.random_range(0..100) {
            0 => *sizes.start(),
            1 => *sizes.end(),
            2 if *sizes.end() == self.body_max => self.body_max + 1,
            _ => rng.random_range(-1.0..=longest).exp2() as u64,
        };
        let mut body = vec![rng.random::<u8>(); usize::try_from(len).unwrap()];
        let number = call.to_be_bytes();
        let marked = body.len().min(number.len());
        body[..marked].copy_from_slice(&number[number.len() - marked..]);
        body
    }

    /// Takes an answer, if there is one before the limit; says to which call.
    fn take(
        &self,
        calls: &mut Calls<'_, CallId>,
        limit: Instant,
        back: Micros,
        answered: &impl Fn(Duration),
    ) -> Option<CallId> {
        let Answer {
            key: call,
            result,
            latency,
            ..
        } = calls.next_before(limit)?;
        if result.is_ok() {
            answered(latency);
        }
        self.history.write(&Event::Ended(Ended {
            call,
            at: now(),
            back,
            latency: micros(latency),
            outcome: outcome(result),
        }));
        Some(call)
    }

    /// An open call was dropped.
    fn abandoned(&self, call: CallId) {
        let at = now();
        self.history.write(&Event::Ended(Ended {
            call,
            at,
            back: at,
            latency: 0,
            outcome: Outcome::Abandoned,
        }));
    }
}

fn outcome(result: Result<Reply, fibrpc::Error>) -> Outcome {
    match result {
        Ok(reply) => Outcome::Answered {
            answer: digest(&reply.body),
            to: reply.header(CALL).and_then(|text| text.parse().ok()),
        },
        Err(error) => Outcome::Failed {
            kind: Failure::of(&error),
            message: error.to_string(),
        },
    }
}
