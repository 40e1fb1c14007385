//! `fibrpc bench`: a closed or an open loop of calls on one client, every answer checked, and the
//! report on it.

use crate::command::cli::bench::BenchArgs;
use crate::command::cli::{Global, ReportKind};
use crate::command::exit::{INTERRUPTED, class};
use crate::command::lines;
use crate::command::signals::{GOODBYE_TIME, on_first_signal};
use crate::fib;
use fibrpc::{Answer, Calls, Client, RequestBuilder};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// What to do.
pub struct Plan {
    /// The n of fib(n).
    pub argument: u32,
    /// Requests sent before, closed loop, not counted.
    pub warmup: u64,
    pub length: Length,
    pub pace: Pace,
}

#[derive(Clone, Copy)]
pub enum Length {
    Requests(u64),
    Time(Duration),
}

#[derive(Clone, Copy)]
pub enum Pace {
    /// The next request goes out when an answer comes in.
    Closed { in_flight: usize },
    /// Requests go out when they are due, whatever comes in.
    Open { per_second: u32 },
}

/// In an open loop against a server that does not keep up, calls pile up. Above so many in
/// flight, the next is sent late; its latency counts from when it was due all the same.
const PILE_MAX: usize = 100_000;

/// How many calls the warm-up keeps in flight in front of an open loop.
const WARMUP_IN_FLIGHT: usize = 64;

/// How often the progress bar moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// The longest latency that the histogram tells from longer ones, in nanoseconds: an hour.
const LATENCY_MAX: u64 = 3600 * 1_000_000_000;

/// The significant digits of a latency.
const PRECISION: u8 = 3;

/// The kind of an answer that is a number, and not the right one. The server is to blame.
const WRONG: (&str, u8) = ("wrong", 3);

/// What came of it.
struct Report {
    requests: u64,
    ok: u64,
    /// Failures by kind, and the exit code of each.
    failures: BTreeMap<(&'static str, u8), u64>,
    elapsed: Duration,
    /// The latencies of the requests that were answered right, in nanoseconds.
    latencies: Histogram<u64>,
}

/// Runs the command; the exit code is that of the commonest failure.
pub fn bench(args: &BenchArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let client = args.client(global)?;
    let interrupted = client.clone();
    on_first_signal(Some(GOODBYE_TIME), move || interrupted.close())?;
    let report = run(&client, &global.queue, &args.plan());
    let text = match args.output {
        ReportKind::Text => report.text(),
        ReportKind::Json => serde_json::to_string(&report.json())? + "\n",
    };
    lines::print(&text)?;
    Ok(match report.commonest_failure() {
        _ if client.is_closed() => ExitCode::from(INTERRUPTED),
        None => ExitCode::SUCCESS,
        Some(code) => ExitCode::from(code),
    })
}

/// Runs a plan; ends early when the client is closed.
fn run(client: &Client, queue: &str, plan: &Plan) -> Report {
    if plan.warmup > 0 {
        let in_flight = match plan.pace {
            Pace::Closed { in_flight } => in_flight,
            Pace::Open { .. } => WARMUP_IN_FLIGHT,
        };
        let warmup = Length::Requests(plan.warmup);
        Run::start(client, queue, plan.argument, warmup).closed(in_flight);
    }
    let run = Run::start(client, queue, plan.argument, plan.length);
    match plan.pace {
        Pace::Closed { in_flight } => run.closed(in_flight),
        Pace::Open { per_second } => run.open(per_second),
    }
}

/// A run in progress.
struct Run<'c> {
    client: &'c Client,
    queue: &'c str,
    /// Each call's key is the time it was due.
    calls: Calls<'c, Instant>,
    body: Vec<u8>,
    expected: Vec<u8>,
    length: Length,
    began: Instant,
    sent: u64,
    report: Report,
    progress: ProgressBar,
    progressed: Instant,
}

impl<'c> Run<'c> {
    fn start(client: &'c Client, queue: &'c str, argument: u32, length: Length) -> Run<'c> {
        let expected = fib::fast(argument).expect("the command line allows no larger n");
        let steps = match length {
            Length::Requests(requests) => requests,
            Length::Time(time) => time.as_millis() as u64,
        };
        // Shows itself only on a terminal.
        let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %  {msg}");
        let progress =
            ProgressBar::new(steps).with_style(style.expect("a template that is constant"));
        let latencies = Histogram::new_with_bounds(1, LATENCY_MAX, PRECISION);
        let now = Instant::now();
        Run {
            client,
            queue,
            calls: client.calls(),
            body: argument.to_string().into_bytes(),
            expected: expected.to_string().into_bytes(),
            length,
            began: now,
            sent: 0,
            report: Report {
                requests: 0,
                ok: 0,
                failures: BTreeMap::new(),
                elapsed: Duration::ZERO,
                latencies: latencies.expect("bounds that are constant"),
            },
            progress,
            progressed: now,
        }
    }

    fn closed(mut self, in_flight: usize) -> Report {
        let mut now = self.began;
        loop {
            let mut requests = Vec::new();
            while self.calls.len() + requests.len() < in_flight && self.has_more(now) {
                requests.push(self.request(now));
            }
            self.calls.extend(requests);
            let Some(answer) = self.calls.next() else {
                return self.end();
            };
            now = self.take(&answer);
            // What has come in with it.
            while let Some(answer) = self.calls.next_before(now) {
                now = self.take(&answer);
            }
        }
    }

    fn open(mut self, per_second: u32) -> Report {
        let due = |sent: u64, began: Instant| {
            began + Duration::from_secs_f64(sent as f64 / f64::from(per_second))
        };
        loop {
            let mut now = Instant::now();
            let mut next = due(self.sent, self.began);
            let mut requests = Vec::new();
            while next <= now && self.has_more(next) && self.calls.len() + requests.len() < PILE_MAX
            {
                requests.push(self.request(next));
                next = due(self.sent, self.began);
            }
            self.calls.extend(requests);
            if self.calls.is_empty() {
                if !self.has_more(next) {
                    return self.end();
                }
                thread::sleep(next.saturating_duration_since(now));
                continue;
            }
            // All that has come in until the next is due; if there is no next, all that comes in.
            let full = self.calls.len() >= PILE_MAX || !self.has_more(next);
            let limit = if full { now + PROGRESS_INTERVAL } else { next };
            while let Some(answer) = self.calls.next_before(limit) {
                now = self.take(&answer);
                if now >= limit {
                    break;
                }
            }
        }
    }

    /// Whether a request that is due at a time is still to be sent.
    fn has_more(&self, at: Instant) -> bool {
        !self.client.is_closed()
            && match self.length {
                Length::Requests(requests) => self.sent < requests,
                Length::Time(time) => at < self.began + time,
            }
    }

    /// The next request, which is due at that time.
    fn request(&mut self, due: Instant) -> (Instant, RequestBuilder<'c>) {
        self.sent += 1;
        let request = self.client.request(self.queue);
        (due, request.body(&*self.body))
    }

    /// Counts an answer; returns the time.
    fn take(&mut self, answer: &Answer<Instant>) -> Instant {
        let now = Instant::now();
        let report = &mut self.report;
        report.requests += 1;
        let failure = match &answer.result {
            Ok(reply) if reply.body == self.expected => {
                report.ok += 1;
                let latency = now.saturating_duration_since(answer.key).as_nanos() as u64;
                report.latencies.saturating_record(latency);
                None
            }
            Ok(_) => Some(WRONG),
            Err(error) => Some(class(error)),
        };
        if let Some(failure) = failure {
            *report.failures.entry(failure).or_default() += 1;
        }
        if now - self.progressed >= PROGRESS_INTERVAL {
            self.progressed = now;
            let elapsed = now - self.began;
            self.progress.set_position(match self.length {
                Length::Requests(_) => report.requests,
                Length::Time(_) => elapsed.as_millis() as u64,
            });
            let rate = report.requests as f64 / elapsed.as_secs_f64();
            self.progress.set_message(format!("{rate:.0}/s"));
        }
        now
    }

    fn end(mut self) -> Report {
        self.progress.finish_and_clear();
        self.report.elapsed = self.began.elapsed();
        self.report
    }
}

/// The report for programs, as the contract has it.
#[derive(Serialize)]
struct Json {
    requests: u64,
    ok: u64,
    wrong: u64,
    errors: BTreeMap<&'static str, u64>,
    seconds: f64,
    rate: f64,
    latency_ms: Latency,
}

#[derive(Serialize)]
struct Latency {
    min: f64,
    mean: f64,
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

impl Report {
    /// The exit code of the commonest failure; `None` if there was none.
    fn commonest_failure(&self) -> Option<u8> {
        let (&(_, code), _) = self.failures.iter().max_by_key(|&(_, count)| count)?;
        Some(code)
    }

    fn json(&self) -> Json {
        let mut errors: BTreeMap<_, _> = self
            .failures
            .iter()
            .map(|(&(kind, _), &count)| (kind, count))
            .collect();
        Json {
            requests: self.requests,
            ok: self.ok,
            wrong: errors.remove(WRONG.0).unwrap_or(0),
            errors,
            seconds: self.elapsed.as_secs_f64(),
            rate: self.rate(),
            latency_ms: self.latency(),
        }
    }

    /// Answers a second.
    fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    fn latency(&self) -> Latency {
        let at = |quantile| milliseconds(self.latencies.value_at_quantile(quantile));
        Latency {
            // The histogram's own least value is a bound when it is empty.
            min: if self.ok == 0 {
                0.0
            } else {
                milliseconds(self.latencies.min())
            },
            mean: self.latencies.mean() / 1e6,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: milliseconds(self.latencies.max()),
        }
    }

    /// The report for people.
    fn text(&self) -> String {
        let mut out = format!(
            "{} requests in {:.2} s: {:.0} requests/s, {} answered right\n",
            self.requests,
            self.elapsed.as_secs_f64(),
            self.rate(),
            self.ok
        );
        for (&(kind, _), count) in &self.failures {
            let _ = writeln!(out, "{count} failed: {kind}");
        }
        if self.ok == 0 {
            return out;
        }
        let Latency {
            min,
            mean,
            p50,
            p90,
            p99,
            p99_9,
            max,
        } = self.latency();
        let _ = writeln!(out, "latency in ms:");
        for (name, value) in [
            ("min", min),
            ("mean", mean),
            ("p50", p50),
            ("p90", p90),
            ("p99", p99),
            ("p99.9", p99_9),
            ("max", max),
        ] {
            let _ = writeln!(out, "  {name:>5} {value:10.3}");
        }
        self.put_histogram(&mut out);
        out
    }

    /// How many latencies are up to 2^k microseconds, for each k that has some, as bars.
    fn put_histogram(&self, out: &mut String) {
        const BAR_LEN: u64 = 40;
        let mut buckets = BTreeMap::<u32, u64>::new();
        for value in self.latencies.iter_recorded() {
            let microseconds = value.value_iterated_to().div_ceil(1000).max(1);
            let bucket = microseconds.next_power_of_two().trailing_zeros();
            *buckets.entry(bucket).or_default() += value.count_since_last_iteration();
        }
        let most = buckets.values().copied().max().unwrap_or(1);
        for (bucket, count) in buckets {
            let bar = "#".repeat((count * BAR_LEN).div_ceil(most) as usize);
            let _ = writeln!(
                out,
                "  <= {:9.3} {count:9} {bar}",
                f64::from(1 << bucket) / 1000.0
            );
        }
    }
}

fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}
