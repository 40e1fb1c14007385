//! How a failure is told: its kind, its exit code, a hint.

use crate::command::lines::{CANNOT_WRITE, stderr};
use fibrpc::Error;
use std::io::{self, ErrorKind};
use std::process::ExitCode;

/// The exit code for arguments and input that cannot be used; clap's, too.
pub const USAGE: u8 = 2;

/// The exit code when nobody serves the request queue.
pub const NO_SERVER: u8 = 5;

/// The exit code when what was measured does not keep what was asked of it.
pub const FAILED_CHECK: u8 = 9;

/// The exit code after an interrupt, as shells report it: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Prints why the command failed, and says with what code.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    if let Some(usage) = error.downcast_ref::<clap::Error>() {
        return self::usage(usage);
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
            stderr::offer(&format!("error: {error}"));
            if let Some(hint) = hint(error) {
                stderr::offer(&hint);
            }
            ExitCode::from(class(error).1)
        }
        None => {
            stderr::offer(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints what clap has to say: of the arguments, or the help that was asked for.
pub fn usage(said: &clap::Error) -> ExitCode {
    let printed = match said.use_stderr() && stderr::is_formatted() {
        true => {
            stderr::offer(&said.to_string());
            Ok(())
        }
        false => said.print(),
    };
    match printed {
        Err(error) if !said.use_stderr() && error.kind() != ErrorKind::BrokenPipe => {
            fail(&anyhow::Error::new(error).context(CANNOT_WRITE))
        }
        _ => u8::try_from(said.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from),
    }
}

/// An error's kind, for programs that read our JSON, and the exit code for it.
pub fn class(error: &Error) -> (&'static str, u8) {
    match error {
        Error::InvalidUrl(_) | Error::InvalidArgument(_) => ("usage", USAGE),
        Error::Remote(_) | Error::UnreadableReply { .. } => ("remote", 3),
        Error::Timeout { .. } | Error::DrainTimeout { .. } => ("timeout", 4),
        Error::NoServer { .. } => ("no-server", NO_SERVER),
        Error::Unreachable { .. } | Error::QueueRefused { .. } => ("unreachable", 6),
        Error::ConnectionLost { .. } => ("connection-lost", 7),
        Error::Rejected { .. } => ("rejected", 8),
        Error::Closed | Error::Stopped => ("interrupted", INTERRUPTED),
        _ => ("internal", 1),
    }
}

/// What to do about it, if there is something.
pub fn hint(error: &Error) -> Option<String> {
    let hint = match error {
        // Otherwise the broker was reached, and refused us.
        Error::Unreachable {
            source: Some(_), ..
        } => "is RabbitMQ running there? `make broker` starts one; --url or AMQP_URL names another",
        Error::NoServer { .. } => {
            "start one (`fibrpc server`, `fibrpc reply`), or wait with --wait-for-server"
        }
        _ => return None,
    };
    Some(format!("  hint: {hint}"))
}
