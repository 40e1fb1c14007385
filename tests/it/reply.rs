//! `fibrpc reply`: a command for each request, and what becomes of it when it misbehaves. After
//! each, no process is left, no worker is lost, and the next request is served.

mod ends;

use crate::support::{
    Caller, Message, PATIENCE, Peer, PrivateBroker, Process, RawPeer, client, eventually, fibrpc,
    run, short_string, signal, unique, url,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use fibrpc::{Error, RemoteError};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};

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
