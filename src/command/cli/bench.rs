//! What may be typed to measure.

use crate::command::bench::checks::{Condition, Metric, Operator};
use crate::command::bench::find_rate::Goal;
use crate::command::bench::load::{Length, Pace};
use crate::command::bench::payload::{Payload, Right, pattern};
use crate::command::bench::{Plan, Task};
use crate::command::bodies::{BODY_MAX, read_file};
use crate::command::cli::calling::{ClientArgs, ConfirmKind, ReplyKind};
use crate::command::cli::{Global, ReportKind, U32_MAX, duration, usage, whole};
use crate::fib;
use clap::Args;
use fibrpc::Client;
use serde::Serialize;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  fibrpc bench --duration 10s                     how fast is it?
  fibrpc bench --queue up --size 1024             any server, 1 KiB a request
  fibrpc bench --queue up --data @order.json --content-type application/json
  fibrpc bench --queue echo --size 65536 --expect-echo
  fibrpc bench --connections 8 --concurrency 256  as eight clients
  fibrpc bench --duration 10m --every 1s          a line a second: a failover is a gap
  fibrpc bench --rate 500 --duration 1m --fail-if 'p99>20ms' --fail-if 'errors>0'
  fibrpc bench --find-rate 'p99<20ms'             how much can it take?

Exit code: 9 if a check failed, otherwise that of the commonest failure, 0 if there was none.
With --fail-if 'errors>N', up to N failures are none.";

/// More connections need more memory and threads than a machine has.
const CONNECTIONS_MAX: u64 = 10_000;

/// The shortest interval that is worth a line.
const EVERY_MIN: Duration = Duration::from_millis(10);

/// How long a trial of a rate takes unless told otherwise.
const TRIAL_TIME: Duration = Duration::from_secs(3);

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct BenchArgs {
    /// How many requests to send
    #[arg(
        long,
        value_name = "N",
        default_value = "10000",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroU64>(1..=U32_MAX),
        conflicts_with_all = ["duration", "find_rate"]
    )]
    requests: NonZeroU64,

    /// How long to send requests, instead of how many
    #[arg(long, value_name = "DUR", value_parser = duration)]
    duration: Option<Duration>,

    /// How many calls to keep in flight, on all connections together
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

    /// How many clients to be, each with a connection and a thread: requests, concurrency and rate
    /// are spread over them
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroUsize>(1..=CONNECTIONS_MAX)
    )]
    connections: NonZeroUsize,

    /// How many requests to send before, not counted
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        allow_negative_numbers = true,
        value_parser = whole::<u64>(0..=U32_MAX)
    )]
    warmup: u64,

    /// What to ask a Fibonacci server for
    #[arg(short = 'n', long = "argument", value_name = "N", default_value = "1",
          value_parser = clap::value_parser!(u32).range(..=i64::from(fib::FAST_N_MAX)))]
    argument: u32,

    /// What to send instead, to a server of any kind: BODY itself, or the content of FILE. Every
    /// reply that is no error is right
    #[arg(
        long,
        value_name = "BODY|@FILE",
        allow_hyphen_values = true,
        conflicts_with = "argument",
        group = "body"
    )]
    data: Option<String>,

    /// Send so many bytes instead: letters and digits, always the same, in an order that does not
    /// repeat. Every reply that is no error is right
    #[arg(
        long,
        value_name = "BYTES",
        allow_negative_numbers = true,
        value_parser = whole::<usize>(0..=BODY_MAX),
        conflicts_with = "argument",
        group = "body"
    )]
    size: Option<usize>,

    /// A reply is right if it has the same bytes as the request
    #[arg(long, requires = "body")]
    expect_echo: bool,

    /// What the requests are: a media type [default: text/plain]
    #[arg(long, value_name = "TYPE", value_parser = content_type)]
    content_type: Option<String>,

    /// Print a line (or a JSON object) for each such interval while it runs
    #[arg(long, value_name = "DUR", value_parser = interval, conflicts_with = "find_rate")]
    every: Option<Duration>,

    /// End with exit code 9 if this holds in the end, such as p99>20ms, rate<1000 or errors>0.
    /// Metrics: min mean p50 p90 p99 p99.9 max, rate (right answers a second), errors; operators: < > <= >=. Can be repeated
    #[arg(long, value_name = "CHECK", value_parser = Condition::parse)]
    fail_if: Vec<Condition>,

    /// Find the highest rate that keeps this, such as p99<20ms, within 2%. Each rate is tried twice
    /// for --duration [default here: 3s] or four times as long as an answer takes, a third time if the two disagree; usually 5 to 10 rates,
    /// never more than 20. A rate that the server falls behind is not kept, nor is one at which
    /// calls fail. The next trial waits for the answers to the last, at most for --timeout
    #[arg(
        long,
        value_name = "CHECK",
        value_parser = goal,
        conflicts_with = "rate"
    )]
    find_rate: Option<Condition>,

    #[command(flatten)]
    client: ClientArgs,

    /// What to print
    #[arg(long, value_enum, default_value_t = ReportKind::Text)]
    pub output: ReportKind,
}

/// The arguments that a result depends on, for whoever reads it later.
#[derive(Serialize)]
pub struct Arguments<'a> {
    /// Without a password.
    url: String,
    queue: &'a str,
    requests: Option<u64>,
    duration: Option<String>,
    concurrency: Option<usize>,
    rate: Option<u32>,
    connections: usize,
    warmup: u64,
    argument: Option<u32>,
    data_file: Option<&'a str>,
    body_bytes: usize,
    expect_echo: bool,
    content_type: Option<&'a str>,
    timeout: String,
    reply_to: ReplyKind,
    confirm: ConfirmKind,
    spin: String,
    every: Option<String>,
    find_rate: Option<String>,
    fail_if: Vec<String>,
}

impl BenchArgs {
    /// One for each connection.
    pub fn clients(&self, global: &Global) -> anyhow::Result<Vec<Client>> {
        let builder = self.client.builder(global)?;
        (0..self.connections.get())
            .map(|_| Ok(builder.clone().build()?))
            .collect()
    }

    pub fn timeout(&self) -> Duration {
        self.client.timeout
    }

    pub fn plan(&self) -> Result<Plan, clap::Error> {
        let (in_flight, connections) = (self.concurrency.get(), self.connections.get());
        if self.rate.is_none() && in_flight < connections {
            return Err(usage(format!(
                "--connections {connections} is more than --concurrency {in_flight}, the calls in \
                 flight on all of them together; each needs one at least"
            )));
        }
        let task = match &self.find_rate {
            Some(condition) => Task::FindRate(Goal {
                condition: condition.clone(),
                trial: self.trial_time(),
                in_flight,
            }),
            None => Task::Measure {
                length: match self.duration {
                    Some(duration) => Length::Time(duration),
                    None => Length::Requests(self.requests.get()),
                },
                pace: match self.rate {
                    Some(rate) => Pace::Open {
                        per_second: rate.get(),
                    },
                    None => Pace::Closed { in_flight },
                },
                every: self.every,
            },
        };
        Ok(Plan {
            payload: self.payload()?,
            warmup: self.warmup,
            task,
            fail_if: self.fail_if.clone(),
        })
    }

    fn trial_time(&self) -> Duration {
        self.duration.unwrap_or(TRIAL_TIME)
    }

    fn payload(&self) -> Result<Payload, clap::Error> {
        let body = match (&self.data, self.size) {
            (Some(data), _) => Some(data_body(data)?),
            (None, Some(size)) => Some(pattern(size)),
            (None, None) => None,
        };
        let payload = match body {
            None => Payload::fib(self.argument),
            Some(body) => Payload {
                right: match self.expect_echo {
                    true => Right::Exactly(body.clone()),
                    false => Right::Any,
                },
                body,
                content_type: None,
            },
        };
        Ok(Payload {
            content_type: self.content_type.clone(),
            ..payload
        })
    }

    pub fn described<'a>(
        &'a self,
        global: &'a Global,
        body_bytes: usize,
    ) -> Result<Arguments<'a>, clap::Error> {
        let text = |duration| humantime::format_duration(duration).to_string();
        let asks_fib = self.data.is_none() && self.size.is_none();
        let duration = match self.find_rate {
            Some(_) => Some(self.trial_time()),
            None => self.duration,
        };
        Ok(Arguments {
            url: global.endpoints()?.to_string(),
            queue: &global.queue,
            requests: duration.is_none().then_some(self.requests.get()),
            duration: duration.map(text),
            concurrency: self.rate.is_none().then_some(self.concurrency.get()),
            rate: self.rate.map(NonZeroU32::get),
            connections: self.connections.get(),
            warmup: self.warmup,
            argument: asks_fib.then_some(self.argument),
            data_file: self.data.as_deref().and_then(file_of),
            body_bytes,
            expect_echo: self.expect_echo,
            content_type: self.content_type.as_deref(),
            timeout: text(self.client.timeout),
            reply_to: self.client.reply_to,
            confirm: self.client.confirm,
            spin: text(self.client.spin),
            every: self.every.map(text),
            find_rate: self.find_rate.as_ref().map(Condition::to_string),
            fail_if: self.fail_if.iter().map(Condition::to_string).collect(),
        })
    }
}

/// The file that the body is in, if it is.
fn file_of(data: &str) -> Option<&str> {
    data.strip_prefix('@')
}

fn data_body(data: &str) -> Result<Vec<u8>, clap::Error> {
    let Some(file) = file_of(data) else {
        return Ok(data.as_bytes().to_vec());
    };
    read_file(file.as_ref()).map_err(|reason| usage(format!("--data: {reason}")))
}

fn content_type(text: &str) -> Result<String, String> {
    match text.len() {
        1..=255 => Ok(text.to_owned()),
        len => Err(format!("it has {len} bytes; AMQP allows 1 to 255")),
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text)?;
    match interval < EVERY_MIN {
        true => Err(format!("must be at least {EVERY_MIN:?}")),
        false => Ok(interval),
    }
}

/// A condition that a rate can keep, and a higher one cannot.
fn goal(text: &str) -> Result<Condition, String> {
    let condition = Condition::parse(text)?;
    let is_upper = matches!(condition.operator, Operator::Less | Operator::AtMost);
    match is_upper && condition.metric != Metric::Rate {
        true => Ok(condition),
        false => Err(
            "expected what is to be kept, with < or <=, such as p99<20ms; \
                      not a rate, which is what is looked for"
                .to_owned(),
        ),
    }
}
