//! The tutorial: its two programs, with each other, with ours and with Python's, and the pages that
//! explain them, in English and in Chinese.

use crate::examples::program;
use crate::support::{Peer, Process, eventually, fibrpc, python, root, run, server, unique, url};
use amiquip::AmqpProperties;
use std::fs;
use std::process::Command;

const PAGES: [&str; 2] = ["docs/tutorial.md", "docs/tutorial.zh.md"];

fn tutorial(name: &str, queue: &str) -> Command {
    let mut command = program(name);
    command.env("FIBRPC_QUEUE", queue);
    command
}

fn tutorial_server(queue: &str) -> Process {
    let server = Process::spawn(&mut tutorial("tutorial_server", queue));
    assert_eq!(server.line(), " [x] Awaiting RPC requests");
    server
}

/// What the client prints.
fn tutorial_call(queue: &str, numbers: &[&str]) -> String {
    let done = run(tutorial("tutorial_client", queue).args(numbers));
    assert_eq!(done.code(), Some(0), "{}", done.stderr);
    done.stdout
}

#[test]
fn the_tutorials_client_is_answered_by_its_server() {
    let queue = unique("tutorial");
    let server = tutorial_server(&queue);
    assert_eq!(
        tutorial_call(&queue, &["30", "0", "1"]),
        " [x] Requesting fib(30)\n [.] Got 832040\n\
         \x20[x] Requesting fib(0)\n [.] Got 0\n\
         \x20[x] Requesting fib(1)\n [.] Got 1\n"
    );
    for n in ["30", "0", "1"] {
        assert_eq!(server.line(), format!(" [.] fib({n})"));
    }
}

#[test]
fn the_tutorials_client_is_answered_by_our_server() {
    let queue = unique("tutorial-client");
    let ours = server(&url(), &queue, &["--workers", "1"]);
    assert_eq!(
        tutorial_call(&queue, &["30"]),
        " [x] Requesting fib(30)\n [.] Got 832040\n"
    );
    assert_eq!(ours.line(), " [.] fib(30)");
}

#[test]
fn our_client_is_answered_by_the_tutorials_server() {
    let queue = unique("tutorial-server");
    let _server = tutorial_server(&queue);
    for reply_to in ["queue", "direct"] {
        let call = run(fibrpc(&url(), &queue).args(["call", "--reply-to", reply_to, "30"]));
        assert_eq!(
            call.stdout, " [x] Requesting fib(30)\n [.] Got 832040\n",
            "{}",
            call.stderr
        );
    }
}

#[test]
fn the_tutorial_in_python_and_ours_take_part_in_each_other() {
    let queue = unique("tutorial-python");
    // Both declare the same queue: a declaration that differs would end the second server.
    let ours = tutorial_server(&queue);
    let theirs = Process::spawn(&mut python("rpc_server.py", &[&url(), &queue]));
    assert_eq!(theirs.line(), " [x] Awaiting RPC requests");
    let answers = run(&mut python(
        "rpc_client.py",
        &[&url(), &queue, "uuid", "10", "20"],
    ));
    assert_eq!(answers.stdout, "55\n6765\n", "{}", answers.stderr);
    drop(ours);
    assert!(tutorial_call(&queue, &["30"]).ends_with(" [.] Got 832040\n"));
}

#[test]
fn the_tutorials_client_drops_a_reply_that_it_does_not_know() {
    let peer = Peer::connect(&url());
    let queue = peer.callback_queue();
    let client = Process::spawn(tutorial("tutorial_client", &queue).arg("30"));
    let request = peer.receive(&queue);
    let callback = request.properties.reply_to().clone().unwrap();
    let id = request.properties.correlation_id().clone().unwrap();
    for (id, body) in [("another", "wrong"), (&id, "832040")] {
        let properties = AmqpProperties::default().with_correlation_id(id.to_owned());
        peer.publish(&callback, body.as_bytes(), properties);
    }
    assert_eq!(client.line(), " [x] Requesting fib(30)");
    assert_eq!(client.line(), " [.] Got 832040");
}

#[test]
fn the_tutorials_server_takes_one_request_at_a_time_and_gives_it_back_when_it_dies() {
    let queue = unique("tutorial-prefetch");
    let server = tutorial_server(&queue);
    let peer = Peer::connect(&url());
    for _ in 0..3 {
        peer.publish(&queue, b"60", AmqpProperties::default()); // takes hours
    }
    assert_eq!(server.line(), " [.] fib(60)");
    eventually("two requests wait", || peer.count(&queue).0 == 2);
    drop(server);
    eventually("the third is back", || peer.count(&queue) == (3, 0));
}

#[test]
fn the_tutorials_client_says_what_it_wants() {
    let done = run(&mut tutorial("tutorial_client", "unused"));
    assert_eq!(done.code(), Some(1));
    assert_eq!(done.stderr, "Error: \"usage: tutorial_client N...\"\n");
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// The blocks of a page in that language, without the fences.
fn blocks(page: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    read(page)
        .split(&fence)
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned())
        .collect()
}

#[test]
fn every_snippet_of_the_tutorial_stands_in_its_programs() {
    let programs = [
        "examples/tutorial/mod.rs",
        "examples/tutorial_server.rs",
        "examples/tutorial_client.rs",
    ]
    .map(read);
    let [english, chinese] = PAGES.map(|page| blocks(page, "rust"));
    assert!(english.len() > 5);
    assert_eq!(english, chinese, "the pages show different snippets");
    for snippet in english {
        assert!(
            programs.iter().any(|program| program.contains(&snippet)),
            "no program of the tutorial contains:\n{snippet}"
        );
    }
}

/// The commands in a page's blocks that begin so, each with the output below it.
fn shown(page: &str, command: &str) -> Vec<(String, String)> {
    let prompt = format!("$ {command}");
    blocks(page, "console")
        .concat()
        .split("$ ")
        .map(|run| format!("$ {run}"))
        .filter_map(|run| {
            let (typed, output) = run.split_once('\n')?;
            let arguments = typed.strip_prefix(&prompt)?.trim().to_owned();
            Some((arguments, output.to_owned()))
        })
        .collect()
}

#[test]
fn the_tutorial_shows_what_its_programs_print() {
    for page in PAGES {
        let queue = unique("tutorial-page");
        let server = tutorial_server(&queue);
        let servers = shown(page, "cargo run -q --example tutorial_server");
        let (_, served) = &servers[0];
        let clients = shown(page, "cargo run -q --example tutorial_client");
        assert!(!clients.is_empty(), "{page} runs no client");
        for (numbers, printed) in &clients {
            let numbers: Vec<_> = numbers.split(' ').collect();
            assert_eq!(tutorial_call(&queue, &numbers), *printed, "{page}");
        }
        for line in served.lines().skip(1) {
            assert_eq!(server.line(), line, "{page}");
        }
        for (numbers, printed) in shown(page, "cargo run -q -- call") {
            let call = run(fibrpc(&url(), &queue).arg("call").args(numbers.split(' ')));
            assert_eq!(call.stdout, printed, "{page}: {}", call.stderr);
        }
    }
}

#[test]
fn every_file_that_the_tutorial_links_to_is_there() {
    for page in PAGES {
        let text = read(page);
        let links = text.split("](../").skip(1);
        let files: Vec<_> = links
            .filter_map(|rest| rest.split([')', '#']).next())
            .collect();
        assert!(files.len() > 10, "{page}");
        for file in files {
            assert!(root().join(file).exists(), "{page} links to {file}");
        }
    }
}
