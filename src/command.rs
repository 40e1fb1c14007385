//! The command line: what may be typed, and a file for each subcommand with much to say. It uses the
//! library as any other program would, by its public API alone.

pub mod cli; // what may be typed

pub mod bench;
pub mod call;
pub mod request;
pub mod server;
pub mod status;

mod bodies; // what `request` sends
pub mod exit; // exit codes, and how a failure is told
pub mod lines; // lines on stdout and stderr
mod numbers; // what `call` asks for
mod pipeline; // many calls in flight, answers in order
mod questions; // where questions come from
mod signals;
