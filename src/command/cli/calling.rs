//! What may be typed to call.

use crate::command::bodies::BodyArg;
use crate::command::cli::{Global, U32_MAX, duration, duration_or_zero, usage, whole};
use crate::command::numbers;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use fibrpc::{Client, ClientBuilder, Confirms, ReplyTo, RequestBuilder, Retry};
use serde::Serialize;
use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Duration;

const CALL_EXAMPLES: &str = "\
Examples:
  fibrpc call 30                          one number
  fibrpc call --output raw 1 2 3          several, in flight together; the results alone
  seq 1000 | fibrpc call -                as many as there are lines
  fibrpc call --timeout 2s 40             give up after two seconds
  fibrpc call --wait-for-server 30        the server may come later
  fibrpc call --url amqp://app:secret@a.example,amqp://app:secret@b.example 30

Results come in the order of the arguments. A call that fails is told on stderr, the others still
run, and the exit code is that of the first failure.";

#[derive(Debug, Args)]
#[command(after_help = CALL_EXAMPLES)]
pub struct CallArgs {
    /// The numbers to ask for; or `-` to read them from stdin, one a line
    #[arg(value_name = "N", required = true, allow_negative_numbers = true, value_parser = number)]
    numbers: Vec<Option<i128>>,

    /// What to print
    #[arg(long, value_enum, default_value_t = CallOutput::Text)]
    pub output: CallOutput,

    #[command(flatten)]
    pub calling: CallingArgs,
}

#[derive(Debug, Args)]
#[command(after_help = REQUEST_EXAMPLES)]
pub struct RequestArgs {
    /// The request's body; @FILE: what a file holds; @-: all of stdin; -: each line of stdin is a
    /// request of its own [default: one request with an empty body]
    #[arg(
        value_name = "BODY",
        allow_negative_numbers = true,
        value_parser = OsStringValueParser::new().try_map(body)
    )]
    bodies: Vec<BodyArg>,

    /// A header of each request; may be given several times
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE", value_parser = header)]
    headers: Vec<(String, String)>,

    /// What the bodies are, for the server to read [default: text/plain]
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,

    /// What to print
    #[arg(long, value_enum, default_value_t = RequestOutput::Body)]
    pub output: RequestOutput,

    #[command(flatten)]
    pub calling: CallingArgs,
}

const REQUEST_EXAMPLES: &str = "\
Examples:
  fibrpc request --queue up hello                  print the reply to one request
  fibrpc request --queue up a b c                  several, in flight together
  fibrpc request --queue users -H 'tenant: 7' --content-type application/json '{\"id\":1}'
  fibrpc request --queue resize --output raw @in.png >out.png
  jq -c '.[]' orders.json | fibrpc request --queue orders --output json -
  printf %s '@home' | fibrpc request --queue up @-     a body that begins with '@'

Replies come in the order of the requests. A request that fails is told on stderr, the others still
run, and the exit code is that of the first failure. With `-`, a line is sent as it is, without its
line end: an empty line is an empty request, and a carriage return belongs to the body. `-` and `@-`
are stdin behind `--`, too.";

/// What `call` and `request` have in common.
#[derive(Debug, Args)]
pub struct CallingArgs {
    /// How many calls may be in flight at the same time; fewer, while their bodies are large and
    /// have 64 MiB together
    #[arg(
        long,
        value_name = "N",
        default_value = "64",
        allow_negative_numbers = true,
        value_parser = whole::<NonZeroUsize>(1..=U32_MAX)
    )]
    pub concurrency: NonZeroUsize,

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

/// What they have in common with `bench`.
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
pub enum CallOutput {
    /// The tutorial's two lines for each call
    Text,
    /// The number alone
    Raw,
    /// A JSON object for each call
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RequestOutput {
    /// The reply's body, and a line end if it has none
    Body,
    /// The reply's bytes, and nothing else
    Raw,
    /// A JSON object for each request, on a line: body, content type, headers, latency; or the error
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
}

impl RequestArgs {
    /// The bodies to send, of which at least one.
    pub fn bodies(&self) -> Result<Vec<BodyArg>, clap::Error> {
        let reads_stdin = |arg: &&BodyArg| matches!(arg, BodyArg::Stdin | BodyArg::Lines);
        if self.bodies.iter().filter(reads_stdin).count() > 1 {
            return Err(usage("stdin can be read once; give '-' or '@-' one time"));
        }
        if self.bodies.is_empty() {
            return Ok(vec![BodyArg::Literal(Vec::new())]);
        }
        Ok(self.bodies.clone())
    }

    /// Puts to a request what goes along with its body.
    pub fn describe<'c>(&self, mut request: RequestBuilder<'c>) -> RequestBuilder<'c> {
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        match &self.content_type {
            Some(content_type) => request.content_type(content_type),
            None => request,
        }
    }
}

impl CallingArgs {
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

fn body(arg: OsString) -> Result<BodyArg, String> {
    Ok(match arg.as_bytes() {
        b"-" => BodyArg::Lines,
        b"@-" => BodyArg::Stdin,
        b"@" => {
            return Err(
                "a file's name must follow '@'; a body that begins with '@' comes from stdin (@-)"
                    .to_owned(),
            );
        }
        [b'@', path @ ..] => BodyArg::File(OsString::from_vec(path.to_owned()).into()),
        _ => BodyArg::Literal(arg.into_vec()),
    })
}

/// A header; what a name may be, the library knows.
fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once(':')
        .ok_or("expected a name, a colon and a value, as in 'tenant: 7'")?;
    match name.trim() {
        "" => Err("the name before the colon is empty".to_owned()),
        name => Ok((name.to_owned(), value.trim().to_owned())),
    }
}
