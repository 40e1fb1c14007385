//! Who reads what a command prints: somebody slow, somebody who has enough, or nobody.

use crate::support::{PATIENCE, Peer, Process, fibrpc, run, server, unique, url};
use amiquip::AmqpProperties;
use std::io::{BufRead, BufReader, Seek, Write};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

#[test]
fn a_reader_that_has_enough_ends_the_call_quietly() {
    let queue = unique("pipe");
    let _server = server(&url(), &queue, &["--quiet"]);
    let mut call = fibrpc(&url(), &queue)
        .args(["call", "--output", "raw"])
        .args(vec!["10"; 5000])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let head = Command::new("head")
        .arg("-1")
        .stdin(call.stdout.take().unwrap())
        .output()
        .unwrap();
    assert_eq!(head.stdout, b"55\n");
    let ended = call.wait_with_output().unwrap();
    assert_eq!(
        (ended.status.code(), ended.stderr.as_slice()),
        (Some(0), &b""[..])
    );
}

#[test]
fn a_server_whose_output_nobody_reads_goes_on() {
    let queue = unique("deaf");
    let mut server = fibrpc(&url(), &queue)
        .args(["server", "--workers", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(server.stdout.take());
    for _ in 0..3 {
        let call = run(fibrpc(&url(), &queue).args([
            "call",
            "--wait-for-server",
            "--output",
            "raw",
            "10",
        ]));
        assert_eq!(call.stdout, "55\n", "{}", call.stderr);
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

/// More requests than a pipe and the server's buffers hold lines of: 64 KiB three times.
const LINES: usize = 20_000;

/// A server whose output is a pipe that nobody reads.
fn unread(queue: &str, arguments: &[&str]) -> std::process::Child {
    fibrpc(&url(), queue)
        .arg("server")
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for a process whose output nobody reads.
fn code_of(mut process: std::process::Child) -> Option<i32> {
    let mut status = None;
    crate::support::eventually("the process has ended", || {
        status = process.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().code()
}

fn bench(queue: &str, requests: usize) {
    let arguments = ["bench", "--requests", &requests.to_string()];
    let mut bench = Process::spawn(fibrpc(&url(), queue).args(arguments));
    // So many requests take seconds by themselves.
    let status = bench.wait(4 * PATIENCE);
    let (stdout, stderr) = bench.output();
    assert_eq!(status.code(), Some(0), "{stdout}{stderr}");
}

#[test]
fn a_server_whose_stdout_nobody_reads_answers_says_how_many_lines_are_missing_and_drains() {
    let queue = unique("unread");
    let mut stuck = unread(&queue, &["--workers", "2"]);
    wait_for_server(&queue);
    bench(&queue, LINES);
    // The reader is back.
    let mut lines = BufReader::new(stuck.stdout.take().unwrap()).lines();
    let mut printed = 0;
    let dropped = loop {
        let line = lines.next().unwrap().unwrap();
        match line.strip_prefix(" [!] ") {
            Some(note) => break note.to_owned(),
            None => printed += usize::from(line.starts_with(" [.] fib(1")),
        }
    };
    let (dropped, words) = dropped.split_once(' ').unwrap();
    assert_eq!(words, "lines dropped: stdout is not read");
    assert_eq!(printed + dropped.parse::<usize>().unwrap(), LINES + 1);
    // And away again.
    bench(&queue, LINES);
    crate::support::signal(stuck.id(), "TERM");
    assert_eq!(code_of(stuck), Some(0));
}

#[test]
fn a_server_whose_stderr_nobody_reads_answers_and_drains() {
    let queue = unique("unread-log");
    let server = unread(&queue, &["--workers", "1", "--quiet"]);
    wait_for_server(&queue);
    let peer = Peer::connect(&url());
    // Each is a warning.
    for _ in 0..LINES / 10 {
        peer.publish(&queue, b"10", AmqpProperties::default());
    }
    bench(&queue, 100);
    crate::support::signal(server.id(), "TERM");
    assert_eq!(code_of(server), Some(0));
}

/// A call that waits for the server.
fn wait_for_server(queue: &str) {
    let call = run(fibrpc(&url(), queue).args(["call", "10", "--wait-for-server"]));
    assert_eq!(call.code(), Some(0), "{}", call.stderr);
}

#[test]
fn a_slow_reader_slows_the_calls_down_loses_nothing_and_a_signal_ends_it() {
    let queue = unique("slow");
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let count = std::sync::Arc::clone(&asked);
    let _server = crate::support::local(
        &queue,
        |server| server,
        move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok("55")
        },
    );
    let call = |numbers: usize| {
        let mut input = tempfile::tempfile().unwrap();
        input.write_all("10\n".repeat(numbers).as_bytes()).unwrap();
        input.rewind().unwrap();
        let call = fibrpc(&url(), &queue)
            .args(["call", "-", "--output", "json"])
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The calls come to rest, since nobody takes the answers.
        let began = asked.load(Ordering::Relaxed);
        crate::support::eventually("the calls wait for the reader", || {
            let before = asked.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(500));
            before > began && asked.load(Ordering::Relaxed) == before
        });
        assert!(asked.load(Ordering::Relaxed) - began < numbers);
        call
    };
    let mut slow = call(12_000);
    let lines = BufReader::new(slow.stdout.take().unwrap()).lines();
    assert_eq!(lines.map_while(Result::ok).count(), 12_000);
    assert_eq!(code_of(slow), Some(0));
    for name in ["INT", "TERM"] {
        let stuck = call(12_000);
        crate::support::signal(stuck.id(), name);
        assert_eq!(code_of(stuck), Some(130), "{name}");
    }
}

/// What each command ends with when its output is taken, when stdout is full, and when it is closed.
#[test]
fn no_command_panics_when_its_output_cannot_be_written() {
    let queue = unique("full");
    let server = server(&url(), &queue, &["--quiet"]);
    for (command, taken, full, closed) in [
        ("--help", 0, 1, 0),
        ("--version", 0, 1, 0),
        ("completions bash", 0, 1, 0),
        ("status", 0, 1, 0),
        ("status --output json", 0, 1, 0),
        ("status --queue no-such-queue", 5, 1, 5),
        ("bench --requests 100", 0, 1, 0),
        ("bench --requests 100 --every 10ms", 0, 1, 0),
        ("bench --requests 100 --fail-if 'errors>=0'", 9, 1, 9),
        ("call 10", 0, 1, 0),
        ("call 10 --output json", 0, 1, 0),
        ("call -1 --output raw", 3, 3, 3),
        ("call no-number", 2, 2, 2),
        ("status --url amqp://127.0.0.1:1", 6, 6, 6),
    ] {
        for (stdout, expected) in [
            ("", taken),
            (">/dev/full", full),
            // Rust opens /dev/null in its place.
            (">&-", taken),
            ("| true", closed),
        ] {
            for stderr in ["", "2>/dev/full", "2>&-", "2>&1"] {
                if (stdout, stderr) == (">&-", "2>&1") {
                    continue; // a shell does not start it
                }
                // The code passes by the pipe; stderr is what `sh` itself has.
                let script = format!("{{ \"$0\" {command} {stderr}; echo code=$? >&3; }} {stdout}");
                let mut shell = Command::new("sh");
                let shell = shell
                    .args(["-c", &format!("exec 3>&2; {script}")])
                    .arg(env!("CARGO_BIN_EXE_fibrpc"))
                    .env("AMQP_URL", url())
                    .env("FIBRPC_QUEUE", &queue)
                    .env("RUST_LOG", "fibrpc=no-such-level");
                let ended = run(shell);
                let context = format!("{command} {stdout} {stderr}: {}", ended.stderr);
                // A pipe's reader may be gone by then, or not.
                assert!(!ended.stderr.contains("panicked"), "{context}");
                let code = format!("code={expected}\n");
                let other = format!("code={taken}\n");
                assert!(
                    ended.stderr.contains(&code)
                        || stdout == "| true" && ended.stderr.contains(&other),
                    "{context}"
                );
                if stdout == ">/dev/full" && full == 1 && stderr.is_empty() {
                    assert!(ended.stderr.contains("cannot write to stdout"), "{context}");
                    assert!(ended.stderr.contains("No space left"), "{context}");
                }
            }
        }
    }
    drop(server);

    // To a server, lines are a courtesy.
    for (stdout, told) in [("/dev/full", true), ("/dev/null", false)] {
        let out = std::fs::File::options().write(true).open(stdout).unwrap();
        let mut command = fibrpc(&url(), &queue);
        let server = command.args(["server", "--workers", "1"]);
        let server = server.stdout(out).stderr(Stdio::piped()).spawn().unwrap();
        for _ in 0..2 {
            wait_for_server(&queue);
        }
        crate::support::signal(server.id(), "TERM");
        let ended = server.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(0), "{said}");
        assert_eq!(said.contains("cannot write to stdout"), told, "{said}");
    }
}

#[test]
fn a_line_is_printed_for_each_request_and_none_is_lost() {
    let queue = unique("lines");
    let mut server = server(&url(), &queue, &["--workers", "4"]);
    let call = run(fibrpc(&url(), &queue)
        .args(["call", "--output", "raw"])
        .args(vec!["7"; 2000]));
    assert_eq!(call.code(), Some(0), "{}", call.stderr);
    server.signal("TERM");
    assert!(server.wait(PATIENCE).success());
    assert_eq!(server.output().0, " [.] fib(7)\n".repeat(2000));
}
