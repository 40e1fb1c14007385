//! Tests against a real broker: `make test` starts one.

mod bench;
mod breaks; // first of those that take a minute: who begins late ends last
mod chaos;
mod cli;
mod cluster;
mod connecting;
mod examples;
mod failures;
#[allow(dead_code)] // it is the command's
#[path = "../../src/fib.rs"]
mod fib;
mod hostile;
mod interop;
mod limits;
mod pages;
mod reply;
mod request;
mod rpc;
mod slow;
mod support;
#[cfg(feature = "tls")]
mod tls;
mod tutorial;
mod watch;
