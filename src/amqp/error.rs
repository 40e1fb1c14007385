//! What goes wrong with a broker, and amiquip's errors in our words.

use crate::amqp::frame::reply_code;
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

/// What can be done about what the broker has said; `None` if that is not known. One code means
/// many things, so the text is looked at, too: it is that of RabbitMQ 3.10 to 4.3.
pub(crate) fn way_out(close: &CloseReason) -> Option<&'static str> {
    use reply_code::{
        ACCESS_REFUSED, INTERNAL_ERROR, NOT_ALLOWED, NOT_FOUND, PRECONDITION_FAILED,
        RESOURCE_LOCKED,
    };
    const WAYS_OUT: &[(u16, &str, &str)] = &[
        (
            ACCESS_REFUSED,
            "exclusive use",
            "another consumer has it for itself alone; choose another name",
        ),
        (
            ACCESS_REFUSED,
            "reserved prefix",
            "names that begin with 'amq.' are the broker's own; choose another",
        ),
        (
            ACCESS_REFUSED,
            "refused for user",
            "a server needs the permissions configure, write and read, a client configure and read \
             for amq.gen-*, write for amq.default (rabbitmqctl set_permissions)",
        ),
        (
            NOT_FOUND,
            "down or inaccessible",
            "the node that has the queue is down; start it, or use a quorum queue",
        ),
        (
            RESOURCE_LOCKED,
            "",
            "another connection has declared it for itself alone; choose another name",
        ),
        (
            PRECONDITION_FAILED,
            "inequivalent arg",
            "somebody declares it otherwise at this very moment; try again",
        ),
        (
            PRECONDITION_FAILED,
            "queue limit",
            "`rabbitmqctl set_vhost_limits` changes that, or delete queues",
        ),
        (
            PRECONDITION_FAILED,
            "consumer prefetch count is not set",
            "it is a stream, which cannot be served; choose another name",
        ),
        (
            INTERNAL_ERROR,
            "is down",
            "`rabbitmqctl restart_vhost` may bring the virtual host back; the broker's log has the \
             cause",
        ),
        (
            INTERNAL_ERROR,
            "transient_nonexcl_queues",
            "declare another type (--queue-type classic or quorum)",
        ),
        (
            // RabbitMQ 3.10 loses the process of a quorum queue if it is killed while it deletes it.
            INTERNAL_ERROR,
            "",
            "the broker's log has the cause; a queue that is 'down' for good (`rabbitmqctl list_queues name \
             state`) has to be deleted",
        ),
        (
            NOT_ALLOWED,
            "not found",
            "`rabbitmqctl add_vhost` and `set_permissions` change that, or name another virtual \
             host at the end of the URL",
        ),
        (
            NOT_ALLOWED,
            "user connection limit",
            "close connections, or change it by `rabbitmqctl set_user_limits`",
        ),
        (
            NOT_ALLOWED,
            "connection limit",
            "close connections, or change it by `rabbitmqctl set_vhost_limits`",
        ),
        (
            NOT_ALLOWED,
            "number of channels",
            "start fewer workers, or change it by `rabbitmqctl set_user_limits`",
        ),
        (
            NOT_ALLOWED,
            "access to vhost",
            "`rabbitmqctl set_permissions -p` changes that, or name another virtual host at the \
             end of the URL",
        ),
    ];
    WAYS_OUT
        .iter()
        .find(|(code, words, _)| *code == close.code && close.text.contains(words))
        .map(|&(_, _, way_out)| way_out)
}

/// What the broker has said, and what can be done about it, if that is known.
pub(crate) fn with_way_out(close: &CloseReason) -> String {
    match way_out(close) {
        Some(way_out) => format!("{close}; {way_out}"),
        None => close.to_string(),
    }
}

/// What an amiquip error means, in our words where its own mislead.
pub(crate) fn describe(error: &amiquip::Error) -> String {
    match error {
        amiquip::Error::ServerClosedConnection { code, message } => {
            let (code, text) = (*code, message.clone());
            with_way_out(&CloseReason { code, text })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_fits_its_cause_or_is_not_given() {
        for (code, text, hint) in [
            (
                403,
                "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use",
                "for itself alone",
            ),
            (
                403,
                "ACCESS_REFUSED - queue name 'amq.foo' contains reserved prefix 'amq.*'",
                "'amq.'",
            ),
            (
                403,
                "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'",
                "permissions",
            ),
            (
                403,
                "ACCESS_REFUSED - read access to queue 'q' in vhost '/' refused for user 'u'",
                "permissions",
            ),
            (
                404,
                "NOT_FOUND - home node 'rabbit@a' of durable queue 'q' in vhost '/' is down or inaccessible",
                "start it",
            ),
            (
                405,
                "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q'",
                "another name",
            ),
            (
                406,
                "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/'",
                "at this very moment",
            ),
            (
                406,
                "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost 'v' (0) is reached",
                "set_vhost_limits",
            ),
            (530, "NOT_ALLOWED - vhost v not found", "add_vhost"),
            (
                530,
                "NOT_ALLOWED - access to vhost 'v' refused for user 'u'",
                "set_permissions -p",
            ),
            (541, "INTERNAL_ERROR", "list_queues"),
            (
                541,
                "INTERNAL_ERROR - access to vhost 'v' refused for user 'u': vhost 'v' is down",
                "restart_vhost",
            ),
            (
                541,
                "INTERNAL_ERROR - Feature `transient_nonexcl_queues` is deprecated",
                "--queue-type",
            ),
            (
                530,
                "NOT_ALLOWED - access to vhost 'v' refused for user 'u': connection limit (0) is reached",
                "set_vhost_limits",
            ),
            (
                530,
                "NOT_ALLOWED - connection refused for user 'u': user connection limit (0) is reached",
                "set_user_limits",
            ),
            (
                530,
                "NOT_ALLOWED - number of channels opened for user 'u' has reached the maximum allowed user limit of (1)",
                "fewer workers",
            ),
        ] {
            let text = text.to_owned();
            let found = way_out(&CloseReason {
                code,
                text: text.clone(),
            });
            assert!(
                found.is_some_and(|found| found.contains(hint)),
                "{text}: {found:?}"
            );
        }
        for (code, text) in [
            (
                406,
                "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out.",
            ),
            (
                406,
                "PRECONDITION_FAILED - message size 2 is larger than configured max size 1",
            ),
            (404, "NOT_FOUND - no queue 'q' in vhost '/'"),
            (320, "CONNECTION_FORCED - by an operator"),
            (504, "CHANNEL_ERROR - expected 'channel.open'"),
        ] {
            let text = text.to_owned();
            assert_eq!(way_out(&CloseReason { code, text }), None);
        }
    }
}
