//! Many calls in flight, and their answers printed in the order of the questions.

use crate::command::exit::{INTERRUPTED, USAGE, class, hint};
use crate::command::lines::{CANNOT_WRITE, Lines, stderr};
use crate::command::questions::{Next, Source};
use crate::command::signals::{GOODBYE_TIME, on_first_signal};
use anyhow::Context;
use crossbeam_channel::{Receiver, bounded};
use fibrpc::{Answer, Calls, Client, RequestBuilder};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long to wait for an answer before looking for another question, while there may be one.
const LOOK_INTERVAL: Duration = Duration::from_millis(2);

/// How often the progress bar moves.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// A time that does not come.
const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// How many bytes the calls in flight may hold before no further question is taken: the bodies of
/// unanswered requests, and of replies that wait for their turn. So 64 calls of 16 MiB each are not
/// 1 GiB. One call is made however large it is.
const BYTES_MAX: usize = 64 << 20;

/// What is asked, and is kept until its answer is printed.
pub trait Question {
    /// The request's body; taken once, when the request is sent.
    fn take_body(&mut self) -> Vec<u8>;
}

/// How a command prints what it asks, and what comes of it.
pub trait Format {
    type Question: Question;

    /// A question, as soon as those before it are answered.
    fn question(&self, _question: &Self::Question, _out: &Output) -> io::Result<()> {
        Ok(())
    }

    /// An answer. Returns the error, if it is one.
    fn answer(
        &self,
        question: &Self::Question,
        answer: Answer<u64>,
        out: &Output,
    ) -> io::Result<Result<(), fibrpc::Error>>;

    /// What is no question: where it stands, and why.
    fn bad(&self, reason: &str, out: &Output) -> io::Result<()>;
}

/// Has the first signal close the client; whoever waits on what is returned learns of it, too.
pub fn close_on_signal(client: &Client) -> anyhow::Result<Receiver<Infallible>> {
    let (running, interrupt) = bounded(0);
    let client = client.clone();
    on_first_signal(Some(GOODBYE_TIME), move || {
        client.close();
        drop(running);
    })?;
    Ok(interrupt)
}

/// Asks all questions, each by a copy of `template`, at most `window` at the same time. The exit code
/// is that of the first failure, in the order of the questions.
pub fn run<F: Format>(
    client: &Client,
    template: &RequestBuilder<'_>,
    source: Source<F::Question>,
    window: NonZeroUsize,
    format: F,
) -> anyhow::Result<ExitCode>
where
    F::Question: Send + 'static,
{
    let pipeline = Pipeline {
        client,
        template,
        calls: client.calls(),
        window: window.get(),
        open: VecDeque::new(),
        open_bytes: 0,
        taken: 0,
        ended: false,
        announced: false,
        format,
        out: Output {
            lines: Lines::stdout()?,
            progress: progress(source.total()),
        },
        progressed: Instant::now(),
        first_failure: None,
        source,
    };
    let first_failure = pipeline.run().context(CANNOT_WRITE)?;
    if client.is_closed() {
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(first_failure.map_or(ExitCode::SUCCESS, ExitCode::from))
}

/// The calls under way, in the order of their questions.
struct Pipeline<'c, F: Format> {
    source: Source<F::Question>,
    client: &'c Client,
    template: &'c RequestBuilder<'c>,
    calls: Calls<'c, u64>,
    window: usize,
    /// Questions taken and answers not yet printed, the next to print first.
    open: VecDeque<Open<F::Question>>,
    /// The sum of their bytes.
    open_bytes: usize,
    /// How many questions have been taken: the key of the next.
    taken: u64,
    /// Whether there are no more to take.
    ended: bool,
    /// Whether the question at the head has been announced.
    announced: bool,
    format: F,
    out: Output,
    progressed: Instant,
    first_failure: Option<u8>,
}

/// A question that was taken, and what came of it.
enum Open<Q> {
    Asked {
        question: Q,
        answer: Option<Answer<u64>>,
        /// How long the request's body is, or the reply's once that is there.
        bytes: usize,
    },
    /// Not a question: where it stands, and why.
    Bad(String),
}

impl<F: Format> Pipeline<'_, F>
where
    F::Question: Send + 'static,
{
    /// Runs to the end of the questions, or until the client is closed. Returns the exit code of
    /// the first failure, in the order of the questions.
    fn run(mut self) -> io::Result<Option<u8>> {
        while !self.client.is_closed() {
            self.take();
            self.print()?;
            if self.open.is_empty() {
                if self.ended {
                    break;
                }
                continue;
            }
            let wait = if self.ended || self.is_full() {
                FAR_FUTURE
            } else {
                LOOK_INTERVAL
            };
            if let Some(answer) = self.calls.next_before(Instant::now() + wait) {
                self.file(answer);
            }
        }
        if self.client.is_closed() {
            let unanswered = self.open.len();
            self.out.complain(&format!(
                "interrupted; {unanswered} calls were not answered"
            ))?;
        }
        self.out.finish()?;
        Ok(self.first_failure)
    }

    fn is_full(&self) -> bool {
        self.open.len() >= self.window || self.open_bytes >= BYTES_MAX
    }

    /// Takes as many questions as there are and there is room for, and asks them.
    fn take(&mut self) {
        let mut requests = Vec::new();
        while !self.ended && !self.is_full() {
            // With nothing under way, there is nothing else to wait for.
            match self.source.next(self.open.is_empty()) {
                Next::Question(mut question) => {
                    let body = question.take_body();
                    let bytes = body.len();
                    requests.push((self.taken, self.template.clone().body(body)));
                    self.open_bytes += bytes;
                    self.open.push_back(Open::Asked {
                        question,
                        answer: None,
                        bytes,
                    });
                }
                Next::Bad(reason) => self.open.push_back(Open::Bad(reason)),
                Next::Later => break,
                Next::End => {
                    self.ended = true;
                    break;
                }
            }
            self.taken += 1;
        }
        self.calls.extend(requests);
    }

    /// Prints what is answered and has its turn.
    fn print(&mut self) -> io::Result<()> {
        while let Some(head) = self.open.front() {
            if let Open::Asked {
                question, answer, ..
            } = head
            {
                if !self.announced {
                    self.format.question(question, &self.out)?;
                    self.announced = true;
                }
                if answer.is_none() {
                    break;
                }
            }
            self.announced = false;
            let failure = match self.open.pop_front() {
                Some(Open::Asked {
                    question,
                    answer: Some(answer),
                    bytes,
                }) => {
                    self.open_bytes -= bytes;
                    let result = self.format.answer(&question, answer, &self.out)?;
                    result.err().map(|error| class(&error).1)
                }
                Some(Open::Bad(reason)) => {
                    self.format.bad(&reason, &self.out)?;
                    Some(USAGE)
                }
                Some(Open::Asked { answer: None, .. }) | None => None,
            };
            self.first_failure = self.first_failure.or(failure);
            self.step();
        }
        Ok(())
    }

    /// Puts an answer to its question.
    fn file(&mut self, received: Answer<u64>) {
        // The keys of the open ones are `taken - open.len() .. taken`.
        let index = received.key + self.open.len() as u64 - self.taken;
        if let Ok(index) = usize::try_from(index)
            && let Some(Open::Asked { answer, bytes, .. }) = self.open.get_mut(index)
        {
            self.open_bytes -= *bytes;
            *bytes = received.result.as_ref().map_or(0, |reply| reply.body.len());
            self.open_bytes += *bytes;
            *answer = Some(received);
        }
    }

    fn step(&mut self) {
        self.out.progress.inc(1);
        if self.progressed.elapsed() >= PROGRESS_INTERVAL {
            self.progressed = Instant::now();
            self.out.progress.tick();
        }
    }
}

/// Stdout for answers, stderr for failures and progress.
pub struct Output {
    lines: Lines,
    progress: ProgressBar,
}

impl Output {
    pub fn line(&self, line: &str) -> io::Result<()> {
        self.lines.print(line)
    }

    pub fn bytes(&self, bytes: &[u8]) -> io::Result<()> {
        self.lines.print_bytes(bytes)
    }

    /// A line of JSON.
    pub fn json(&self, line: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(line)?;
        line.push(b'\n');
        self.bytes(&line)
    }

    /// A failure in words; `what` failed may be empty.
    pub fn failure(&self, what: &str, error: &fibrpc::Error) -> io::Result<()> {
        self.complain(&format!("{what}{error}"))?;
        if let Some(hint) = hint(error) {
            stderr::print(&hint);
        }
        Ok(())
    }

    pub fn complain(&self, what: &str) -> io::Result<()> {
        // So that on a terminal the two come in order.
        self.lines.flush(None)?;
        self.progress
            .suspend(|| stderr::print(&format!("error: {what}")));
        Ok(())
    }

    fn finish(self) -> io::Result<()> {
        self.lines.flush(None)?;
        self.progress.finish_and_clear();
        Ok(())
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
