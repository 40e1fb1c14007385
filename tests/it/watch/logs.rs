//! The log in JSON: the same log, with an object a line and no password.

use crate::cli::with_password;
use crate::support::{PATIENCE, Peer, Process, fibrpc, json_lines, run, server, unique, url};
use amiquip::AmqpProperties;
use serde_json::Value;
use std::io::Read;
use std::net::TcpListener;
use std::process::Stdio;
use std::thread;

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
