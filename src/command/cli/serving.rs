//! What may be typed to serve.

use crate::command::cli::listen::Listen;
use crate::command::cli::{Global, U32_MAX, duration, usage, whole};
use crate::fib;
use clap::{Args, ValueEnum};
use fibrpc::{QueueType, Server};
use std::ffi::OsString;
use std::num::{NonZeroU16, NonZeroUsize};
use std::thread;
use std::time::Duration;

/// What every server has.
#[derive(Debug, Args)]
pub struct ServingArgs {
    /// How many requests to execute at the same time [default: the number of CPUs]
    // Each has a channel, of which AMQP can number no more.
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroUsize>(1..=65535)
    )]
    workers: Option<NonZeroUsize>,

    /// How many requests the broker may give each worker ahead of its acknowledgements
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroU16>(1..=65535)
    )]
    prefetch: NonZeroU16,

    /// Which queue to declare if there is none; one that exists is used as it is, unless it is a stream
    #[arg(long, value_enum, default_value_t = QueueKind::Transient)]
    queue_type: QueueKind,

    /// How long to try for the first connection; once lost, it tries for ever
    #[arg(long, value_name = "DUR", default_value = "10s", value_parser = duration)]
    connect_timeout: Duration,

    /// How long requests being executed may take to finish once told to stop
    #[arg(long, value_name = "DUR", default_value = "30s", value_parser = duration)]
    drain_timeout: Duration,

    /// Do not print a line for each request
    #[arg(long)]
    quiet: bool,

    /// Serve metrics for Prometheus at http://ADDRESS:PORT/metrics; no password guards them. :9464
    /// is every address of the machine
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<Listen>,
}

#[derive(Debug, Args)]
#[command(after_help = SERVER_EXAMPLES)]
pub struct ServerArgs {
    #[command(flatten)]
    serving: ServingArgs,

    /// How to compute: the tutorial's slow recursion, or fast doubling
    #[arg(long, value_enum, default_value_t = Algorithm::Recursive)]
    algorithm: Algorithm,

    /// The largest n to accept [default: 45 for recursive, 186 for fast]
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = whole::<u32>(0..=U32_MAX)
    )]
    max_n: Option<u32>,
}

#[derive(Debug, Args)]
#[command(override_usage = REPLY_USAGE, after_help = REPLY_HELP)]
pub struct ReplyArgs {
    #[command(flatten)]
    serving: ServingArgs,

    /// Reply with the request itself: its body, its content type, and its headers as text
    #[arg(long)]
    echo: bool,

    /// Run this for each request, at most --workers at a time, and never through a shell: stdin is
    /// the request's body, stdout the reply's, and exit code 0 means success
    #[arg(
        last = true,
        value_name = "COMMAND",
        conflicts_with = "echo",
        num_args = 1..
    )]
    command: Vec<OsString>,
}

const SERVER_EXAMPLES: &str = "\
Examples:
  fibrpc server --workers 4                        answer requests, four at a time
  fibrpc server --queue fib --queue-type quorum    a queue of another name, replicated
  fibrpc server --algorithm fast --max-n 186       results instead of slow work
  fibrpc server --metrics 127.0.0.1:9464 --quiet   for Prometheus, without a line per request

SIGINT or SIGTERM: what has begun is finished and answered, the rest given back to the broker; exit
code 0. A second signal ends it at once: 130.";

const REPLY_USAGE: &str = "\
fibrpc reply [OPTIONS] --echo
       fibrpc reply [OPTIONS] -- COMMAND [ARG]...";

const REPLY_HELP: &str = "\
Examples:
  fibrpc reply --queue up -- tr a-z A-Z
  fibrpc reply --queue name -- jq -c .name
  fibrpc reply --queue work --workers 8 -- timeout 30 python3 handler.py
  fibrpc reply --queue echo --echo

A command that does not end with exit code 0 is an error for the caller: kind `internal`, and the
last line of its stderr. Its environment has
  FIBRPC_CORRELATION_ID  the same if the request is delivered again, FIBRPC_REDELIVERED (0 or 1)
  FIBRPC_CONTENT_TYPE    FIBRPC_TIME_LEFT_MS (if the caller says how long it waits)
  FIBRPC_HEADER_NAME     for each header: upper case, other characters `_`; the first, if several
                         come to the same name
A value with a NUL byte is left out. When the caller's time is up, or that of the drain, the command
and what it has started are killed: SIGTERM, a second later SIGKILL. So is, when the command has
ended, what it has left behind in its process group (setsid takes it out). Its output is read until
its end, and for 0.1 s if something else keeps it open.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// The tutorial's: two calls for every number
    Recursive,
    /// Fast doubling: exact up to n = 186
    Fast,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum QueueKind {
    /// Not durable, as in the tutorial
    Transient,
    /// Durable, on one node
    Classic,
    /// Durable and replicated
    Quorum,
}

/// What every server has, as plain values.
pub struct ServingPlan {
    pub server: Server,
    pub workers: usize,
    pub quiet: bool,
    pub metrics: Option<Listen>,
}

/// A server and what it computes, as plain values.
pub struct ServerPlan {
    pub serving: ServingPlan,
    pub algorithm: Algorithm,
    pub max_n: u32,
}

/// A server and what it replies with, as plain values.
pub struct ReplyPlan {
    pub serving: ServingPlan,
    pub replier: Replier,
}

/// What replies.
pub enum Replier {
    Echo,
    /// A command and its arguments.
    Command(Vec<OsString>),
}

impl ServingArgs {
    pub fn plan(self, global: &Global) -> anyhow::Result<ServingPlan> {
        if global.queue.starts_with("amq.") {
            let queue = &global.queue;
            return Err(usage(format!(
                "--queue {queue}: names that begin with 'amq.' are for the broker itself; take \
                 another, here and for the callers"
            ))
            .into());
        }
        let queue_type = match self.queue_type {
            QueueKind::Transient => QueueType::Transient,
            QueueKind::Classic => QueueType::Classic,
            QueueKind::Quorum => QueueType::Quorum,
        };
        let workers = self
            .workers
            .or_else(|| thread::available_parallelism().ok())
            .map_or(1, NonZeroUsize::get);
        let server = Server::new(global.endpoints()?)?
            .queue(&global.queue)
            .queue_type(queue_type)
            .workers(workers)
            .prefetch(self.prefetch.get())
            .connect_timeout(self.connect_timeout)
            .drain_timeout(self.drain_timeout);
        Ok(ServingPlan {
            server,
            workers,
            quiet: self.quiet,
            metrics: self.metrics,
        })
    }
}

impl ServerArgs {
    pub fn plan(self, global: &Global) -> anyhow::Result<ServerPlan> {
        let (default_n, limit) = match self.algorithm {
            // fib(45) takes seconds; fib(60) would take an hour.
            Algorithm::Recursive => (45, fib::RECURSIVE_N_MAX),
            Algorithm::Fast => (fib::FAST_N_MAX, fib::FAST_N_MAX),
        };
        let max_n = self.max_n.unwrap_or(default_n);
        if max_n > limit {
            let reason = format!(
                "--max-n {max_n} is beyond what this algorithm counts to exactly, n = {limit}"
            );
            return Err(usage(reason).into());
        }
        Ok(ServerPlan {
            serving: self.serving.plan(global)?,
            algorithm: self.algorithm,
            max_n,
        })
    }
}

impl ReplyArgs {
    pub fn plan(self, global: &Global) -> anyhow::Result<ReplyPlan> {
        let replier = match (self.echo, self.command) {
            (true, _) => Replier::Echo,
            (false, command) if command.is_empty() => {
                let reason = "what is to reply? Either the request itself: `fibrpc reply --echo`; \
                              or a command: `fibrpc reply -- COMMAND [ARG]...`";
                return Err(usage(reason).into());
            }
            (false, command) => Replier::Command(command),
        };
        Ok(ReplyPlan {
            serving: self.serving.plan(global)?,
            replier,
        })
    }
}
