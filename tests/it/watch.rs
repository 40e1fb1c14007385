//! What an operator watches: the metrics, the log as JSON, the health check.

use crate::cli::with_password;
use crate::support::{
    PATIENCE, Peer, PrivateBroker, Process, eventually, fibrpc, json_lines, local, root, run,
    server, unique, url,
};
use amiquip::AmqpProperties;
use fibrpc::{HandlerError, RemoteError, Request};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
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
    let busy = Process::spawn(fibrpc(&url(), &queue).args(["call", "--timeout", "5m", "42"]));
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
        let line = status.lines().find(|line| line.starts_with("Threads:"));
        line.unwrap().to_owned()
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
    assert_eq!(threads(), before);
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

/// The lines of a log, each an object.
fn events(stderr: &str) -> Vec<Value> {
    let events = json_lines(stderr);
    for event in &events {
        for field in ["time", "level", "target", "message"] {
            assert!(event[field].is_string(), "{event}");
        }
        let time = event["time"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.contains('T'), "{event}");
    }
    events
}

#[test]
fn a_json_log_is_the_same_log_with_an_object_a_line() {
    let queue = unique("json-log");
    let log = |format: &str| {
        let mut command = fibrpc(&url(), &queue);
        command.args(["server", "--workers", "1", "-v", "--log", format]);
        // Whoever asks for JSON gets no colours.
        let mut server = Process::spawn(command.env("CLICOLOR_FORCE", "1"));
        server.wait_for("Awaiting");
        let peer = Peer::connect(&url());
        peer.publish(&queue, b"10", AmqpProperties::default());
        // Once this is answered, the other has been dropped.
        peer.ask(&queue, b"10", AmqpProperties::default());
        server.signal("TERM");
        assert_eq!(server.wait(PATIENCE).code(), Some(0));
        server.output().1
    };
    let json = log("json");
    let events = events(&json);
    let told = |level: &str, text: &str| {
        let has = |event: &Value| {
            event["level"] == level && event["message"].as_str().unwrap().contains(text)
        };
        assert!(events.iter().any(has), "{level} {text}: {json}");
    };
    told("info", "connected to amqp://");
    told("info", "1 workers consume");
    told("warn", "dropped a request without reply_to");
    told("info", "stopped: 1 answered");
    assert_eq!(events.len(), log("text").lines().count(), "{json}");
}

#[test]
fn an_error_that_ends_a_command_is_an_event_of_a_json_log() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("amqp://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let queue = unique("json-error");
    let _server = server(&url(), &queue, &["--quiet"]);
    for (url, arguments, code, told) in [
        (&nowhere, &["status"][..], 6, "Connection refused"),
        (
            &nowhere,
            &["server", "--connect-timeout", "300ms"],
            6,
            "trying again",
        ),
        (&url(), &["call", "-1"], 3, "fib(-1): the server answered"),
        (&url(), &["status", "--url", "amqp://h:0"], 2, "--url: "),
        // What clap refuses.
        (&url(), &["status", "--waitt"], 2, "--waitt"),
        (&url(), &["bench", "--fail-if", "p98>1s"], 2, "no metric"),
    ] {
        let ended = run(fibrpc(url, &queue).args(arguments).args(["--log", "json"]));
        assert_eq!(ended.code(), Some(code), "{}", ended.stderr);
        let events = events(&ended.stderr);
        assert!(ended.stderr.contains(told), "{told}: {}", ended.stderr);
        let last = events.iter().rfind(|event| event["level"] == "error");
        let message = last.unwrap()["message"].as_str().unwrap();
        assert!(!message.starts_with("error"), "{message}");
    }
}

#[test]
fn lines_that_are_missing_from_a_json_log_are_told_in_json() {
    let queue = unique("json-unread");
    let mut command = fibrpc(&url(), &queue);
    command.args(["server", "--quiet", "--workers", "1", "--log", "json"]);
    let mut server = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ready = run(fibrpc(&url(), &queue).args(["call", "1", "--wait-for-server"]));
    assert_eq!(ready.code(), Some(0), "{}", ready.stderr);
    let peer = Peer::connect(&url());
    // Each is a warning, and they are more than a pipe and the buffers hold.
    for _ in 0..5_000 {
        peer.publish(&queue, b"10", AmqpProperties::default());
    }
    let last = run(fibrpc(&url(), &queue).args(["call", "1", "--timeout", "1m"]));
    assert_eq!(last.code(), Some(0), "{}", last.stderr);
    let mut log = server.stderr.take().unwrap();
    let reader = thread::spawn(move || {
        let mut read = String::new();
        log.read_to_string(&mut read).unwrap();
        read
    });
    crate::support::signal(server.id(), "TERM");
    assert!(server.wait().unwrap().success());
    let read = reader.join().unwrap();
    events(&read);
    assert!(read.contains("lines dropped: stderr is not read"));
}

#[test]
fn no_log_tells_a_password() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let unreachable = format!("amqp://u:hunter2@{}", nobody.local_addr().unwrap());
    drop(nobody);
    let refusing = with_password("hunter2");
    for url in [unreachable, refusing] {
        for format in ["text", "json"] {
            for arguments in [
                &["status"][..],
                &["status", "--wait", "300ms", "--call", "1"],
                &["call", "1", "--timeout", "2s"],
                &["server", "--connect-timeout", "300ms"],
            ] {
                let mut command = fibrpc(&url, "q");
                command.args(arguments).args(["-vv", "--log", format]);
                let ended = run(command.env("RUST_LOG", "trace"));
                assert_eq!(ended.code(), Some(6), "{arguments:?}: {}", ended.stderr);
                assert!(!ended.stderr.contains("hunter2"), "{}", ended.stderr);
                if format == "json" {
                    events(&ended.stderr);
                }
            }
        }
    }
}

#[test]
fn status_makes_a_real_call_and_ends_as_it_does() {
    let queue = unique("status-call");
    let status = |arguments: &[&str]| {
        run(fibrpc(&url(), &queue)
            .args(["status", "--call"])
            .args(arguments))
    };
    let missing = status(&["1"]);
    assert_eq!(missing.code(), Some(5), "{}", missing.stderr);
    assert!(missing.stdout.contains("not made"), "{}", missing.stdout);
    let missing = status(&["1", "--output", "json"]);
    assert!(
        missing.stdout.contains("\"call\":null"),
        "{}",
        missing.stdout
    );

    let handler = |request: &Request| -> Result<Vec<u8>, HandlerError> {
        match request.body() {
            b"-no" => Err(RemoteError::new("too-late", "a\x1b[31m\nb"))?,
            b"sleep" => thread::sleep(Duration::from_secs(5)),
            b"bytes" => return Ok(vec![0xff; 1000]),
            _ => {}
        }
        Ok(request.body().to_vec())
    };
    let _serving = local(&queue, |server| server.workers(2), handler);
    let answered = status(&["grüße\x1b\n"]);
    assert_eq!(answered.code(), Some(0), "{}", answered.stderr);
    let line = answered.stdout.lines().last().unwrap();
    assert!(line.starts_with("call        answered in "), "{line}");
    assert!(line.ends_with(": \"grüße\\u{1b}\\n\""), "{line}");
    let bytes = status(&["bytes"]);
    assert!(bytes.stdout.contains("(1000 bytes)"), "{}", bytes.stdout);
    assert!(bytes.stdout.len() < 1_500, "{}", bytes.stdout);
    let error = status(&["-no"]);
    assert_eq!(error.code(), Some(3), "{}", error.stderr);
    assert!(
        error.stdout.contains("call        failed after "),
        "{}",
        error.stdout
    );
    assert!(error.stdout.contains("(too-late): a"), "{}", error.stdout);
    assert!(!error.stdout.contains('\x1b'), "{}", error.stdout);
    let late = status(&["sleep", "--timeout", "1s"]);
    assert_eq!(late.code(), Some(4), "{}", late.stdout);

    let call = |body: &str| {
        let status = status(&[body, "--output", "json"]);
        json_lines(&status.stdout)[0]["call"].clone()
    };
    let answered = call("hello");
    assert_eq!(answered["body"], "hello");
    assert_eq!(answered["bytes"], 5);
    assert!(answered["latency_ms"].as_f64().unwrap() > 0.0, "{answered}");
    assert_eq!(call("-no")["error"]["kind"], "remote");
    assert_eq!(call("bytes")["bytes"], 1000);
}

#[test]
fn status_waits_for_a_server_and_for_a_broker() {
    let queue = unique("status-wait");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("amqp://{}", nobody.local_addr().unwrap());
    drop(nobody);
    // What was seen last is told.
    for (url, code) in [(&url(), 5), (&nowhere, 6)] {
        let vain = run(fibrpc(url, &queue).args(["status", "--wait", "500ms"]));
        assert_eq!(vain.code(), Some(code), "{}", vain.stderr);
        assert!(vain.took >= Duration::from_millis(500), "{:?}", vain.took);
    }
    // First there is no broker, then no queue, then a server.
    let mut broker = PrivateBroker::start();
    broker.kill();
    let mut command = fibrpc(&broker.url, &queue);
    command.args(["status", "--wait", "5m", "--call", "10", "-v"]);
    let mut waiting = Process::spawn(&mut command);
    waiting.wait_for_stderr("cannot reach the broker");
    broker.boot();
    waiting.wait_for_stderr("nobody serves the queue yet");
    let _server = server(&broker.url, &queue, &["--quiet"]);
    assert_eq!(waiting.wait(PATIENCE).code(), Some(0));
    let (stdout, _) = waiting.output();
    assert!(stdout.contains("answered in"), "{stdout}");
    assert!(stdout.contains(": \"55\""), "{stdout}");
}

#[test]
fn a_signal_ends_status_with_130() {
    for signal in ["INT", "TERM"] {
        let mut command = fibrpc(&url(), &unique("status-signal"));
        let mut waiting = Process::spawn(command.args(["status", "--wait", "5m", "-v"]));
        waiting.wait_for_stderr("nobody serves the queue yet");
        waiting.signal(signal);
        assert_eq!(waiting.wait(PATIENCE).code(), Some(130), "{signal}");
        let (stdout, stderr) = waiting.output();
        assert_eq!(stdout, "");
        assert!(stderr.contains("error: interrupted"), "{stderr}");
    }
}
