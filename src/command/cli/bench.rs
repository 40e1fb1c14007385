//! What may be typed to measure.

use crate::command::bench::{Length, Pace, Plan};
use crate::command::cli::calling::ClientArgs;
use crate::command::cli::{Global, ReportKind, U32_MAX, duration, whole};
use crate::fib;
use clap::Args;
use fibrpc::Client;
use std::num::{NonZeroU32, NonZeroU64, NonZeroUsize};
use std::time::Duration;

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
