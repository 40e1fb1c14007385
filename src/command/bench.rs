//! `fibrpc bench`: measures a load, and decides.
//!
//! `load` runs it, `tally` counts, `report` prints. `intervals` tells while it runs, `checks` and
//! `find_rate` (with `trend`) decide.

pub mod checks;
mod context;
pub mod find_rate;
mod intervals;
pub mod load;
pub mod payload;
mod progress;
mod report;
mod tally;
mod trend;

use crate::command::cli::bench::BenchArgs;
use crate::command::cli::{Global, ReportKind};
use crate::command::exit::{FAILED_CHECK, INTERRUPTED};
use crate::command::lines::{Lines, stderr};
use crate::command::signals::{GOODBYE_TIME, on_first_signal};
use checks::{Check, Condition, Metric};
use context::Context;
use fibrpc::Client;
use find_rate::{Found, Goal, Trial, find_rate};
use intervals::Every;
use load::{Length, Load, Pace};
use payload::Payload;
use report::{Printer, Report};
use std::process::ExitCode;
use std::time::Duration;
use tally::Measured;

/// What to do.
pub struct Plan {
    pub payload: Payload,
    /// Requests sent before, closed loop, not counted.
    pub warmup: u64,
    pub task: Task,
    /// What is not to hold in the end.
    pub fail_if: Vec<Condition>,
}

pub enum Task {
    Measure {
        length: Length,
        pace: Pace,
        /// How often to tell of what came since.
        every: Option<Duration>,
    },
    FindRate(Goal),
}

/// How many calls the warm-up keeps in flight in front of an open loop, at least.
const WARMUP_IN_FLIGHT: usize = 64;

/// Runs the command. A failed check decides the exit code, then the commonest failure.
pub fn bench(args: &BenchArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let plan = args.plan()?;
    let clients = args.clients(global)?;
    let interrupted = clients.clone();
    on_first_signal(Some(GOODBYE_TIME), move || {
        interrupted.iter().for_each(Client::close);
    })?;
    let context = match args.output {
        ReportKind::Text => None,
        ReportKind::Json => Some(Context::now(args, global, plan.payload.body.len())?),
    };
    let has_lines = !matches!(plan.task, Task::Measure { every: None, .. });
    let load = Load {
        clients: &clients,
        queue: &global.queue,
        payload: &plan.payload,
        // Lines tell as much, and would be torn by it.
        bar: !has_lines,
    };
    let printer = Printer {
        kind: args.output,
        lines: Lines::stdout()?,
    };
    let outcome = plan.run(&load, &printer)?;
    let checks: Vec<_> = plan
        .fail_if
        .iter()
        .map(|condition| Check::of(condition, &outcome.measured))
        .collect();
    printer.report(&Report {
        outcome: &outcome,
        checks: &checks,
        follows_lines: has_lines,
        context,
    })?;
    if load.is_closed() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    for (kind, reason) in &outcome.measured.tally.reasons {
        log::warn!("calls failed ({kind}), the first with: {reason}");
    }
    let complaints: Vec<_> = checks
        .iter()
        .filter(|check| check.failed)
        .map(Check::complaint)
        .chain(outcome.complaint())
        .collect();
    for complaint in &complaints {
        stderr::print(&format!("error: {complaint}"));
    }
    let code = match complaints.is_empty() {
        false => Some(FAILED_CHECK),
        true if plan.tolerates_errors() && outcome.measured.tally.ok > 0 => None,
        true => outcome.measured.tally.commonest_failure(),
    };
    Ok(code.map_or(ExitCode::SUCCESS, ExitCode::from))
}

impl Plan {
    fn run<'p>(&'p self, load: &Load<'_>, printer: &Printer) -> anyhow::Result<Outcome<'p>> {
        if self.warmup > 0 {
            let in_flight = match &self.task {
                Task::Measure {
                    pace: Pace::Closed { in_flight },
                    ..
                } => *in_flight,
                Task::Measure { .. } => load.clients.len().max(WARMUP_IN_FLIGHT),
                Task::FindRate(goal) => goal.in_flight,
            };
            let pace = Pace::Closed { in_flight };
            load.run(Length::Requests(self.warmup), pace, None)?;
        }
        match &self.task {
            Task::Measure {
                length,
                pace,
                every,
            } => {
                let tell = |interval: &_| printer.interval(interval);
                let every = every.map(|length| Every {
                    length,
                    tell: &tell,
                });
                if every.is_some() {
                    printer.header()?;
                }
                Ok(Outcome {
                    measured: load.run(*length, *pace, every.as_ref())?,
                    search: None,
                })
            }
            Task::FindRate(goal) => {
                let metric = goal.condition.metric;
                let tell = |trial: &Trial<'_>| printer.trial(trial, metric);
                let (measured, found) = find_rate(load, goal, tell)?;
                Ok(Outcome {
                    measured,
                    search: Some((&goal.condition, found)),
                })
            }
        }
    }

    /// Whether failures are what is checked: then others than those asked for are none.
    fn tolerates_errors(&self) -> bool {
        let goal = match &self.task {
            Task::Measure { .. } => None,
            Task::FindRate(goal) => Some(&goal.condition),
        };
        let mut conditions = self.fail_if.iter().chain(goal);
        conditions.any(|condition| condition.metric == Metric::Errors)
    }
}

/// What came of it.
pub struct Outcome<'p> {
    measured: Measured,
    /// What was to be found, and what was.
    search: Option<(&'p Condition, Found)>,
}

impl Outcome<'_> {
    /// Why the search has failed. Where nothing is answered right, there is nothing to search.
    fn complaint(&self) -> Option<String> {
        match &self.search {
            Some((condition, Found { kept: None, .. })) if self.measured.tally.ok > 0 => {
                Some(format!("not even 1 request a second keeps {condition}"))
            }
            _ => None,
        }
    }
}
