//! What a broker says of itself and of a request queue: a health check.

use crate::amqp::connection::Connection;
use crate::amqp::endpoint::{Endpoints, InvalidUrl};
use crate::amqp::inbox::Discard;
use crate::amqp::queue::{self, QueueStatus};
use crate::amqp::time::{after, time_left};
use crate::error::Error;
use crate::message;
use std::time::{Duration, Instant};

/// What a broker says of itself and of a request queue: for a health check. It says whether
/// somebody consumes the queue, not whether requests are answered.
///
/// ```no_run
/// use fibrpc::Status;
/// use std::time::Duration;
///
/// let status = Status::of("amqp://localhost", "shout", Duration::from_secs(5))?;
/// println!("{}, answers in {:?}", status.broker, status.round_trip);
/// match status.queue {
///     Some(queue) => println!("{} workers, {} requests wait", queue.consumers, queue.ready),
///     None => println!("no server has declared the queue"),
/// }
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Status {
    /// The product and its version, such as `RabbitMQ 3.10.8`; `unknown` for what it does not say.
    pub broker: String,
    /// The name of the cluster, which unless configured is that of its first node; `unknown` if it
    /// does not say.
    pub node: String,
    /// The connection's name in the broker's own list: our address, and its. The connection is
    /// closed by now.
    pub connection: String,
    /// The request queue; `None` if it does not exist.
    pub queue: Option<QueueStatus>,
    /// How long the broker took to answer one question on the open connection.
    pub round_trip: Duration,
}

impl Status {
    /// Asks the first of the brokers that answers, on a connection of its own, which it closes
    /// again. Blocks for at most `timeout`, and 0.2 s to close. [`Status`] has an example.
    ///
    /// # Errors
    ///
    /// - [`Error::Unreachable`]: no broker could be reached within `timeout`.
    /// - [`Error::QueueRefused`]: we may not know of the queue (403), or it is another connection's
    ///   own (405).
    /// - [`Error::ConnectionLost`]: the connection was lost, or `timeout` passed while it was
    ///   asked.
    /// - [`Error::InvalidArgument`]: the queue's name is empty or longer than 255 bytes.
    /// - [`Error::InvalidUrl`]: a URL cannot be used.
    pub fn of<B>(brokers: B, queue: &str, timeout: Duration) -> Result<Status, Error>
    where
        B: TryInto<Endpoints>,
        InvalidUrl: From<B::Error>,
    {
        let endpoints = brokers.try_into().map_err(InvalidUrl::from)?;
        message::check_queue_name(queue).map_err(Error::InvalidArgument)?;
        let deadline = after(Instant::now(), timeout);
        let mut connection =
            Connection::open(&endpoints, "status", deadline, &|| Box::new(Discard))?;
        let _watchdog = connection.outbox.abort_after(time_left(deadline));
        let began = Instant::now();
        let channel = connection.open_channel()?;
        let round_trip = began.elapsed();
        let status = queue::status(&mut connection, queue)?;
        drop(channel);
        let property = |name| {
            connection
                .server_property(name)
                .unwrap_or_else(|| "unknown".to_owned())
        };
        Ok(Status {
            broker: format!("{} {}", property("product"), property("version")),
            node: property("cluster_name"),
            connection: connection.name.clone(),
            queue: status,
            round_trip,
        })
    }
}
