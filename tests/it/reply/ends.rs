//! The end of a command: its own, that of its caller, of the server, of a terminal, of a connection.

use super::{Reply, is_marked, message, processes, script, text};
use crate::support::{PATIENCE, Peer, PrivateBroker, eventually, unique, url};
use amiquip::AmqpProperties;
use fibrpc::{Error, Retry};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

#[test]
fn a_command_need_not_read_its_stdin() {
    let server = Reply::shell("unread", "exec <&-; sleep 0.2; echo done");
    let long = vec![b'x'; 4 << 20];
    assert_eq!(server.client().call(long.clone()).unwrap(), b"done\n");
    let unread = Reply::start("unread", &["--workers", "1"], &["echo", "done"]);
    assert_eq!(unread.client().call(long).unwrap(), b"done\n");
    unread.still_serves("short", "done\n");
}

#[test]
fn a_command_that_closes_its_stdout_early_is_waited_for() {
    let line = "read line; echo early; exec >&- 2>&-; sleep 0.5; exit $line";
    let server = Reply::shell("early", line);
    let client = server.client();
    let began = Instant::now();
    assert_eq!(message(client.call("7\n")), "exit status 7");
    assert!(began.elapsed() >= Duration::from_millis(500));
    server.still_serves("0\n", "early\n");
}

#[test]
fn a_grandchild_that_keeps_stdout_open_holds_nothing_up_and_is_ended() {
    for ignoring in ["", "trap '' TERM;"] {
        let line = format!("{ignoring} sleep 100 & cat");
        let server = Reply::shell("forks", &line);
        let began = Instant::now();
        for _ in 0..2 {
            assert_eq!(server.client().call("a").unwrap(), b"a");
        }
        assert!(began.elapsed() < PATIENCE);
        server.still_serves("", "");
    }
}

#[test]
fn what_a_pipeline_writes_after_the_commands_own_end_belongs_to_the_reply() {
    let line = "(sleep 0.01; echo late) & echo early";
    let server = Reply::shell("late", line);
    let replies: Vec<_> = (0..10).map(|_| server.client().call("").unwrap()).collect();
    let whole = replies.iter().filter(|reply| **reply == b"early\nlate\n");
    // Not all on a machine that is busy.
    assert!(whole.count() > 0, "{replies:?}");
    server.wait_until_alone();
}

#[test]
fn a_command_that_outlives_its_caller_is_killed_with_all_it_has_started() {
    for ignoring in ["", "trap '' TERM;"] {
        let line = format!(
            "{ignoring} read line; [ $line = fast ] && exit; sleep 100 & sleep 100 | sleep 100"
        );
        let server = Reply::shell("deadline", &line);
        let client = server.client();
        let peer = Peer::connect(&url());
        let callback = peer.callback_queue();
        let properties = AmqpProperties::default()
            .with_reply_to(callback.clone())
            .with_expiration("3000".to_owned());
        peer.publish(&server.queue, b"slow\n", properties);
        server.wait_until_busy();
        server.wait_until_alone();
        assert_eq!(
            text(&peer.receive(&callback)),
            "the command was killed: its caller's time was up"
        );
        // The only worker is free, and nothing comes back.
        assert_eq!(client.call("fast\n").unwrap(), b"");
        let short = client.request().retry(Retry::Never);
        let error = short.timeout(Duration::from_millis(700)).send("slow\n");
        assert!(matches!(error, Err(Error::Timeout { .. })), "{error:?}");
        server.still_serves("fast\n", "");
        server.process.signal("TERM");
        let mut process = server.process;
        assert_eq!(process.wait(PATIENCE).code(), Some(0));
        assert!(peer.is_empty(&server.queue), "all are acknowledged");
    }
}

#[test]
fn a_drain_waits_for_commands_which_ctrl_c_does_not_reach() {
    let held = tempfile::NamedTempFile::new().unwrap();
    let wait = r#"while [ -e "$0" ]; do sleep 0.05; done; cat"#;
    let path = held.path().to_str().unwrap();
    let server = Reply::start("drain", &["--workers", "1"], &["sh", "-c", wait, path]);
    let client = server.client();
    let caller = thread::spawn(move || client.call("a"));
    let mut command = 0;
    eventually(
        "the command is a shell, no copy of the server any more",
        || {
            let others = server.others();
            let shell = others.iter().find(|(_, name)| name.contains("(sh)"));
            command = shell.map_or(0, |(pid, _)| *pid);
            command != 0
        },
    );
    // As the terminal does: to the whole group of whoever runs in the foreground. The server is
    // not the leader of one here, and its command must not be in the server's.
    assert_eq!(process_group(command), command);
    assert_ne!(process_group(command), process_group(server.process.pid()));
    server.process.signal("INT");
    drop(held);
    assert_eq!(caller.join().unwrap().unwrap(), b"a");
    let mut process = server.process;
    assert_eq!(process.wait(PATIENCE).code(), Some(0));
}

fn process_group(pid: u32) -> u32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = stat.rsplit_once(") ").unwrap();
    rest.split(' ').nth(2).unwrap().parse().unwrap()
}

#[test]
fn commands_that_outlive_the_drain_are_killed_and_their_requests_are_given_back() {
    for ignoring in ["", "trap '' TERM;"] {
        let line = format!("{ignoring} sleep 100 & sleep 100");
        let options = ["--workers", "3", "--drain-timeout", "300ms"];
        let server = Reply::start("outlives", &options, &["sh", "-c", &line]);
        let peer = Peer::connect(&url());
        for _ in 0..3 {
            let properties = AmqpProperties::default().with_reply_to("nowhere".to_owned());
            peer.publish(&server.queue, b"", properties);
        }
        eventually("three run", || server.others().len() >= 3 * 3);
        server.process.signal("TERM");
        let Reply { mut process, queue } = server;
        let pid = process.pid();
        assert_eq!(process.wait(PATIENCE).code(), Some(4));
        let left = processes(|other, _| other != pid && is_marked(other, &queue));
        // Those that were sent SIGKILL and are not the server's children end in their own time.
        if ignoring.is_empty() {
            assert_eq!(left, [], "at the end of the server");
        }
        eventually("no process is left", || {
            processes(|pid, _| is_marked(pid, &queue)).is_empty()
        });
        let again = peer.receive(&queue);
        assert!(again.redelivered);
    }
}

#[test]
fn a_second_signal_leaves_no_command_behind() {
    for ignoring in ["", "trap '' TERM;"] {
        let line = format!("{ignoring} sleep 100 & sleep 100");
        let server = Reply::shell("twice", &line);
        let peer = Peer::connect(&url());
        let properties = AmqpProperties::default().with_reply_to("nowhere".to_owned());
        peer.publish(&server.queue, b"", properties);
        server.wait_until_busy();
        server.process.signal("INT");
        thread::sleep(Duration::from_millis(300));
        server.process.signal("INT");
        let Reply { mut process, queue } = server;
        assert_eq!(process.wait(PATIENCE).code(), Some(130));
        eventually("no process is left", || {
            processes(|pid, _| is_marked(pid, &queue)).is_empty()
        });
    }
}

#[test]
fn after_a_second_signal_another_server_gets_the_requests() {
    // The end of one command takes a second, in which the other's worker could still answer.
    let line = "read what; [ $what = quick ] || trap '' TERM; sleep 100; sleep 100";
    let server = Reply::start("given-back", &["--workers", "2"], &["sh", "-c", line]);
    let peer = Peer::connect(&url());
    for body in ["quick", "slow"] {
        let properties = AmqpProperties::default().with_reply_to("nowhere".to_owned());
        peer.publish(&server.queue, format!("{body}\n").as_bytes(), properties);
    }
    eventually("two shells sleep", || server.others().len() == 4);
    server.process.signal("INT");
    thread::sleep(Duration::from_millis(300));
    server.process.signal("INT");
    let Reply { mut process, queue } = server;
    assert_eq!(process.wait(PATIENCE).code(), Some(130));
    for _ in 0..2 {
        assert!(peer.receive(&queue).redelivered);
    }
}

#[test]
fn a_terminal_that_is_gone_drains_and_leaves_no_command_behind() {
    let options = ["--workers", "1"];
    let sleeping = |nohup: &str| {
        let queue = unique("hangup");
        let mut fibrpc = Command::new("sh");
        // `trap ''` is what nohup does.
        fibrpc
            .args(["-c", &format!("{nohup} exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_fibrpc"))
            .args(["--url", &url(), "--queue", &queue, "reply"])
            .args(options)
            .args(["--", "sh", "-c", "cat; sleep 0.5; [ -s /dev/null ]"])
            .stdin(Stdio::null());
        Reply::spawn(queue, &mut fibrpc)
    };
    let server = sleeping("");
    let caller = server.client();
    let call = thread::spawn(move || caller.call("").map(drop));
    server.wait_until_busy();
    server.process.signal("HUP");
    // The kernel sends one, and so does the shell.
    thread::sleep(Duration::from_millis(100));
    server.process.signal("HUP");
    let Reply { mut process, queue } = server;
    assert_eq!(process.wait(PATIENCE).code(), Some(0));
    assert!(message(call.join().unwrap()).contains("exit"));
    assert_eq!(processes(|pid, _| is_marked(pid, &queue)), []);

    let server = sleeping("trap '' HUP;");
    server.process.signal("HUP");
    assert!(message(server.client().call("")).contains("exit"));
}

#[test]
fn a_connection_that_is_lost_while_draining_leaves_no_command_behind() {
    let broker = PrivateBroker::start();
    let (_folder, script) = script("#!/bin/sh\nsleep 100\n");
    let server = Reply::start_at(&broker.url, "lost", &["--workers", "1"], &[&script]);
    let peer = Peer::connect(&broker.url);
    let properties = AmqpProperties::default().with_reply_to("nowhere".to_owned());
    peer.publish(&server.queue, b"", properties);
    server.wait_until_busy();
    server.process.signal("TERM");
    thread::sleep(Duration::from_millis(300));
    drop(peer);
    broker.kill();
    let Reply { mut process, queue } = server;
    process.wait(PATIENCE);
    eventually("no process is left", || {
        processes(|pid, _| is_marked(pid, &queue)).is_empty()
    });
}
