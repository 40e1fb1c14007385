//! `fibrpc status`: is there a broker, is there a queue, does anybody serve it, and does it answer?

use crate::command::cli::{Global, ReportKind, StatusArgs};
use crate::command::exit::{NO_SERVER, class};
use crate::command::json::{JsonError, milliseconds};
use crate::command::lines;
use crate::command::signals::exit_on_signal;
use fibrpc::{Client, Endpoints, Error, Reply, Status};
use serde::Serialize;
use std::fmt;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

/// How long to wait before looking again, at first; then twice that, and so on.
const PAUSE_MIN: Duration = Duration::from_millis(100);

/// How long to wait at most: each look is a connection, of which the broker writes into its log.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How long the last look may take, though the time to wait is over: what it sees is the answer.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// How much of a reply or an error is shown, in bytes.
const SHOWN_MAX: usize = 200;

/// Runs the command; the exit code says whether a call would find a server, or has been answered.
pub fn status(args: &StatusArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let endpoints = global.endpoints()?;
    exit_on_signal()?;
    let look = |timeout| {
        let began = Instant::now();
        let status = Status::of(&endpoints, &global.queue, timeout);
        let left = args.timeout.saturating_sub(began.elapsed());
        status
            .map(|status| (status, left))
            .map_err(|error| not_there(error, &endpoints))
    };
    let (status, left) = match args.wait {
        None => look(args.timeout),
        Some(wait) => wait_for_server(wait, |left| look(left.min(args.timeout))),
    }?;
    let is_served = status.queue.is_some_and(|queue| queue.consumers > 0);
    let call = match &args.call {
        Some(body) if is_served => Some(Call::make(&endpoints, &global.queue, body, left)?),
        _ => None,
    };
    let report = Report {
        queue: &global.queue,
        status: &status,
        asked: args.call.is_some(),
        call: call.as_ref(),
    };
    lines::print(&match args.output {
        ReportKind::Json => report.json()?,
        ReportKind::Text => report.to_string(),
    })?;
    Ok(match call.map(|call| call.result) {
        _ if !is_served => ExitCode::from(NO_SERVER),
        Some(Err(error)) => ExitCode::from(class(&error).1),
        Some(Ok(_)) | None => ExitCode::SUCCESS,
    })
}

/// To a health check, a broker that is lost while it is asked is one that is not there.
fn not_there(error: Error, endpoints: &Endpoints) -> Error {
    match error {
        Error::ConnectionLost { reason } => Error::Unreachable {
            endpoint: endpoints.to_string(),
            reason,
            source: None,
        },
        other => other,
    }
}

/// Looks again and again until somebody serves the queue; what was seen last. A broker that is not
/// there may come, and so may a user and a permission: what refuses us is waited for, too.
fn wait_for_server<T>(
    wait: Duration,
    look: impl Fn(Duration) -> Result<(Status, T), Error>,
) -> Result<(Status, T), Error> {
    let began = Instant::now();
    let mut pause = PAUSE_MIN;
    loop {
        let left = wait.saturating_sub(began.elapsed());
        let seen = look(left.max(LAST_LOOK));
        match &seen {
            Ok((status, _)) if status.queue.is_some_and(|queue| queue.consumers > 0) => {
                return seen;
            }
            Ok(_) => log::info!("nobody serves the queue yet"),
            Err(Error::Unreachable { .. } | Error::QueueRefused { .. }) => {}
            Err(_) => return seen,
        }
        if let Err(error) = &seen {
            log::info!("{error}");
        }
        let left = wait.saturating_sub(began.elapsed());
        if left.is_zero() {
            return seen;
        }
        thread::sleep(pause.min(left));
        pause = (2 * pause).min(PAUSE_MAX);
    }
}

/// A call that was made, and what came of it.
struct Call {
    result: Result<Reply, Error>,
    took: Duration,
}

impl Call {
    fn make(
        endpoints: &Endpoints,
        queue: &str,
        body: &str,
        timeout: Duration,
    ) -> Result<Call, Error> {
        // A timeout of 0 would be a mistake, and not a timeout.
        let timeout = timeout.max(Duration::from_millis(1));
        let client = Client::builder(endpoints)?.timeout(timeout).build()?;
        let began = Instant::now();
        let result = client.call(queue, body);
        let took = began.elapsed();
        Ok(Call { result, took })
    }
}

/// What is told.
struct Report<'a> {
    queue: &'a str,
    status: &'a Status,
    /// Whether a call was asked for.
    asked: bool,
    /// None if nobody would have answered it.
    call: Option<&'a Call>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status {
            broker,
            node,
            connection,
            round_trip,
            ..
        } = self.status;
        let queue = self.queue;
        let missing = match self.status.queue {
            Some(_) => "",
            None => " does not exist",
        };
        let counts = self.status.queue.unwrap_or_default();
        write!(
            f,
            "broker      {broker}\n\
             node        {node}\n\
             connection  {connection}\n\
             queue       {queue}{missing}\n\
             consumers   {}\n\
             ready       {} requests wait for a consumer\n\
             round trip  {round_trip:.2?}",
            counts.consumers, counts.ready,
        )?;
        match self.call {
            None if self.asked => f.write_str("\ncall        not made: nobody serves the queue"),
            None => Ok(()),
            Some(Call { result, took }) => match result {
                Ok(reply) => write!(
                    f,
                    "\ncall        answered in {took:.1?}: {}",
                    quoted(&reply.body)
                ),
                Err(error) => {
                    let error = error.to_string();
                    let shown = &error[..error.floor_char_boundary(SHOWN_MAX)];
                    let more = if shown.len() < error.len() { "..." } else { "" };
                    let shown = shown.replace(char::is_control, " ");
                    write!(f, "\ncall        failed after {took:.1?}: {shown}{more}")
                }
            },
        }
    }
}

/// The beginning of a reply, for a terminal.
fn quoted(body: &[u8]) -> String {
    let shown = &body[..body.len().min(SHOWN_MAX)];
    let shown = match str::from_utf8(body) {
        Ok(text) => text[..text.floor_char_boundary(SHOWN_MAX)]
            .escape_debug()
            .to_string(),
        Err(_) => shown.escape_ascii().to_string(),
    };
    match body.len() {
        0..=SHOWN_MAX => format!("\"{shown}\""),
        len => format!("\"{shown}\"... ({len} bytes)"),
    }
}

impl Report<'_> {
    fn json(&self) -> serde_json::Result<String> {
        let counts = self.status.queue.unwrap_or_default();
        serde_json::to_string(&JsonReport {
            broker: &self.status.broker,
            queue: self.queue,
            exists: self.status.queue.is_some(),
            consumers: counts.consumers,
            ready: counts.ready,
            rtt_ms: milliseconds(self.status.round_trip),
            call: self.asked.then(|| self.call.map(Call::json)),
        })
    }
}

impl Call {
    fn json(&self) -> JsonCall<'_> {
        let (reply, error) = match &self.result {
            Ok(reply) => (Some(reply), None),
            Err(error) => (None, Some(error)),
        };
        JsonCall {
            body: reply.and_then(|reply| str::from_utf8(&reply.body).ok()),
            bytes: reply.map(|reply| reply.body.len()),
            error: error.map(JsonError::from),
            latency_ms: milliseconds(self.took),
        }
    }
}

#[derive(Serialize)]
struct JsonReport<'a> {
    broker: &'a str,
    queue: &'a str,
    exists: bool,
    consumers: u32,
    ready: u32,
    rtt_ms: f64,
    /// Nothing if no call was asked for, and null if it was not made.
    #[serde(skip_serializing_if = "Option::is_none")]
    call: Option<Option<JsonCall<'a>>>,
}

#[derive(Serialize)]
struct JsonCall<'a> {
    /// Not there if it is no text.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<JsonError>,
    latency_ms: f64,
}
