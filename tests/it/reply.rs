//! `fibrpc reply`: a command for each request, and what becomes of it when it misbehaves. After
//! each, no process is left, no worker is lost, and the next request is served.

use crate::support::{
    Caller, Message, PATIENCE, Peer, PrivateBroker, Process, RawPeer, client, eventually, fibrpc,
    run, short_string, signal, unique, url,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use fibrpc::{Error, RemoteError, Retry};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Marks the processes of a test, which inherit it.
const MARK: &str = "TEST_OF_REPLY";

/// A server around a command.
struct Reply {
    process: Process,
    queue: String,
}

impl Reply {
    fn start(name: &str, options: &[&str], command: &[&str]) -> Reply {
        Reply::start_at(&url(), name, options, command)
    }

    fn start_at(url: &str, name: &str, options: &[&str], command: &[&str]) -> Reply {
        let queue = unique(name);
        let mut fibrpc = fibrpc(url, &queue);
        fibrpc.arg("reply").args(options).arg("--").args(command);
        Reply::spawn(queue, &mut fibrpc)
    }

    /// A server around a line for the shell, with one worker, so that it counts if that is lost.
    fn shell(name: &str, line: &str) -> Reply {
        Reply::start(name, &["--workers", "1"], &["sh", "-c", line])
    }

    fn spawn(queue: String, fibrpc: &mut Command) -> Reply {
        let process = Process::spawn(fibrpc.env(MARK, &queue));
        assert_eq!(process.line(), " [x] Awaiting RPC requests");
        Reply { process, queue }
    }

    fn client(&self) -> Caller {
        client(&url(), &self.queue, PATIENCE)
    }

    /// The processes that it has started, and that these have: zombies, too.
    fn others(&self) -> Vec<(u32, String)> {
        let server = self.process.pid();
        processes(|pid, parent| pid != server && (parent == server || is_marked(pid, &self.queue)))
    }

    fn wait_until_alone(&self) {
        eventually("no process is left", || self.others().is_empty());
    }

    fn wait_until_busy(&self) {
        eventually("a command runs", || !self.others().is_empty());
    }

    /// Waits until nothing but the next request is there, which is served.
    fn still_serves(&self, body: &str, expected: &str) {
        self.wait_until_alone();
        let reply = self.client().call(body).unwrap();
        assert_eq!(String::from_utf8_lossy(&reply), expected);
        self.wait_until_alone();
    }
}

/// All processes that are wanted, by number and parent; their numbers and names.
fn processes(is_wanted: impl Fn(u32, u32) -> bool) -> Vec<(u32, String)> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = stat.rsplit_once(") ")?;
        let parent = rest.split(' ').nth(1)?.parse().ok()?;
        is_wanted(pid, parent).then(|| (pid, format!("{name}) {}", &rest[..1])))
    })
    .collect()
}

fn is_marked(pid: u32, mark: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let wanted = format!("{MARK}={mark}");
    environment
        .split(|&byte| byte == 0)
        .any(|variable| variable == wanted.as_bytes())
}

/// What an error reply says, whose kind must be `internal`.
fn message<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    match result {
        Err(Error::Remote(error)) => {
            assert_eq!(error.kind(), RemoteError::INTERNAL);
            error.message().to_owned()
        }
        other => panic!("expected an error reply, got {other:?}"),
    }
}

fn text(message: &Message) -> String {
    String::from_utf8_lossy(&message.body).into_owned()
}

/// A script in a folder of its own.
fn script(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("script");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn a_reply_is_what_the_command_writes_and_a_line_tells_of_the_request() {
    let server = Reply::start("tr", &["--workers", "2"], &["tr", "a-z", "A-Z"]);
    let client = server.client();
    assert_eq!(client.call("hello").unwrap(), b"HELLO");
    assert_eq!(server.process.line(), " [.] 5 bytes");
    assert_eq!(client.call("").unwrap(), b"");
    assert_eq!(server.process.line(), " [.] 0 bytes");
    // Byte for byte: no line end is added or taken away.
    for body in [&b"\0\xff\r\n\n"[..], b"\n", b"\0"] {
        assert_eq!(client.call(body).unwrap(), body);
    }
    server.wait_until_alone();
}

#[test]
fn an_echo_replies_with_body_content_type_and_headers() {
    let queue = unique("echo");
    let mut command = fibrpc(&url(), &queue);
    let server = Reply::spawn(queue, command.args(["reply", "--echo", "--quiet"]));
    let request = server.client();
    let request = request
        .request()
        .content_type("application/json")
        .header("X-a", "1");
    let reply = request.header("x-a", "2").send(&b"\0\xff"[..]).unwrap();
    assert_eq!(reply.body, b"\0\xff");
    assert_eq!(reply.content_type.as_deref(), Some("application/json"));
    let headers: Vec<_> = reply.headers.iter().collect();
    assert_eq!(headers, [("X-a", "1"), ("x-a", "2")]);
    // What another peer may send, and no reply can have.
    let peer = Peer::connect(&url());
    let mut headers = FieldTable::new();
    headers.insert("x-number".to_owned(), AmqpValue::LongInt(7));
    headers.insert(
        "x-error-kind".to_owned(),
        AmqpValue::LongString("x".to_owned()),
    );
    let reply = peer.ask(
        &server.queue,
        b"ping",
        AmqpProperties::default().with_headers(headers),
    );
    assert_eq!(text(&reply), "ping");
    let headers = reply.properties.headers().clone().unwrap();
    let number = AmqpValue::LongString("7".to_owned());
    assert_eq!(headers.get("x-number"), Some(&number));
    assert_eq!(headers.len(), 1, "{headers:?}");
    // The second line would be that of a request.
    server.process.signal("TERM");
    let (stdout, _) = server.process.output();
    assert_eq!(stdout, "");
}

#[test]
fn what_cannot_work_is_told_before_anything_is_served() {
    for (arguments, named) in [
        (&[][..], "fibrpc reply -- COMMAND [ARG]..."),
        (&[], "fibrpc reply --echo"),
        (&["--echo", "--", "cat"], "--echo"),
        (&["cat"], "-- COMMAND [ARG]..."),
        (&["--", "no-such-command"], "not in PATH"),
        (&["--", "/no/such/command"], "No such file"),
        (&["--", "/etc/passwd"], "not executable"),
        (&["--", "/"], "no file"),
        (&["--", ""], "its name is empty"),
        (&["--workers", "0", "--", "cat"], "--workers"),
    ] {
        // Nobody listens there.
        let mut fibrpc = fibrpc("amqp://127.0.0.1:1", "q");
        let usage = run(fibrpc.arg("reply").args(arguments));
        assert_eq!(usage.code(), Some(2), "{arguments:?}: {}", usage.stderr);
        assert!(usage.stderr.contains(named), "{}", usage.stderr);
    }
}

#[test]
fn the_environment_tells_of_the_request_and_of_no_other() {
    let queue = unique("environment");
    let mut command = fibrpc(&url(), &queue);
    command
        .args(["reply", "--", "env", "-0"])
        .env("FIBRPC_HEADER_OLD", "of an outer request")
        .env("FIBRPC_CONTENT_TYPE", "of an outer request")
        .env("FIBRPC_TIME_LEFT_MS", "of an outer request");
    let server = Reply::spawn(queue, &mut command);
    let ours = |body: &[u8]| -> Vec<Vec<u8>> {
        let mut ours: Vec<_> = body
            .split(|&byte| byte == 0)
            .filter(|one| one.starts_with(b"FIBRPC_"))
            // What the tester has.
            .filter(|one| {
                !["QUEUE", "TEST", "COMMIT"]
                    .iter()
                    .any(|name| one[7..].starts_with(name.as_bytes()))
            })
            .map(<[u8]>::to_vec)
            .collect();
        ours.sort();
        ours
    };
    let peer = Peer::connect(&url());
    let reply = peer.ask(&server.queue, b"", AmqpProperties::default());
    assert_eq!(ours(&reply.body), [b"FIBRPC_REDELIVERED=0"]);
    let mut headers = FieldTable::new();
    let string = |text: &str| AmqpValue::LongString(text.to_owned());
    headers.insert("x-user id".to_owned(), string("$(reboot) `\n\u{fc}"));
    headers.insert("count".to_owned(), AmqpValue::LongInt(-3));
    headers.insert("nul".to_owned(), string("a\0b"));
    let properties = AmqpProperties::default()
        .with_headers(headers)
        .with_content_type("text/x".to_owned())
        .with_correlation_id("id \"1\"".to_owned())
        .with_expiration("60000".to_owned());
    let reply = peer.ask(&server.queue, b"", properties);
    let ours = ours(&reply.body);
    let expected = [
        "FIBRPC_CONTENT_TYPE=text/x",
        "FIBRPC_CORRELATION_ID=id \"1\"",
        "FIBRPC_HEADER_COUNT=-3",
        "FIBRPC_HEADER_X_USER_ID=$(reboot) `\n\u{fc}",
        "FIBRPC_REDELIVERED=0",
        "FIBRPC_TIME_LEFT_MS=",
    ];
    assert_eq!(ours.len(), expected.len(), "{ours:?}");
    for (is, expected) in ours.iter().zip(expected) {
        assert!(is.starts_with(expected.as_bytes()), "{ours:?}");
    }
    let left = str::from_utf8(&ours[5]).unwrap().rsplit_once('=').unwrap();
    assert!((1..=60_000).contains(&left.1.parse().unwrap()), "{left:?}");
}

#[test]
fn a_correlation_id_is_handed_on_verbatim_and_one_with_a_nul_byte_not_at_all() {
    let line = "printf %s \"${FIBRPC_CORRELATION_ID-none}\" | od -An -tx1 >&2";
    let server = Reply::shell("id", line);
    let mut peer = RawPeer::connect(&url());
    let flags = 1 << 10 | 1 << 9; // correlation id, reply_to
    for (id, expected) in [(&b"\xff\x01"[..], " ff 01"), (b"a\0b", " 6e 6f 6e 65")] {
        let properties = [short_string(id), short_string(b"nowhere")].concat();
        peer.publish(&server.queue, flags, &properties, b"");
        assert_eq!(server.process.wait_for_stderr(" "), expected);
    }
}

#[test]
fn nothing_of_a_request_reaches_a_shell_and_the_arguments_stay_as_they_are() {
    let arguments = ["printf", "%s|", "$HOME", "a b", "*", "`id`", ";", ""];
    let server = Reply::start("arguments", &[], &arguments);
    let reply = server.client().call("; echo no").unwrap();
    assert_eq!(String::from_utf8_lossy(&reply), "$HOME|a b|*|`id`|;||");
}

#[test]
fn a_command_has_its_pipes_and_no_other_descriptor_of_ours() {
    let server = Reply::start("descriptors", &[], &["ls", "/proc/self/fd"]);
    let reply = server.client().call("").unwrap();
    // Those that the tester has handed on to us are handed on to anybody.
    let here = run(Command::new("ls").arg("/proc/self/fd"));
    assert_eq!(String::from_utf8_lossy(&reply), here.stdout);
}

#[test]
fn a_command_that_fails_is_an_error_with_its_last_words_which_are_passed_on() {
    let server = Reply::shell("fails", "IFS= read -r line; eval \"$line\"");
    let client = server.client();
    for (line, expected) in [
        ("echo out; echo first >&2; echo last >&2; exit 1", "last"),
        ("printf 'no line end' >&2; exit 1", "no line end"),
        ("printf 'why\\r\\n\\n  \\n' >&2; exit 255", "why"),
        ("exit 3", "exit status 3"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("echo dying >&2; kill -TERM $$", "dying"),
    ] {
        assert_eq!(message(client.call(line)), expected, "{line}");
    }
    for passed_on in ["first", "last", "no line end"] {
        assert_eq!(server.process.wait_for_stderr(passed_on), passed_on);
    }
    // What is said by one that succeeds is passed on, too.
    assert_eq!(client.call("echo a; echo by the way >&2").unwrap(), b"a\n");
    server.process.wait_for_stderr("by the way");
    server.still_serves("echo a", "a\n");
}

#[test]
fn a_command_that_vanishes_is_an_error_for_each_request_until_it_is_back() {
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("mine");
    let there = || symlink("/bin/cat", &link).unwrap();
    there();
    let server = Reply::start("vanishes", &["--workers", "1"], &[link.to_str().unwrap()]);
    let client = server.client();
    assert_eq!(client.call("a").unwrap(), b"a");
    fs::remove_file(&link).unwrap();
    for _ in 0..3 {
        let said = message(client.call("b"));
        assert!(said.contains("cannot be started: No such file"), "{said}");
    }
    let said = server.process.wait_for_stderr("cannot run");
    assert!(said.contains("mine"), "{said}");
    there();
    server.still_serves("c", "c");
}

#[test]
fn headers_that_no_environment_has_room_for_are_an_error_and_no_more() {
    let queue = unique("room");
    let direct = fibrpc(&url(), &queue);
    // Linux gives arguments and environment a quarter of the stack, and 128 KiB at least.
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -s 512; exec \"$0\" \"$@\""])
        .arg(direct.get_program())
        .args(["reply", "--workers", "1", "--", "cat"])
        .envs(
            direct
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
    let server = Reply::spawn(queue, &mut command);
    let peer = Peer::connect(&url());
    let mut headers = FieldTable::new();
    headers.insert("x".to_owned(), AmqpValue::LongString("v".repeat(130_000)));
    let properties = AmqpProperties::default().with_headers(headers);
    let reply = peer.ask(&server.queue, b"", properties);
    assert!(text(&reply).contains("Argument list too long"), "{reply:?}");
    server.still_serves("c", "c");
}

#[test]
fn a_large_body_goes_through_a_command_that_writes_while_it_reads() {
    let server = Reply::start("large", &["--workers", "2"], &["cat"]);
    let client = client(&url(), &server.queue, 2 * PATIENCE);
    let body: Vec<u8> = (0..16 << 20).map(|n: u32| (n % 251) as u8).collect();
    let mut calls = client.client.calls();
    for n in 0..4 {
        calls.submit(n, client.request().body(body.clone()));
    }
    for answer in calls {
        assert!(
            answer.result.unwrap().body == body,
            "{} differs",
            answer.key
        );
    }
    server.still_serves("next", "next");
}

#[test]
fn output_without_an_end_is_an_error_and_the_command_is_killed() {
    let line = "read line; if [ $line = much ]; then exec yes; fi; echo $line";
    let server = Reply::shell("endless", line);
    let said = message(client(&url(), &server.queue, 4 * PATIENCE).call("much\n"));
    assert!(said.contains("killed"), "{said}");
    assert!(said.contains("134217728 bytes"), "{said}");
    server.still_serves("a\n", "a\n");
}

#[test]
fn a_reply_over_the_brokers_limit_is_an_error() {
    let broker = PrivateBroker::configured("max_message_size = 1000000\n", &[]);
    let options = ["--workers", "1"];
    let command = ["sh", "-c", "read len; head -c $len /dev/zero"];
    let server = Reply::start_at(&broker.url, "limit", &options, &command);
    let client = client(&broker.url, &server.queue, 2 * PATIENCE);
    for _ in 0..2 {
        let said = message(client.call("100000000\n"));
        assert!(said.contains(" 1000000"), "{said}");
        assert_eq!(client.call("1000000\n").unwrap().len(), 1_000_000);
    }
    server.wait_until_alone();
}

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
            .with_expiration("1000".to_owned());
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

/// A process whose output nobody reads. Killed when dropped.
struct Unread(Child);

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn stderr_without_an_end_and_without_a_reader_stalls_nothing() {
    let queue = unique("stderr");
    let line = "head -c 100000000 /dev/zero >&2; yes long | head -c 10000000 >&2; cat";
    let mut command = fibrpc(&url(), &queue);
    command
        .args(["reply", "--workers", "1", "--", "sh", "-c", line])
        .env(MARK, &queue)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // Nobody reads.
    let mut server = Unread(command.spawn().unwrap());
    let child = &mut server.0;
    let client = client(&url(), &queue, 4 * PATIENCE);
    eventually("it serves", || {
        !matches!(client.call("a"), Err(Error::NoServer { .. }))
    });
    assert_eq!(client.call("b").unwrap(), b"b");
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(peak < 64 << 10, "{peak} KiB of memory");
    signal(child.id(), "TERM");
    eventually("it ends", || child.try_wait().unwrap().is_some());
}

#[test]
fn a_drain_waits_for_commands_which_ctrl_c_does_not_reach() {
    let server = Reply::shell("drain", "sleep 1; cat");
    let client = server.client();
    let caller = thread::spawn(move || client.call("a"));
    server.wait_until_busy();
    // As the terminal does: to the whole group of whoever runs in the foreground. The server is
    // not the leader of one here, and its command must not be in the server's.
    let (command, _) = server.others()[0];
    assert_eq!(process_group(command), command);
    assert_ne!(process_group(command), process_group(server.process.pid()));
    server.process.signal("INT");
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
    let options = ["--workers", "1", "--drain-timeout", "1s"];
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
fn too_few_files_for_so_many_workers_are_told() {
    let queue = unique("files");
    let mut fibrpc = Command::new("sh");
    fibrpc
        .args(["-c", "ulimit -n 40; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_fibrpc"))
        .args([
            "--url",
            &url(),
            "--queue",
            &queue,
            "reply",
            "--workers",
            "8",
        ])
        .args(["--", "cat"])
        .stdin(Stdio::null());
    let server = Reply::spawn(queue, &mut fibrpc);
    server
        .process
        .wait_for_stderr("may need 76 open files, and 40 are allowed");
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

#[test]
fn many_at_once_are_each_answered_with_their_own() {
    let server = Reply::start("many", &["--workers", "8", "--quiet"], &["cat"]);
    let client = client(&url(), &server.queue, 2 * PATIENCE);
    let mut calls = client.client.calls();
    for n in 0..300 {
        calls.submit(n, client.request().body(n.to_string()));
    }
    for answer in calls {
        assert_eq!(
            answer.result.unwrap().body,
            answer.key.to_string().into_bytes()
        );
    }
    server.wait_until_alone();
}

#[test]
fn a_command_is_called_what_was_typed() {
    let line = "tr '\\0' ' ' </proc/$$/cmdline";
    let server = Reply::shell("name", line);
    let reply = server.client().call("").unwrap();
    assert_eq!(String::from_utf8_lossy(&reply), format!("sh -c {line} "));
}
