//! `fibrpc status`: is there a broker, is there a queue, does anybody serve it?

use crate::command::cli::{Global, ReportKind, StatusArgs};
use crate::command::exit::NO_SERVER;
use fibrpc::{Error, Status};
use serde::Serialize;
use std::process::ExitCode;

/// Runs the command; the exit code says whether a call would find a server.
pub fn status(args: &StatusArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let status =
        Status::of(&global.endpoints()?, &global.queue, args.timeout).map_err(|error| {
            // To a health check, a broker that is lost while it is asked is one that is not there.
            match error {
                Error::ConnectionLost { reason } => Error::Unreachable {
                    endpoint: global
                        .endpoints()
                        .map_or_else(|_| String::new(), |all| all.to_string()),
                    reason,
                    source: None,
                },
                other => other,
            }
        })?;
    let queue = status.queue.unwrap_or_default();
    match args.output {
        ReportKind::Json => {
            let report = JsonReport {
                broker: &status.broker,
                queue: &global.queue,
                exists: status.queue.is_some(),
                consumers: queue.consumers,
                ready: queue.ready,
                rtt_ms: status.round_trip.as_micros() as f64 / 1000.0,
            };
            println!("{}", serde_json::to_string(&report)?);
        }
        ReportKind::Text => {
            println!("broker      {}", status.broker);
            println!("node        {}", status.node);
            println!("connection  {}", status.connection);
            match status.queue {
                Some(_) => println!("queue       {}", global.queue),
                None => println!("queue       {} does not exist", global.queue),
            }
            println!("consumers   {}", queue.consumers);
            println!("ready       {} requests wait for a consumer", queue.ready);
            println!("round trip  {:.2?}", status.round_trip);
        }
    }
    Ok(match queue.consumers {
        0 => ExitCode::from(NO_SERVER),
        _ => ExitCode::SUCCESS,
    })
}

#[derive(Serialize)]
struct JsonReport<'a> {
    broker: &'a str,
    queue: &'a str,
    exists: bool,
    consumers: u32,
    ready: u32,
    rtt_ms: f64,
}
