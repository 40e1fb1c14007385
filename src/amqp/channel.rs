//! A channel: amiquip's, with a deadline for every round trip.

use crate::amqp::outbox::Outbox;
use std::sync::Arc;
use std::time::Duration;

/// How long a round trip on a live connection may take: opening a channel, declaring a queue.
/// Longer than two of the default heartbeats, so that a dead broker is found out as that.
pub(crate) const SETUP_TIME: Duration = Duration::from_secs(30);

/// A channel.
///
/// Dropped, it is closed, which is a round trip behind everything that was sent on it.
pub(crate) struct Channel {
    /// `None` only while being dropped.
    inner: Option<amiquip::Channel>,
    id: u16,
    outbox: Arc<Outbox>,
}

impl Channel {
    pub(super) fn new(channel: amiquip::Channel, outbox: Arc<Outbox>) -> Channel {
        Channel {
            id: channel.channel_id(),
            inner: Some(channel),
            outbox,
        }
    }

    /// The channel's number on its connection.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Makes a round trip; a broker that does not answer within [`SETUP_TIME`] loses the
    /// connection.
    ///
    /// # Errors
    ///
    /// amiquip's.
    pub(super) fn ask<T>(
        &self,
        question: impl FnOnce(&amiquip::Channel) -> amiquip::Result<T>,
    ) -> amiquip::Result<T> {
        let _watchdog = self.outbox.abort_after(SETUP_TIME);
        match &self.inner {
            Some(channel) => question(channel),
            None => Err(amiquip::Error::ClientClosedChannel),
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _watchdog = self.outbox.abort_after(SETUP_TIME);
        drop(self.inner.take());
    }
}
