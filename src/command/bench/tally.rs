//! What is counted: answers, failures by kind, latencies.

use crate::command::bench::trend::Trend;
use crate::command::exit::class;
use fibrpc::Error;
use hdrhistogram::Histogram;
use std::collections::BTreeMap;
use std::time::Duration;

/// The longest latency that is told from longer ones, in nanoseconds: an hour.
const LATENCY_MAX: u64 = 3600 * 1_000_000_000;

/// The significant digits of a latency.
const PRECISION: u8 = 3;

/// The kind of a reply that is no error, and not the right one. The server is to blame.
pub const WRONG: (&str, u8) = ("wrong", 3);

pub struct Tally {
    pub requests: u64,
    pub ok: u64,
    /// Failures by kind, and the exit code of each.
    pub failures: BTreeMap<(&'static str, u8), u64>,
    /// What was said of the first of each kind.
    pub reasons: BTreeMap<&'static str, String>,
    /// The latencies of the requests that were answered right, in nanoseconds. It grows with them,
    /// so that many connections do not take much memory.
    pub latencies: Histogram<u64>,
}

impl Tally {
    pub fn new() -> Tally {
        Tally {
            requests: 0,
            ok: 0,
            failures: BTreeMap::new(),
            reasons: BTreeMap::new(),
            latencies: Histogram::new(PRECISION).expect("a precision that is constant"),
        }
    }

    pub fn answered(&mut self, latency: Duration) {
        self.requests += 1;
        self.ok += 1;
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(LATENCY_MAX);
        self.latencies
            .record(nanoseconds.min(LATENCY_MAX))
            .expect("the histogram grows");
    }

    pub fn failed(&mut self, failure: (&'static str, u8)) {
        self.requests += 1;
        *self.failures.entry(failure).or_default() += 1;
    }

    /// Counts a call that failed, and keeps why.
    pub fn refused(&mut self, error: &Error) {
        let failure = class(error);
        self.failed(failure);
        self.reasons
            .entry(failure.0)
            .or_insert_with(|| error.to_string());
    }

    pub fn add(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.ok += other.ok;
        for (&failure, count) in &other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
        for (kind, reason) in &other.reasons {
            self.reasons.entry(kind).or_insert_with(|| reason.clone());
        }
        self.latencies
            .add(&other.latencies)
            .expect("the histogram grows");
    }

    /// How many were not answered right.
    pub fn errors(&self) -> u64 {
        self.requests - self.ok
    }

    /// The exit code of the commonest failure; `None` if there was none.
    pub fn commonest_failure(&self) -> Option<u8> {
        let (&(_, code), _) = self.failures.iter().max_by_key(|&(_, count)| count)?;
        Some(code)
    }

    /// In ms; `None` if nothing was answered right.
    pub fn min(&self) -> Option<f64> {
        (self.ok > 0).then(|| milliseconds(self.latencies.min()))
    }

    /// In ms; `None` if nothing was answered right.
    pub fn mean(&self) -> Option<f64> {
        (self.ok > 0).then(|| self.latencies.mean() / 1e6)
    }

    /// The latency which that share of the requests did not exceed, in ms; `None` if nothing was
    /// answered right.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        (self.ok > 0).then(|| milliseconds(self.latencies.value_at_quantile(share)))
    }

    /// In ms; `None` if nothing was answered right.
    pub fn max(&self) -> Option<f64> {
        (self.ok > 0).then(|| milliseconds(self.latencies.max()))
    }
}

fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

/// What came of a load.
pub struct Measured {
    pub tally: Tally,
    pub elapsed: Duration,
    /// How waiting times went, if that was asked for.
    pub trend: Option<Trend>,
}

impl Measured {
    /// Answers and failures a second.
    pub fn rate(&self) -> f64 {
        self.tally.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Right answers a second. Failures can be many in no time.
    pub fn right_rate(&self) -> f64 {
        self.tally.ok as f64 / self.elapsed.as_secs_f64()
    }

    /// Adds what another connection measured at the same time.
    pub fn add_beside(&mut self, other: &Measured) {
        self.tally.add(&other.tally);
        self.elapsed = self.elapsed.max(other.elapsed);
        if let (Some(trend), Some(other)) = (&mut self.trend, &other.trend) {
            trend.add(other);
        }
    }

    /// Adds what was measured at another time.
    pub fn add_after(&mut self, other: &Measured) {
        self.tally.add(&other.tally);
        self.elapsed += other.elapsed;
    }
}
