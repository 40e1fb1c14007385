//! What a user types, and what comes back: arguments, help, texts.

mod ends;
mod readers;

use crate::support::{
    PATIENCE, Process, fibrpc, json_lines, run, run_with_input, server, unique, url,
};
use std::io::Write;
use std::net::TcpListener;
use std::process::Stdio;

/// The test broker's URL with another password.
pub fn with_password(password: &str) -> String {
    let mut url = url::Url::parse(&url()).unwrap();
    url.set_username("guest").unwrap();
    url.set_password(Some(password)).unwrap();
    url.to_string()
}

#[test]
fn help_and_version_are_answers_and_tell_no_password() {
    for arguments in [
        &["--help"][..],
        &["-h"],
        &["server", "--help"],
        &["call", "--help"],
        &["help"],
    ] {
        let help = run(fibrpc("amqp://u:hunter2@h", "q").args(arguments));
        assert_eq!(
            (help.code(), help.stderr.as_str()),
            (Some(0), ""),
            "{arguments:?}"
        );
        assert!(help.stdout.contains("Usage: fibrpc"), "{arguments:?}");
        assert!(
            !help.stdout.contains("hunter2") && !help.stdout.contains("guest:"),
            "{}",
            help.stdout
        );
    }
    let version = run(fibrpc("", "q").arg("--version"));
    // Behind it stands the commit, where there is one.
    assert!(
        version
            .stdout
            .starts_with(concat!("fibrpc ", env!("CARGO_PKG_VERSION"))),
        "{}",
        version.stdout
    );
}

#[test]
fn usage_errors_end_with_2_name_the_argument_and_tell_no_password() {
    for (arguments, named) in [
        (&["call"][..], "<N>..."),
        (&["call", "abc"], "abc"),
        (&["call", "1", "2.5"], "2.5"),
        (&["call", ""], "N"),
        (&["call", "--timeout", "5", "1"], "--timeout"),
        (&["call", "--timeout", "0s", "1"], "longer than 0"),
        (&["call", "--concurrency", "0", "1"], "--concurrency"),
        (&["call", "--output", "xml", "1"], "--output"),
        (&["server", "--workers", "0"], "from 1 to 65535"),
        (&["server", "--workers", "-1"], "--workers"),
        (&["server", "--workers", "70000"], "from 1 to 65535"),
        (&["server", "--prefetch", "0"], "from 1 to 65535"),
        (&["server", "--prefetch", "70000"], "--prefetch"),
        (&["server", "--max-n", "-1"], "from 0 to"),
        (&["bench", "--requests", "-1"], "--requests"),
        (&["bench", "--rate", "0"], "from 1 to"),
        (&["bench", "--argument", "187"], "--argument"),
        (&["call", "1", "--timeout", "1e9d"], "--timeout"),
        (
            &["call", "1", "--timeout", "99999999999999999999d"],
            "--timeout",
        ),
        (&["call", "1", "--queue", "line\n"], "line end"),
        (&["server", "--queue", "amq.mine"], "for the broker itself"),
        (
            &["status", "--url-file", "/"],
            "cannot read /: Is a directory",
        ),
        (
            &["status", "--url-file", "/dev/null"],
            "invalid broker URL in /dev/null",
        ),
        (
            &["status", "--url", "amqp://h:0"],
            "--url: invalid broker URL",
        ),
        (&["status", "--url", "'amqp://u:hunter2@h'"], "quotes"),
        (&["server", "--max-n", "94"], "--max-n 94"),
        (
            &["server", "--algorithm", "fast", "--max-n", "187"],
            "--max-n 187",
        ),
        (&["server", "--queue-type", "stream"], "--queue-type"),
        (
            &["--url", "http://u:hunter2@h", "call", "1"],
            "the scheme is neither",
        ),
        (&["call", "1", "--url", "amqp://u:hunter2@h:port/"], "port"),
        (
            &["call", "1", "--url", "amqp://u:hunter2@h/a/b"],
            "virtual host",
        ),
        (&["server", "--url", ""], "empty"),
        (&["call", "--queue", "", "1"], "queue"),
        (&["unknown"], "unknown"),
        (&[], "Usage"),
    ] {
        let usage = run(fibrpc(&url(), "q").args(arguments));
        assert_eq!(usage.code(), Some(2), "{arguments:?}: {}", usage.stderr);
        assert!(
            usage.stderr.contains(named),
            "{arguments:?}: {}",
            usage.stderr
        );
        assert!(!usage.stderr.contains("hunter2"), "{}", usage.stderr);
        assert_eq!(usage.stdout, "", "{arguments:?}");
    }
    for url in ["", "  ", "amqp://u:hunter2@h:0"] {
        let usage = run(fibrpc(url, "q").arg("status"));
        assert_eq!(usage.code(), Some(2), "{url}: {}", usage.stderr);
        assert!(usage.stderr.contains("AMQP_URL: "), "{}", usage.stderr);
        assert!(!usage.stderr.contains("hunter2"), "{}", usage.stderr);
    }
    let long = run(fibrpc(&url(), &"q".repeat(256)).args(["call", "1"]));
    assert_eq!(long.code(), Some(2));
    assert!(long.stderr.contains("256 bytes"), "{}", long.stderr);
}

#[test]
fn no_duration_is_too_long() {
    let queue = unique("long");
    let _server = server(&url(), &queue, &["--drain-timeout", "500000000y"]);
    for duration in ["500000000y", "18446744073709551615s"] {
        for arguments in [
            &["call", "10", "--timeout"][..],
            &["call", "10", "--resend-after"],
            &["status", "--timeout"],
            &["bench", "--requests", "10", "--timeout"],
        ] {
            let ended = run(fibrpc(&url(), &queue).args(arguments).arg(duration));
            assert_eq!(ended.code(), Some(0), "{arguments:?}: {}", ended.stderr);
        }
    }
}

#[test]
fn a_wrong_rust_log_is_told_and_no_color_is_heeded() {
    let queue = unique("rust-log");
    let _server = server(&url(), &queue, &["--quiet"]);
    let call = |filter: &str| {
        let mut command = fibrpc(&url(), &queue);
        run(command.env("RUST_LOG", filter).args(["call", "10"]))
    };
    let wrong = call("fibrpc=loud");
    assert!(
        wrong.stderr.contains("RUST_LOG is ignored"),
        "{}",
        wrong.stderr
    );
    assert!(wrong.stderr.contains("loud"), "{}", wrong.stderr);
    assert_eq!(wrong.code(), Some(0));
    for filter in ["fibrpc=info", "info,amiquip=off", ""] {
        let right = call(filter);
        assert!(!right.stderr.contains("RUST_LOG"), "{}", right.stderr);
        assert!(!right.stderr.contains('\x1b'), "{}", right.stderr);
    }
}

#[test]
fn text_is_what_the_tutorial_prints_and_the_rest_still_run_after_a_failure() {
    let queue = unique("text");
    let _server = server(&url(), &queue, &["--quiet"]);
    let call = run(fibrpc(&url(), &queue).args(["call", "10", "-1", "20"]));
    assert_eq!(
        call.stdout,
        " [x] Requesting fib(10)\n [.] Got 55\n [x] Requesting fib(-1)\n [x] Requesting fib(20)\n [.] Got 6765\n"
    );
    assert!(
        call.stderr.starts_with("error: fib(-1): "),
        "{}",
        call.stderr
    );
    assert!(call.stderr.contains("out-of-range"), "{}", call.stderr);
    assert_eq!(call.code(), Some(3));
}

#[test]
fn raw_is_the_number_alone() {
    let queue = unique("raw");
    let _server = server(&url(), &queue, &["--quiet"]);
    let call = run(fibrpc(&url(), &queue).args(["call", "--output", "raw", "10", "46", "20"]));
    assert_eq!((call.code(), call.stdout.as_str()), (Some(3), "55\n6765\n"));
}

#[test]
fn json_is_a_line_for_each_call_errors_in_place() {
    let queue = unique("json");
    let _server = server(&url(), &queue, &["--quiet", "--algorithm", "fast"]);
    let call = run(fibrpc(&url(), &queue).args(["call", "--output", "json", "186", "187", "0"]));
    assert_eq!((call.code(), call.stderr.as_str()), (Some(3), ""));
    let lines = json_lines(&call.stdout);
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[0]["n"], 186);
    assert_eq!(
        lines[0]["result"],
        "332825110087067562321196029789634457848"
    );
    assert_eq!(lines[1]["n"], 187);
    assert_eq!(lines[1]["error"]["kind"], "remote");
    assert!(
        lines[1]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("fib(186)")
    );
    assert_eq!(lines[1].get("result"), None);
    assert_eq!(lines[2]["result"], "0");
    assert_eq!(lines[2].get("error"), None);
    assert!(
        lines
            .iter()
            .all(|line| line["latency_ms"].as_f64().unwrap() > 0.0)
    );
}

#[test]
fn exact_numbers_beyond_64_bits() {
    let queue = unique("exact");
    let _server = server(&url(), &queue, &["--quiet", "--algorithm", "fast"]);
    let call =
        run(fibrpc(&url(), &queue).args(["call", "--output", "raw", "0", "1", "93", "94", "186"]));
    assert_eq!(
        call.stdout,
        "0\n1\n12200160415121876738\n19740274219868223167\n332825110087067562321196029789634457848\n"
    );
}

#[test]
fn the_server_refuses_n_above_its_limit() {
    let queue = unique("limit");
    let _server = server(&url(), &queue, &["--quiet", "--max-n", "20"]);
    let call = run(fibrpc(&url(), &queue).args(["call", "--output", "raw", "20", "21"]));
    assert_eq!((call.code(), call.stdout.as_str()), (Some(3), "6765\n"));
    assert!(call.stderr.contains("fib(20)"), "{}", call.stderr);
}

#[test]
fn global_options_stand_before_or_after_the_subcommand_or_in_the_environment() {
    let queue = unique("global");
    let _server = server(&url(), &queue, &["--quiet"]);
    for arguments in [
        &[
            "--queue",
            &queue,
            "--url",
            &url(),
            "call",
            "--output",
            "raw",
            "10",
        ][..],
        &[
            "call",
            "--output",
            "raw",
            "10",
            "--queue",
            &queue,
            "--url",
            &url(),
        ],
    ] {
        let call = run(fibrpc("amqp://192.0.2.1", "other").args(arguments));
        assert_eq!(call.stdout, "55\n", "{arguments:?}: {}", call.stderr);
    }
}

#[test]
fn no_log_level_shows_the_password() {
    let queue = unique("log");
    let _server = server(&url(), &queue, &["--quiet"]);
    let password = url::Url::parse(&url())
        .unwrap()
        .password()
        .unwrap_or("guest")
        .to_owned();
    for level in ["trace", "amiquip=trace", "debug,amiquip=trace"] {
        let call = run(fibrpc(&url(), &queue)
            .env("RUST_LOG", level)
            .args(["-vv", "call", "10"]));
        assert_eq!(call.code(), Some(0));
        // The user and the password of a test broker may be the same word: look for the pair.
        let handshake = format!("\\u{{0}}{password}");
        assert!(
            !call.stderr.contains(&handshake),
            "{level}: {}",
            call.stderr
        );
        assert!(!call.stderr.contains(&format!(":{password}@")), "{level}");
        let call = run(fibrpc(&with_password("hunter2"), &queue)
            .env("RUST_LOG", level)
            .args(["call", "10"]));
        assert_eq!(call.code(), Some(6));
        assert!(!call.stderr.contains("hunter2"), "{level}: {}", call.stderr);
    }
}

#[test]
fn verbose_tells_the_connection_as_the_broker_names_it() {
    let queue = unique("verbose");
    let _server = server(&url(), &queue, &["--quiet"]);
    let quiet = run(fibrpc(&url(), &queue).args(["call", "10"]));
    assert_eq!(quiet.stderr, "");
    let verbose = run(fibrpc(&url(), &queue).args(["-v", "call", "10"]));
    assert!(
        verbose.stderr.contains("connected to amqp://"),
        "{}",
        verbose.stderr
    );
    assert!(verbose.stderr.contains(" -> "), "{}", verbose.stderr);
}

#[test]
fn numbers_from_stdin_are_answered_in_order_and_bad_lines_are_told_by_number() {
    let queue = unique("stdin");
    let _server = server(&url(), &queue, &["--workers", "4", "--algorithm", "fast"]);
    let numbers: Vec<u32> = (0..2_000).map(|i| i % 187).collect();
    let mut input: Vec<_> = numbers.iter().map(u32::to_string).collect();
    input.insert(1_000, "abc".to_owned());
    input.insert(7, String::new());
    let input = input.join("\r\n");
    let call = run_with_input(
        fibrpc(&url(), &queue).args(["call", "-", "--output", "raw"]),
        input.as_bytes(),
    );
    let expected: Vec<_> = numbers
        .iter()
        .map(|&n| crate::fib::fast(n).unwrap().to_string())
        .collect();
    assert_eq!(call.stdout.lines().collect::<Vec<_>>(), expected);
    assert_eq!(call.code(), Some(2));
    assert!(
        call.stderr.contains("line 1002 of stdin"),
        "{}",
        call.stderr
    );

    let json = run_with_input(
        fibrpc(&url(), &queue).args(["call", "-", "--output", "json"]),
        b"10\nx\n20\n",
    );
    let lines = json_lines(&json.stdout);
    assert_eq!(lines[0]["result"], "55");
    assert_eq!(lines[1]["error"]["kind"], "usage");
    assert_eq!(lines[2]["result"], "6765");
    assert_eq!((json.code(), json.stderr.as_str()), (Some(2), ""));

    let mixed = run(fibrpc(&url(), &queue).args(["call", "1", "-"]));
    assert_eq!(mixed.code(), Some(2));
    assert!(mixed.stderr.contains("alone"), "{}", mixed.stderr);
}

#[test]
fn an_answer_is_printed_before_the_next_line_is_there() {
    let queue = unique("interactive");
    let _server = server(&url(), &queue, &["--workers", "1"]);
    let mut command = fibrpc(&url(), &queue);
    let mut call = Process::spawn(command.args(["call", "-"]).stdin(Stdio::piped()));
    let mut input = call.stdin();
    for (n, answer) in [("10", "55"), ("30", "832040")] {
        writeln!(input, "{n}").unwrap();
        assert_eq!(call.line(), format!(" [x] Requesting fib({n})"));
        assert_eq!(call.line(), format!(" [.] Got {answer}"));
    }
    // Nothing is under way, and no line comes: an interrupt ends the wait.
    call.signal("INT");
    assert_eq!(call.wait(PATIENCE).code(), Some(130));
}

#[test]
fn status_is_a_health_check() {
    let queue = unique("status");
    let status =
        |url: &str, arguments: &[&str]| run(fibrpc(url, &queue).arg("status").args(arguments));
    let missing = status(&url(), &[]);
    assert_eq!(missing.code(), Some(5), "{}", missing.stderr);
    assert!(
        missing.stdout.contains("does not exist"),
        "{}",
        missing.stdout
    );

    let mut serving = server(&url(), &queue, &["--workers", "3"]);
    let text = status(&url(), &[]);
    assert_eq!(text.code(), Some(0), "{}", text.stderr);
    assert!(text.stdout.contains("RabbitMQ "), "{}", text.stdout);
    let json = &json_lines(&status(&url(), &["--output", "json"]).stdout)[0];
    assert!(
        json["broker"].as_str().unwrap().starts_with("RabbitMQ "),
        "{json}"
    );
    assert_eq!(json["queue"], *queue);
    assert_eq!(json["exists"], true);
    assert_eq!(
        (json["consumers"].as_u64(), json["ready"].as_u64()),
        (Some(3), Some(0))
    );
    assert!(json["rtt_ms"].as_f64().unwrap() > 0.0, "{json}");

    serving.signal("TERM");
    assert!(serving.wait(PATIENCE).success());
    let idle = status(&url(), &["--output", "json"]);
    assert_eq!(idle.code(), Some(5), "{}", idle.stdout);
    assert_eq!(json_lines(&idle.stdout)[0]["exists"], true);

    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let unreachable = status(&format!("amqp://{nobody}"), &[]);
    assert_eq!(
        (unreachable.code(), unreachable.stdout.as_str()),
        (Some(6), "")
    );
    let refused = status(&with_password("wrong"), &[]);
    assert_eq!(refused.code(), Some(6), "{}", refused.stderr);
    assert!(!refused.stderr.contains(":wrong"), "{}", refused.stderr);
}

#[test]
fn a_url_can_come_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("url");
    std::fs::write(&file, format!("{}\n", url())).unwrap();
    let file = file.to_str().unwrap();
    let queue = unique("url-file");
    let _server = server("amqp://no.such.host.invalid", &queue, &["--url-file", file]);
    let call = run(fibrpc("", &queue).args(["call", "30", "--url-file", file]));
    assert!(call.stdout.contains("832040"), "{}", call.stderr);
    let missing = run(fibrpc("", &queue).args(["call", "30", "--url-file", "/no/such/file"]));
    assert_eq!(missing.code(), Some(2));
    assert!(
        missing.stderr.contains("cannot read /no/such/file"),
        "{}",
        missing.stderr
    );
}

#[test]
fn completions_and_the_manual_pages_know_every_command() {
    let help = run(fibrpc("", "q").arg("--help"));
    let commands = help.stdout.split("Commands:\n").nth(1).unwrap();
    // Lines of a longer description are indented further.
    let commands = commands.lines().take_while(|line| !line.is_empty());
    let commands = commands.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    let commands: Vec<_> = commands
        .filter(|command| !["", "help"].contains(command))
        .collect();
    assert!(commands.contains(&"server"), "{commands:?}");

    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(fibrpc("", "q").args(["completions", shell]));
        assert_eq!(script.code(), Some(0), "{shell}");
        for word in commands.iter().chain(&["reply-to"]) {
            assert!(script.stdout.contains(word), "{shell}: {word}");
        }
    }

    let folder = tempfile::tempdir().unwrap();
    let written = run(fibrpc("amqp://u:hunter2@h", "q")
        .arg("man")
        .arg(folder.path()));
    assert_eq!(written.code(), Some(0), "{}", written.stderr);
    let page = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    for command in &commands {
        let page = page(&format!("fibrpc-{command}.1"));
        assert!(page.contains(&format!(".TH fibrpc-{command} 1")), "{page}");
        assert!(page.contains("url\\-file"), "no global options: {page}");
        let help = run(fibrpc("", "q").args([command, "--help"])).stdout;
        assert!(help.contains("Examples:\n  fibrpc "), "{help}");
    }
    let overview = page("fibrpc.1");
    assert!(overview.contains(".TH fibrpc 1"), "{overview}");
    assert!(!overview.contains("hunter2"), "{overview}");
    assert!(page("fibrpc-server.1").contains("drain\\-timeout"));
    // No page refers to one that there is not.
    let pages = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(pages, commands.len() + 1);
    assert_eq!(overview.matches("(1)").count(), commands.len());

    let nowhere = run(fibrpc("", "q").args(["man", "/no/such/folder"]));
    assert_eq!(nowhere.code(), Some(2), "{}", nowhere.stderr);
    assert!(nowhere.stderr.contains("'/no/such/folder' is no folder"));
}

#[test]
fn systemd_is_told_when_the_server_is_ready() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let queue = unique("systemd");
    let mut command = fibrpc(&url(), &queue);
    let _server = Process::spawn(command.arg("server").env("NOTIFY_SOCKET", &path));
    let mut message = [0; 100];
    let len = socket.recv(&mut message).unwrap();
    assert_eq!(&message[..len], b"READY=1\n");
}
