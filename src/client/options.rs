//! What a client can be told, with the defaults.

use crate::amqp::endpoint::Endpoints;
use std::time::Duration;

/// Where replies are to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReplyTo {
    /// One callback queue for each connection: named by the broker, exclusive, auto-delete.
    #[default]
    Queue,
    /// RabbitMQ's direct reply-to: no queue at all. Its address is good for one channel, so a
    /// request that is sent again on a live connection goes out on the channel of the first.
    /// Source: <https://www.rabbitmq.com/docs/direct-reply-to>.
    Direct,
}

/// How hard a call tries: when its request is sent again, under the same correlation id.
///
/// A request that is sent again may be executed twice; its caller gets one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Retry {
    /// Never. A call whose connection is lost after its request was sent ends with
    /// [`Error::ConnectionLost`](crate::Error::ConnectionLost).
    Never,
    /// When the connection is lost after it was sent.
    #[default]
    LostConnection,
    /// When the connection is lost, and also when it is unanswered for so long, then after twice
    /// that, and so on. It saves calls whose request was lost where no client can see it: the queue
    /// was purged or deleted, or was on another node of a cluster that died. The price: a handler
    /// that takes longer runs more than once.
    Unanswered(Duration),
}

/// What a client was told.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub endpoints: Endpoints,
    pub reply_to: ReplyTo,
    pub timeout: Duration,
    pub retry: Retry,
    pub wait_for_server: bool,
}

impl Options {
    pub fn new(endpoints: Endpoints) -> Options {
        Options {
            endpoints,
            reply_to: ReplyTo::default(),
            timeout: Duration::from_secs(30),
            retry: Retry::default(),
            wait_for_server: false,
        }
    }
}
