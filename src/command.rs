//! The command line: what may be typed, and a file for each subcommand with much to say. It uses the
//! library as any other program would, by its public API alone.

pub mod cli; // what may be typed

pub mod bench;
pub mod call;
pub mod reply;
pub mod request;
pub mod server;
pub mod status;

mod bodies; // what `request` sends
mod child; // a command that is run for each request
pub mod exit; // exit codes, and how a failure is told
mod json; // what the JSON of several commands has in common
pub mod lines; // lines on stdout and stderr
pub mod log; // what goes to stderr, as text or JSON
mod metrics; // what a server counts, for Prometheus
mod numbers; // what `call` asks for
mod pipeline; // many calls in flight, answers in order
mod questions; // where questions come from
mod serving; // what the servers have in common
mod signals;
