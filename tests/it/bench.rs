//! `fibrpc bench`: that it counts right, checks every answer, and does not hide a stall.

mod checks;
mod intervals;

use crate::support::{Finished, PATIENCE, Peer, Process, fibrpc, local, run, server, unique, url};
use amiquip::QueueDeclareOptions;
use fibrpc::{RemoteError, Request, Serving};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

fn json(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap_or_else(|error| panic!("{error}: {stdout:?}"))
}

/// Runs `bench` with options, which are separated by spaces.
fn bench(queue: &str, options: &str) -> Finished {
    run(fibrpc(&url(), queue).arg("bench").args(options.split(' ')))
}

/// A server that answers with the request's body.
fn echo(queue: &str) -> Serving {
    local(
        queue,
        |server| server,
        |request| Ok(request.body().to_vec()),
    )
}

/// The objects before the last line, each under its only name, and the last line: the report.
fn lines(stdout: &str, name: &str) -> (Vec<Value>, Value) {
    let mut lines: Vec<_> = stdout.lines().map(json).collect();
    let report = lines.pop().unwrap();
    assert!(report["requests"].is_u64(), "{stdout}");
    let inner = |line: Value| match line.as_object().map(serde_json::Map::len) {
        Some(1) => line[name].clone(),
        _ => panic!("{line}"),
    };
    (lines.into_iter().map(inner).collect(), report)
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
    // And it is told why, once.
    let told = "calls failed (no-server), the first with: no server: the queue";
    assert_eq!(bench.stderr.matches(told).count(), 1, "{}", bench.stderr);
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

#[test]
fn any_server_is_measured_with_any_body() {
    let queue = unique("bench-body");
    let handler = |request: &Request| match request.content_type() {
        Some("application/json") => Ok(request.body().to_ascii_uppercase()),
        _ => Err(RemoteError::invalid_argument("this is not JSON").into()),
    };
    let _server = local(&queue, |server| server, handler);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"\xff\0SHOUTED\n").unwrap();
    let file = format!("@{}", file.path().display());
    // Upper case is an echo only of what is upper case.
    for (options, code, ok) in [
        (
            &["--data", "{}", "--content-type", "application/json"][..],
            0,
            20,
        ),
        (&["--data", "", "--content-type", "application/json"], 0, 20),
        (
            &["--size", "100000", "--content-type", "application/json"],
            0,
            20,
        ),
        (
            &[
                "--data",
                &file,
                "--expect-echo",
                "--content-type",
                "application/json",
            ],
            0,
            20,
        ),
        (
            &[
                "--data",
                "-a",
                "--expect-echo",
                "--content-type",
                "application/json",
            ],
            3,
            0,
        ),
        (
            &[
                "--size",
                "100",
                "--expect-echo",
                "--content-type",
                "application/json",
            ],
            3,
            0,
        ),
        (&["--data", "{}"], 3, 0),
    ] {
        let mut command = fibrpc(&url(), &queue);
        command.args(["bench", "--requests", "20", "--output", "json"]);
        let bench = run(command.args(options));
        assert_eq!(bench.code(), Some(code), "{options:?}: {}", bench.stderr);
        let report = json(&bench.stdout);
        assert_eq!(report["ok"], ok, "{options:?}: {report}");
        let wrong = if options.contains(&"--expect-echo") {
            20 - ok
        } else {
            0
        };
        assert_eq!(report["wrong"], wrong, "{options:?}: {report}");
    }
}

#[test]
fn an_echo_that_is_put_together_wrongly_is_found() {
    let queue = unique("bench-echo");
    let handler = |request: &Request| {
        let mut body = request.body().to_vec();
        // Two parts of a long body change places.
        if body.len() > 4 * 4096 {
            let (left, right) = body.split_at_mut(2 * 4096);
            left[4096..].swap_with_slice(&mut right[..4096]);
        }
        Ok(body)
    };
    let _server = local(&queue, |server| server, handler);
    let right = bench(
        &queue,
        "--requests 20 --expect-echo --size 16384 --output json",
    );
    assert_eq!(right.code(), Some(0), "{}{}", right.stdout, right.stderr);
    let wrong = bench(
        &queue,
        "--requests 20 --expect-echo --size 16385 --output json",
    );
    assert_eq!(wrong.code(), Some(3));
    assert_eq!(json(&wrong.stdout)["wrong"], 20);
}

#[test]
fn connections_share_the_requests_and_the_calls_in_flight() {
    let queue = unique("bench-connections");
    let arrived = AtomicU64::new(0);
    // Fewer than seven in flight would not be answered until the eighth could have come.
    let handler = move |_: &Request| {
        arrived.fetch_add(1, Ordering::SeqCst);
        let deadline = Instant::now() + PATIENCE / 3;
        while arrived.load(Ordering::SeqCst) < 7 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(100));
        Ok(arrived.load(Ordering::SeqCst).to_string())
    };
    let _server = local(&queue, |server| server.workers(16), handler);
    let options = "--connections 3 --concurrency 7 --data 7 --expect-echo --output json";
    let seven = bench(&queue, &format!("--requests 7 {options}"));
    assert_eq!(seven.code(), Some(0), "{}{}", seven.stdout, seven.stderr);
    let more = bench(&queue, &format!("--requests 17 {options}"));
    assert_eq!(json(&more.stdout)["requests"], 17);
}

#[test]
fn connections_share_a_rate() {
    let queue = unique("bench-share");
    let _server = echo(&queue);
    let bench = bench(
        &queue,
        "--rate 40 --requests 60 --connections 4 --size 9 --output json",
    );
    let report = json(&bench.stdout);
    assert_eq!(report["ok"], 60);
    // The last one is due after 59/40 s.
    assert!(report["seconds"].as_f64().unwrap() >= 1.47, "{report}");
}

#[test]
fn each_connection_is_a_client_of_its_own() {
    let queue = unique("bench-clients");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    for rate in ["--concurrency 10", "--rate 100"] {
        let mut bench = Process::spawn(
            fibrpc(&url(), &queue)
                .arg("bench")
                .args("--requests 10 --connections 4 --output json".split(' '))
                .args(rate.split(' ')),
        );
        let clients: HashSet<_> = (0..10)
            .map(|_| peer.receive(&queue).properties.reply_to().clone().unwrap())
            .collect();
        assert_eq!(clients.len(), 4, "{clients:?}");
        assert!(peer.is_empty(&queue));
        bench.signal("INT");
        assert_eq!(bench.wait(PATIENCE).code(), Some(130));
        assert_eq!(
            json(&bench.output().0)["errors"],
            json!({"interrupted": 10})
        );
    }
}

#[test]
fn json_says_of_what_by_what_when_and_where_it_was_measured() {
    let queue = unique("bench-context");
    let _server = echo(&queue);
    let bench = bench(
        &queue,
        "--requests 10 --size 7 --connections 2 --output json",
    );
    assert_eq!(bench.code(), Some(0), "{}", bench.stderr);
    let report = json(&bench.stdout);
    let version = report["version"].as_str().unwrap();
    assert!(version.starts_with(env!("CARGO_PKG_VERSION")), "{version}");
    assert!(report["broker"].as_str().unwrap().starts_with("RabbitMQ "));
    let arguments = &report["arguments"];
    for (name, value) in [
        ("queue", json!(*queue)),
        ("requests", json!(10)),
        ("body_bytes", json!(7)),
        ("connections", json!(2)),
        ("concurrency", json!(64)),
        ("timeout", json!("30s")),
        ("rate", Value::Null),
    ] {
        assert_eq!(arguments[name], value, "{name}: {arguments}");
    }
    assert!(arguments["url"].as_str().unwrap().starts_with("amqp://"));
    let url = url::Url::parse(&url()).unwrap();
    let secret = format!(":{}@", url.password().unwrap_or("guest"));
    assert!(!bench.stdout.contains(&secret), "{}", bench.stdout);
    let time = report["time"].as_str().unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    assert_eq!(report["machine"]["os"], std::env::consts::OS);
    assert!(report["machine"]["cpus"].as_u64().unwrap() >= 1);
}

#[test]
fn options_that_cannot_be_are_told_with_what_can() {
    for (options, told) in [
        ("--fail-if p98>20ms", "'p98' is no metric"),
        ("--fail-if p99>20", "metrics are min, mean"),
        ("--fail-if p99", "quotes"),
        ("--find-rate p99>20ms", "with < or <="),
        ("--find-rate rate<20", "what is looked for"),
        ("--find-rate p99<1s --rate 5", "--rate"),
        ("--find-rate p99<1s --requests 5", "--requests"),
        ("--find-rate p99<1s --every 1s", "--every"),
        ("--every 1ms", "at least 10ms"),
        ("--data x --size 5", "--size"),
        ("--data x -n 5", "--argument"),
        ("--size -5", "from 0 to 134217728"),
        ("--size 134217729", "from 0 to 134217728"),
        ("--expect-echo", "--data <BODY|@FILE>|--size <BYTES>"),
        ("--data @/no/such/file", "cannot read '/no/such/file'"),
        ("--data @/dev/zero", "longer than 134217728 bytes"),
        ("--content-type= --data x", "1 to 255"),
        ("--connections 0", "from 1 to 10000"),
        ("--connections 65", "--concurrency 64"),
    ] {
        let usage = bench("q", options);
        assert_eq!(usage.code(), Some(2), "{options}: {}", usage.stderr);
        assert!(usage.stderr.contains(told), "{options}: {}", usage.stderr);
        assert_eq!(usage.stdout, "", "{options}");
    }
}
