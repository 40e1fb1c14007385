//! The command: parses, dispatches, prints, and chooses the exit code. Answers go to stdout,
//! everything else to stderr.

mod bench;
mod call;
mod cli;
mod numbers;
mod output;
mod status;

use anyhow::Context;
use clap::Parser;
use cli::{Algorithm, Cli, Command, ServerArgs};
use crossbeam_channel::bounded;
use fibrpc::{Error, RemoteError, Request, Server, fib, parse_n};
use output::Lines;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, ErrorKind, Write};
use std::process::{self, ExitCode};
use std::sync::{Arc, Once};
use std::{env, thread};

/// The exit code for arguments and input that cannot be used; clap's, too.
const USAGE: u8 = 2;

/// The exit code when nobody serves the request queue.
const NO_SERVER: u8 = 5;

/// The exit code after an interrupt, as shells report it: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    let done = match cli.command {
        Command::Server(args) => server(args, &cli.global),
        Command::Call(args) => call::call(args, &cli.global),
        Command::Bench(args) => bench::bench(&args, &cli.global),
        Command::Status(args) => status::status(&args, &cli.global),
        Command::Completions { shell } => {
            cli::print_completions(shell);
            Ok(ExitCode::SUCCESS)
        }
        Command::Man => cli::print_man()
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
    };
    done.unwrap_or_else(|error| fail(&error))
}

/// Prints why the command failed, and says with what code.
fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        usage.exit();
    }
    if let Some(error) = error.downcast_ref::<io::Error>()
        && error.kind() == ErrorKind::BrokenPipe
    {
        // Whoever read our output has enough.
        return ExitCode::SUCCESS;
    }
    match error.downcast_ref::<Error>() {
        Some(error) => {
            // It tells of its source itself.
            eprintln!("error: {error}");
            print_hint(error);
            ExitCode::from(class(error).1)
        }
        None => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// An error's kind, for programs that read our JSON, and the exit code for it.
fn class(error: &Error) -> (&'static str, u8) {
    match error {
        Error::InvalidUrl(_) | Error::InvalidArgument(_) => ("usage", USAGE),
        Error::Remote(_) => ("remote", 3),
        Error::Timeout { .. } | Error::DrainTimeout { .. } => ("timeout", 4),
        Error::NoServer { .. } => ("no-server", NO_SERVER),
        Error::Unreachable { .. } | Error::QueueRefused { .. } => ("unreachable", 6),
        Error::ConnectionLost { .. } => ("connection-lost", 7),
        Error::Closed => ("interrupted", INTERRUPTED),
        _ => ("internal", 1),
    }
}

fn print_hint(error: &Error) {
    let hint = match error {
        // Otherwise the broker was reached, and refused us.
        Error::Unreachable {
            source: Some(_), ..
        } => "is RabbitMQ running there? `make broker` starts one; --url or AMQP_URL names another",
        Error::NoServer { .. } => "start one with `fibrpc server`, or wait with --wait-for-server",
        _ => return,
    };
    eprintln!("  hint: {hint}");
}

fn server(args: ServerArgs, global: &cli::Global) -> anyhow::Result<ExitCode> {
    let plan = args.plan(global)?;
    let server = Server::new(plan.config)?;
    let (running, stop) = bounded::<()>(0);
    on_first_signal(move || drop(running))?;
    let lines = Arc::new(Lines::start()?);
    let (algorithm, max_n) = (plan.algorithm, plan.max_n);
    let printed = (!plan.quiet).then(|| Arc::clone(&lines));
    let handler = move |request: Request| -> Result<Vec<u8>, RemoteError> {
        let n = parse_n(&request.body, max_n)?;
        if let Some(lines) = &printed {
            // A server goes on when nobody reads its output any more.
            let _ = lines.print(&format!(" [.] fib({n})"));
        }
        let result = match algorithm {
            Algorithm::Recursive => u128::from(fib::recursive(n)),
            Algorithm::Fast => fib::fast(n).unwrap_or_else(|| unreachable!("n is at most {max_n}")),
        };
        Ok(result.to_string().into_bytes())
    };
    let announced = Once::new();
    let ready = || {
        announced.call_once(|| {
            let _ = lines.print(" [x] Awaiting RPC requests");
            // To systemd, if it has started us and wants to know.
            if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
                log::warn!("cannot tell systemd that the server is ready: {error}");
            }
        });
    };
    let stats = server.run(handler, ready, stop);
    // Workers may be left behind with their clones, so this is not the end of the lines.
    let _ = lines.flush();
    let stats = stats?;
    log::info!(
        "stopped: {} answered, {} refused, {} without reply_to",
        stats.answered,
        stats.refused,
        stats.unanswerable
    );
    Ok(ExitCode::SUCCESS)
}

/// Does something on the first SIGINT or SIGTERM; exits at once on the second.
fn on_first_signal(action: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen for signals")?;
    let listen = move || {
        let mut action = Some(action);
        for _ in signals.forever() {
            match action.take() {
                Some(action) => action(),
                None => process::exit(i32::from(INTERRUPTED)),
            }
        }
    };
    // Owned by nobody; it ends with the process.
    thread::Builder::new()
        .name("fibrpc-signals".to_owned())
        .spawn(listen)?;
    Ok(())
}

/// Logs to stderr: warnings, and more with -v or as `RUST_LOG` says.
fn start_logging(verbose: u8) {
    let ours = match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        _ => log::LevelFilter::Debug,
    };
    // journald adds the time itself.
    let with_time = env::var_os("JOURNAL_STREAM").is_none();
    env_logger::Builder::new()
        .filter_module("fibrpc", ours)
        .parse_default_env()
        .format(move |out, record| {
            // amiquip logs the handshake at debug, with the password in it.
            if record.target().starts_with("amiquip") && record.level() >= log::Level::Debug {
                return Ok(());
            }
            let style = out.default_level_style(record.level());
            if with_time {
                write!(out, "{} ", out.timestamp_millis())?;
            }
            writeln!(out, "{style}{}{style:#} {}", record.level(), record.args())
        })
        .init();
}
