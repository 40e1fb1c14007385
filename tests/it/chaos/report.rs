//! What is said of a history: a table, and the story of every call that broke a rule.

use crate::chaos::checker::{Case, RULES, Violation, seconds};
use crate::chaos::history::{Fault, Micros, Outcome, Party};
use fibrpc::ClientStats;
use std::collections::BTreeMap;
use std::path::Path;

/// So many violations of a rule are told in full.
const TOLD_MAX: usize = 3;

/// Prints the table of a run; `title` says what run it was.
pub fn print_table(
    case: &Case,
    violations: &[Violation],
    stats: &[ClientStats],
    title: &str,
    path: &Path,
) {
    println!("\n| {title} | |\n|---|---|");
    let row = |name: &str, value: &dyn std::fmt::Display| println!("| {name} | {value} |");
    let mut faults = BTreeMap::new();
    for fault in &case.faults {
        *faults.entry(fault.kind).or_insert(0_u32) += 1;
    }
    for (kind, count) in faults {
        row(&format!("fault: {kind:?}"), &count);
    }
    for (party, tally) in tallies(case) {
        row(case.name(party), &tally);
    }
    let stories = || case.calls.values();
    let executions = |least: usize| {
        let counts = stories().map(|story| story.executions.len());
        counts.filter(|&count| count >= least).count()
    };
    row("calls made", &case.calls.len());
    let answered = stories().filter(|story| {
        let outcomes = story.ended.iter().map(|ended| &ended.outcome);
        outcomes
            .into_iter()
            .any(|outcome| matches!(outcome, Outcome::Answered { .. }))
    });
    row("calls answered", &answered.count());
    row("calls executed", &executions(1));
    row("calls executed more than once", &executions(2));
    row(
        "calls executed after their deadline, within the slack",
        &late(case),
    );
    let sum = |count: fn(&ClientStats) -> u64| stats.iter().map(count).sum::<u64>();
    row(
        "connections made by clients",
        &sum(|stats| stats.connections),
    );
    row("requests sent again", &sum(|stats| stats.republished));
    row("replies dropped", &sum(|stats| stats.dropped_replies));
    let ends = || {
        let ends = stories().flat_map(|story| story.ended.iter().zip(&story.called));
        ends.filter(|(ended, _)| ended.outcome != Outcome::Abandoned)
    };
    let slowest = ends().map(|(ended, _)| ended.latency).max();
    row("slowest call", &seconds(slowest.unwrap_or(0)));
    let overrun = ends().map(|(ended, called)| {
        let due = called.deadline().max(ended.back);
        ended.at.saturating_sub(due)
    });
    row(
        "longest overrun of a deadline",
        &seconds(overrun.max().unwrap_or(0)),
    );
    for rule in RULES {
        let broken = violations.iter().filter(|violation| violation.rule == rule);
        row(&format!("violations: {rule}"), &broken.count());
    }
    println!("\nThe history is in {}.\n", path.display());
}

/// How the calls of one client have ended.
fn tallies(case: &Case) -> BTreeMap<Party, String> {
    let mut counts: BTreeMap<Party, BTreeMap<String, u32>> = BTreeMap::new();
    for story in case.calls.values() {
        let Some(called) = &story.called else {
            continue;
        };
        let tally = counts.entry(called.client).or_default();
        for ended in &story.ended {
            let outcome = match &ended.outcome {
                Outcome::Answered { .. } => "answered".to_owned(),
                Outcome::Failed { kind, .. } => format!("{kind:?}"),
                Outcome::Abandoned => "abandoned".to_owned(),
            };
            *tally.entry(outcome).or_default() += 1;
        }
    }
    let text = |tally: BTreeMap<String, u32>| {
        let parts: Vec<_> = tally
            .iter()
            .map(|(outcome, count)| format!("{outcome} {count}"))
            .collect();
        parts.join(", ")
    };
    counts
        .into_iter()
        .map(|(party, tally)| (party, text(tally)))
        .collect()
}

fn late(case: &Case) -> usize {
    let is_late = |story: &&crate::chaos::checker::Story| {
        let deadline = story
            .called
            .as_ref()
            .map_or(Micros::MAX, |called| called.deadline());
        story.executions.iter().any(|began| began.at > deadline)
    };
    case.calls.values().filter(is_late).count()
}

/// Prints what is wrong: the rule, the call's whole story in order of time, and the faults that
/// struck it.
pub fn print_violations(case: &Case, violations: &[Violation]) {
    for rule in RULES {
        let broken = violations.iter().filter(|violation| violation.rule == rule);
        for violation in broken.take(TOLD_MAX) {
            println!("\nseed {}: not so: {rule}", case.seed);
            println!("  {}", violation.what);
            for (at, line) in story(case, violation) {
                println!("  {:>12}  {line}", seconds(at.saturating_sub(case.began)));
            }
        }
    }
}

fn story(case: &Case, violation: &Violation) -> Vec<(Micros, String)> {
    let Some(call) = violation.call else {
        return Vec::new();
    };
    let story = &case.calls[&call];
    let mut lines = Vec::new();
    if let Some(called) = &story.called {
        let client = case.name(called.client);
        lines.push((called.at, format!("{client} calls: {called:?}")));
        lines.push((called.sent, "submitted".to_owned()));
        lines.push((called.deadline(), "its deadline".to_owned()));
    }
    for began in &story.executions {
        let server = case.name(began.server);
        lines.push((began.at, format!("{server} begins: {began:?}")));
    }
    for &(server, at) in &story.finished {
        lines.push((at, format!("{} has finished", case.name(server))));
    }
    for ended in &story.ended {
        lines.push((ended.at, format!("it ends: {ended:?}")));
    }
    for fault in case.faults_around(story) {
        let Fault {
            kind,
            from,
            until,
            party,
            queue,
            detail,
        } = fault;
        let whom = party.map(|party| case.name(party)).or(queue.as_deref());
        let whom = whom.unwrap_or("all");
        lines.push((*from, format!("fault {kind:?} begins ({whom}): {detail}")));
        lines.push((*until, format!("fault {kind:?} is over ({whom})")));
    }
    lines.sort();
    lines
}
