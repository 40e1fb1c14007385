//! `fibrpc request`: sends any bodies to any queue, and prints the replies in the order of the
//! requests.

use crate::command::bodies::{self, Body};
use crate::command::cli::Global;
use crate::command::cli::calling::{RequestArgs, RequestOutput};
use crate::command::json::{JsonError, milliseconds};
use crate::command::pipeline::{self, Format, Output};
use base64::prelude::{BASE64_STANDARD, Engine};
use fibrpc::{Answer, Error, Headers, Reply};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;
use std::process::ExitCode;
use std::str;
use std::time::Duration;

/// Runs the command; the exit code is that of the first failure.
pub fn request(args: RequestArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let bodies = args.bodies()?;
    let client = args.calling.client(global)?;
    let template = args.describe(client.request(&global.queue));
    // Once, instead of with each request.
    template.check()?;
    let interrupt = pipeline::close_on_signal(&client)?;
    let source = bodies::source(bodies, interrupt)?;
    let window = args.calling.concurrency;
    pipeline::run(&client, &template, source, window, args.output)
}

impl Format for RequestOutput {
    type Question = Body;

    fn answer(
        &self,
        body: &Body,
        answer: Answer<u64>,
        out: &Output,
    ) -> io::Result<Result<(), Error>> {
        match (&answer.result, self) {
            (result, RequestOutput::Json) => out.json(&JsonLine::new(result, answer.latency))?,
            (Ok(reply), RequestOutput::Raw) => out.bytes(&reply.body)?,
            (Ok(reply), RequestOutput::Body) => {
                out.bytes(&reply.body)?;
                if !reply.body.ends_with(b"\n") {
                    out.bytes(b"\n")?;
                }
            }
            (Err(error), RequestOutput::Body | RequestOutput::Raw) => {
                out.failure(&body.origin.to_string(), error)?;
            }
        }
        Ok(answer.result.map(drop))
    }

    fn bad(&self, reason: &str, out: &Output) -> io::Result<()> {
        match self {
            RequestOutput::Json => out.json(&JsonLine {
                error: Some(JsonError::usage(reason)),
                ..JsonLine::default()
            }),
            RequestOutput::Body | RequestOutput::Raw => out.complain(reason),
        }
    }
}

/// A reply, or an error.
#[derive(Serialize, Default)]
struct JsonLine<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    /// In place of `body`, if that is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<BTreeMap<&'a str, &'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<JsonError>,
    latency_ms: f64,
}

impl JsonLine<'_> {
    fn new(result: &Result<Reply, Error>, latency: Duration) -> JsonLine<'_> {
        let latency_ms = milliseconds(latency);
        match result {
            Ok(reply) => {
                let body = str::from_utf8(&reply.body).ok();
                JsonLine {
                    body,
                    body_base64: body.is_none().then(|| BASE64_STANDARD.encode(&reply.body)),
                    content_type: reply.content_type.as_deref(),
                    headers: Some(by_name(&reply.headers)),
                    error: None,
                    latency_ms,
                }
            }
            Err(error) => JsonLine {
                error: Some(error.into()),
                latency_ms,
                ..JsonLine::default()
            },
        }
    }
}

/// Headers as an object, whose names must differ: of several with one name, the first is shown.
fn by_name(headers: &Headers) -> BTreeMap<&str, &str> {
    let mut by_name = BTreeMap::new();
    for (name, value) in headers.iter() {
        by_name.entry(name).or_insert(value);
    }
    by_name
}
