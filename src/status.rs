//! What a broker says of itself and of a request queue: a health check.

use crate::amqp::brokers::Brokers;
use crate::amqp::connection::Connection;
use crate::amqp::endpoint::{Endpoints, InvalidUrl};
use crate::amqp::error::{Error as AmqpError, GONE};
use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{ChannelEvent, Incoming};
use crate::amqp::queue::{self, Events, QueueStatus};
use crate::amqp::sync::Instant;
use crate::amqp::sync::channel::{Receiver, select, unbounded};
use crate::amqp::time::after;
use crate::error::Error;
use crate::message;
use std::time::Duration;

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
        let (events, told) = unbounded();
        let sink = || -> Box<dyn Sink> { Box::new(events.clone()) };
        let mut connection =
            Brokers::new(endpoints).connect("status", deadline, deadline, &sink)?;
        let began = Instant::now();
        let status = queue::status(&mut connection, &mut Told { told, deadline }, queue)?;
        let round_trip = began.elapsed();
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

/// What comes in on the connection until the deadline.
struct Told {
    told: Receiver<Incoming>,
    deadline: Instant,
}

impl Events for Told {
    fn next_of(
        &mut self,
        connection: &mut Connection,
        channel: u16,
    ) -> Result<ChannelEvent, AmqpError> {
        let lost = |reason: &str| AmqpError::Lost {
            reason: reason.to_owned(),
        };
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let incoming = select! {
                recv(self.told) -> incoming => incoming.map_err(|_| lost(GONE))?,
                recv(connection.down) -> _ => return Err(lost(GONE)),
                default(left) => return Err(lost("no answer in time")),
            };
            connection.note(&incoming);
            match incoming {
                Incoming::Channel(id, event) if id == channel => return Ok(event),
                _ => {}
            }
        }
    }
}
