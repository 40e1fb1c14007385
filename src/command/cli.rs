//! The command line: what may be typed, and the plain values that come of it.

pub mod bench; // to measure
pub mod calling; // to call
pub mod listen; // where to listen
pub mod manual; // completions and the manual
pub mod serving; // to serve

use bench::BenchArgs;
use calling::{CallArgs, RequestArgs};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use fibrpc::Endpoints;
use serving::{ReplyArgs, ServerArgs};
use std::env;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Synchronous RPC over RabbitMQ: any function, any payload, and the tutorial's Fibonacci server
#[derive(Debug, Parser)]
#[command(version = VERSION, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,

    #[command(subcommand)]
    pub command: Command,
}

/// With the commit, if it was built in the repository.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("FIBRPC_COMMIT"));

/// More than anybody can want where there is no other limit.
const U32_MAX: u64 = u32::MAX as u64;

const EXAMPLES: &str = "\
Examples:
  fibrpc server --workers 4          answer requests, four at a time
  fibrpc call 30                     ask for one number
  fibrpc call --output raw 1 2 3     ask for several, print the numbers alone
  seq 1000 | fibrpc call -           ask for as many as there are lines
  fibrpc call --timeout 2s 40        give up after two seconds
  fibrpc request --queue up hello    send any body to any queue, print the reply
  fibrpc reply -- tr a-z A-Z         answer with a command's output
  fibrpc status                      is there a broker, and a server?
  fibrpc bench --duration 10s        how fast is it?

Exit codes (of `call` and `request`, the first failure's):
  0 answered   2 usage   3 the server answered with an error   4 timeout   5 no request queue
  6 no broker, or refused   7 connection lost (with --no-retry)   8 not taken by the broker
  9 a check of `bench` failed   130 interrupted";

const STATUS_EXAMPLES: &str = "\
Examples:
  fibrpc status                           is there a broker, and a server?
  fibrpc status --output json             the same for a program
  fibrpc status --call 10 --timeout 2s    does it answer? a health check from end to end
  fibrpc status --wait 60s --queue up     wait until somebody serves `up`

Exit codes:
  0 served, and with --call answered   5 nobody serves the queue   6 no broker, or refused
  with --call, what the call failed with:   3 answered with an error   4 no answer in time
  130 interrupted";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  fibrpc completions bash >~/.local/share/bash-completion/completions/fibrpc
  fibrpc completions zsh >\"${fpath[1]}/_fibrpc\"
  fibrpc completions fish >~/.config/fish/completions/fibrpc.fish";

#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
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

    /// How to log: text for people, or JSON, an object a line with time, level, target and message
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text, global = true)]
    pub log: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer requests for Fibonacci numbers until interrupted
    Server(ServerArgs),
    /// Answer requests with a command of yours, or with themselves, until interrupted
    Reply(ReplyArgs),
    /// Ask for Fibonacci numbers
    Call(CallArgs),
    /// Send any request to any queue, and print the reply
    Request(RequestArgs),
    /// Measure: many calls, every answer checked
    Bench(BenchArgs),
    /// Tell about the broker, the queue and its servers; exit code 0 if there is a server
    #[command(after_help = STATUS_EXAMPLES)]
    Status(StatusArgs),
    /// Print a script that completes command lines, for a shell to read
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// Whose
        shell: Shell,
    },
    /// Write the manual pages, one for each command
    #[command(hide = true)]
    Man {
        /// Into this folder
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// How long it may take, with the call
    #[arg(long, value_name = "DUR", default_value = "10s", value_parser = duration)]
    pub timeout: Duration,

    /// Make one call with this body, too: exit code 0 if it is answered, and not with an error
    #[arg(long, value_name = "BODY", allow_hyphen_values = true)]
    pub call: Option<String>,

    /// Wait for so long until somebody serves the queue, if need be for a broker, too
    #[arg(long, value_name = "DUR", value_parser = duration)]
    pub wait: Option<Duration>,

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

/// An error about the arguments, said and exited with as clap does.
pub fn usage(message: impl Display) -> clap::Error {
    Cli::command().error(ErrorKind::ValueValidation, message)
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
