//! What a figure is worth nothing without: of what, by what, when and where it was measured.

use crate::command::cli::bench::{Arguments, BenchArgs};
use crate::command::cli::{Global, VERSION};
use fibrpc::Status;
use serde::Serialize;
use std::env::consts::{ARCH, OS};
use std::thread;
use std::time::{Duration, SystemTime};

/// How long a broker may take to say what it is.
const BROKER_TIME: Duration = Duration::from_secs(5);

#[derive(Serialize)]
pub struct Context<'a> {
    /// Of fibrpc, with the commit.
    version: &'static str,
    /// Product and version, as `status` tells; null if it could not be asked.
    broker: Option<String>,
    arguments: Arguments<'a>,
    /// When it began: RFC 3339, UTC.
    time: String,
    machine: Machine,
}

#[derive(Serialize)]
struct Machine {
    cpus: Option<usize>,
    os: &'static str,
    arch: &'static str,
}

impl<'a> Context<'a> {
    /// Asks the broker, on a connection of its own, which is closed then.
    pub fn now(
        args: &'a BenchArgs,
        global: &'a Global,
        body_bytes: usize,
    ) -> anyhow::Result<Context<'a>> {
        // Whatever is wrong with it, the calls will tell.
        let timeout = args.timeout().min(BROKER_TIME);
        let status = Status::of(global.endpoints()?, &global.queue, timeout).ok();
        Ok(Context {
            version: VERSION,
            broker: status.map(|status| status.broker),
            arguments: args.described(global, body_bytes)?,
            time: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            machine: Machine {
                cpus: thread::available_parallelism().ok().map(usize::from),
                os: OS,
                arch: ARCH,
            },
        })
    }
}
