//! What may be typed to call.

use crate::command::cli::{Global, U32_MAX, duration, duration_or_zero, usage, whole};
use crate::command::numbers;
use clap::{Args, ValueEnum};
use fibrpc::{Client, ClientBuilder, Confirms, ReplyTo, Retry};
use serde::Serialize;
use std::num::NonZeroUsize;
use std::time::Duration;

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
pub struct ClientArgs {
    /// How long each call may take, everything included: connect, send, wait, reconnect
    #[arg(long, value_name = "DUR", default_value = "30s", value_parser = duration)]
    pub timeout: Duration,

    /// Where replies are sent: a callback queue, or RabbitMQ's direct reply-to
    #[arg(long, value_enum, default_value_t = ReplyKind::Queue)]
    pub reply_to: ReplyKind,

    /// Have the broker confirm each request, and send again what it has not confirmed within 1 s:
    /// auto does so with several brokers. It costs about a tenth of the rate
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = ConfirmKind::Auto)]
    pub confirm: ConfirmKind,

    /// How long to ask for a reply again and again before sleeping until it comes: halves the
    /// latency of short calls, for CPU time. Stops by itself where it does not pay; 0s: never
    #[arg(long, value_name = "DUR", default_value = "500us", value_parser = duration_or_zero)]
    pub spin: Duration,
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

#[derive(Debug, Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplyKind {
    /// One exclusive queue for all calls
    Queue,
    /// No queue (amq.rabbitmq.reply-to)
    Direct,
}

#[derive(Debug, Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ConfirmKind {
    Auto,
    Always,
    Never,
}

impl ClientArgs {
    pub fn builder(&self, global: &Global) -> anyhow::Result<ClientBuilder> {
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

/// A number, or `None` for `-`.
fn number(text: &str) -> Result<Option<i128>, String> {
    match text {
        "-" => Ok(None),
        text => numbers::parse(text).map(Some),
    }
}
