//! The way out: any thread appends what it has to send, and writes it itself if nobody is writing.
//!
//! So sending costs no hop to another thread. What others append while one thread writes leaves
//! with the next write: the busier the connection, the fewer the system calls (a pattern known as
//! flat combining). A sender writes for a few milliseconds only. When that turn is over, or the
//! socket full, the rest is handed over to amiquip's I/O thread, which writes some of it whenever
//! there is room, and reads in between.

use crate::amqp::backlog::Backlog;
use crate::amqp::sync::atomic::{AtomicBool, Ordering};
use crate::amqp::sync::net::TcpStream;
use crate::amqp::sync::poll::unix::EventedFd;
use crate::amqp::sync::poll::{Events, Poll, PollOpt, Ready, Token};
use crate::amqp::sync::{Condvar, Instant, Mutex, MutexGuard, Watchdog, lock};
use crate::amqp::transport::{Down, Transport, Written};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How much may wait for the broker to read, in bytes, before senders have to wait as well.
/// Beyond it lie the kernel's socket buffers, a few MiB more.
const BACKLOG_MAX: usize = 1 << 20;

/// How much is worth a write of its own, in bytes.
pub(crate) const APPENDED_MAX: usize = 16 << 10;

/// How long a sender goes on writing, for itself and others, before it hands over.
const TURN_TIME: Duration = Duration::from_millis(5);

/// How much is written at a time, in bytes: in a fraction of a millisecond, if the broker reads.
const WRITE_LEN: usize = 512 << 10;

/// Why frames were not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// The broker does not read, and the backlog is full.
    Full,
    /// The connection is dead.
    Down,
    /// The sender has found that it has nothing to send any more.
    Outdated,
}

/// Our end of the socket: the way out.
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// The backlog has shrunk, or the connection is dead.
    room: Condvar,
    /// Whether what waits is the I/O thread's to write; others only append meanwhile. Changed with
    /// the state locked. Beside the state, so that each read costs a load and not a lock.
    handed_over: AtomicBool,
    /// Becomes readable when the socket has room for what was handed over. A field before
    /// `watched`, which it watches, so that it is dropped first.
    writable: Poll,
    /// Another descriptor of the socket, because one can be in a poll only once.
    watched: TcpStream,
    transport: Transport,
}

#[derive(Default)]
struct State {
    backlog: Backlog,
    /// Whether a thread is writing; it goes on until the backlog is empty, or hands over.
    writing: bool,
    /// How many threads wait for room. Waking none would still be a system call.
    waiting: usize,
    /// Whether the connection is dead.
    down: bool,
}

impl Outbox {
    /// # Errors
    ///
    /// The operating system refuses another descriptor.
    pub fn new(transport: Transport) -> io::Result<Outbox> {
        let outbox = Outbox {
            state: Mutex::default(),
            room: Condvar::new(),
            handed_over: AtomicBool::new(false),
            writable: Poll::new()?,
            watched: transport.socket().try_clone()?,
            transport,
        };
        // Registered now, armed when needed.
        outbox.writable.register(
            &EventedFd(&outbox.watched.as_raw_fd()),
            Token(0),
            Ready::empty(),
            PollOpt::edge() | PollOpt::oneshot(),
        )?;
        Ok(outbox)
    }

    /// A descriptor that becomes readable when [`Outbox::resume`] has something to do.
    pub fn watch(&self) -> RawFd {
        self.writable.as_raw_fd()
    }

    /// Learns the longest frame that the broker accepts, in octets.
    pub fn set_frame_max(&self, frame_max: usize) {
        self.lock().backlog.set_frame_max(frame_max);
    }

    /// Sends what `encode` appends, or leaves it to the thread that is writing. Does not wait for
    /// room. `encode` is called with the lock held: so it decides of what must not change until the
    /// frames have their place.
    ///
    /// # Errors
    ///
    /// The backlog is full, or the connection dead; then `encode` has not been called.
    pub fn try_send(&self, encode: impl FnOnce(&mut Backlog)) -> Result<(), NotSent> {
        let mut state = self.lock_with_room()?;
        encode(&mut state.backlog);
        self.write(state, TURN_TIME);
        Ok(())
    }

    /// Takes what `encode` appends, to leave with whatever is sent next, and writes
    /// nothing. The caller sees to it that something is sent, by [`Outbox::flush`] at the latest:
    /// at once, if this returns that enough has been appended.
    ///
    /// # Errors
    ///
    /// As of [`Outbox::try_send`].
    pub fn try_append(&self, encode: impl FnOnce(&mut Backlog)) -> Result<bool, NotSent> {
        let mut state = self.lock_with_room()?;
        encode(&mut state.backlog);
        Ok(state.backlog.len() >= APPENDED_MAX)
    }

    /// Sends what was appended.
    pub fn flush(&self) {
        self.write(self.lock(), TURN_TIME);
    }

    /// How many bytes have left, ever. While it grows, the broker reads.
    pub fn written(&self) -> u64 {
        self.lock().backlog.written()
    }

    fn lock_with_room(&self) -> Result<MutexGuard<'_, State>, NotSent> {
        let state = self.lock();
        if state.down {
            Err(NotSent::Down)
        } else if state.backlog.len() >= BACKLOG_MAX {
            Err(NotSent::Full)
        } else {
            Ok(state)
        }
    }

    /// Sends the frames that `encode` appends whether there is room or not. For what amiquip says
    /// and what closes a channel, a few dozen bytes each.
    ///
    /// # Errors
    ///
    /// The connection is dead.
    pub fn send_anyway(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), Down> {
        let mut state = self.lock();
        if state.down {
            return Err(Down);
        }
        state.backlog.append(encode);
        self.write(state, TURN_TIME);
        Ok(())
    }

    /// Sends like [`Outbox::try_send`], but waits for room until the deadline, if there is one.
    /// Here a large message that has begun to leave takes none: what is done, as a reply is, has
    /// nothing to lose by standing behind it.
    ///
    /// # Errors
    ///
    /// The deadline has passed, or the connection is dead.
    pub fn send(
        &self,
        deadline: Option<Instant>,
        encode: impl FnOnce(&mut Backlog),
    ) -> Result<(), NotSent> {
        let mut state = self.lock_when_there_is_room(deadline, Backlog::behind)?;
        encode(&mut state.backlog);
        self.write(state, TURN_TIME);
        Ok(())
    }

    /// Waits for room until the deadline, if there is one. Somebody else may take it.
    ///
    /// # Errors
    ///
    /// The deadline has passed, or the connection is dead.
    pub fn wait_for_room(&self, deadline: Option<Instant>) -> Result<(), NotSent> {
        self.lock_when_there_is_room(deadline, Backlog::len)
            .map(drop)
    }

    /// Waits until what `waits` counts of the backlog is less than [`BACKLOG_MAX`].
    fn lock_when_there_is_room(
        &self,
        deadline: Option<Instant>,
        waits: fn(&Backlog) -> usize,
    ) -> Result<MutexGuard<'_, State>, NotSent> {
        let mut state = self.lock();
        while waits(&state.backlog) >= BACKLOG_MAX && !state.down {
            let left = deadline.map_or(Duration::MAX, |at| {
                at.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(NotSent::Full);
            }
            // `wait_timeout` overflows on very long waits; an hour at a time is as good.
            let left = left.min(Duration::from_secs(3600));
            state.waiting += 1;
            state = self
                .room
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.waiting -= 1;
        }
        match state.down {
            true => Err(NotSent::Down),
            false => Ok(state),
        }
    }

    /// Ends the connection at once: whoever is blocked on it, in amiquip or here, gets an error.
    pub fn abort(&self) {
        let mut state = self.lock();
        if !state.down {
            state.down = true;
            self.transport.shut_down();
            self.room.notify_all();
            // Nobody writes that any more; it is freed without the lock.
            let backlog = std::mem::take(&mut state.backlog);
            drop(state);
            drop(backlog);
        }
    }

    /// Aborts the connection after `time`, unless the watchdog is dropped before.
    pub fn abort_after(self: &Arc<Self>, time: Duration) -> Watchdog {
        let outbox = Arc::clone(self);
        Watchdog::start(time, move || outbox.abort())
    }

    /// Writes for a turn if something was handed over and there is room for it. Called by the I/O
    /// thread, for whatever reason it is awake.
    pub fn resume(&self) {
        // The watch is armed after the hand-over is known, so who sees it fire sees that, too. Once
        // it has fired and that is taken, it is not armed, and `hand_over` can arm it again.
        if self.handed_over.load(Ordering::Acquire) && self.has_fired() {
            let state = self.lock();
            self.handed_over.store(false, Ordering::Release);
            // One write, and then it has to see what else there is to do.
            self.write(state, Duration::ZERO);
        }
    }

    /// Whether the watch has fired; if so, that is taken.
    fn has_fired(&self) -> bool {
        let fired = self
            .writable
            .poll(&mut Events::with_capacity(1), Some(Duration::ZERO));
        matches!(fired, Ok(count) if count > 0)
    }

    /// Writes for a turn of that time, or a little longer, unless that is somebody else's to do.
    fn write(&self, mut state: MutexGuard<'_, State>, time: Duration) {
        let is_ours = !state.writing && !self.handed_over.load(Ordering::Acquire);
        if is_ours && !state.backlog.is_empty() {
            state.writing = true;
            self.write_for(time, state);
        }
    }

    /// Writes until nothing is left, the socket is full, or the turn is over. The lock is not held
    /// while writing.
    fn write_for<'a>(&'a self, time: Duration, mut state: MutexGuard<'a, State>) {
        let over_at = Instant::now() + time;
        while let Some(mut chunk) = state.backlog.take() {
            drop(state);
            let written = self.transport.write(&chunk.left(WRITE_LEN));
            let Ok(Written { len, full }) = written else {
                // Known to everyone by `down`; whoever reads sees it as well.
                return self.abort();
            };
            chunk.advance(len);
            state = self.lock();
            if state.down {
                drop(state); // before the chunk
                return;
            }
            state.backlog.put_back(chunk, len);
            if state.waiting > 0 && state.backlog.behind() < BACKLOG_MAX {
                self.room.notify_all();
            }
            if full || !state.backlog.is_empty() && Instant::now() >= over_at {
                self.hand_over();
                break;
            }
        }
        state.writing = false;
    }

    /// Leaves what waits to the I/O thread, which is woken when there is room: at once, if there
    /// is. The state is locked.
    fn hand_over(&self) {
        self.handed_over.store(true, Ordering::Release);
        let armed = self.writable.reregister(
            &EventedFd(&self.watched.as_raw_fd()),
            Token(0),
            Ready::writable(),
            PollOpt::edge() | PollOpt::oneshot(),
        );
        if let Err(error) = armed {
            log::warn!("cannot watch a full socket ({error}); closing it");
            self.transport.shut_down();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
