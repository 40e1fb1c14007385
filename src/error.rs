//! The one error type of the library. Each variant says when it happens.

use crate::amqp;
use crate::amqp::endpoint::InvalidUrl;
use crate::amqp::queue::QueueStatus;
use crate::message::RemoteError;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Why a call was not answered, or a server could not run.
///
/// Each variant says when it happens; [`Client::call`](crate::Client::call),
/// [`Server::start`](crate::Server::start) and [`Serving::stop`](crate::Serving::stop) say which of
/// them they return. Printed, an error is one sentence that names what it is about.
///
/// No message contains a password: URLs are printed without it.
///
/// ```no_run
/// use fibrpc::{Client, Error};
///
/// let client = Client::new("amqp://localhost")?;
/// match client.call("users", "42") {
///     Ok(reply) => println!("{} bytes", reply.body.len()),
///     Err(Error::Remote(error)) if error.kind() == "no-such-user" => println!("nobody"),
///     Err(Error::Timeout { waiting_for, .. }) => println!("too late: {waiting_for}"),
///     Err(other) => return Err(other),
/// }
/// # Ok(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Error {
    /// A broker's URL cannot be used. Told when a client or a server is made.
    InvalidUrl(InvalidUrl),
    /// A value that could never work, found before anything was sent: a queue name over 255 bytes,
    /// a reserved header, a request over 128 MiB, a timeout of 0, no workers, a value that cannot
    /// be written as JSON. The text says which. Also if the operating system has no thread to
    /// spare.
    InvalidArgument(String),
    /// No broker could be reached, or it refused us: nothing listens there, the name does not
    /// resolve, wrong credentials or virtual host, TLS failed, no callback queue to be had. A
    /// client that has been connected once does not end with it, but tries again until the
    /// deadline.
    Unreachable {
        /// What was tried, without passwords.
        endpoint: String,
        /// What happened there; with several brokers, at each of them.
        reason: String,
        /// The operating system's error, where there was one; with several brokers, at the first.
        source: Option<Arc<dyn StdError + Send + Sync>>,
    },
    /// The request queue does not exist: no server has been there since the broker started, or the
    /// queue was deleted. The broker returned the request (`basic.return`, 312 NO_ROUTE), so this
    /// is known after one round trip.
    /// Source: <https://www.rabbitmq.com/docs/publishers#unroutable>.
    NoServer {
        /// The request queue.
        queue: String,
    },
    /// The broker did not take the request, which was not executed: its body is over the broker's
    /// limit (`max_message_size`; RabbitMQ 4: 16 MiB unless configured otherwise), or its queue is
    /// full and refuses more, which is known where the broker
    /// [confirms](crate::ClientBuilder::confirms).
    /// Source: <https://www.rabbitmq.com/docs/maxlength#overflow-behaviour>.
    Rejected {
        /// The request queue.
        queue: String,
        /// Why, and what may help.
        reason: String,
    },
    /// The deadline passed. The request may or may not have been executed.
    Timeout {
        /// The call's timeout.
        after: Duration,
        /// What was being waited for when the deadline passed.
        waiting_for: WaitingFor,
    },
    /// The server answered, and the answer is an error.
    Remote(RemoteError),
    /// The connection was lost after the request was sent, and sending it again was not allowed
    /// ([`Retry::Never`](crate::Retry::Never)). The server may or may not have executed it.
    ///
    /// [`Status::of`](crate::Status::of) uses it, too, for a connection that was lost while it
    /// asked, and [`Serving::stop`](crate::Serving::stop) for a panic of ours. The printed
    /// sentence, which speaks of a request that was sent, does not fit then.
    ConnectionLost {
        /// What happened to the connection.
        reason: String,
    },
    /// The broker refuses the request queue to a server: another one declares it otherwise at that
    /// moment (406), it is another connection's own (405), or we lack the permission (403); 541 is
    /// what a broker says that refuses transient queues.
    ///
    /// To a client: we may not publish or consume (403).
    /// Source: <https://www.rabbitmq.com/docs/access-control>.
    QueueRefused {
        /// The request queue.
        queue: String,
        /// The broker's words, and what may help.
        reason: String,
    },
    /// A server was told to stop, and some requests were still being executed when the drain
    /// timeout passed. The broker gives them to another server.
    DrainTimeout {
        /// The drain timeout, as set.
        after: Duration,
        /// Workers whose handler had not returned; 0 if it was a reply that had not left.
        workers: usize,
    },
    /// The server has answered, and its answer cannot be read as what was asked for, such as JSON
    /// of a certain shape. The request was executed.
    UnreadableReply {
        /// What is wrong with it, and where.
        reason: String,
    },
    /// The client was closed ([`Client::close`](crate::Client::close)) while the call was waiting,
    /// or before. A request that had been sent may be executed.
    Closed,
    /// The server was told to stop by a [`Stopper`](crate::Stopper) before it had started.
    Stopped,
}

/// What a call was waiting for when its deadline passed: a part of [`Error::Timeout`].
///
/// ```
/// use fibrpc::{Error, WaitingFor};
///
/// fn advice(error: &Error) -> &'static str {
///     match error {
///         Error::Timeout { waiting_for: WaitingFor::Answer { status: Some(status), .. }, .. } => {
///             match status.consumers {
///                 0 => "start a server",
///                 _ => "start more servers, or wait for longer",
///             }
///         }
///         Error::Timeout { waiting_for: WaitingFor::BlockedBroker { .. }, .. } => "free memory",
///         _ => "read the message",
///     }
/// }
/// # assert_eq!(advice(&Error::Closed), "read the message");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WaitingFor {
    /// A connection: name resolution, TCP, TLS, AMQP's handshake, or the callback queue. A request
    /// that was sent before the connection was lost may have been executed.
    Connection {
        /// The brokers being tried, without passwords.
        endpoint: String,
        /// Why the latest attempt failed, or the connection was lost, if that has happened yet.
        last_error: Option<String>,
    },
    /// Room in the socket: the broker does not read, and the request is still here.
    Room,
    /// A broker that has blocked publishers (`connection.blocked`), low on memory or disk. Requests
    /// are held back meanwhile. Source: <https://www.rabbitmq.com/docs/connection-blocked>.
    BlockedBroker {
        /// The broker's reason, such as `low on memory`.
        reason: String,
    },
    /// A broker that has fallen silent: the request was sent, and nothing has come from it since
    /// shortly before the deadline, when it was asked after the queue.
    SilentBroker {
        /// The request queue.
        queue: String,
        /// For how long nothing had come in.
        silence: Duration,
    },
    /// A request queue that does not exist: the call was told to
    /// [wait](crate::ClientBuilder::wait_for_server) for it, or the client had connected again less
    /// than 10 s before, or the queue was deleted with the request in it.
    Queue {
        /// The request queue.
        queue: String,
    },
    /// An answer: the request was sent.
    Answer {
        /// The request queue.
        queue: String,
        /// What the broker said of the queue shortly before the deadline (0.2 s, or a fifth of the
        /// timeout if that is less): its consumers, and its requests not yet given to one. `None`
        /// if it did not say in time, as of a queue that has lost most of its nodes, or if we may
        /// not know.
        status: Option<QueueStatus>,
        /// How many replies came during the call that belong to no call: if there are any, a
        /// server may not send the correlation id back.
        strangers: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InvalidUrl(error) => error.fmt(f),
            Error::InvalidArgument(reason) => f.write_str(reason),
            Error::Unreachable {
                endpoint, reason, ..
            } => {
                write!(f, "cannot reach the broker at {endpoint}: {reason}")
            }
            Error::NoServer { queue } => write!(
                f,
                "no server: the queue '{queue}' does not exist (a running server declares it)"
            ),
            Error::Rejected { queue, reason } => write!(
                f,
                "the broker did not take the request for the queue '{queue}': {reason}"
            ),
            Error::Timeout { after, waiting_for } => {
                write!(f, "no answer within {after:?}: {waiting_for}")
            }
            Error::Remote(error) => error.fmt(f),
            Error::ConnectionLost { reason } => write!(
                f,
                "connection lost after sending ({reason}): the request may or may not have been executed"
            ),
            Error::QueueRefused { queue, reason } => {
                write!(f, "the broker refuses the queue '{queue}': {reason}")
            }
            Error::DrainTimeout { after, workers: 0 } => write!(
                f,
                "a reply had not left within the drain timeout of {after:?}; the broker gives its \
                 request to another server"
            ),
            Error::DrainTimeout { after, workers } => write!(
                f,
                "{workers} of the workers had not finished within the drain timeout of {after:?}; \
                 the broker gives their requests to another server"
            ),
            Error::UnreadableReply { reason } => write!(f, "the reply cannot be read: {reason}"),
            Error::Stopped => f.write_str("the server was told to stop before it had started"),
            Error::Closed => {
                f.write_str("interrupted: the client was closed before the answer came")
            }
        }
    }
}

impl fmt::Display for WaitingFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WaitingFor::Connection {
                endpoint,
                last_error,
            } => {
                write!(f, "still connecting to {endpoint}")?;
                match last_error {
                    Some(error) => write!(f, " (last attempt: {error})"),
                    None => Ok(()),
                }
            }
            WaitingFor::Room => {
                f.write_str("the request could not be sent, the broker does not read")
            }
            WaitingFor::BlockedBroker { reason } => {
                write!(f, "the broker has blocked publishers ({reason})")
            }
            WaitingFor::Queue { queue } => write!(f, "the queue '{queue}' does not exist yet"),
            WaitingFor::SilentBroker { queue, silence } => write!(
                f,
                "the request was sent to '{queue}', and the broker has been silent for {silence:.1?}"
            ),
            WaitingFor::Answer {
                queue,
                status,
                strangers,
            } => {
                match status {
                    None => write!(
                        f,
                        "the request was sent to '{queue}', and the broker does not say what state \
                         that is in"
                    )?,
                    Some(QueueStatus {
                        consumers: 0,
                        ready,
                    }) => write!(
                        f,
                        "nobody consumes the queue '{queue}' ({ready} waiting); is a server running?"
                    )?,
                    Some(QueueStatus { consumers, ready }) => write!(
                        f,
                        "the queue '{queue}' has {consumers} consumer{} and {ready} request{} waiting",
                        plural(*consumers),
                        plural(*ready),
                    )?,
                }
                match strangers {
                    0 => Ok(()),
                    1 => f.write_str("; a reply came that belongs to no call"),
                    many => write!(f, "; {many} replies came that belong to no call"),
                }
            }
        }
    }
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Error::Unreachable {
                source: Some(source),
                ..
            } => Some(source.as_ref()),
            Error::Remote(error) => Some(error),
            Error::InvalidUrl(error) => Some(error),
            _ => None,
        }
    }
}

impl Error {
    /// A request is longer than the broker takes.
    pub(crate) fn too_long(queue: &str, max: usize) -> Error {
        Error::Rejected {
            queue: queue.to_owned(),
            reason: format!(
                "it takes {max} bytes; send less, or set max_message_size in its rabbitmq.conf"
            ),
        }
    }

    /// The broker says that it has not taken a request.
    pub(crate) fn refused(queue: &str) -> Error {
        Error::Rejected {
            queue: queue.to_owned(),
            reason: "the queue is full (x-max-length), or has lost its node; start more servers, \
                     or try again"
                .to_owned(),
        }
    }

    /// What happened, without what it happened to: for a log line that has said that already.
    pub(crate) fn reason(&self) -> String {
        match self {
            Error::Unreachable { reason, .. }
            | Error::ConnectionLost { reason }
            | Error::QueueRefused { reason, .. } => reason.clone(),
            other => other.to_string(),
        }
    }
}

impl From<InvalidUrl> for Error {
    fn from(error: InvalidUrl) -> Error {
        Error::InvalidUrl(error)
    }
}

impl From<amqp::error::Error> for Error {
    fn from(error: amqp::error::Error) -> Error {
        match error {
            amqp::error::Error::Unreachable {
                endpoint,
                reason,
                source,
            } => Error::Unreachable {
                endpoint,
                reason,
                source,
            },
            amqp::error::Error::Lost { reason } => Error::ConnectionLost { reason },
            amqp::error::Error::QueueRefused { queue, reason } => {
                Error::QueueRefused { queue, reason }
            }
        }
    }
}
