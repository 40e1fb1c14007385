//! Queues: declaring one, asking after one, and what it means when the broker refuses one.

use crate::amqp::channel::Channel;
use crate::amqp::connection::Connection;
use crate::amqp::error::{Error, way_out, with_way_out};
use crate::amqp::frame::{Declare, put_declare, reply_code};
use crate::amqp::incoming::{ChannelEvent, CloseReason, Declared};
use std::sync::Arc;

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
    /// A durable classic queue, whatever the virtual host's default type is. The queue is there
    /// again after a restart, the requests in it are not.
    /// Source: <https://www.rabbitmq.com/docs/classic-queues>.
    Classic,
    /// A durable queue that a cluster's nodes replicate, requests included: it survives the loss of
    /// a node. It costs a round of the nodes for each request, and drops one that was delivered too
    /// often. Source: <https://www.rabbitmq.com/docs/quorum-queues>.
    Quorum,
}

impl QueueType {
    fn declaration<'a>(self, name: &'a str) -> Declare<'a> {
        let arguments: &[_] = match self {
            QueueType::Transient => &[],
            QueueType::Classic => &[("x-queue-type", "classic")],
            QueueType::Quorum => &[("x-queue-type", "quorum")],
        };
        Declare {
            name: name.as_bytes(),
            durable: self != QueueType::Transient,
            arguments,
            ..Declare::default()
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

/// What comes in on a connection, for whoever waits for one event of it.
pub(crate) trait Events {
    /// The next event of that channel. What comes in meanwhile and is not about it is for later.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`]: the connection is dead, the broker does not answer in time, or there is
    /// something better to do than to wait.
    fn next_of(&mut self, connection: &mut Connection, channel: u16)
    -> Result<ChannelEvent, Error>;
}

/// Makes sure that a queue exists; whether it was there. One that was is used as it is, whatever
/// its type.
///
/// # Errors
///
/// [`Error::QueueRefused`] if the broker does not let us have it; [`Error::Lost`].
pub(crate) fn ensure(
    connection: &mut Connection,
    events: &mut impl Events,
    queue: &str,
    queue_type: QueueType,
) -> Result<bool, Error> {
    /// Between our look and our declaration, another server may declare it otherwise: then look
    /// again. It takes somebody to delete it at that very moment, too, to need a third round.
    const ROUNDS: usize = 3;
    let mut refusal = None;
    for _ in 0..ROUNDS {
        if status(connection, events, queue)?.is_some() {
            return Ok(true);
        }
        let declaration = queue_type.declaration(queue);
        match declare(connection, events, &declaration)? {
            Ok(_) => return Ok(false),
            Err(close) if close.code == reply_code::PRECONDITION_FAILED => {
                refusal = Some(refused(queue, &close));
            }
            // What RabbitMQ says, from 4.3, unless it is configured to permit transient queues.
            Err(close) if close.code == reply_code::INTERNAL_ERROR && !declaration.durable => {
                return Err(Error::QueueRefused {
                    queue: queue.to_owned(),
                    reason: format!(
                        "{close}; if it refuses transient queues, declare another type \
                         (--queue-type classic or quorum)"
                    ),
                });
            }
            Err(close) => return Err(refused(queue, &close)),
        }
    }
    Err(refusal.unwrap_or_else(|| unreachable!("each round ends with a refusal or returns")))
}

/// Asks after a queue; `None` if it does not exist.
///
/// # Errors
///
/// [`Error::QueueRefused`] if we may not know; [`Error::Lost`].
pub(crate) fn status(
    connection: &mut Connection,
    events: &mut impl Events,
    queue: &str,
) -> Result<Option<QueueStatus>, Error> {
    match declare(connection, events, &question(queue))? {
        Ok(declared) => Ok(Some(declared.into())),
        Err(close) if is_missing(&close) => Ok(None),
        Err(close) => Err(refused(queue, &close)),
    }
}

/// Whether that is said because there is no such queue, and not because its node is down.
fn is_missing(close: &CloseReason) -> bool {
    close.code == reply_code::NOT_FOUND && way_out(close).is_none()
}

/// Whether a queue that is there is a stream, of which each consumer would get every request.
///
/// Nothing says so of a queue. But a declaration that differs from it is refused, with the first
/// difference that the broker finds: here it finds none in the type, and one that comes later. This
/// declaration creates nothing, since its age is none.
///
/// # Errors
///
/// [`Error::Lost`].
pub(crate) fn is_stream(
    connection: &mut Connection,
    events: &mut impl Events,
    queue: &str,
) -> Result<bool, Error> {
    let declaration = Declare {
        name: queue.as_bytes(),
        durable: true,
        arguments: &[("x-queue-type", "stream"), ("x-max-age", "none")],
        ..Declare::default()
    };
    let declared = declare(connection, events, &declaration)?;
    Ok(declared.is_err_and(|close| close.text.contains("inequivalent arg 'x-max-age'")))
}

/// What asks after a queue.
fn question(queue: &str) -> Declare<'_> {
    Declare {
        name: queue.as_bytes(),
        passive: true,
        ..Declare::default()
    }
}

/// Declares a queue, on a channel of its own, which the broker closes if it refuses.
fn declare(
    connection: &mut Connection,
    events: &mut impl Events,
    queue: &Declare<'_>,
) -> Result<Result<Declared, CloseReason>, Error> {
    let channel = connection.open_channel()?;
    channel.say(|out, id| put_declare(out, id, queue));
    let mut answer = None;
    loop {
        match events.next_of(connection, channel.id()) {
            Ok(ChannelEvent::Declared(declared)) => {
                answer = Some(declared);
                channel.close();
            }
            Ok(ChannelEvent::Closed(reason)) => return Ok(Err(reason)),
            // Not before: a user may have only as many channels as are needed afterwards.
            Ok(ChannelEvent::ClosedAsAsked) => {
                let unknown = || Error::Lost {
                    reason: "it does not say whether the queue exists".to_owned(),
                };
                return answer.map(Ok).ok_or_else(unknown);
            }
            Ok(_) => {}
            // A broker that refuses transient queues closes the connection.
            Err(lost) => {
                return connection
                    .inbox
                    .close_reason()
                    .cloned()
                    .map(Err)
                    .ok_or(lost);
            }
        }
    }
}

/// Asks after a queue and does not wait; [`answer`] reads what comes back on the channel.
pub(crate) fn ask_after(connection: &mut Connection, queue: &str) -> Result<Arc<Channel>, Error> {
    let channel = connection.open_channel()?;
    channel.say(|out, id| put_declare(out, id, &question(queue)));
    Ok(channel)
}

/// What was found out about a queue by [`ask_after`], and the end of the channel: `Some(None)` if
/// it does not exist. `None` if this says nothing about it.
pub(crate) fn answer(channel: &Channel, event: ChannelEvent) -> Option<Option<QueueStatus>> {
    match event {
        ChannelEvent::Declared(declared) => {
            channel.close();
            Some(Some(declared.into()))
        }
        ChannelEvent::Closed(close) if is_missing(&close) => Some(None),
        _ => None,
    }
}

/// A queue that only this connection can use and that is gone with it, by a name of the broker's.
pub(crate) const CALLBACK: Declare<'_> = Declare {
    name: b"",
    passive: false,
    durable: false,
    exclusive: true,
    auto_delete: true,
    arguments: &[],
};

impl From<Declared> for QueueStatus {
    fn from(declared: Declared) -> QueueStatus {
        QueueStatus {
            consumers: declared.consumers,
            ready: declared.ready,
        }
    }
}

fn refused(queue: &str, close: &CloseReason) -> Error {
    refusal(queue, close).unwrap_or_else(|| Error::Lost {
        reason: with_way_out(close),
    })
}

/// What it means for a queue that the broker has closed a channel or the connection; `None` if it
/// is not about the queue.
pub(crate) fn refusal(queue: &str, close: &CloseReason) -> Option<Error> {
    use reply_code::{ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, RESOURCE_LOCKED};
    let is_refusal = match close.code {
        ACCESS_REFUSED | RESOURCE_LOCKED => true,
        // Other messages with these codes are about something else.
        NOT_FOUND | PRECONDITION_FAILED => way_out(close).is_some(),
        _ => false,
    };
    is_refusal.then(|| Error::QueueRefused {
        queue: queue.to_owned(),
        reason: with_way_out(close),
    })
}
