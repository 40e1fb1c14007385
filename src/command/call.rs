//! `fibrpc call`: asks for numbers, and prints the answers in the order of the questions.

use crate::command::cli::Global;
use crate::command::cli::calling::{CallArgs, CallOutput, Numbers};
use crate::command::json::{JsonError, milliseconds};
use crate::command::numbers;
use crate::command::pipeline::{self, Format, Output, Question};
use crate::command::questions::Source;
use fibrpc::{Answer, Error, RemoteError};
use serde::Serialize;
use std::io;
use std::process::ExitCode;
use std::str;

/// Runs the command; the exit code is that of the first failure.
pub fn call(args: CallArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let client = args.calling.client(global)?;
    let interrupt = pipeline::close_on_signal(&client)?;
    let source = match args.numbers()? {
        Numbers::Given(numbers) => Source::given(numbers),
        Numbers::Stdin => numbers::from_stdin(interrupt)?,
    };
    let template = client.request(&global.queue);
    let window = args.calling.concurrency;
    pipeline::run(&client, &template, source, window, args.output)
}

/// The number to ask for.
impl Question for i128 {
    fn take_body(&mut self) -> Vec<u8> {
        self.to_string().into()
    }
}

impl Format for CallOutput {
    type Question = i128;

    fn question(&self, n: &i128, out: &Output) -> io::Result<()> {
        match self {
            CallOutput::Text => out.line(&format!(" [x] Requesting fib({n})")),
            CallOutput::Raw | CallOutput::Json => Ok(()),
        }
    }

    fn answer(&self, n: &i128, answer: Answer<u64>, out: &Output) -> io::Result<Result<(), Error>> {
        let result = answer.result.and_then(|reply| decimal(&reply.body));
        match (&result, self) {
            (_, CallOutput::Json) => out.json(&JsonLine {
                n: Some(*n),
                result: result.as_deref().ok(),
                error: result.as_ref().err().map(JsonError::from),
                latency_ms: milliseconds(answer.latency),
            })?,
            (Ok(number), CallOutput::Text) => out.line(&format!(" [.] Got {number}"))?,
            (Ok(number), CallOutput::Raw) => out.line(number)?,
            (Err(error), CallOutput::Text | CallOutput::Raw) => {
                out.failure(&format!("fib({n}): "), error)?;
            }
        }
        Ok(result.map(drop))
    }

    fn bad(&self, reason: &str, out: &Output) -> io::Result<()> {
        match self {
            CallOutput::Json => out.json(&JsonLine {
                n: None,
                result: None,
                error: Some(JsonError::usage(reason)),
                latency_ms: 0.0,
            }),
            CallOutput::Text | CallOutput::Raw => out.complain(reason),
        }
    }
}

#[derive(Serialize)]
struct JsonLine<'a> {
    /// None of a line that is no number.
    n: Option<i128>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<JsonError>,
    latency_ms: f64,
}

/// A reply's number. An empty one is how the tutorial's Java and .NET servers say that they failed,
/// and anything else is an error that a server sent without our header.
pub fn decimal(body: &[u8]) -> Result<String, Error> {
    let reason = match str::from_utf8(body) {
        Ok("") => "the reply is empty, which is how some servers say that they failed".to_owned(),
        Ok(text) if text.bytes().all(|b| b.is_ascii_digit()) => return Ok(text.to_owned()),
        _ => {
            let shown = body[..body.len().min(100)].escape_ascii();
            format!("the answer is not a number: \"{shown}\"")
        }
    };
    Err(Error::Remote(RemoteError::internal(reason)))
}
