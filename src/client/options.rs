//! What a client can be told, with the defaults.

use crate::amqp::endpoint::Endpoints;
use crate::error::Error;
use std::thread;
use std::time::Duration;

/// Where replies are to be sent. Set by
/// [`ClientBuilder::reply_to`](crate::ClientBuilder::reply_to).
///
/// ```
/// use fibrpc::{Client, ReplyTo};
///
/// let client = Client::builder("amqp://localhost")?
///     .reply_to(ReplyTo::Direct)
///     .build()?;
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReplyTo {
    /// The default. One callback queue for each connection: named by the broker, exclusive,
    /// auto-delete, so that it is gone with the connection. The user needs the permissions to
    /// configure and read `amq.gen-*`. Source: <https://www.rabbitmq.com/docs/queues>.
    #[default]
    Queue,
    /// RabbitMQ's direct reply-to: no queue at all. Its address is good for one channel, so a
    /// request that is sent again on a live connection goes out on the channel of the first.
    /// Source: <https://www.rabbitmq.com/docs/direct-reply-to>.
    Direct,
}

/// When a request is sent again, under the same correlation id.
///
/// A request that is sent again may be executed twice; its caller gets one answer. It never
/// prolongs a call: the deadline stays what it was. A server that dies before it has acknowledged a
/// request makes the broker deliver it again whatever is chosen here.
///
/// ```no_run
/// use fibrpc::{Client, Error, Retry};
/// use std::time::Duration;
///
/// let client = Client::builder("amqp://localhost")?
///     .retry(Retry::Unanswered(Duration::from_secs(1)))
///     .build()?;
/// match client.request("withdraw").retry(Retry::Never).send("42") {
///     Err(Error::ConnectionLost { .. }) => println!("look whether it was done"),
///     other => println!("{other:?}"),
/// }
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Retry {
    /// Never. The price: a call whose connection is lost after its request was sent ends with
    /// [`Error::ConnectionLost`], and it is for you to find out
    /// whether the request was executed.
    Never,
    /// The default: when the connection is lost after it was sent. The price: a request that a
    /// server had already, or that waits in the queue still, is executed twice. A request that was
    /// lost without the connection, with a queue that was deleted or purged, ends with its
    /// deadline.
    #[default]
    LostConnection,
    /// When the connection is lost, and also when it is unanswered for so long, then after twice
    /// that, and so on. It saves calls whose request was lost where no client can see it: the queue
    /// was purged or deleted, or was on another node of a cluster that died. The price: a request
    /// that takes longer, in the handler or in a long queue before it, is executed more than once,
    /// which adds to the load of a server that is late already. So choose longer than an answer
    /// ever takes; 0 is refused.
    Unanswered(Duration),
}

/// Whether the broker is to confirm each request that it has taken (publisher confirms). Set by
/// [`ClientBuilder::confirms`](crate::ClientBuilder::confirms).
///
/// With them, a request that the broker has not confirmed within 1 s is sent again on another
/// channel, under the same correlation id, unless it has [`Retry::Never`]; after that within 2 s,
/// and so on. And one that the broker does not take, since its queue is full, ends with
/// [`Error::Rejected`] at once and not with its deadline. The price is a message of the broker's for
/// each request, about a tenth of the rate.
/// Source: <https://www.rabbitmq.com/docs/confirms#publisher-confirms>.
///
/// ```
/// use fibrpc::{Client, Confirms};
///
/// let client = Client::builder("amqp://localhost")?
///     .confirms(Confirms::Always)
///     .build()?;
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Confirms {
    /// The default: with several brokers, since one of them may be lost with what it has taken.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// How long a thread that waits for a reply spins at most, by default. A call that a server answers
/// at once takes about a third of this.
pub(crate) const SPIN_TIME: Duration = Duration::from_micros(500);

/// What a client was told.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub endpoints: Endpoints,
    pub reply_to: ReplyTo,
    pub timeout: Duration,
    pub retry: Retry,
    pub confirms: Confirms,
    pub wait_for_server: bool,
    pub spin: Duration,
}

impl Options {
    pub fn new(endpoints: Endpoints) -> Options {
        Options {
            endpoints,
            reply_to: ReplyTo::default(),
            timeout: Duration::from_secs(30),
            retry: Retry::default(),
            confirms: Confirms::default(),
            wait_for_server: false,
            spin: SPIN_TIME,
        }
    }

    /// Whether the broker is to confirm requests.
    pub fn confirms(&self) -> bool {
        match self.confirms {
            Confirms::Auto => self.endpoints.len() > 1,
            Confirms::Always => true,
            Confirms::Never => false,
        }
    }

    /// How long to spin on this machine: with one core, the broker could not answer meanwhile.
    pub fn spin(&self) -> Duration {
        match thread::available_parallelism() {
            Ok(cores) if cores.get() > 1 => self.spin,
            _ => Duration::ZERO,
        }
    }
}

/// # Errors
///
/// [`Error::InvalidArgument`]: one of the times is zero.
pub(crate) fn check_times(timeout: Duration, retry: Retry) -> Result<(), Error> {
    let what = match (timeout, retry) {
        (Duration::ZERO, _) => "the timeout",
        (_, Retry::Unanswered(Duration::ZERO)) => "the time after which a request is sent again",
        _ => return Ok(()),
    };
    Err(Error::InvalidArgument(format!(
        "{what} must be longer than 0"
    )))
}
