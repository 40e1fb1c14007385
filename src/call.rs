//! `fibrpc call`: asks for numbers, and prints the answers in the order of the arguments.

use crate::cli::{CallArgs, Global, Output};
use crate::output::Lines;
use crate::{INTERRUPTED, class, on_first_signal, print_hint};
use anyhow::Context;
use fibrpc::{Answer, Client, Error, RemoteError};
use serde::Serialize;
use std::io;
use std::process::ExitCode;
use std::str;

/// Runs the command; the exit code is that of the first failure.
pub fn call(args: &CallArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let client = Client::new(args.config(global)?)?;
    let interrupted = client.clone();
    on_first_signal(move || interrupted.close())?;
    let lines = Lines::start()?;
    let requests = args.numbers.iter().map(i128::to_string);
    let mut answers = client.call_many(requests, args.concurrency.get());
    let mut first_failure = None;
    for &n in &args.numbers {
        if args.output == Output::Text {
            lines.print(&format!(" [x] Requesting fib({n})"))?;
        }
        let answer = answers.next().context("a call has no answer")?;
        if let Err(error) = report(n, &answer, args.output, &lines)? {
            first_failure.get_or_insert(class(&error).1);
        }
        if client.is_closed() {
            break;
        }
    }
    lines.finish()?;
    if client.is_closed() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(first_failure.map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// Prints how one call ended; returns the error if it failed.
fn report(
    n: i128,
    answer: &Answer<u64>,
    output: Output,
    lines: &Lines,
) -> io::Result<Result<(), Error>> {
    let result = answer.result.clone().and_then(|body| decimal(&body));
    match (&result, output) {
        (_, Output::Json) => {
            let line = JsonLine {
                n,
                result: result.as_deref().ok(),
                error: result.as_ref().err().map(|error| JsonError {
                    kind: class(error).0,
                    message: error.to_string(),
                }),
                latency_ms: answer.latency.as_micros() as f64 / 1000.0,
            };
            lines.print(&serde_json::to_string(&line)?)?;
        }
        (Ok(number), Output::Text) => lines.print(&format!(" [.] Got {number}"))?,
        (Ok(number), Output::Raw) => lines.print(number)?,
        (Err(error), Output::Text | Output::Raw) => {
            // So that on a terminal the two come in order.
            lines.flush()?;
            eprintln!("error: fib({n}): {error}");
            print_hint(error);
        }
    }
    Ok(result.map(drop))
}

#[derive(Serialize)]
struct JsonLine<'a> {
    n: i128,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<JsonError>,
    latency_ms: f64,
}

#[derive(Serialize)]
struct JsonError {
    kind: &'static str,
    message: String,
}

/// A reply's number. Anything else is an error that a server sent without our header.
pub fn decimal(body: &[u8]) -> Result<String, Error> {
    match str::from_utf8(body) {
        Ok(text) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(text.to_owned()),
        _ => {
            let shown = body[..body.len().min(100)].escape_ascii();
            let message = format!("the answer is not a number: \"{shown}\"");
            Err(Error::Remote(RemoteError::internal(message)))
        }
    }
}
