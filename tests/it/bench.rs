//! `fibrpc bench`: that it counts right, checks every answer, and does not hide a stall.

use crate::support::{PATIENCE, Peer, Process, fibrpc, local, run, server, unique, url};
use amiquip::QueueDeclareOptions;
use serde_json::Value;
use std::sync::Once;
use std::thread;
use std::time::Duration;

fn json(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout:?}"))
}

#[test]
fn a_closed_loop_counts_every_request_and_orders_its_percentiles() {
    let queue = unique("bench");
    let _server = server(&url(), &queue, &["--quiet", "--algorithm", "fast"]);
    for reply_to in ["queue", "direct"] {
        let bench = run(fibrpc(&url(), &queue).args([
            "bench",
            "--requests",
            "500",
            "--concurrency",
            "16",
            "--warmup",
            "50",
            "-n",
            "186",
            "--reply-to",
            reply_to,
            "--output",
            "json",
        ]));
        assert_eq!((bench.code(), bench.stderr.as_str()), (Some(0), ""));
        let report = json(&bench.stdout);
        assert_eq!(
            (&report["requests"], &report["ok"], &report["wrong"]),
            (&500.into(), &500.into(), &0.into())
        );
        assert_eq!(report["errors"], serde_json::json!({}));
        let rate = report["rate"].as_f64().unwrap();
        assert!((rate * report["seconds"].as_f64().unwrap() - 500.0).abs() < 1.0);
        let latency = |name: &str| report["latency_ms"][name].as_f64().unwrap();
        let ordered = ["min", "p50", "p90", "p99", "p99_9", "max"].map(latency);
        assert!(ordered[0] > 0.0 && ordered.is_sorted(), "{ordered:?}");
        assert!(latency("mean") >= latency("min") && latency("mean") <= latency("max"));
    }
}

#[test]
fn text_is_for_people_and_fits_80_columns() {
    let queue = unique("bench-text");
    let _server = server(&url(), &queue, &["--quiet"]);
    let bench = run(fibrpc(&url(), &queue).args(["bench", "--requests", "300"]));
    assert_eq!(bench.code(), Some(0));
    assert!(
        bench.stdout.starts_with("300 requests in "),
        "{}",
        bench.stdout
    );
    assert!(
        bench.stdout.contains("p99.9") && bench.stdout.contains('#'),
        "{}",
        bench.stdout
    );
    assert!(
        bench.stdout.lines().all(|line| line.len() <= 80),
        "{}",
        bench.stdout
    );
}

#[test]
fn wrong_answers_are_found() {
    let queue = unique("bench-wrong");
    let _server = local(&queue, |server| server, |_| Ok("2"));
    let bench = run(fibrpc(&url(), &queue).args(["bench", "--requests", "20", "--output", "json"]));
    assert_eq!(bench.code(), Some(3));
    let report = json(&bench.stdout);
    assert_eq!((&report["ok"], &report["wrong"]), (&0.into(), &20.into()));
}

#[test]
fn failures_are_counted_by_kind_and_the_commonest_is_the_exit_code() {
    let queue = unique("bench-timeout");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    let bench = run(fibrpc(&url(), &queue).args([
        "bench",
        "--requests",
        "10",
        "--timeout",
        "300ms",
        "--output",
        "json",
    ]));
    assert_eq!(bench.code(), Some(4));
    assert_eq!(
        json(&bench.stdout)["errors"],
        serde_json::json!({"timeout": 10})
    );
    let bench = run(fibrpc(&url(), &unique("bench-none")).args([
        "bench",
        "--requests",
        "10",
        "--output",
        "json",
    ]));
    assert_eq!(bench.code(), Some(5));
}

#[test]
fn an_open_loop_does_not_hide_a_server_that_stalls() {
    const STALL: Duration = Duration::from_millis(800);
    let queue = unique("bench-stall");
    let stalled = Once::new();
    let _server = local(
        &queue,
        |server| server.workers(1),
        move |_| {
            stalled.call_once(|| thread::sleep(STALL));
            Ok("1")
        },
    );
    let bench = run(fibrpc(&url(), &queue).args([
        "bench",
        "--rate",
        "100",
        "--requests",
        "150",
        "--output",
        "json",
    ]));
    assert_eq!(bench.code(), Some(0), "{}", bench.stderr);
    let report = json(&bench.stdout);
    assert_eq!(report["ok"], 150);
    // Some 80 requests were due while it stalled, and each waited for the rest of the stall: more
    // than half of them all, so half have a latency far above what the server takes.
    let p50 = report["latency_ms"]["p50"].as_f64().unwrap();
    let max = report["latency_ms"]["max"].as_f64().unwrap();
    assert!(max >= 700.0, "{report}");
    assert!(p50 >= 20.0, "{report}");
    assert!(
        report["seconds"].as_f64().unwrap() >= 1.4,
        "150 at 100 a second: {report}"
    );
}

#[test]
fn an_interrupted_bench_reports_what_it_has() {
    let queue = unique("bench-interrupted");
    let server = server(&url(), &queue, &[]);
    let mut bench = Process::spawn(fibrpc(&url(), &queue).args([
        "bench",
        "--duration",
        "10m",
        "--output",
        "json",
    ]));
    server.wait_for(" [.] fib(1)");
    bench.signal("INT");
    assert_eq!(bench.wait(PATIENCE).code(), Some(130));
    assert!(json(&bench.output().0)["requests"].as_u64().unwrap() > 0);
}
