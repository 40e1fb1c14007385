//! `fibrpc call`: asks for numbers, and prints the answers in the order of the questions.

use crate::command::cli::Global;
use crate::command::cli::calling::{CallArgs, Numbers, Output};
use crate::command::exit::{INTERRUPTED, USAGE, class, hint};
use crate::command::lines::{CANNOT_WRITE, Lines, stderr};
use crate::command::numbers::{Next, Source};
use crate::command::signals::{GOODBYE_TIME, on_first_signal};
use anyhow::Context;
use crossbeam_channel::bounded;
use fibrpc::{Answer, Calls, Client, Error, RemoteError};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::str;
use std::time::{Duration, Instant};

/// How long to wait for an answer before looking for another number, while there may be one.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// How often the progress bar moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// A time that does not come.
const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Runs the command; the exit code is that of the first failure.
pub fn call(args: CallArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let client = args.client(global)?;
    let (running, interrupt) = bounded(0);
    let interrupted = client.clone();
    on_first_signal(Some(GOODBYE_TIME), move || {
        interrupted.close();
        drop(running);
    })?;
    let (source, total) = match args.numbers()? {
        Numbers::Given(numbers) => {
            let total = numbers.len() as u64;
            (Source::given(numbers), Some(total))
        }
        Numbers::Stdin => (Source::lines(io::stdin(), interrupt)?, None),
    };
    let run = Run {
        source,
        client: &client,
        queue: &global.queue,
        calls: client.calls(),
        window: args.concurrency.get(),
        open: VecDeque::new(),
        taken: 0,
        printer: Printer {
            output: args.output,
            lines: Lines::stdout()?,
            first_failure: None,
            progress: progress(total),
            progressed: Instant::now(),
        },
    };
    let first_failure = run.run().context(CANNOT_WRITE)?;
    if client.is_closed() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(first_failure.map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// The calls under way, in the order of their questions.
struct Run<'c> {
    source: Source,
    client: &'c Client,
    queue: &'c str,
    calls: Calls<'c, u64>,
    window: usize,
    /// Questions taken and answers not yet printed, the next to print first.
    open: VecDeque<Open>,
    /// How many questions have been taken: the key of the next.
    taken: u64,
    printer: Printer,
}

/// A question, and what came of it.
enum Open {
    Waiting(i128),
    Done(i128, Answer<u64>),
    /// Not a question: where it stands, and why.
    Bad(String),
}

impl Run<'_> {
    /// Runs to the end of the questions, or until the client is closed. Returns the exit code of
    /// the first failure, in the order of the questions.
    fn run(mut self) -> io::Result<Option<u8>> {
        let mut ended = false;
        // Whether the question at the head has been announced.
        let mut announced = false;
        while !self.client.is_closed() {
            let mut requests = Vec::new();
            while !ended && self.open.len() < self.window {
                // With nothing under way, there is nothing else to wait for.
                match self.source.next(self.open.is_empty()) {
                    Next::Number(n) => {
                        let request = self.client.request(self.queue).body(n.to_string());
                        requests.push((self.taken, request));
                        self.open.push_back(Open::Waiting(n));
                    }
                    Next::Bad(reason) => self.open.push_back(Open::Bad(reason)),
                    Next::Later => break,
                    Next::End => {
                        ended = true;
                        break;
                    }
                }
                self.taken += 1;
            }
            self.calls.extend(requests);
            while let Some(head) = self.open.front() {
                match head {
                    Open::Waiting(n) if !announced => {
                        self.printer.question(*n)?;
                        announced = true;
                        break;
                    }
                    Open::Waiting(_) => break,
                    Open::Done(n, answer) => {
                        if !announced {
                            self.printer.question(*n)?;
                        }
                        self.printer.answer(*n, answer)?;
                    }
                    Open::Bad(reason) => self.printer.bad(reason)?,
                }
                announced = false;
                self.open.pop_front();
            }
            if self.open.is_empty() {
                if ended {
                    break;
                }
                continue;
            }
            let wait = if ended || self.open.len() >= self.window {
                FAR_FUTURE
            } else {
                LOOK_INTERVAL
            };
            if let Some(answer) = self.calls.next_before(Instant::now() + wait) {
                self.file(answer);
            }
        }
        if self.client.is_closed() {
            self.printer.interrupted(self.open.len())?;
        }
        self.printer.finish()
    }

    /// Puts an answer to its question.
    fn file(&mut self, answer: Answer<u64>) {
        // The keys of the open ones are `taken - open.len() .. taken`.
        let index = answer.key + self.open.len() as u64 - self.taken;
        if let Ok(index) = usize::try_from(index)
            && let Some(Open::Waiting(n)) = self.open.get(index)
        {
            self.open[index] = Open::Done(*n, answer);
        }
    }
}

/// Prints, and remembers how the first failure is to be reported.
struct Printer {
    output: Output,
    lines: Lines,
    first_failure: Option<u8>,
    progress: ProgressBar,
    progressed: Instant,
}

impl Printer {
    fn question(&self, n: i128) -> io::Result<()> {
        match self.output {
            Output::Text => self.lines.print(&format!(" [x] Requesting fib({n})")),
            Output::Raw | Output::Json => Ok(()),
        }
    }

    fn answer(&mut self, n: i128, answer: &Answer<u64>) -> io::Result<()> {
        let result = answer.result.clone().and_then(|reply| decimal(&reply.body));
        match (&result, self.output) {
            (_, Output::Json) => self.json(&JsonLine {
                n: Some(n),
                result: result.as_deref().ok(),
                error: result.as_ref().err().map(|error| JsonError {
                    kind: class(error).0,
                    message: error.to_string(),
                }),
                latency_ms: answer.latency.as_micros() as f64 / 1000.0,
            })?,
            (Ok(number), Output::Text) => self.lines.print(&format!(" [.] Got {number}"))?,
            (Ok(number), Output::Raw) => self.lines.print(number)?,
            (Err(error), Output::Text | Output::Raw) => {
                self.complain(&format!("fib({n}): {error}"))?;
                if let Some(hint) = hint(error) {
                    stderr::print(&hint);
                }
            }
        }
        if let Err(error) = result {
            self.first_failure.get_or_insert(class(&error).1);
        }
        self.step();
        Ok(())
    }

    fn bad(&mut self, reason: &str) -> io::Result<()> {
        match self.output {
            Output::Json => self.json(&JsonLine {
                n: None,
                result: None,
                error: Some(JsonError {
                    kind: "usage",
                    message: reason.to_owned(),
                }),
                latency_ms: 0.0,
            })?,
            Output::Text | Output::Raw => self.complain(reason)?,
        }
        self.first_failure.get_or_insert(USAGE);
        self.step();
        Ok(())
    }

    fn interrupted(&self, unanswered: usize) -> io::Result<()> {
        self.complain(&format!(
            "interrupted; {unanswered} calls were not answered"
        ))
    }

    fn json(&self, line: &JsonLine<'_>) -> io::Result<()> {
        self.lines.print(&serde_json::to_string(line)?)
    }

    fn complain(&self, what: &str) -> io::Result<()> {
        // So that on a terminal the two come in order.
        self.lines.flush(None)?;
        self.progress
            .suspend(|| stderr::print(&format!("error: {what}")));
        Ok(())
    }

    fn step(&mut self) {
        self.progress.inc(1);
        if self.progressed.elapsed() >= PROGRESS_INTERVAL {
            self.progressed = Instant::now();
            self.progress.tick();
        }
    }

    fn finish(self) -> io::Result<Option<u8>> {
        self.lines.flush(None)?;
        self.progress.finish_and_clear();
        Ok(self.first_failure)
    }
}

/// A bar on stderr, for who looks at it while the answers go elsewhere. How much is to come is not
/// known of what is read from stdin.
fn progress(total: Option<u64>) -> ProgressBar {
    if io::stdout().is_terminal() || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{wide_bar} {pos}/{len}  {per_sec}"),
        None => (
            ProgressBar::no_length(),
            "{spinner} {pos} answered  {per_sec}",
        ),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("a template that is constant"))
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

#[derive(Serialize)]
struct JsonError {
    kind: &'static str,
    message: String,
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
