//! Synchronous RPC over RabbitMQ, without an async runtime.
//!
//! This is the remote procedure call of RabbitMQ's sixth tutorial, done as a library that
//! programs can rely on. A [`Client`] publishes a request with a `reply_to` and a
//! `correlation_id`; a [`Server`] in any process, on any machine, takes it from the shared queue,
//! runs its handler, publishes the reply to the caller's callback queue and acknowledges.
//!
//! ```no_run
//! use fibrpc::{Client, ClientConfig};
//!
//! let client = Client::new(ClientConfig::default())?;
//! let answer = client.call(b"30")?; // blocks, at most for the configured timeout
//! assert_eq!(answer, b"832040");
//! # Ok::<(), fibrpc::Error>(())
//! ```
//!
//! # The tour
//!
//! In reading order:
//!
//! 1. [`fib`]: what the tutorial computes. Pure.
//! 2. `wire`: what a request, a reply and an error look like as messages. Pure.
//! 3. `error`: everything that can go wrong, and when.
//! 4. `frame`: the five AMQP frames that we write ourselves, and why. Pure.
//! 5. `socket`: the socket that amiquip and we share; how a thread sends without a hop.
//! 6. `broker`: URLs, opening and closing connections, queues, consumers.
//! 7. `client`: calls with deadlines; the keeper that reconnects.
//! 8. `server`: the supervisor and its workers; how it drains.
//!
//! The binary is `main.rs` (dispatch, logs, exit codes), `cli.rs` (arguments), `output.rs` (lines on
//! stdout), and a file for each command with much to say: `call.rs`,
//! `bench.rs`.
//!
//! # What holds everywhere
//!
//! - `client` and `server` do not know each other; the server knows a handler, not Fibonacci.
//! - `fib`, `wire` and `frame` do no I/O. Nothing in the library prints; it reports through
//!   `log`.
//! - amiquip's connection is touched in `broker`, `client` and `server`; its property types in
//!   `wire`; its stream in `socket`. Nothing else knows it.
//! - Every wait has a deadline, or is woken by a stop channel, or by the end of the connection.

pub mod fib;

mod arrival;
mod broker;
mod client;
mod error;
mod frame;
mod inbox;
mod server;
mod socket;
#[cfg(feature = "tls")]
mod tls;
mod wire;

pub use broker::{Endpoints, QueueType, Status};
pub use client::{Answer, CallMany, Calls, Client, ClientConfig, ClientStats, ReplyTo};
pub use error::{Error, QueueStatus, WaitingFor};
pub use server::{Request, Server, ServerConfig, ServerStats};
#[cfg(feature = "tls")]
pub use tls::TlsOptions;
pub use wire::{RemoteError, RemoteErrorKind, parse_n};

/// The README's example, so that it compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
