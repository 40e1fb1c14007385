//! How one watches a server: its metrics.

mod logs;
mod status;

use crate::support::{
    PATIENCE, Peer, PrivateBroker, Process, eventually, fibrpc, root, run, unique, url,
};
use amiquip::AmqpProperties;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// A server that is watched, and where.
fn watched(url: &str, queue: &str, arguments: &[&str]) -> (Process, String) {
    watched_as("server", url, queue, arguments)
}

fn watched_as(kind: &str, url: &str, queue: &str, arguments: &[&str]) -> (Process, String) {
    let mut command = fibrpc(url, queue);
    command.args([kind, "--quiet", "--metrics", "127.0.0.1:0", "-v"]);
    let process = Process::spawn(command.args(arguments));
    let said = process.wait_for_stderr("metrics at http://");
    let (_, page) = said.split_once("http://").unwrap();
    let address = page.strip_suffix("/metrics").unwrap().to_owned();
    (process, address)
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a request over HTTP; the head of the response, and the body.
fn exchange(address: &str, request: &str) -> (String, String) {
    let mut stream = connect(address);
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn get(address: &str) -> String {
    let (head, body) = exchange(address, "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    body
}

/// Reads the text format as Prometheus does: the samples, each of a metric that was introduced
/// before. Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.
fn samples(text: &str) -> BTreeMap<String, f64> {
    let mut helped = HashSet::new();
    let mut types = BTreeMap::new();
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, words) = help.split_once(' ').unwrap();
            assert!(helped.insert(name) && !words.is_empty(), "{line}");
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(helped.contains(name), "{line}");
            assert_eq!(types.insert(name, kind), None, "{line}");
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|part| name.strip_suffix(part))
                .filter(|family| types.get(family) == Some(&"histogram"));
            assert!(types.contains_key(family.unwrap_or(name)), "{line}");
            let value: f64 = value.parse().unwrap();
            assert_eq!(samples.insert(sample.to_owned(), value), None, "{line}");
        }
    }
    assert!(text.ends_with('\n'));
    samples
}

fn outcome(samples: &BTreeMap<String, f64>, outcome: &str) -> f64 {
    samples[&format!("fibrpc_requests_total{{outcome=\"{outcome}\"}}")]
}

#[test]
fn metrics_tell_what_came_of_each_request() {
    let queue = unique("metrics");
    let (server, address) = watched(&url(), &queue, &["--workers", "3"]);
    server.wait_for("Awaiting");
    let before = samples(&get(&address));
    assert_eq!(outcome(&before, "expired"), 0.0, "a rate begins at 0");
    assert_eq!(before["fibrpc_workers"], 3.0);
    assert_eq!(before["fibrpc_workers_busy"], 0.0);
    assert_eq!(before["fibrpc_connected"], 1.0);
    assert_eq!(before["fibrpc_connections_total"], 1.0);
    let build = before
        .keys()
        .find(|name| name.starts_with("fibrpc_build_info{"));
    let version = concat!("version=\"", env!("CARGO_PKG_VERSION"), "\"");
    assert!(build.unwrap().contains(version), "{build:?}");

    let call = run(fibrpc(&url(), &queue).args(["call", "1", "2", "3", "-1", "46", "47"]));
    assert_eq!(call.code(), Some(3), "{}", call.stderr);
    let peer = Peer::connect(&url());
    peer.publish(&queue, b"10", AmqpProperties::default());
    peer.ask(&queue, b"many", AmqpProperties::default());
    let busy = Process::spawn(fibrpc(&url(), &queue).args(["call", "--timeout", "5m", "40"]));
    eventually("a worker is busy", || {
        samples(&get(&address))["fibrpc_workers_busy"] == 1.0
    });
    drop(busy);
    eventually("all are counted", || {
        let after = samples(&get(&address));
        // Buckets hold what smaller ones hold.
        let mut buckets: Vec<_> = after
            .iter()
            .filter_map(|(name, count)| {
                let le = name.strip_prefix("fibrpc_handler_seconds_bucket{le=\"")?;
                let le = le.strip_suffix("\"}")?;
                Some((le.parse::<f64>().unwrap(), *count))
            })
            .collect();
        buckets.sort_by(|a, b| a.partial_cmp(b).unwrap());
        assert!(buckets.is_sorted_by_key(|(_, count)| *count), "{buckets:?}");
        let count = after["fibrpc_handler_seconds_count"];
        assert_eq!(buckets.last().unwrap(), &(f64::INFINITY, count));
        ["answered", "out-of-range", "invalid-argument"].map(|name| outcome(&after, name))
            == [4.0, 3.0, 1.0]
            && outcome(&after, "unanswerable") == 1.0
            && outcome(&after, "internal") == 0.0
            && count == 8.0
            && after["fibrpc_workers_busy"] == 0.0
            && after["fibrpc_handler_seconds_sum"] > 0.0
    });
}

#[test]
fn a_server_around_a_command_has_metrics_too() {
    let queue = unique("metrics-reply");
    let arguments = ["--workers", "1", "--", "sh", "-c", "read n && exit $n"];
    let (server, address) = watched_as("reply", &url(), &queue, &arguments);
    server.wait_for("Awaiting");
    let peer = Peer::connect(&url());
    for code in ["0\n", "1\n", "0\n"] {
        peer.ask(&queue, code.as_bytes(), AmqpProperties::default());
    }
    let counted = samples(&get(&address));
    assert_eq!(outcome(&counted, "answered"), 2.0);
    assert_eq!(outcome(&counted, "internal"), 1.0);
    assert_eq!(counted["fibrpc_handler_seconds_count"], 3.0);
}

#[test]
fn metrics_are_there_while_the_server_connects_loses_its_connection_and_drains() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("amqp://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let (_connecting, address) = watched(&nowhere, "q", &["--connect-timeout", "5m"]);
    let connecting = samples(&get(&address));
    assert_eq!(connecting["fibrpc_connected"], 0.0);
    assert_eq!(connecting["fibrpc_connections_total"], 0.0);

    let mut broker = PrivateBroker::start();
    let queue = unique("metrics-lost");
    let (mut server, address) = watched(&broker.url, &queue, &["--max-n", "60"]);
    server.wait_for("Awaiting");
    let connected = || samples(&get(&address))["fibrpc_connected"];
    assert_eq!(connected(), 1.0);
    broker.kill();
    eventually("the loss is seen", || connected() == 0.0);
    broker.boot();
    eventually("it has connected again", || connected() == 1.0);
    assert_eq!(samples(&get(&address))["fibrpc_connections_total"], 2.0);

    let _call = Process::spawn(fibrpc(&broker.url, &queue).args(["call", "60"]));
    eventually("a worker is busy", || {
        samples(&get(&address))["fibrpc_workers_busy"] == 1.0
    });
    server.signal("TERM");
    let peer = Peer::connect(&broker.url);
    eventually("it has begun to drain", || peer.count(&queue).1 == 0);
    assert_eq!(samples(&get(&address))["fibrpc_workers_busy"], 1.0);
    server.signal("TERM");
    assert_eq!(server.wait(PATIENCE).code(), Some(130));
}

#[test]
fn scrapers_that_hang_hold_up_neither_each_other_nor_the_server() {
    let queue = unique("scrapers");
    let (server, address) = watched(&url(), &queue, &["--workers", "1"]);
    server.wait_for("Awaiting");
    let threads = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"));
        count.unwrap().trim().parse::<u32>().unwrap()
    };
    let before = threads();
    let hanging: Vec<_> = (0..100)
        .map(|i| {
            let mut stream = connect(&address);
            // Some say nothing, some a part, and some do not read what they have asked for.
            let said = ["", "GET /met", "GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"][i % 3];
            // The server may have given it up by then.
            let _ = stream.write_all(said.as_bytes());
            stream
        })
        .collect();
    for _ in 0..500 {
        samples(&get(&address));
    }
    let call = run(fibrpc(&url(), &queue).args(["call", "--output", "raw", "10"]));
    assert_eq!(call.stdout, "55\n", "{}", call.stderr);
    // Or fewer: one that has connected the server may have been there still.
    eventually("there are no more threads", || threads() <= before);
    drop(hanging);

    // One that never stops sending is cut off.
    let mut endless = connect(&address);
    endless.set_write_timeout(Some(PATIENCE)).unwrap();
    eventually("it is cut off", || {
        endless.write_all(&[b'x'; 1 << 16]).is_err()
    });
    // One that is silent, too.
    let mut silent = connect(&address);
    assert_eq!(silent.read(&mut [0; 10]).unwrap(), 0);
    samples(&get(&address));
}

#[test]
fn only_the_metrics_are_served_and_only_read() {
    let (_server, address) = watched(&url(), &unique("http"), &[]);
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(20_000));
    for (request, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("POST / HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("GET /metrics/ HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("GET /metrics?name=a HTTP/1.0\r\n\r\n", "200 OK"),
        (
            "POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\na=b",
            "405 Method Not Allowed\r\nAllow: GET, HEAD",
        ),
        ("\u{16}\u{3}\u{1} TLS\r\n\r\n", "400 Bad Request"),
        (&long, "431 Request Header Fields Too Large"),
    ] {
        let (head, _) = exchange(&address, request);
        let start = format!("HTTP/1.1 {status}\r\n");
        assert!(head.starts_with(&start), "{request}: {head}");
    }
    let (head, body) = exchange(&address, "HEAD /metrics HTTP/1.1\r\n\r\n");
    assert_eq!(body, "");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"));
    // In pieces, and from one that sends no more.
    let mut stream = connect(&address);
    for piece in ["GET /met", "rics HTTP/1.1\r\n", "Host: h\r\n", "\r\n"] {
        stream.write_all(piece.as_bytes()).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    samples(response.split_once("\r\n\r\n").unwrap().1);
}

#[test]
fn metrics_that_cannot_be_served_are_told_at_once() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (at, told) in [
        (address.as_str(), "Address already in use"),
        ("192.0.2.1:9464", "Cannot assign requested address"),
        ("no.such.host.invalid:9464", "lookup"),
        ("9464", "expected ADDRESS:PORT"),
        ("http://127.0.0.1:9464", "expected ADDRESS:PORT"),
    ] {
        let server = run(fibrpc(&url(), "q").args(["server", "--metrics", at]));
        assert_eq!(server.code(), Some(2), "{at}: {}", server.stderr);
        let stderr = server.stderr;
        assert!(stderr.contains(told) && stderr.contains(at), "{stderr}");
    }
}

#[test]
fn the_dashboard_asks_for_what_is_exported_and_for_all_of_it() {
    let (_server, address) = watched(&url(), &unique("dashboard"), &[]);
    let samples = samples(&get(&address));
    let exported: HashSet<_> = samples
        .keys()
        .map(|sample| sample.split('{').next().unwrap().to_owned())
        .collect();
    let file = root().join("contrib/grafana-dashboard.json");
    let text = std::fs::read_to_string(file).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut asked = HashSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            let names = expression
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':')
                .filter(|word| word.starts_with("fibrpc_"));
            let before = asked.len();
            asked.extend(names.map(str::to_owned));
            assert!(asked.len() > before || expression.contains("fibrpc_"));
        }
    }
    assert_eq!(asked, exported);
}
