//! The command: parses, dispatches, and chooses the exit code. Answers go to stdout, everything else
//! to stderr.

mod command;
mod fib;

use clap::Parser;
use command::cli::{Cli, Command, LogFormat, manual};
use command::lines::{self, LAST_LINES, stderr};
use command::{bench, call, exit, log, reply, request, server, status};
use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    let code = match Cli::try_parse() {
        Ok(cli) => {
            log::start(cli.global.verbose, cli.global.log);
            run(cli).unwrap_or_else(|error| exit::fail(&error))
        }
        Err(other) => {
            if log::is_json_asked_for(env::args_os()) {
                log::start(0, LogFormat::Json);
            }
            exit::usage(&other)
        }
    };
    stderr::flush(LAST_LINES);
    code
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Server(args) => server::server(args, &cli.global),
        Command::Reply(args) => reply::reply(args, &cli.global),
        Command::Call(args) => call::call(args, &cli.global),
        Command::Request(args) => request::request(args, &cli.global),
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
