//! The command: parses, dispatches, and chooses the exit code. Answers go to stdout, everything else
//! to stderr.

mod command;
mod fib;

use clap::Parser;
use command::cli::{self, Cli, Command};
use command::{bench, call, exit, server, status};
use std::env;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    let done = match cli.command {
        Command::Server(args) => server::server(args, &cli.global),
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
    done.unwrap_or_else(|error| exit::fail(&error))
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
            let style = out.default_level_style(record.level());
            if with_time {
                write!(out, "{} ", out.timestamp_millis())?;
            }
            writeln!(out, "{style}{}{style:#} {}", record.level(), record.args())
        })
        .init();
}
