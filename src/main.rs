//! The command: parses, dispatches, and chooses the exit code. Answers go to stdout, everything else
//! to stderr.

mod command;
mod fib;

use clap::Parser;
use command::cli::{Cli, Command, manual};
use command::lines::{self, LAST_LINES, stderr};
use command::{bench, call, exit, server, status};
use std::env::{self, VarError};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => {
            start_logging(cli.global.verbose);
            run(cli).unwrap_or_else(|error| exit::fail(&error))
        }
        Err(other) => exit::usage(&other),
    };
    stderr::flush(LAST_LINES);
    code
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Server(args) => server::server(args, &cli.global),
        Command::Call(args) => call::call(args, &cli.global),
        Command::Bench(args) => bench::bench(&args, &cli.global),
        Command::Status(args) => status::status(&args, &cli.global),
        Command::Completions { shell } => {
            lines::print(&manual::completions(shell))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man { folder } => {
            manual::write_manual(&folder)?;
            Ok(ExitCode::SUCCESS)
        }
    }
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
    let style = match has_colours() {
        true => env_logger::WriteStyle::Always,
        false => env_logger::WriteStyle::Never,
    };
    let (filters, wrong) = match env::var("RUST_LOG") {
        Ok(filters) => match env_filter::Builder::new().try_parse(&filters) {
            Ok(_) => (filters, None),
            Err(error) => (String::new(), Some(error.to_string())),
        },
        Err(VarError::NotPresent) => (String::new(), None),
        Err(error) => (String::new(), Some(error.to_string())),
    };
    env_logger::Builder::new()
        .filter_module("fibrpc", ours)
        .parse_filters(&filters)
        .write_style(style)
        .target(env_logger::Target::Pipe(Box::new(Log)))
        .format(move |out, record| {
            let style = out.default_level_style(record.level());
            if with_time {
                write!(out, "{} ", out.timestamp_millis())?;
            }
            writeln!(out, "{style}{}{style:#} {}", record.level(), record.args())
        })
        .init();
    if let Some(wrong) = wrong {
        log::warn!(
            "RUST_LOG is ignored: {wrong}; it is a level (error, warn, info, debug, trace, off), \
             or a module and its level, as in fibrpc=debug"
        );
    }
}

/// Whether stderr is a terminal that is to show colours. Source: <https://no-color.org>.
fn has_colours() -> bool {
    let is = |name: &str, value: &str| env::var_os(name).is_some_and(|is| is == value);
    io::stderr().is_terminal()
        && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && !is("TERM", "dumb")
        && !is("CLICOLOR", "0")
}

/// Where the log goes. A thread that logs never waits for whoever reads the log: it may be one
/// that others wait for.
struct Log;

impl Write for Log {
    /// Takes a whole record.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(record);
        stderr::offer(text.strip_suffix('\n').unwrap_or(&text));
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
