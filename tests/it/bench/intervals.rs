//! `fibrpc bench --interval`: what happens meanwhile.

use super::{bench, echo, json, lines};
use crate::support::{PATIENCE, Peer, Process, fibrpc, local, run, unique, url};
use amiquip::QueueDeclareOptions;
use fibrpc::Request;
use serde_json::Value;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

#[test]
fn intervals_add_up_and_a_stall_is_a_gap() {
    for options in [
        "--concurrency 4",
        "--concurrency 4 --connections 2",
        "--rate 200",
    ] {
        let queue = unique("bench-every");
        let count = AtomicU64::new(0);
        let handler = move |request: &Request| {
            if count.fetch_add(1, Ordering::Relaxed) == 30 {
                thread::sleep(Duration::from_millis(700));
            }
            Ok(request.body().to_vec())
        };
        let _server = local(&queue, |server| server.workers(1), handler);
        let options = format!("--every 100ms --requests 100 --size 9 --output json {options}");
        let bench = bench(&queue, &options);
        assert_eq!(bench.code(), Some(0), "{}", bench.stderr);
        let (intervals, report) = lines(&bench.stdout, "interval");
        let sum = |name| -> u64 { intervals.iter().filter_map(|i| i[name].as_u64()).sum() };
        assert_eq!((sum("requests"), sum("ok"), sum("errors")), (100, 100, 0));
        let end = |interval: &Value| interval["end"].as_f64().unwrap();
        assert!(intervals.is_sorted_by_key(end), "{}", bench.stdout);
        assert_eq!(end(&intervals[0]), 0.1);
        assert!(end(&intervals[intervals.len() - 1]) <= report["seconds"].as_f64().unwrap());
        let gaps: Vec<_> = intervals.iter().filter(|i| i["requests"] == 0).collect();
        assert!(gaps.len() >= 4, "{options}: {}", bench.stdout);
        let nothing = json!({"p50": null, "p99": null, "max": null});
        assert_eq!(
            (&gaps[0]["latency_ms"], &gaps[0]["rate"]),
            (&nothing, &json!(0.0))
        );
    }
}

#[test]
fn intervals_are_printed_while_it_runs_and_fit_80_columns() {
    let queue = unique("bench-lines");
    let _server = echo(&queue);
    let mut text = Process::spawn(
        fibrpc(&url(), &queue)
            .arg("bench")
            .args("--duration 10m --every 100ms --size 9".split(' ')),
    );
    let mut head = vec![text.line(), text.line(), text.line()];
    text.signal("INT");
    assert_eq!(text.wait(PATIENCE).code(), Some(130));
    let rest = text.output().0;
    head.extend(rest.lines().map(str::to_owned));
    assert!(
        head[0].contains("rate") && head[1].contains("0.10"),
        "{head:?}"
    );
    assert!(rest.contains("requests in"), "{rest}");
    assert!(head.iter().all(|line| line.len() <= 80), "{head:?}");
}

#[test]
fn intervals_are_printed_while_nothing_is_answered() {
    let queue = unique("bench-silence");
    let peer = Peer::connect(&url());
    peer.channel
        .queue_declare(&*queue, QueueDeclareOptions::default())
        .unwrap();
    for pace in ["--concurrency 4", "--rate 10"] {
        let mut silent = Process::spawn(
            fibrpc(&url(), &queue)
                .args(["bench", "--every", "100ms", "--timeout", "10m"])
                .args("--output json --requests 8".split(' '))
                .args(pace.split(' ')),
        );
        for number in 1..=3 {
            let interval = &json(&silent.line())["interval"];
            assert_eq!(interval["requests"], 0);
            let end = interval["end"].as_f64().unwrap();
            assert!((end - f64::from(number) / 10.0).abs() < 1e-9, "{interval}");
        }
        silent.signal("INT");
        assert_eq!(silent.wait(PATIENCE).code(), Some(130));
    }
}

#[test]
fn a_bench_whose_intervals_cannot_be_written_ends() {
    let queue = unique("bench-reader");
    let _server = echo(&queue);
    let fibrpc = env!("CARGO_BIN_EXE_fibrpc");
    for (to, code) in [("| head -n 2 >/dev/null", "0"), (">/dev/full", "1")] {
        let bench = format!("'{fibrpc}' bench --duration 10m --every 20ms --size 9");
        let script = format!("{{ {bench}; echo code=$? >&3; }} {to}");
        let mut shell = std::process::Command::new("sh");
        shell
            .args(["-c", &format!("exec 3>&2; {script}")])
            .env("AMQP_URL", url())
            .env("FIBRPC_QUEUE", &queue);
        let ended = run(&mut shell);
        assert!(
            ended.stderr.contains(&format!("code={code}")),
            "{}",
            ended.stderr
        );
    }
}
