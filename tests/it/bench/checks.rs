//! `fibrpc bench --fail-if` and `--find-rate`: that it decides right, and says why.

use super::{bench, echo, json, lines}; // the macro, too
use crate::support::{PATIENCE, Process, fibrpc, local, run, unique, url};
use fibrpc::{RemoteError, Request, Serving};
use serde_json::Value;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// A server that fails each tenth request.
fn failing(queue: &str) -> Serving {
    let count = AtomicU64::new(0);
    let handler = move |_: &Request| match count.fetch_add(1, Ordering::Relaxed) % 10 {
        0 => Err(RemoteError::internal("the tenth").into()),
        _ => Ok("1"),
    };
    local(queue, |server| server, handler)
}

#[test]
fn a_check_that_fails_ends_with_9_and_is_named_with_the_value() {
    let queue = unique("bench-checks");
    let _server = echo(&queue);
    let checked = |checks: &[&str]| {
        let mut command = fibrpc(&url(), &queue);
        command.args([
            "bench",
            "--requests",
            "100",
            "--size",
            "9",
            "--output",
            "json",
        ]);
        for check in checks {
            command.args(["--fail-if", check]);
        }
        run(&mut command)
    };
    let kept = checked(&["p99.9>30s", "min < 1ns", "errors>0", "rate<=0.5"]);
    assert_eq!((kept.code(), kept.stderr.as_str()), (Some(0), ""));
    let report = json(&kept.stdout);
    let checks = report["checks"].as_array().unwrap();
    assert_eq!(checks.len(), 4);
    assert!(
        checks.iter().all(|check| check["failed"] == false),
        "{report}"
    );
    assert_eq!(checks[0]["value"], report["latency_ms"]["p99_9"]);
    assert_eq!(checks[3]["value"], report["rate"]);

    let failed = checked(&["max<1h", "errors>0", "mean>1ns"]);
    assert_eq!(failed.code(), Some(9));
    let complaints: Vec<_> = failed.stderr.lines().collect();
    assert_eq!(complaints.len(), 2, "{complaints:?}");
    assert!(complaints[0].starts_with("error: failed check 'max<1h': max was "));
    assert!(complaints[1].starts_with("error: failed check 'mean>1ns': mean was "));
    let report = json(&failed.stdout);
    let verdicts: Vec<_> = (0..3).map(|i| &report["checks"][i]["failed"]).collect();
    assert_eq!(verdicts, [true, false, true]);
}

#[test]
fn a_check_of_errors_says_how_many_are_tolerated() {
    let queue = unique("bench-errors");
    let _server = failing(&queue);
    for (check, code) in [
        ("", 3),
        ("p99>1h", 3),
        ("errors>10", 0),
        ("errors>9", 9),
        ("p99>1ns", 9),
    ] {
        let mut options = "--requests 100".to_owned();
        if !check.is_empty() {
            options += &format!(" --fail-if {check}");
        }
        let bench = bench(&queue, &options);
        assert_eq!(bench.code(), Some(code), "{check}: {}", bench.stdout);
        assert!(
            bench.stdout.contains("10 failed: remote"),
            "{}",
            bench.stdout
        );
    }
    // Where nothing works, no number of failures is fine.
    let none = unique("bench-nobody");
    for (check, code) in [("errors>10", 5), ("errors>2", 9), ("p99>1h", 9)] {
        let bench = bench(&none, &format!("--requests 5 --fail-if {check}"));
        assert_eq!(bench.code(), Some(code), "{check}: {}", bench.stderr);
        let told = bench.stderr.contains("nothing was answered right");
        assert_eq!(told, check.starts_with("p99"), "{}", bench.stderr);
    }
}

#[test]
fn the_highest_rate_that_a_server_keeps_is_found() {
    let queue = unique("bench-find");
    // Four workers that take 10 ms: 400 a second, and much less on a machine that is busy.
    let handler = |request: &Request| {
        thread::sleep(Duration::from_millis(10));
        Ok(request.body().to_vec())
    };
    let _server = local(&queue, |server| server.workers(4).prefetch(2), handler);
    let mut bench = Process::spawn(fibrpc(&url(), &queue).arg("bench").args(
        "--duration 1s --connections 2 --size 9 --output json --find-rate p99<20s".split(' '),
    ));
    let code = bench.wait(4 * PATIENCE).code();
    let (stdout, stderr) = bench.output();
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    let (trials, report) = lines(&stdout, "trial");
    let found = report["find_rate"]["rate"].as_u64().unwrap();
    assert!((50..=420).contains(&found), "{stdout}");
    let tried = |is_kept: bool| {
        let rates = trials.iter().filter(|trial| trial["kept"] == is_kept);
        rates
            .map(|trial| trial["rate"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let (kept, not_kept) = (tried(true), tried(false));
    assert!(
        kept.iter().filter(|rate| **rate == found).count() >= 2,
        "{stdout}"
    );
    let too_high = report["find_rate"]["too_high"].as_u64().unwrap();
    assert!(
        not_kept.iter().filter(|rate| **rate == too_high).count() >= 2,
        "{stdout}"
    );
    assert!(
        too_high > found && too_high - found <= found / 50,
        "{stdout}"
    );
    assert_eq!(report["ok"], report["requests"]);
}

#[test]
fn a_server_whose_answers_take_longer_than_a_trial_is_not_behind() {
    let queue = unique("bench-find-long");
    // 53 a second: 16 at a time, each for 0.3 s.
    let _server = local(
        &queue,
        |server| server.workers(16),
        |_: &Request| {
            thread::sleep(Duration::from_millis(300));
            Ok("")
        },
    );
    let mut bench = Process::spawn(fibrpc(&url(), &queue).arg("bench").args(
        "--duration 200ms --size 9 --concurrency 16 --output json --find-rate p99<20s".split(' '),
    ));
    let code = bench.wait(4 * PATIENCE).code();
    let (stdout, stderr) = bench.output();
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    let (_, report) = lines(&stdout, "trial");
    let found = report["find_rate"]["rate"].as_u64().unwrap();
    // How few depends on what else runs here.
    assert!((5..=57).contains(&found), "{stdout}");
}

#[test]
fn a_rate_at_which_calls_fail_is_not_kept() {
    let queue = unique("bench-find-failing");
    let _server = failing(&queue);
    let bench = bench(&queue, "--duration 200ms --output json --find-rate p99<20s");
    let (trials, _) = lines(&bench.stdout, "trial");
    // Each tenth fails, so a trial without a failure has less than 10 requests.
    let many = |trial: &&Value| trial["requests"].as_u64().unwrap() >= 10;
    let reasons: Vec<_> = trials
        .iter()
        .filter(many)
        .map(|trial| &trial["reason"])
        .collect();
    assert!(reasons.contains(&&json!("errors")), "{}", bench.stdout);
    assert!(!reasons.contains(&&Value::Null), "{}", bench.stdout);
}

#[test]
fn a_rate_that_nothing_keeps_is_an_error() {
    let queue = unique("bench-find-none");
    let _server = echo(&queue);
    let none = bench(&queue, "--duration 50ms --size 9 --find-rate p50<1ns");
    assert_eq!(none.code(), Some(9), "{}", none.stderr);
    assert_eq!(
        none.stderr,
        "error: not even 1 request a second keeps p50<1ns\n"
    );
    // Without a server there is nothing to search.
    let nobody = bench(
        &unique("bench-find-nobody"),
        "--duration 50ms --find-rate p50<1s",
    );
    assert_eq!(nobody.code(), Some(5));
    assert!(!nobody.stderr.contains("keeps"), "{}", nobody.stderr);
}

#[test]
fn an_interrupted_search_reports_what_it_has() {
    let queue = unique("bench-find-interrupted");
    let _server = echo(&queue);
    let mut bench = Process::spawn(
        fibrpc(&url(), &queue)
            .arg("bench")
            .args("--duration 200ms --size 9 --output json --find-rate max<1ns".split(' ')),
    );
    bench.wait_for("trial");
    bench.signal("INT");
    assert_eq!(bench.wait(PATIENCE).code(), Some(130));
    let (_, report) = lines(&bench.output().0, "trial");
    assert_eq!(report["find_rate"]["rate"], Value::Null);
    assert_eq!(report["find_rate"]["condition"], "max<1ns");
}
