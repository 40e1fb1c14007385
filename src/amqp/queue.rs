//! Queues: declaring one, asking after one, and what it means when the broker refuses one.

use crate::amqp::channel::Channel;
use crate::amqp::connection::Connection;
use crate::amqp::error::{Error, describe, reply_code};
use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};

/// Which queue a server declares when there is none yet. Set by
/// [`Server::queue_type`](crate::Server::queue_type); a queue that exists is used as it is,
/// whatever its type.
///
/// Whichever it is, the requests in it are messages that are not persistent. With the queue, or
/// without it, they are lost when a classic queue's broker restarts; clients that still wait send
/// theirs again ([`Retry`](crate::Retry)).
/// Source: <https://www.rabbitmq.com/docs/queues#durability>.
///
/// ```
/// use fibrpc::{QueueType, Server};
///
/// let server = Server::new("amqp://localhost")?
///     .queue("shout")
///     .queue_type(QueueType::Quorum); // to be started
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QueueType {
    /// The default: not durable, as in the tutorial, so it is gone when the broker restarts.
    /// RabbitMQ has deprecated such queues, and one that is configured to refuse them makes
    /// [`Server::start`](crate::Server::start) end with
    /// [`Error::QueueRefused`](crate::Error::QueueRefused).
    /// Source: <https://www.rabbitmq.com/release-information/deprecated-features-list>.
    #[default]
    Transient,
    /// A durable queue of the virtual host's default type, which is a classic one unless configured
    /// otherwise. The queue is there again after a restart, the requests in it are not.
    /// Source: <https://www.rabbitmq.com/docs/vhosts#default-queue-type>.
    Classic,
    /// A durable queue that a cluster's nodes replicate, requests included: it survives the loss of
    /// a node. It costs a round of the nodes for each request, and drops one that was delivered too
    /// often. Source: <https://www.rabbitmq.com/docs/quorum-queues>.
    Quorum,
}

impl QueueType {
    fn declaration(self) -> QueueDeclareOptions {
        let mut arguments = FieldTable::new();
        if self == QueueType::Quorum {
            arguments.insert(
                "x-queue-type".to_owned(),
                AmqpValue::LongString("quorum".to_owned()),
            );
        }
        QueueDeclareOptions {
            durable: self != QueueType::Transient,
            arguments,
            ..QueueDeclareOptions::default()
        }
    }
}

/// A queue's consumers and its messages that wait for one, at one moment. Part of
/// [`Status`](crate::Status) and of [`WaitingFor::Answer`](crate::WaitingFor::Answer).
///
/// ```no_run
/// use fibrpc::Status;
/// use std::time::Duration;
///
/// let status = Status::of("amqp://localhost", "shout", Duration::from_secs(5))?;
/// let is_served = status.queue.is_some_and(|queue| queue.consumers > 0);
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueStatus {
    /// How many consumers the queue has: a fibrpc server has one for each worker.
    pub consumers: u32,
    /// How many messages are ready, not counting those given to a consumer and not acknowledged.
    pub ready: u32,
}

/// Makes sure that a queue exists. One that does is used as it is, whatever its type.
///
/// # Errors
///
/// [`Error::QueueRefused`] if the broker does not let us have it; [`Error::Lost`].
pub(crate) fn ensure(
    connection: &mut Connection,
    queue: &str,
    queue_type: QueueType,
) -> Result<(), Error> {
    /// Between our look and our declaration, another server may declare it otherwise: then look
    /// again. It takes somebody to delete it at that very moment, too, to need a third round.
    const ROUNDS: usize = 3;
    let mut refusal = None;
    for _ in 0..ROUNDS {
        if status(connection, queue)?.is_some() {
            return Ok(());
        }
        match declare(&connection.open_channel()?, queue, queue_type) {
            Err(
                error @ Error::QueueRefused {
                    code: reply_code::PRECONDITION_FAILED,
                    ..
                },
            ) => refusal = Some(error),
            done => return done,
        }
    }
    Err(refusal.unwrap_or_else(|| unreachable!("each round ends with a refusal or returns")))
}

/// Declares a queue.
///
/// # Errors
///
/// As of [`ensure`]; the channel is then closed.
fn declare(channel: &Channel, queue: &str, queue_type: QueueType) -> Result<(), Error> {
    channel
        .ask(|channel| {
            channel
                .queue_declare(queue, queue_type.declaration())
                .map(drop)
        })
        .map_err(|error| on_queue(queue, &error))
}

/// Declares a queue that only this connection can use and that is gone with it; returns the name
/// that the broker has given it.
///
/// # Errors
///
/// [`Error::Lost`].
pub(crate) fn declare_exclusive(channel: &Channel) -> Result<String, Error> {
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    channel
        .ask(|channel| Ok(channel.queue_declare("", options)?.name().to_owned()))
        .map_err(|error| Error::lost(&error))
}

/// Asks after a queue; `None` if it does not exist.
///
/// # Errors
///
/// [`Error::QueueRefused`] if we may not know; [`Error::Lost`].
pub(crate) fn status(
    connection: &mut Connection,
    queue: &str,
) -> Result<Option<QueueStatus>, Error> {
    // Its own channel, which the broker closes if the queue does not exist.
    let channel = connection.open_channel()?;
    let found = channel.ask(|channel| {
        let found = channel.queue_declare_passive(queue)?;
        Ok(QueueStatus {
            consumers: found.declared_consumer_count().unwrap_or(0),
            ready: found.declared_message_count().unwrap_or(0),
        })
    });
    match found {
        Ok(status) => Ok(Some(status)),
        Err(error) if reply_code(&error) == Some(reply_code::NOT_FOUND) => Ok(None),
        Err(error) => Err(on_queue(queue, &error)),
    }
}

fn on_queue(queue: &str, error: &amiquip::Error) -> Error {
    reply_code(error)
        .and_then(|code| refusal(queue, code, &describe(error)))
        .unwrap_or_else(|| Error::lost(error))
}

/// What it means for a queue that the broker says no; `None` if it is not about the queue.
pub(crate) fn refusal(queue: &str, code: u16, said: &str) -> Option<Error> {
    let way_out = match code {
        reply_code::ACCESS_REFUSED if said.contains("exclusive") => {
            "another consumer has it for itself alone; choose another name"
        }
        reply_code::ACCESS_REFUSED => {
            "a server needs the permissions configure, write and read, a client configure and read \
             for amq.gen-*, write for amq.default (rabbitmqctl set_permissions)"
        }
        reply_code::RESOURCE_LOCKED => {
            "another connection has declared it for itself alone; choose another name"
        }
        reply_code::PRECONDITION_FAILED => {
            "somebody declares it otherwise at this very moment; try again"
        }
        // What RabbitMQ says, from 4.3, when it is configured to refuse transient queues.
        reply_code::INTERNAL_ERROR => {
            "if it refuses transient queues, declare another type (--queue-type classic or quorum)"
        }
        _ => return None,
    };
    Some(Error::QueueRefused {
        queue: queue.to_owned(),
        code,
        reason: format!("{said}; {way_out}"),
    })
}
