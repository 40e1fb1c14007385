//! `fibrpc status`: is there a broker, is there a queue, does anybody serve it?

use crate::command::cli::{Global, ReportKind, StatusArgs};
use crate::command::exit::NO_SERVER;
use crate::command::lines;
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
    let text = match args.output {
        ReportKind::Json => serde_json::to_string(&JsonReport {
            broker: &status.broker,
            queue: &global.queue,
            exists: status.queue.is_some(),
            consumers: queue.consumers,
            ready: queue.ready,
            rtt_ms: status.round_trip.as_micros() as f64 / 1000.0,
        })?,
        ReportKind::Text => {
            let missing = match status.queue {
                Some(_) => "",
                None => " does not exist",
            };
            format!(
                "broker      {}\n\
                 node        {}\n\
                 connection  {}\n\
                 queue       {}{missing}\n\
                 consumers   {}\n\
                 ready       {} requests wait for a consumer\n\
                 round trip  {:.2?}",
                status.broker,
                status.node,
                status.connection,
                global.queue,
                queue.consumers,
                queue.ready,
                status.round_trip
            )
        }
    };
    lines::print(&text)?;
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
