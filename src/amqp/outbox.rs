//! The way out: any thread appends whole frames, and writes them itself if nobody is writing.
//!
//! So sending costs no hop to another thread. What others append while one thread writes leaves
//! with the next write: the busier the connection, the fewer the system calls (a pattern known as
//! flat combining). When the socket is full, the rest is left to amiquip's I/O thread, which is
//! woken when there is room.

use crate::amqp::sync::{Watchdog, lock};
use crate::amqp::transport::{Down, Transport};
use mio::unix::EventedFd;
use mio::{Events, Poll, PollOpt, Ready, Token};
use std::io::{self, ErrorKind};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much may wait for the broker to read, in bytes, before senders have to wait as well.
/// Beyond it lie the kernel's socket buffers, a few MiB more.
const BACKLOG_MAX: usize = 1 << 20;

/// How much is worth a write of its own, in bytes.
pub(crate) const APPENDED_MAX: usize = 16 << 10;

/// A buffer that a large message has grown beyond this is given back, in bytes.
const BUFFER_KEPT_MAX: usize = 1 << 20;

/// Why frames were not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotSent {
    /// The broker does not read, and the backlog is full.
    Full,
    /// The connection is dead.
    Down,
}

/// Our end of the socket: the way out.
pub(crate) struct Outbox {
    state: Mutex<State>,
    /// The backlog has shrunk, or the connection is dead.
    room: Condvar,
    /// Whether the socket was full, so that the I/O thread is to write the rest. Beside the
    /// state, so that each read costs a load and not a lock.
    stalled: AtomicBool,
    /// Becomes readable when a stalled socket has room again. A field before `socket`, which it
    /// watches, so that it is dropped first.
    writable: Poll,
    /// Another descriptor of the socket, because one can be in a poll only once.
    watched: TcpStream,
    transport: Transport,
}

#[derive(Default)]
struct State {
    /// Whole frames, not yet written; but the first may have begun to leave.
    queue: Vec<u8>,
    /// An empty buffer to take the queue's place while that is being written.
    spare: Vec<u8>,
    /// Whether a thread is writing; it goes on until the queue is empty.
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
            stalled: AtomicBool::new(false),
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

    /// Sends the frames that `encode` appends, or leaves them to the thread that is writing. Does
    /// not wait for room.
    ///
    /// # Errors
    ///
    /// The backlog is full, or the connection dead; then `encode` has not been called.
    pub fn try_send(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), NotSent> {
        let state = self.lock_with_room()?;
        self.push(state, encode).map_err(|Down| NotSent::Down)
    }

    /// Takes the frames that `encode` appends, to leave with whatever is sent next, and writes
    /// nothing. The caller sees to it that something is sent, by [`Outbox::flush`] at the latest:
    /// at once, if this returns that enough has been appended.
    ///
    /// # Errors
    ///
    /// As of [`Outbox::try_send`].
    pub fn try_append(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<bool, NotSent> {
        let mut state = self.lock_with_room()?;
        encode(&mut state.queue);
        Ok(state.queue.len() >= APPENDED_MAX)
    }

    /// Sends what was appended.
    pub fn flush(&self) {
        // A dead connection is known to everyone by other ways.
        let _ = self.push(self.lock(), |_| {});
    }

    fn lock_with_room(&self) -> Result<MutexGuard<'_, State>, NotSent> {
        let state = self.lock();
        if state.down {
            Err(NotSent::Down)
        } else if state.queue.len() >= BACKLOG_MAX {
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
        self.push(self.lock(), encode)
    }

    /// Sends like [`Outbox::try_send`], but waits for room until the deadline, if there is one.
    ///
    /// # Errors
    ///
    /// The deadline has passed, or the connection is dead.
    pub fn send(
        &self,
        deadline: Option<Instant>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), NotSent> {
        let state = self.lock_when_there_is_room(deadline)?;
        self.push(state, encode).map_err(|Down| NotSent::Down)
    }

    /// Waits for room until the deadline, if there is one. Somebody else may take it.
    ///
    /// # Errors
    ///
    /// The deadline has passed, or the connection is dead.
    pub fn wait_for_room(&self, deadline: Option<Instant>) -> Result<(), NotSent> {
        self.lock_when_there_is_room(deadline).map(drop)
    }

    fn lock_when_there_is_room(
        &self,
        deadline: Option<Instant>,
    ) -> Result<MutexGuard<'_, State>, NotSent> {
        let mut state = self.lock();
        while state.queue.len() >= BACKLOG_MAX && !state.down {
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
        }
    }

    /// Aborts the connection after `time`, unless the watchdog is dropped before.
    pub fn abort_after(self: &Arc<Self>, time: Duration) -> Watchdog {
        let outbox = Arc::clone(self);
        Watchdog::start(time, move || outbox.abort())
    }

    /// Writes what a full socket had stopped, if anything. Called by the I/O thread.
    pub fn resume(&self) {
        if self.stalled.load(Ordering::Acquire) {
            // Take the event, so that the next one is news.
            let _ = self
                .writable
                .poll(&mut Events::with_capacity(1), Some(Duration::ZERO));
            let state = self.lock();
            self.stalled.store(false, Ordering::Release);
            // A failure is known to everyone by `down`; the read that follows sees it as well.
            let _ = self.push(state, |_| {});
        }
    }

    fn push<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        encode: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), Down> {
        if state.down {
            return Err(Down);
        }
        encode(&mut state.queue);
        if !state.queue.is_empty() && !state.writing && !self.stalled.load(Ordering::Acquire) {
            state.writing = true;
            self.write_out(state);
        }
        Ok(())
    }

    /// Writes until the queue is empty or the socket full. The lock is not held while writing.
    fn write_out<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        while !state.queue.is_empty() && !state.down {
            let spare = std::mem::take(&mut state.spare);
            let mut frames = std::mem::replace(&mut state.queue, spare);
            drop(state);
            let (written, result) = self.write(&frames);
            state = self.lock();
            frames.drain(..written);
            if frames.is_empty() {
                if frames.capacity() <= BUFFER_KEPT_MAX {
                    state.spare = frames;
                }
            } else {
                // What is left goes before what has been appended meanwhile.
                frames.append(&mut state.queue);
                state.queue = frames;
            }
            match result {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.stall();
                    break;
                }
                Err(_) => {
                    state.writing = false;
                    drop(state);
                    self.abort();
                    return;
                }
            }
        }
        state.writing = false;
        if state.waiting > 0 && state.queue.len() < BACKLOG_MAX {
            self.room.notify_all();
        }
    }

    /// Leaves the rest to the I/O thread, which is woken when there is room. The state is locked.
    fn stall(&self) {
        self.stalled.store(true, Ordering::Release);
        let socket = self.watched.as_raw_fd();
        // Anew, because one that has fired and was not taken would not fire again.
        let armed = self
            .writable
            .deregister(&EventedFd(&socket))
            .and_then(|()| {
                self.writable.register(
                    &EventedFd(&socket),
                    Token(0),
                    Ready::writable(),
                    PollOpt::edge() | PollOpt::oneshot(),
                )
            });
        if let Err(error) = armed {
            log::warn!("cannot watch a full socket ({error}); closing it");
            self.transport.shut_down();
        }
    }

    /// Writes as much as goes; says how much that was and, if not all, why.
    fn write(&self, frames: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < frames.len() {
            match self.transport.write(&frames[written..]) {
                Ok(0) => return (written, Err(ErrorKind::WriteZero.into())),
                Ok(len) => written += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, Ok(()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
