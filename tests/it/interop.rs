//! A peer in another language, in both roles, on the same queue: Python's pika, as in the
//! tutorial. `make test` installs it (scripts/peers).

use crate::support::{PATIENCE, Process, client, fibrpc, python, run, server, unique, url};

fn python_server(queue: &str, declaration: &str, behaviour: &str) -> Process {
    let process = Process::spawn(&mut python(
        "rpc_server.py",
        &[&url(), queue, declaration, behaviour],
    ));
    assert_eq!(process.line(), " [x] Awaiting RPC requests");
    process
}

fn python_call(queue: &str, correlation_id: &str, numbers: &[&str]) -> String {
    let ended = run(&mut python(
        "rpc_client.py",
        &[&[&url(), queue, correlation_id], numbers].concat(),
    ));
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    ended.stdout
}

#[test]
fn their_client_is_answered_by_our_server() {
    let queue = unique("their-client");
    let _server = server(&url(), &queue, &["--quiet", "--algorithm", "fast"]);
    let answers = python_call(&queue, "uuid", &["0", "30", "94", "186"]);
    assert_eq!(
        answers,
        "0\n832040\n19740274219868223167\n332825110087067562321196029789634457848\n"
    );
}

#[test]
fn a_correlation_id_of_any_form_comes_back_to_their_client() {
    let queue = unique("their-ids");
    let _server = server(&url(), &queue, &["--quiet"]);
    for id in [
        "1",
        "0.123456789.0.987654321",
        "ünïcode id",
        &"x".repeat(255),
    ] {
        assert_eq!(python_call(&queue, id, &["10"]), "55\n", "{id}");
    }
}

#[test]
fn their_client_prints_our_errors_as_sentences() {
    let queue = unique("their-errors");
    let _server = server(&url(), &queue, &["--quiet"]);
    let answers = python_call(&queue, "uuid", &["abc", "46", "10"]);
    let lines: Vec<_> = answers.lines().collect();
    assert!(
        lines[0].contains("must be a decimal integer"),
        "{}",
        lines[0]
    );
    assert!(lines[1].contains("out of range"), "{}", lines[1]);
    assert_eq!(lines[2], "55");
}

#[test]
fn our_client_is_answered_by_their_server() {
    let queue = unique("their-server");
    let _server = python_server(&queue, "plain", "fib");
    let call = run(fibrpc(&url(), &queue).args(["call", "30"]));
    assert_eq!(
        call.stdout, " [x] Requesting fib(30)\n [.] Got 832040\n",
        "{}",
        call.stderr
    );
    let call = run(fibrpc(&url(), &queue).args([
        "call",
        "--output",
        "raw",
        "--reply-to",
        "direct",
        "186",
    ]));
    assert_eq!(
        call.stdout, "332825110087067562321196029789634457848\n",
        "{}",
        call.stderr
    );
    // Pipelined, which the tutorial's client never does.
    let client = client(&url(), &queue, PATIENCE);
    let requests = (0..187_u32).map(|n| client.request().body(n.to_string()));
    for answer in client.client.call_many(requests, 32) {
        let expected = crate::fib::fast(answer.key as u32).unwrap().to_string();
        assert_eq!(answer.result.unwrap().body, expected.as_bytes());
    }
}

#[test]
fn their_empty_answer_is_a_remote_error() {
    let queue = unique("their-empty");
    let _server = python_server(&queue, "plain", "empty");
    let call = run(fibrpc(&url(), &queue).args(["call", "30"]));
    assert_eq!(call.code(), Some(3), "{}", call.stderr);
}

#[test]
fn our_server_serves_the_queue_that_the_peer_declared_otherwise() {
    for declaration in ["durable", "quorum", "limited"] {
        let queue = unique(declaration);
        let theirs = python_server(&queue, declaration, "fib");
        drop(theirs);
        let ours = server(&url(), &queue, &["--workers", "2"]);
        assert_eq!(
            python_call(&queue, "uuid", &["20"]),
            "6765\n",
            "{declaration}"
        );
        assert_eq!(ours.line(), " [.] fib(20)");
    }
}

#[test]
fn the_peer_can_declare_our_queue_as_the_tutorial_does() {
    let queue = unique("our-queue");
    let _ours = server(&url(), &queue, &["--workers", "1"]);
    // A declaration that differs in anything would end their server.
    let _theirs = python_server(&queue, "plain", "fib");
    assert_eq!(python_call(&queue, "uuid", &["20"]), "6765\n");
}

#[test]
fn both_servers_share_the_load_of_one_queue() {
    let queue = unique("both");
    let ours = server(&url(), &queue, &["--workers", "1"]);
    let theirs = python_server(&queue, "plain", "fib");
    let call = run(fibrpc(&url(), &queue)
        .args(["call", "--output", "raw"])
        .args(vec!["25"; 60]));
    assert_eq!(call.stdout, "75025\n".repeat(60), "{}", call.stderr);
    assert_eq!(ours.line(), " [.] fib(25)");
    assert_eq!(theirs.line(), " [.] fib(25)");
}
