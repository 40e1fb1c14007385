//! `fibrpc status`, a health check that makes a real call.

use crate::support::{
    PATIENCE, PrivateBroker, Process, fibrpc, json_lines, local, run, server, unique, url,
};
use fibrpc::{HandlerError, RemoteError, Request};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

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
