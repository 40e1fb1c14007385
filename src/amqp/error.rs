//! What goes wrong with a broker, and amiquip's errors in our words.

use crate::amqp::incoming::CloseReason;
use std::error::Error as StdError;
use std::sync::Arc;

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
    QueueRefused { queue: String, reason: String },
}

impl Error {
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
        amiquip::Error::ServerClosedConnection { code, message } => {
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

/// The reply code with which the broker closed the connection.
pub(crate) fn reply_code(error: &amiquip::Error) -> Option<u16> {
    match error {
        amiquip::Error::ServerClosedConnection { code, .. } => Some(*code),
        _ => None,
    }
}
