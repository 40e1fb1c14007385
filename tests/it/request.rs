//! `fibrpc request`, against servers that others have written: with Python's pika, JavaScript's amqplib
//! and the class `RpcServer` of RabbitMQ's Java client. `make test` installs them (scripts/peers).

use crate::support::{
    PATIENCE, Process, fibrpc, json_lines, local, python, root, run, run_with_input, server,
    unique, url,
};
use fibrpc::{HandlerError, RemoteError, Request, Response};
use std::fs;
use std::io::{Seek, Write};
use std::process::{Command, Stdio};

const MIB: usize = 1 << 20;

/// A server in another language that consumes.
fn peer(command: &mut Command) -> Process {
    let process = Process::spawn(command);
    process.wait_for(" [x] Awaiting RPC requests");
    process
}

fn pika(queue: &str, behaviour: &str) -> Process {
    peer(&mut python("bytes_server.py", &[&url(), queue, behaviour]))
}

fn amqplib(queue: &str) -> Process {
    let modules = root().join("target/peers/node/node_modules");
    assert!(
        modules.join("amqplib").exists(),
        "these tests need a JavaScript peer: run `make test`, which installs it"
    );
    let script = root().join("tests/peers/upper_server.js");
    peer(
        Command::new("node")
            .env("NODE_PATH", modules)
            .arg(script)
            .args([&url(), queue]),
    )
}

fn java(queue: &str) -> Process {
    let script = root().join("tests/peers/EchoServer.java");
    // Where Debian's packages have put them.
    let class_path = "/usr/share/java/amqp-client.jar:/usr/share/java/slf4j-api.jar";
    let mut command = Command::new("java");
    command.args(["-cp", class_path]).arg(script);
    peer(command.args([&url(), queue]))
}

/// What a command prints, byte for byte, with something on its stdin.
fn bytes(command: &mut Command, input: &[u8]) -> Vec<u8> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(input).unwrap();
    file.rewind().unwrap();
    let done = command.stdin(file).stderr(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{said}");
    done.stdout
}

/// The most memory that a process has had, in bytes.
fn peak(process: &Process) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<usize>().unwrap() * 1024
}

fn echo(request: &Request) -> Result<Vec<u8>, HandlerError> {
    Ok(request.body().to_vec())
}

/// Fails as it is told.
fn fail(request: &Request) -> Result<Vec<u8>, HandlerError> {
    match request.body() {
        b"nobody" => Err(RemoteError::new("no-such-user", "nobody of that name").into()),
        b"broken" => Err("the table is broken".into()),
        body => Ok(body.to_vec()),
    }
}

#[test]
fn bodies_from_arguments_files_and_stdin_reach_a_server_that_nobody_here_wrote() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "of a\nfile").unwrap();
    let file = format!("@{}", file.path().display());
    let queues = [unique("pika"), unique("amqplib")];
    let _servers = (pika(&queues[0], "upper"), amqplib(&queues[1]));
    for queue in &queues {
        let request = |arguments: &[&str]| {
            let mut command = fibrpc(&url(), queue);
            run_with_input(command.arg("request").args(arguments), b"a\nb\n").stdout
        };
        assert_eq!(request(&["an argument"]), "AN ARGUMENT\n");
        assert_eq!(request(&[&file]), "OF A\nFILE\n");
        assert_eq!(request(&["@-"]), "A\nB\n");
        assert_eq!(request(&["--", "-x", "-"]), "-X\nA\nB\n");
        assert_eq!(
            request(&["1", "-1", &file, "@-"]),
            "1\n-1\nOF A\nFILE\nA\nB\n"
        );
        assert_eq!(request(&[]), "\n");
        assert_eq!(request(&["--reply-to", "direct", "x", "y"]), "X\nY\n");
        assert_eq!(request(&["--confirm", "always", "--no-retry", "x"]), "X\n");
    }
}

#[test]
fn any_bytes_come_back_unchanged() {
    let all: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = all.iter().copied().cycle().take(16 * MIB).collect();
    let queues = [
        unique("pika-bytes"),
        unique("java-bytes"),
        unique("our-bytes"),
    ];
    let _servers = (pika(&queues[0], "echo"), java(&queues[1]));
    let _ours = local(&queues[2], |server| server, echo);
    for queue in &queues {
        let request = |output: &str, body: &[u8]| {
            let mut command = fibrpc(&url(), queue);
            bytes(command.args(["request", "@-", "--output", output]), body)
        };
        for body in [&b""[..], b"\0", b"a\0b\n\0", &all, &large] {
            assert!(request("raw", body) == body, "{} bytes", body.len());
        }
        assert_eq!(request("body", b"\xff\0"), b"\xff\0\n");
        assert_eq!(request("body", b"\xff\n"), b"\xff\n");
        assert_eq!(request("body", b""), b"\n");
    }
}

#[test]
fn each_line_of_stdin_is_a_request_whatever_bytes_it_has() {
    let queue = unique("lines");
    let _server = pika(&queue, "echo");
    let request = |output: &str, input: &[u8]| {
        let mut command = fibrpc(&url(), &queue);
        bytes(command.args(["request", "-", "--output", output]), input)
    };
    let input = b"one\n\ntwo\r\n\xff\0@\n-\n@file\nlast";
    assert_eq!(request("body", input), [&input[..], b"\n"].concat());
    let lines = json_lines(&String::from_utf8(request("json", input)).unwrap());
    let bodies: Vec<_> = lines.iter().map(|line| &line["body"]).collect();
    assert_eq!(
        (bodies[0].as_str(), bodies[1].as_str(), bodies[2].as_str()),
        (Some("one"), Some(""), Some("two\r"))
    );
    assert_eq!(lines[3]["body_base64"], "/wBA");
    assert_eq!(lines.len(), 7);
    assert_eq!(request("raw", b""), b"");
    // Longer than what is read at once, and not the last.
    let long = [&[b'x'; 300_000][..], b"\nshort\n"].concat();
    assert!(request("body", &long) == long);
}

#[test]
fn headers_and_content_type_reach_the_server_and_those_of_the_reply_are_in_the_json() {
    let queue = unique("headers");
    let _server = pika(&queue, "echo");
    let done = run(fibrpc(&url(), &queue).args([
        "request",
        "--output",
        "json",
        "--header",
        "tenant: 7",
        "-H",
        "__TypeId__:com.example.Order",
        "-H",
        "link: amqp://a:b",
        "-H",
        "none:",
        "--content-type",
        "application/json",
        r#"{"id":1}"#,
    ]));
    let line = &json_lines(&done.stdout)[0];
    assert_eq!(line["body"], r#"{"id":1}"#);
    assert_eq!(line["content_type"], "application/json");
    // The last two are the server's own: a number and a truth value.
    let headers = serde_json::json!({
        "tenant": "7",
        "__TypeId__": "com.example.Order",
        "link": "amqp://a:b",
        "none": "",
        "length": "8",
        "whole": "true",
    });
    assert_eq!(line["headers"], headers);
    assert!(line["latency_ms"].as_f64().unwrap() > 0.0);
    assert_eq!(line.get("error"), None);

    let queue = unique("no-headers");
    let _server = pika(&queue, "upper");
    let done = run(fibrpc(&url(), &queue).args(["request", "--output", "json", "x"]));
    let line = &json_lines(&done.stdout)[0];
    assert_eq!(line["headers"], serde_json::json!({}));
    assert_eq!(line.get("content_type"), None);
}

#[test]
fn an_empty_reply_is_a_result() {
    let queue = unique("empty-reply");
    let _server = pika(&queue, "empty");
    let done = run(fibrpc(&url(), &queue).args(["request", "x"]));
    assert_eq!((done.code(), done.stdout.as_str()), (Some(0), "\n"));
}

#[test]
fn an_error_reply_is_told_in_its_place_and_the_first_failure_is_the_exit_code() {
    let queue = unique("error-replies");
    let _server = local(&queue, |server| server, fail);
    let request = |arguments: &[&str]| {
        let mut command = fibrpc(&url(), &queue);
        run_with_input(command.arg("request").args(arguments), b"a\nnobody\nb")
    };
    let done = request(&["a", "nobody", "@/no/such/file", "b"]);
    assert_eq!((done.code(), done.stdout.as_str()), (Some(3), "a\nb\n"));
    let errors: Vec<_> = done.stderr.lines().collect();
    assert!(
        errors[0].starts_with("error: body 2: ") && errors[0].contains("(no-such-user): nobody of"),
        "{errors:?}"
    );
    assert!(errors[1].contains("'/no/such/file'"), "{errors:?}");

    let done = request(&["@/no/such/file", "nobody"]);
    assert_eq!(done.code(), Some(2), "{}", done.stderr);
    let done = request(&["-"]);
    assert_eq!((done.code(), done.stdout.as_str()), (Some(3), "a\nb\n"));
    assert!(
        done.stderr.starts_with("error: line 2 of stdin: "),
        "{}",
        done.stderr
    );
    let done = request(&["broken"]);
    assert!(
        done.stderr.starts_with("error: the server answered"),
        "{}",
        done.stderr
    );

    let done = request(&["--output", "json", "a", "nobody", "@/no/such/file", "b"]);
    assert_eq!((done.code(), done.stderr.as_str()), (Some(3), ""));
    let lines = json_lines(&done.stdout);
    let error = |index: usize| &lines[index]["error"];
    assert_eq!(
        (&lines[0]["body"], &lines[3]["body"]),
        (&"a".into(), &"b".into())
    );
    assert_eq!(error(1)["kind"], "remote");
    assert_eq!(error(1)["remote_kind"], "no-such-user");
    assert!(
        error(1)["message"]
            .as_str()
            .unwrap()
            .contains("nobody of that name")
    );
    assert_eq!(error(2)["kind"], "usage");
    assert!(
        error(2)["message"]
            .as_str()
            .unwrap()
            .contains("/no/such/file")
    );
    assert_eq!(
        (lines[1].get("body"), lines[1].get("headers")),
        (None, None)
    );
}

#[test]
fn without_a_server_or_an_answer_it_says_so() {
    let queue = unique("nobody");
    let none = run(fibrpc(&url(), &queue).args(["request", "x"]));
    assert_eq!(none.code(), Some(5));
    assert!(
        none.stderr.contains(&queue) && none.stderr.contains("--wait-for-server"),
        "{}",
        none.stderr
    );
    let _server = local(
        &queue,
        |server| server,
        |_: &Request| {
            std::thread::sleep(std::time::Duration::from_secs(3));
            Ok(())
        },
    );
    let late = run(fibrpc(&url(), &queue).args(["request", "--timeout", "300ms", "x"]));
    assert_eq!(late.code(), Some(4), "{}", late.stderr);
    let waited = run(fibrpc(&url(), &queue).args(["request", "--wait-for-server", "x"]));
    assert_eq!((waited.code(), waited.stdout.as_str()), (Some(0), "\n"));
}

#[test]
fn what_cannot_be_sent_is_refused_before_anything_is() {
    let long = format!("{}: v", "n".repeat(256));
    let type_long = "t".repeat(256);
    for (arguments, words) in [
        (&["-H", "nocolon"][..], "a colon"),
        (&["-H", ": v"], "empty"),
        (&["-H", &long], "256 bytes"),
        (&["-H", "CC: elsewhere"], "'CC' is reserved"),
        (&["-H", "x-error-kind: mine"], "'x-error-kind' is reserved"),
        (&["--content-type", &type_long], "256 bytes"),
        (&["@"], "file's name"),
        (&["-", "@-"], "stdin can be read once"),
        (&["-", "-"], "stdin can be read once"),
        (&["-x"], "-- -x"),
        (&["--output", "text", "x"], "raw"),
        (&["--concurrency", "0", "x"], "--concurrency"),
    ] {
        // Nobody is asked.
        let done = run(fibrpc("amqp://192.0.2.1", "q")
            .arg("request")
            .args(arguments));
        assert_eq!(done.code(), Some(2), "{arguments:?}: {}", done.stderr);
        assert!(
            done.stderr.contains(words),
            "{arguments:?}: {}",
            done.stderr
        );
        assert_eq!(done.stdout, "");
    }
}

#[test]
fn the_numbers_of_our_own_server_can_be_requested() {
    let queue = unique("request-fib");
    let _server = server(&url(), &queue, &["--quiet"]);
    let done = run(fibrpc(&url(), &queue).args(["request", "30", "abc"]));
    assert_eq!((done.code(), done.stdout.as_str()), (Some(3), "832040\n"));
    assert!(done.stderr.contains("invalid-argument"), "{}", done.stderr);
}

#[test]
fn a_reply_is_printed_before_the_next_line_is_there_and_an_interrupt_ends_the_wait() {
    let queue = unique("request-interactive");
    let _server = local(&queue, |server| server, echo);
    let mut command = fibrpc(&url(), &queue);
    let mut request = Process::spawn(command.args(["request", "-"]).stdin(Stdio::piped()));
    let mut input = request.stdin();
    for line in ["one", "two"] {
        writeln!(input, "{line}").unwrap();
        assert_eq!(request.line(), line);
    }
    request.signal("INT");
    assert_eq!(request.wait(PATIENCE).code(), Some(130));
}

#[test]
fn an_interrupt_ends_the_wait_for_a_file() {
    let queue = unique("request-fifo");
    let _server = local(&queue, |server| server, echo);
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let mut command = fibrpc(&url(), &queue);
    command.args(["request", "x", &format!("@{}", fifo.display())]);
    let mut request = Process::spawn(&mut command);
    assert_eq!(request.line(), "x");
    request.signal("INT");
    assert_eq!(request.wait(PATIENCE).code(), Some(130));
}

#[test]
fn many_lines_take_no_more_memory_than_few() {
    const LINES: usize = 30_000;
    let queue = unique("many-lines");
    let _server = local(
        &queue,
        |server| server,
        |request: &Request| Ok::<_, HandlerError>(request.body()[..5].to_vec()),
    );
    let mut command = fibrpc(&url(), &queue);
    let mut request = Process::spawn(command.args(["request", "-"]).stdin(Stdio::piped()));
    let mut input = request.stdin();
    // It reads on while nobody answers if it is not held back.
    let writer = std::thread::spawn(move || {
        let rest = "x".repeat(2_000);
        for number in 0..LINES {
            writeln!(input, "{number:05}{rest}").unwrap();
        }
        input
    });
    for number in 0..LINES {
        assert_eq!(request.line(), format!("{number:05}"));
    }
    let peak = peak(&request);
    assert!(peak < 35 * MIB, "{} MiB", peak / MIB);
    drop(writer.join().unwrap());
    assert_eq!(request.wait(PATIENCE).code(), Some(0));
}

#[test]
fn few_large_bodies_are_in_flight_at_the_same_time() {
    const BODIES: usize = 30;
    let queue = unique("large-bodies");
    let _server = local(
        &queue,
        |server| server.workers(1),
        |request: &Request| {
            // Slower than they are read.
            std::thread::sleep(std::time::Duration::from_millis(100));
            Ok::<_, HandlerError>(Response::new(request.body().len().to_string()))
        },
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![b'x'; 8 * MIB]).unwrap();
    let mut arguments = vec![format!("@{}", file.path().display()); BODIES];
    // So that it does not end before it is looked at.
    arguments.push("-".to_owned());
    let mut command = fibrpc(&url(), &queue);
    let mut request = Process::spawn(command.arg("request").args(arguments).stdin(Stdio::piped()));
    let input = request.stdin();
    for _ in 0..BODIES {
        assert_eq!(request.line(), (8 * MIB).to_string());
    }
    let peak = peak(&request);
    assert!(peak < 160 * MIB, "{} MiB", peak / MIB);
    drop(input);
    assert_eq!(request.wait(PATIENCE).code(), Some(0));
}

#[test]
fn the_help_of_request_has_examples() {
    let help = run(fibrpc("", "q").args(["request", "--help"]));
    assert!(help.stdout.contains("jq -c"), "{}", help.stdout);
    let shown = run(fibrpc("", "q").args(["request", "-h"])).stdout;
    assert!(shown.contains("Examples:"), "{shown}");
}
