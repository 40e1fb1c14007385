//! The command line: what may be typed, and the plain values that come of it.

use crate::command::bench::{Length, Pace, Plan};
use crate::command::numbers;
use crate::fib;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use fibrpc::{Client, ClientBuilder, Confirms, Endpoints, QueueType, ReplyTo, Retry, Server};
use std::fmt::Display;
use std::io::Write as _;
use std::num::{NonZeroU16, NonZeroU32, NonZeroU64, NonZeroUsize};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use std::{env, io};

/// Synchronous RPC over RabbitMQ: the tutorial's Fibonacci server and its client
#[derive(Debug, Parser)]
#[command(version = VERSION, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,

    #[command(subcommand)]
    pub command: Command,
}

/// With the commit, if it was built in the repository.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("FIBRPC_COMMIT"));

/// More than anybody can want where there is no other limit.
const U32_MAX: u64 = u32::MAX as u64;

const EXAMPLES: &str = "\
Examples:
  fibrpc server --workers 4          answer requests, four at a time
  fibrpc call 30                     ask for one number
  fibrpc call --output raw 1 2 3     ask for several, print the numbers alone
  seq 1000 | fibrpc call -           ask for as many as there are lines
  fibrpc call --timeout 2s 40        give up after two seconds
  fibrpc status                      is there a broker, and a server?
  fibrpc bench --duration 10s        how fast is it?

Exit codes (of `call`, the first failure's):
  0 answered   2 usage   3 the server answered with an error   4 timeout   5 no request queue
  6 no broker, or refused   7 connection lost (with --no-retry)   8 not taken by the broker
  130 interrupted";

#[derive(Debug, Args)]
pub struct Global {
    /// The broker, as amqp://user:password@host:port/vhost; several, separated by commas, are
    /// tried in turn [default: guest at localhost:5672, virtual host /]
    // A plain string, and not shown by clap, since it may hold a password.
    #[arg(
        long,
        value_name = "URL[,URL...]",
        env = "AMQP_URL",
        hide_env_values = true,
        global = true
    )]
    pub url: Option<String>,

    /// A file that holds the URL, instead of --url: no password on the command line or in the
    /// environment
    #[arg(long, value_name = "FILE", global = true)]
    pub url_file: Option<PathBuf>,

    /// The request queue
    #[arg(
        long,
        value_name = "NAME",
        env = "FIBRPC_QUEUE",
        default_value = "rpc_queue",
        value_parser = queue_name,
        global = true
    )]
    pub queue: String,

    /// Trust brokers whose certificates are in this PEM file or were signed by one of those in it,
    /// and no others [default: what the system trusts]
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", global = true)]
    tls_ca: Option<PathBuf>,

    /// Our own certificate, for a broker that asks for one (PEM)
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", global = true, requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// The private key of that certificate (PEM, not encrypted); one file may hold both
    #[cfg(feature = "tls")]
    #[arg(long, value_name = "FILE", global = true, requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// Log more, on stderr: -v connections, -vv everything (or set RUST_LOG)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer requests until interrupted
    Server(ServerArgs),
    /// Ask for Fibonacci numbers
    Call(CallArgs),
    /// Measure: many calls, every answer checked
    Bench(BenchArgs),
    /// Tell about the broker, the queue and its servers; exit code 0 if there is a server
    Status(StatusArgs),
    /// Print a script that completes command lines, for a shell to read
    Completions {
        /// Whose
        shell: Shell,
    },
    /// Print the manual page
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How long it may take
    #[arg(long, value_name = "DUR", default_value = "10s", value_parser = duration)]
    pub timeout: Duration,

    /// What to print
    #[arg(long, value_enum, default_value_t = ReportKind::Text)]
    pub output: ReportKind,
}

#[derive(Debug, Args)]
pub struct ServerArgs {
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

    /// Which queue to declare if there is none
    #[arg(long, value_enum, default_value_t = QueueKind::Transient)]
    queue_type: QueueKind,

    /// How long to try for the first connection
    #[arg(long, value_name = "DUR", default_value = "10s", value_parser = duration)]
    connect_timeout: Duration,

    /// How long requests being executed may take to finish once told to stop
    #[arg(long, value_name = "DUR", default_value = "30s", value_parser = duration)]
    drain_timeout: Duration,

    /// Do not print a line for each request
    #[arg(long)]
    quiet: bool,
}

#[derive(Debug, Args)]
pub struct CallArgs {
    /// The numbers to ask for; or `-` to read them from stdin, one a line
    #[arg(value_name = "N", required = true, allow_negative_numbers = true, value_parser = number)]
    numbers: Vec<Option<i128>>,

    /// How many calls may be in flight at the same time
    #[arg(
        long,
        value_name = "N",
        default_value = "64",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroUsize>(1..=U32_MAX)
    )]
    pub concurrency: NonZeroUsize,

    /// What to print
    #[arg(long, value_enum, default_value_t = Output::Text)]
    pub output: Output,

    #[command(flatten)]
    client: ClientArgs,

    /// Do not send a request again when the connection was lost after sending it
    #[arg(long)]
    no_retry: bool,

    /// Send a request again when it is unanswered for so long, then after twice that, and so on:
    /// for a queue that may be purged or deleted. What takes longer is executed again
    #[arg(long, value_name = "DUR", value_parser = duration, conflicts_with = "no_retry")]
    resend_after: Option<Duration>,

    /// Wait for a broker and a request queue that do not exist yet, instead of failing at once
    #[arg(long)]
    wait_for_server: bool,
}

/// What `call` and `bench` have in common.
#[derive(Debug, Args)]
struct ClientArgs {
    /// How long each call may take, everything included: connect, send, wait, reconnect
    #[arg(long, value_name = "DUR", default_value = "30s", value_parser = duration)]
    timeout: Duration,

    /// Where replies are sent: a callback queue, or RabbitMQ's direct reply-to
    #[arg(long, value_enum, default_value_t = ReplyKind::Queue)]
    reply_to: ReplyKind,

    /// Have the broker confirm each request, and send again what it has not confirmed within 1 s:
    /// auto does so with several brokers. It costs about a tenth of the rate
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = ConfirmKind::Auto)]
    confirm: ConfirmKind,

    /// How long to ask for a reply again and again before sleeping until it comes: halves the
    /// latency of short calls, for CPU time. Stops by itself where it does not pay; 0s: never
    #[arg(long, value_name = "DUR", default_value = "500us", value_parser = duration_or_zero)]
    spin: Duration,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// How many requests to send
    #[arg(
        long,
        value_name = "N",
        default_value = "10000",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroU64>(1..=U32_MAX),
        conflicts_with = "duration"
    )]
    requests: NonZeroU64,

    /// How long to send requests, instead of how many
    #[arg(long, value_name = "DUR", value_parser = duration)]
    duration: Option<Duration>,

    /// How many calls to keep in flight
    #[arg(
        long,
        value_name = "N",
        default_value = "64",
        conflicts_with = "rate",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroUsize>(1..=U32_MAX)
    )]
    concurrency: NonZeroUsize,

    /// Send this many requests a second whatever comes back (an open loop); the latency counts
    /// from the time a request was due, so that a server that stalls cannot hide it
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroU32>(1..=U32_MAX)
    )]
    rate: Option<NonZeroU32>,

    /// How many requests to send before, not counted
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        allow_negative_numbers = true,
        value_parser = whole::<u64>(0..=U32_MAX)
    )]
    warmup: u64,

    /// What to ask for
    #[arg(short = 'n', long = "argument", value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(..=i64::from(fib::FAST_N_MAX)))]
    argument: u32,

    #[command(flatten)]
    client: ClientArgs,

    /// What to print
    #[arg(long, value_enum, default_value_t = ReportKind::Text)]
    pub output: ReportKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportKind {
    /// For people
    Text,
    /// One JSON object
    Json,
}

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// The tutorial's two lines for each call
    Text,
    /// The number alone
    Raw,
    /// A JSON object for each call
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ReplyKind {
    /// One exclusive queue for all calls
    Queue,
    /// No queue (amq.rabbitmq.reply-to)
    Direct,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ConfirmKind {
    Auto,
    Always,
    Never,
}

/// A server and what it computes, as plain values.
pub struct ServerPlan {
    pub server: Server,
    pub algorithm: Algorithm,
    pub max_n: u32,
    pub quiet: bool,
}

impl Global {
    pub fn endpoints(&self) -> Result<Endpoints, clap::Error> {
        let wrong = |from: &str, error: &dyn Display| usage(format!("{from}: {error}"));
        let endpoints = match (&self.url_file, &self.url) {
            (Some(file), _) => {
                Endpoints::from_file(file).map_err(|error| wrong("--url-file", &error))?
            }
            (None, Some(url)) => url.parse().map_err(|error| {
                let is_set = env::var("AMQP_URL").is_ok_and(|set| set == *url);
                wrong(if is_set { "AMQP_URL" } else { "--url" }, &error)
            })?,
            (None, None) => Endpoints::default(),
        };
        #[cfg(feature = "tls")]
        let endpoints = self.with_tls(endpoints)?;
        Ok(endpoints)
    }

    #[cfg(feature = "tls")]
    fn with_tls(&self, endpoints: Endpoints) -> Result<Endpoints, clap::Error> {
        let given = [
            ("--tls-ca", self.tls_ca.is_some()),
            ("--tls-cert", self.tls_cert.is_some()),
        ];
        // Printed, a '/' in a user or virtual host is encoded.
        if let Some((option, _)) = given.into_iter().find(|(_, is_given)| *is_given)
            && !endpoints.to_string().contains("amqps://")
        {
            return Err(usage(format!(
                "{option} is for a broker at amqps://, and {endpoints} is without TLS; write \
                 amqps:// (its usual port is 5671), or leave the option out"
            )));
        }
        let mut tls = fibrpc::TlsOptions::new();
        if let Some(file) = &self.tls_ca {
            tls = tls.ca_file(file);
        }
        if let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) {
            tls = tls.client_certificate(certificate, key);
        }
        Ok(endpoints.with_tls(tls))
    }
}

impl ServerArgs {
    pub fn plan(self, global: &Global) -> anyhow::Result<ServerPlan> {
        if global.queue.starts_with("amq.") {
            let queue = &global.queue;
            return Err(usage(format!(
                "--queue {queue}: names that begin with 'amq.' are for the broker itself; take \
                 another, here and for the callers"
            ))
            .into());
        }
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
        let queue_type = match self.queue_type {
            QueueKind::Transient => QueueType::Transient,
            QueueKind::Classic => QueueType::Classic,
            QueueKind::Quorum => QueueType::Quorum,
        };
        let mut server = Server::new(global.endpoints()?)?
            .queue(&global.queue)
            .queue_type(queue_type)
            .prefetch(self.prefetch.get())
            .connect_timeout(self.connect_timeout)
            .drain_timeout(self.drain_timeout);
        if let Some(workers) = self.workers {
            server = server.workers(workers.get());
        }
        Ok(ServerPlan {
            server,
            algorithm: self.algorithm,
            max_n,
            quiet: self.quiet,
        })
    }
}

impl ClientArgs {
    fn builder(&self, global: &Global) -> anyhow::Result<ClientBuilder> {
        let reply_to = match self.reply_to {
            ReplyKind::Queue => ReplyTo::Queue,
            ReplyKind::Direct => ReplyTo::Direct,
        };
        let confirms = match self.confirm {
            ConfirmKind::Auto => Confirms::Auto,
            ConfirmKind::Always => Confirms::Always,
            ConfirmKind::Never => Confirms::Never,
        };
        Ok(Client::builder(global.endpoints()?)?
            .timeout(self.timeout)
            .reply_to(reply_to)
            .confirms(confirms)
            .spin(self.spin))
    }
}

impl BenchArgs {
    pub fn client(&self, global: &Global) -> anyhow::Result<Client> {
        Ok(self.client.builder(global)?.build()?)
    }

    pub fn plan(&self) -> Plan {
        Plan {
            argument: self.argument,
            warmup: self.warmup,
            length: match self.duration {
                Some(duration) => Length::Time(duration),
                None => Length::Requests(self.requests.get()),
            },
            pace: match self.rate {
                Some(rate) => Pace::Open {
                    per_second: rate.get(),
                },
                None => Pace::Closed {
                    in_flight: self.concurrency.get(),
                },
            },
        }
    }
}

/// What to ask for.
pub enum Numbers {
    Given(Vec<i128>),
    Stdin,
}

impl CallArgs {
    pub fn numbers(&self) -> Result<Numbers, clap::Error> {
        match &self.numbers[..] {
            [None] => Ok(Numbers::Stdin),
            numbers => numbers
                .iter()
                .copied()
                .collect::<Option<_>>()
                .map(Numbers::Given)
                .ok_or_else(|| usage("'-' reads all numbers from stdin; give it alone")),
        }
    }

    pub fn client(&self, global: &Global) -> anyhow::Result<Client> {
        let retry = match self.resend_after {
            Some(time) => Retry::Unanswered(time),
            None if self.no_retry => Retry::Never,
            None => Retry::LostConnection,
        };
        let client = self
            .client
            .builder(global)?
            .retry(retry)
            .wait_for_server(self.wait_for_server);
        Ok(client.build()?)
    }
}

/// An error about the arguments, said and exited with as clap does.
pub fn usage(message: impl std::fmt::Display) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, message)
}

/// A number, or `None` for `-`.
fn number(text: &str) -> Result<Option<i128>, String> {
    match text {
        "-" => Ok(None),
        text => numbers::parse(text).map(Some),
    }
}

/// The script that completes command lines, for a shell.
pub fn completions(shell: Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fibrpc", &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// The manual page, and those of the subcommands after it.
pub fn manual() -> io::Result<String> {
    let mut command = Cli::command();
    command.build();
    let subcommands: Vec<_> = command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
        .cloned()
        .collect();
    let mut out = Vec::new();
    let man = clap_mangen::Man::new(command);
    man.render(&mut out)?;
    for subcommand in subcommands {
        let man = clap_mangen::Man::new(subcommand.clone());
        writeln!(out, ".SH \"fibrpc {}\"", subcommand.get_name())?;
        man.render_description_section(&mut out)?;
        man.render_options_section(&mut out)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A queue's name: an AMQP short string.
fn queue_name(name: &str) -> Result<String, String> {
    match name.len() {
        0 => Err("a queue's name cannot be empty".to_owned()),
        // RabbitMQ drops a line end when it declares a queue, and then does not find it.
        _ if name.contains(char::is_control) => {
            Err("it holds a line end or another control character; leave that out".to_owned())
        }
        1..=255 => Ok(name.to_owned()),
        len => Err(format!("it has {len} bytes; AMQP allows 255")),
    }
}

/// A whole number in a range, which `T` holds.
fn whole<T: FromStr>(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let number = number.and_then(|number| number.to_string().parse().ok());
        number.ok_or_else(|| {
            let (min, max) = (range.start(), range.end());
            format!("expected a whole number from {min} to {max}")
        })
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    match duration_or_zero(text) {
        Ok(duration) if duration.is_zero() => Err("must be longer than 0".to_owned()),
        other => other,
    }
}

fn duration_or_zero(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error} (such as 250ms, 30s or 2m)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
