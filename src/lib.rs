//! Synchronous RPC over RabbitMQ, without an async runtime.
//!
//! This is the remote procedure call of RabbitMQ's sixth tutorial, done as a library that
//! programs can rely on. A [`Client`] publishes a request with a `reply_to` and a
//! `correlation_id`; a [`Server`] in any process, on any machine, takes it from the shared queue,
//! runs its handler, publishes the reply to the caller's callback queue and acknowledges.
//!
//! ```no_run
//! use fibrpc::{Client, Request, Server};
//!
//! let serving = Server::new("amqp://localhost")?
//!     .queue("shout")
//!     .start(|request: &Request| Ok(request.body().to_ascii_uppercase()))?;
//!
//! let client = Client::new("amqp://localhost")?;
//! assert_eq!(client.call("shout", "hello")?.body, b"HELLO");
//!
//! serving.stop()?;
//! # Ok::<(), fibrpc::Error>(())
//! ```
//!
//! # What is guaranteed
//!
//! - **At least once.** A server acknowledges a request after it has published the reply. If it
//!   dies in between, or the client loses its connection and sends again ([`Retry`]), the request
//!   is executed twice. Handlers must be idempotent. The client drops the second answer.
//! - **A call ends by its deadline**, whatever the broker does. [`Error::Timeout`] says what was
//!   waited for; it does not say whether the request was executed.
//! - **A request whose caller has given up is not begun**: neither one that the broker still has,
//!   nor one that a server has prefetched, nor one that a client has held back because the broker
//!   was blocking publishers.
//!
//! # The tour
//!
//! In reading order. Each storey knows only those below it; `docs/design.md` says why.
//!
//! 1. `client`: what a user of the library reads first: [`Client`]. Below it, in `client/`:
//!    `calls` (what a caller's thread does), `pending` (what all threads share), `manager` (the
//!    client's own thread), `link`, `correlation`, `options`.
//! 2. `server`: [`Server`], [`Serving`]. Below it, in `server/`: `worker`, `work_queue` (where
//!    requests meet workers), `supervisor`, `request`, `options`.
//! 3. `message`: what a request, a reply and an error look like as messages. `error`: everything
//!    that can go wrong, and when. `json`, `status`.
//! 4. `amqp`: AMQP over a socket that amiquip and we share. It does not know what a request is.
//!
//! The command is a program like any other that uses this library: `main.rs`, `command/`, and
//! `fib.rs`, the tutorial's function.
//!
//! # Features
//!
//! - `tls` (default): `amqps://`, with rustls.
//! - `json`: requests and replies that serde reads and writes (the module `json`).
//! - `cli` (default): what only the binary needs. A library does without:
//!   `default-features = false, features = ["tls"]`.
//!
//! # What holds everywhere
//!
//! - `client` and `server` do not know each other; neither knows Fibonacci.
//! - amiquip is named in `amqp` alone. `amqp::frame`, `amqp::incoming` and `message` do no I/O.
//! - Nothing prints; the library reports through `log`, and never a password. Nor does amiquip, which
//!   does not get to know it.
//! - Every wait has a deadline, or is woken by a stop, or by the end of the connection.

mod client;
mod server;

mod error;
#[cfg(feature = "json")]
pub mod json;
mod message;
mod status;

mod amqp;

#[cfg(any(all(test, not(shuttle)), fuzzing))]
pub mod bytes;

#[cfg(all(test, shuttle))]
mod schedules; // of calls

pub use amqp::endpoint::{Endpoints, InvalidUrl};
pub use amqp::queue::{QueueStatus, QueueType};
#[cfg(feature = "tls")]
pub use amqp::tls::TlsOptions;
pub use client::calls::{Answer, CallMany, Calls, RequestBuilder};
pub use client::options::{Confirms, ReplyTo, Retry};
pub use client::{Client, ClientBuilder, ClientStats};
pub use error::{Error, WaitingFor};
pub use message::headers::Headers;
pub use message::{HandlerError, RemoteError, Reply, Response};
pub use server::request::Request;
pub use server::{Server, ServerStats, Serving, Stopper};
pub use status::Status;

/// The README's example, so that it compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
