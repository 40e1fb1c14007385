//! What goes wrong with a broker, and amiquip's errors in our words.

use crate::amqp::incoming::CloseReason;
use std::error::Error as StdError;
use std::sync::Arc;

/// AMQP reply codes, as RabbitMQ uses them.
/// Source: <https://www.rabbitmq.com/amqp-0-9-1-reference#constants>.
pub(crate) mod reply_code {
    pub const ACCESS_REFUSED: u16 = 403;
    pub const NOT_FOUND: u16 = 404;
    pub const RESOURCE_LOCKED: u16 = 405;
    pub const PRECONDITION_FAILED: u16 = 406;
    pub const NOT_ALLOWED: u16 = 530;
    pub const INTERNAL_ERROR: u16 = 541;
}

/// What is said of a lost connection when nothing more is known.
pub(crate) const GONE: &str = "the connection is gone";

/// Why a broker does not do what it was asked for.
#[derive(Debug, Clone)]
pub(crate) enum Error {
    /// None of the brokers could be reached, or they refused us.
    Unreachable {
        /// What was tried, without passwords.
        endpoint: String,
        reason: String,
        /// The operating system's error, where there was one.
        source: Option<Arc<dyn StdError + Send + Sync>>,
    },
    /// The connection or the channel was lost.
    Lost { reason: String },
    /// The broker does not let us have a queue.
    QueueRefused {
        queue: String,
        /// The reply code.
        code: u16,
        reason: String,
    },
}

impl Error {
    pub fn lost(error: &amiquip::Error) -> Error {
        let reason = describe(error);
        Error::Lost { reason }
    }

    /// What happened, without what it happened to.
    pub fn reason(&self) -> &str {
        match self {
            Error::Unreachable { reason, .. }
            | Error::Lost { reason }
            | Error::QueueRefused { reason, .. } => reason,
        }
    }
}

/// What an amiquip error means, in our words where its own mislead.
pub(crate) fn describe(error: &amiquip::Error) -> String {
    match error {
        amiquip::Error::ServerClosedConnection { code, message }
        | amiquip::Error::ServerClosedChannel { code, message, .. } => {
            let (code, text) = (*code, message.clone());
            CloseReason { code, text }.to_string()
        }
        amiquip::Error::IoErrorReadingSocket { source }
        | amiquip::Error::IoErrorWritingSocket { source } => source.to_string(),
        amiquip::Error::UnexpectedSocketClose => "the broker closed the connection".to_owned(),
        amiquip::Error::MissedServerHeartbeats => "the broker has fallen silent".to_owned(),
        amiquip::Error::EventLoopDropped => GONE.to_owned(),
        // None of the rest is made with a URL here: we open sockets ourselves.
        other => other.to_string(),
    }
}

/// The reply code with which the broker closed the connection or the channel.
pub(crate) fn reply_code(error: &amiquip::Error) -> Option<u16> {
    match error {
        amiquip::Error::ServerClosedConnection { code, .. }
        | amiquip::Error::ServerClosedChannel { code, .. } => Some(*code),
        _ => None,
    }
}
