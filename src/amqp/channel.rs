//! A channel: a number on a connection, and whether more may be said on it.
//!
//! Any thread says something on a channel by writing frames ([`super::frame`]), and waits for
//! nothing. What the broker answers comes back as events ([`ChannelEvent`](super::incoming::ChannelEvent)), through the
//! connection's sink or by whoever reads.

use crate::amqp::backlog::Backlog;
use crate::amqp::frame::{put_close, put_close_ok};
use crate::amqp::outbox::{NotSent, Outbox};
use crate::amqp::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// How long a round trip on a live connection may take: opening a channel, declaring a queue.
/// Longer than two of the default heartbeats, so that a dead broker is found out as that.
pub(crate) const SETUP_TIME: Duration = Duration::from_secs(30);

/// A channel. Made by [`Connection::open_channel`](super::connection::Connection::open_channel).
pub(crate) struct Channel {
    id: u16,
    outbox: Arc<Outbox>,
    /// Whether more may be sent on it. Read and written with the outbox locked: so nothing follows
    /// what closes it, for which the broker would close the connection (504).
    open: AtomicBool,
}

impl Channel {
    pub(super) fn new(id: u16, outbox: Arc<Outbox>) -> Channel {
        Channel {
            id,
            outbox,
            open: AtomicBool::new(true),
        }
    }

    /// The channel's number on its connection.
    pub fn id(&self) -> u16 {
        self.id
    }

    /// Whether more may be sent on it. To be called with the outbox locked, in the closure that
    /// appends: only there it holds until the frames are in their place.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Sends what `encode` appends for the channel of that number; waits for room.
    ///
    /// # Errors
    ///
    /// The channel is closed ([`NotSent::Outdated`]), or the connection dead.
    pub fn send(&self, encode: impl FnOnce(&mut Backlog, u16)) -> Result<(), NotSent> {
        let mut is_open = false;
        self.outbox.send(None, |out| {
            is_open = self.is_open();
            if is_open {
                encode(out, self.id);
            }
        })?;
        is_open.then_some(()).ok_or(NotSent::Outdated)
    }

    /// Takes such frames to leave with whatever is sent next, as [`Outbox::try_append`] does.
    ///
    /// # Errors
    ///
    /// As of [`Channel::send`], or there is no room.
    pub fn try_append(&self, encode: impl FnOnce(&mut Backlog, u16)) -> Result<bool, NotSent> {
        let mut is_open = false;
        let enough = self.outbox.try_append(|out| {
            is_open = self.is_open();
            if is_open {
                encode(out, self.id);
            }
        })?;
        is_open.then_some(enough).ok_or(NotSent::Outdated)
    }

    /// Sends what was appended.
    pub fn flush(&self) {
        self.outbox.flush();
    }

    /// Sends the frames that `encode` appends for the channel of that number, whether there is room
    /// or not: for what has a few octets. On a closed channel, it does nothing.
    pub fn say(&self, encode: impl FnOnce(&mut Vec<u8>, u16)) {
        // A dead connection is known by other ways.
        let _ = self.outbox.send_anyway(|out| {
            if self.is_open() {
                encode(out, self.id);
            }
        });
    }

    /// Closes it: the broker does what it was told before, and then says
    /// [`ClosedAsAsked`](super::incoming::ChannelEvent::ClosedAsAsked). Does not wait for that.
    pub fn close(&self) {
        let _ = self.outbox.send_anyway(|out| {
            if self.open.swap(false, Ordering::Relaxed) {
                put_close(out, self.id);
            }
        });
    }

    /// Answers the broker, which has closed it; says whether it had been open still.
    pub(super) fn answer_close(&self) -> bool {
        let mut was_open = false;
        // Also if our own `channel.close` is on its way.
        let _ = self.outbox.send_anyway(|out| {
            was_open = self.open.swap(false, Ordering::Relaxed);
            put_close_ok(out, self.id);
        });
        was_open
    }
}
