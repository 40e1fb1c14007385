//! What is printed, for people and for programs.

use crate::command::bench::Outcome;
use crate::command::bench::checks::{Check, Metric};
use crate::command::bench::context::Context;
use crate::command::bench::find_rate::{Trial, Verdict};
use crate::command::bench::intervals::Interval;
use crate::command::bench::tally::{Tally, WRONG};
use crate::command::cli::ReportKind;
use crate::command::lines::{CANNOT_WRITE, Lines};
use anyhow::Context as _;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;

/// Prints on stdout. In JSON, each object is a line.
pub struct Printer {
    pub kind: ReportKind,
    pub lines: Lines,
}

/// What is reported in the end.
pub struct Report<'a> {
    pub outcome: &'a Outcome<'a>,
    pub checks: &'a [Check<'a>],
    /// Whether there are intervals or trials above it.
    pub follows_lines: bool,
    pub context: Option<Context<'a>>,
}

impl Printer {
    /// What stands above the intervals.
    pub fn header(&self) -> anyhow::Result<()> {
        match self.kind {
            ReportKind::Json => Ok(()),
            ReportKind::Text => self.print(&format!(
                "{:>9} {:>10} {:>10} {:>8} {:>10} {:>10} {:>10}",
                "seconds", "answers", "rate", "errors", "p50 ms", "p99 ms", "max ms"
            )),
        }
    }

    pub fn interval(&self, interval: &Interval) -> anyhow::Result<()> {
        let tally = &interval.tally;
        let end = interval.end.as_secs_f64();
        let seconds = interval.length.as_secs_f64();
        let rate = tally.requests as f64 / seconds;
        let (p50, p99, max) = (tally.quantile(0.5), tally.quantile(0.99), tally.max());
        self.print(&match self.kind {
            ReportKind::Json => serde_json::to_string(&JsonLine {
                interval: JsonInterval {
                    end,
                    seconds,
                    requests: tally.requests,
                    ok: tally.ok,
                    errors: tally.errors(),
                    rate,
                    latency_ms: JsonIntervalLatency { p50, p99, max },
                },
            })?,
            ReportKind::Text => {
                let [p50, p99, max] = [p50, p99, max].map(|latency| match latency {
                    Some(latency) => format!("{latency:.3}"),
                    None => "-".to_owned(),
                });
                format!(
                    "{end:9.2} {:10} {rate:10.0} {:8} {p50:>10} {p99:>10} {max:>10}",
                    tally.requests,
                    tally.errors()
                )
            }
        })
    }

    pub fn trial(&self, trial: &Trial<'_>, metric: Metric) -> anyhow::Result<()> {
        let measured = trial.measured;
        let (value, rate) = (metric.of(measured), trial.rate);
        let errors = measured.tally.errors();
        self.print(&match self.kind {
            ReportKind::Json => serde_json::to_string(&JsonTrialLine {
                trial: JsonTrial {
                    rate,
                    kept: trial.verdict == Verdict::Kept,
                    reason: match trial.verdict {
                        Verdict::Kept => None,
                        Verdict::FellBehind => Some("fell-behind"),
                        Verdict::Failed => Some("errors"),
                        Verdict::Broken => Some("condition"),
                    },
                    metric: metric.name(),
                    value,
                    requests: measured.tally.requests,
                    errors,
                    answers_per_second: measured.rate(),
                },
            })?,
            ReportKind::Text => {
                let value = value.map_or_else(|| "-".to_owned(), |value| metric.show(value));
                let verdict = match trial.verdict {
                    Verdict::Kept => "kept".to_owned(),
                    Verdict::FellBehind => {
                        format!("not kept, fell behind ({:.0}/s)", measured.rate())
                    }
                    Verdict::Failed => format!("not kept, {errors} failed"),
                    Verdict::Broken => "not kept".to_owned(),
                };
                format!(
                    "{rate:10} requests/s  {} {value:>14}  {verdict}",
                    metric.name()
                )
            }
        })
    }

    pub fn report(&self, report: &Report<'_>) -> anyhow::Result<()> {
        let text = match self.kind {
            ReportKind::Json => serde_json::to_string(&report.json())?,
            ReportKind::Text if report.follows_lines => format!("\n{}", report.text()),
            ReportKind::Text => report.text(),
        };
        let printed = self.lines.print(text.trim_end_matches('\n'));
        match printed.and_then(|()| self.lines.flush(None)) {
            // What was found holds, though nobody reads it.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            done => done.context(CANNOT_WRITE),
        }
    }

    fn print(&self, line: &str) -> anyhow::Result<()> {
        self.lines.print(line).context(CANNOT_WRITE)
    }
}

#[derive(Serialize)]
struct JsonLine {
    interval: JsonInterval,
}

#[derive(Serialize)]
struct JsonInterval {
    /// When it ended, in seconds since the beginning; how long it was.
    end: f64,
    seconds: f64,
    requests: u64,
    ok: u64,
    errors: u64,
    rate: f64,
    latency_ms: JsonIntervalLatency,
}

/// Null if nothing was answered right.
#[derive(Serialize)]
struct JsonIntervalLatency {
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

#[derive(Serialize)]
struct JsonTrialLine {
    trial: JsonTrial,
}

#[derive(Serialize)]
struct JsonTrial {
    rate: u32,
    kept: bool,
    reason: Option<&'static str>,
    metric: &'static str,
    value: Option<f64>,
    requests: u64,
    errors: u64,
    answers_per_second: f64,
}

/// The report for programs, as the contract has it.
#[derive(Serialize)]
struct Json<'a> {
    requests: u64,
    ok: u64,
    wrong: u64,
    errors: BTreeMap<&'static str, u64>,
    seconds: f64,
    rate: f64,
    latency_ms: Latency,
    #[serde(skip_serializing_if = "Option::is_none")]
    find_rate: Option<JsonFound>,
    checks: Vec<JsonCheck>,
    #[serde(flatten)]
    context: Option<&'a Context<'a>>,
}

/// All 0 if nothing was answered right.
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

#[derive(Serialize)]
struct JsonFound {
    condition: String,
    rate: Option<u32>,
    too_high: Option<u32>,
}

#[derive(Serialize)]
struct JsonCheck {
    check: String,
    metric: &'static str,
    value: Option<f64>,
    failed: bool,
}

impl Report<'_> {
    fn json(&self) -> Json<'_> {
        let Outcome { measured, search } = self.outcome;
        let tally = &measured.tally;
        let mut errors: BTreeMap<_, _> = tally
            .failures
            .iter()
            .map(|(&(kind, _), &count)| (kind, count))
            .collect();
        let checks = self.checks.iter().map(|check| JsonCheck {
            check: check.condition.to_string(),
            metric: check.condition.metric.name(),
            value: check.value,
            failed: check.failed,
        });
        Json {
            requests: tally.requests,
            ok: tally.ok,
            wrong: errors.remove(WRONG.0).unwrap_or(0),
            errors,
            seconds: measured.elapsed.as_secs_f64(),
            rate: measured.rate(),
            latency_ms: latency(tally),
            find_rate: search.as_ref().map(|(condition, found)| JsonFound {
                condition: condition.to_string(),
                rate: found.kept,
                too_high: found.too_high,
            }),
            checks: checks.collect(),
            context: self.context.as_ref(),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let Outcome { measured, search } = self.outcome;
        if let Some((condition, found)) = search
            && let Some(rate) = found.kept
        {
            let _ = write!(out, "{rate} requests/s keep {condition}");
            let _ = match found.too_high {
                Some(too_high) => writeln!(out, ", {too_high} do not"),
                None => writeln!(out),
            };
        }
        let tally = &measured.tally;
        let _ = writeln!(
            out,
            "{} requests in {:.2} s: {:.0} requests/s, {} answered right",
            tally.requests,
            measured.elapsed.as_secs_f64(),
            measured.rate(),
            tally.ok
        );
        for (&(kind, _), count) in &tally.failures {
            let _ = writeln!(out, "{count} failed: {kind}");
        }
        if tally.ok > 0 {
            put_latencies(&mut out, tally);
        }
        out
    }
}

fn latency(tally: &Tally) -> Latency {
    let at = |share| tally.quantile(share).unwrap_or(0.0);
    Latency {
        min: tally.min().unwrap_or(0.0),
        mean: tally.mean().unwrap_or(0.0),
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        p99_9: at(0.999),
        max: tally.max().unwrap_or(0.0),
    }
}

fn put_latencies(out: &mut String, tally: &Tally) {
    let Latency {
        min,
        mean,
        p50,
        p90,
        p99,
        p99_9,
        max,
    } = latency(tally);
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
    put_histogram(out, tally);
}

/// How many latencies are up to 2^k microseconds, for each k that has some, as bars.
fn put_histogram(out: &mut String, tally: &Tally) {
    const BAR_LEN: u64 = 40;
    let mut buckets = BTreeMap::<u32, u64>::new();
    for value in tally.latencies.iter_recorded() {
        let microseconds = value.value_iterated_to().div_ceil(1000).max(1);
        let bucket = microseconds.next_power_of_two().trailing_zeros();
        *buckets.entry(bucket).or_default() += value.count_since_last_iteration();
    }
    let most = buckets.values().copied().max().unwrap_or(1);
    for (bucket, count) in buckets {
        let bar = "#".repeat((count * BAR_LEN).div_ceil(most) as usize);
        let upper = (1_u64 << bucket) as f64 / 1000.0;
        let _ = writeln!(out, "  <= {upper:9.3} {count:9} {bar}");
    }
}
