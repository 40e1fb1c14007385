//! The highest rate that keeps a condition (`--find-rate`).

use crate::command::bench::checks::{Condition, Metric};
use crate::command::bench::load::{Length, Load, Pace};
use crate::command::bench::tally::Measured;
use std::time::Duration;

/// What is to be found.
pub struct Goal {
    pub condition: Condition,
    /// How long each trial takes, unless answers take too long for that.
    pub trial: Duration,
    /// Of the closed loop that the search begins with.
    pub in_flight: usize,
}

/// A trial of a rate.
pub struct Trial<'a> {
    pub rate: u32,
    pub verdict: Verdict,
    pub measured: &'a Measured,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Kept,
    /// Requests piled up, whatever the condition says.
    FellBehind,
    /// Calls failed, and the condition is not about that.
    Failed,
    /// The condition did not hold.
    Broken,
}

/// What was found.
#[derive(Clone, Copy)]
pub struct Found {
    /// The highest rate that keeps the condition; `None` if the lowest does not.
    pub kept: Option<u32>,
    /// The lowest rate that was tried and does not.
    pub too_high: Option<u32>,
}

/// How many times as long as an answer takes a trial is, at least: until the first one comes, any
/// server seems to keep up.
const ANSWERS_MIN: u32 = 4;

/// Finds the highest rate that keeps the goal, or as much as there is when the clients are closed;
/// and what was measured at it, or without one at the last.
///
/// A closed loop says where to begin. Then each rate is tried twice, and a third time if the first
/// two disagree. A trial ends when all its requests are answered or have timed out, so that one
/// which was too much leaves nothing to the next.
///
/// # Errors
///
/// As of [`Load::run`], or a trial cannot be printed.
pub fn find_rate(
    load: &Load<'_>,
    goal: &Goal,
    tell: impl Fn(&Trial<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<(Measured, Found)> {
    let in_flight = goal.in_flight;
    let closed = Pace::Closed { in_flight };
    let mut measured = load.run(Length::Time(goal.trial), closed, None)?;
    let mut search = Search::new(measured.rate());
    let duration = |ms: Option<f64>| Duration::from_secs_f64(ms.unwrap_or_default() / 1e3);
    let latency = duration(measured.tally.mean());
    let length = goal.trial.max(ANSWERS_MIN * duration(measured.tally.min()));
    let answers = measured.tally.ok > 0;
    while answers && let Some(rate) = search.next() {
        let (mut kept, mut not_kept) = (Vec::new(), Vec::new());
        while kept.len() < 2 && not_kept.len() < 2 {
            let pace = Pace::Trial {
                per_second: rate,
                latency,
            };
            let trial = load.run(Length::Time(length), pace, None)?;
            if load.is_closed() {
                return Ok((measured, search.found));
            }
            let verdict = judge(&trial, &goal.condition);
            tell(&Trial {
                rate,
                verdict,
                measured: &trial,
            })?;
            match verdict {
                Verdict::Kept => kept.push(trial),
                Verdict::FellBehind | Verdict::Failed | Verdict::Broken => not_kept.push(trial),
            }
        }
        let is_kept = kept.len() > not_kept.len();
        search.learn(rate, is_kept);
        if is_kept || search.found.kept.is_none() {
            let mut trials = if is_kept { kept } else { not_kept }.into_iter();
            measured = trials.next().unwrap_or(measured);
            trials.for_each(|trial| measured.add_after(&trial));
        }
    }
    Ok((measured, search.found))
}

fn judge(trial: &Measured, condition: &Condition) -> Verdict {
    if trial
        .trend
        .as_ref()
        .is_some_and(|trend| trend.falls_behind())
    {
        return Verdict::FellBehind;
    }
    if trial.tally.errors() > 0 && condition.metric != Metric::Errors {
        return Verdict::Failed;
    }
    match condition.holds(trial) {
        Some(true) => Verdict::Kept,
        Some(false) | None => Verdict::Broken,
    }
}

/// Which rate to try next: farther and farther from the first until one is kept and one is not,
/// then between the two, until they are close.
struct Search {
    first: u32,
    found: Found,
    /// How far the next rate is from the last, while all were kept, or none.
    stride: f64,
}

/// How far the second rate is from the first. The one that a closed loop gives is a good guess.
const FIRST_STRIDE: f64 = 1.1;

/// How close the rate that is kept and the one that is not are in the end.
const CLOSE: f64 = 1.02;

impl Search {
    fn new(first: f64) -> Search {
        Search {
            first: (first as u32).max(1),
            found: Found {
                kept: None,
                too_high: None,
            },
            stride: FIRST_STRIDE,
        }
    }

    /// The rate to try; `None` if the search is over.
    fn next(&self) -> Option<u32> {
        match (self.found.kept, self.found.too_high) {
            (None, None) => Some(self.first),
            (Some(kept), None) if kept == u32::MAX => None,
            (Some(kept), None) => {
                let next = (f64::from(kept) * self.stride) as u32; // at most the largest
                Some(next.max(kept + 1))
            }
            (None, Some(1)) => None,
            (None, Some(high)) => {
                let next = (f64::from(high) / self.stride) as u32;
                Some(next.clamp(1, high - 1))
            }
            (Some(low), Some(high)) => {
                let (from, to) = (f64::from(low), f64::from(high));
                let is_close = high - low <= 1 || to / from <= CLOSE;
                let middle = (from * to).sqrt().round() as u32;
                (!is_close).then(|| middle.clamp(low + 1, high - 1))
            }
        }
    }

    fn learn(&mut self, rate: u32, is_kept: bool) {
        if self.found.kept.is_some() || self.found.too_high.is_some() {
            self.stride *= self.stride;
        }
        match is_kept {
            true => self.found.kept = Some(rate),
            false => self.found.too_high = Some(rate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_finds_every_limit_from_everywhere_in_few_steps() {
        const STEPS_MAX: u32 = 20;
        let limits = (1..200).chain((0..26).map(|k| 300 * 3_u32.pow(k % 13) + k));
        for limit in limits {
            for first in [0.0, 1.0, 50.0, f64::from(limit), 3e4, 1e6, 4e9] {
                let mut search = Search::new(first);
                let mut steps = 0;
                while let Some(rate) = search.next() {
                    search.learn(rate, rate <= limit);
                    steps += 1;
                    assert!(steps <= STEPS_MAX, "from {first} to {limit}");
                }
                let found = search.found.kept.unwrap();
                let (low, high) = (f64::from(found), f64::from(limit));
                assert!(found <= limit, "from {first} to {limit}: {found}");
                assert!(high / low <= CLOSE, "from {first} to {limit}: {found}");
            }
        }
    }

    #[test]
    fn a_search_for_what_is_never_or_always_kept_ends() {
        for is_kept in [false, true] {
            let mut search = Search::new(1000.0);
            while let Some(rate) = search.next() {
                search.learn(rate, is_kept);
            }
            let found = (search.found.kept, search.found.too_high);
            let expected = match is_kept {
                true => (Some(u32::MAX), None),
                false => (None, Some(1)),
            };
            assert_eq!(found, expected);
        }
    }
}
