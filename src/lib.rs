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
//! 4. `frame`: the AMQP frames that we write ourselves, and why. Pure.
//! 5. `arrival`: what comes back: deliveries, returned messages, news of a consumer. Pure.
//! 6. `socket`: the socket that amiquip and we share; how a thread sends without a hop.
//! 7. `inbox`: who reads it; how a thread receives without a hop.
//! 8. `tls`: the same over TLS.
//! 9. `broker`: URLs, opening and closing connections, the request queue.
//! 10. `client`: calls with deadlines; the keeper that reconnects.
//! 11. `server`: the supervisor, its workers, and the floor where they meet; how it drains.
//!
//! The binary is `main.rs` (dispatch, logs, exit codes), `cli.rs` (arguments), `numbers.rs` (lines
//! from stdin), `output.rs` (lines on stdout), and a file for each command with much to say:
//! `call.rs`, `bench.rs`, `status.rs`.
//!
//! # Features
//!
//! - `tls` (default): `amqps://`, with rustls.
//! - `cli` (default): what only the binary needs. A library does without:
//!   `default-features = false, features = ["tls"]`.
//!
//! # What holds everywhere
//!
//! - `client` and `server` do not know each other; the server knows a handler, not Fibonacci.
//! - `fib`, `wire`, `frame` and `arrival` do no I/O. Nothing in the library prints; it reports
//!   through `log`.
//! - The AMQP class `basic` (publish, deliver, ack, ...) is ours, in both directions; connections,
//!   channels, queues and heartbeats are amiquip's. It is touched in `broker`, `client` and
//!   `server`, and its stream in `socket` and `inbox`.
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
