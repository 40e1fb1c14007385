//! The socket that amiquip and we share.
//!
//! - [`Inbox`] is the way in: whoever waits for a message reads the socket.
//! - [`Outbox`] is the way out. Any thread appends whole frames and, if nobody is writing, writes
//!   them itself: no hop to another thread. What others append meanwhile leaves with the next
//!   write, so the busier the connection, the fewer the system calls.
//! - [`Stream`] is what amiquip takes for the socket: it reads what the inbox leaves to it, and
//!   writes into the outbox.
//!
//! Who owns what: amiquip's I/O thread owns the `Stream` and drops it when it ends, for whatever
//! reason; that closes the socket and tells everyone ([`Opened::down`]).

use crate::inbox::{Inbox, Sink};
#[cfg(feature = "tls")]
use crate::tls::TlsStream;
use crossbeam_channel::{Receiver, Sender, bounded};
use mio::unix::EventedFd;
use mio::{Evented, Events, Poll, PollOpt, Ready, Token};
use std::convert::Infallible;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How much may wait for the broker to read, in bytes, before senders have to wait as well.
/// Beyond it lie the kernel's socket buffers, a few MiB more.
const BACKLOG_MAX: usize = 1 << 20;

/// How much may be appended before it is sent in any case, in bytes.
const APPENDED_MAX: usize = 16 << 10;

/// A buffer that a large message has grown beyond this is given back, in bytes.
const BUFFER_KEPT_MAX: usize = 1 << 20;

/// How long a write blocks when the socket is full: as little as the kernel's clock allows, some
/// milliseconds. The socket is a blocking one, because a leader blocks in its reads.
const WRITE_TIME: Duration = Duration::from_millis(1);

/// A channel on which nothing is ever sent: it says something by being disconnected.
pub(crate) type Never = Infallible;

/// The ends of a connection, for amiquip and for us.
pub(crate) struct Opened {
    /// amiquip's end.
    pub stream: Stream,
    /// Our ends.
    pub inbox: Arc<Inbox>,
    pub outbox: Arc<Outbox>,
    /// Disconnected when the connection is dead.
    pub down: Receiver<Never>,
}

/// Shares a connected socket out. What arrives while nobody reads it goes to `sink`.
///
/// # Errors
///
/// The operating system refuses an option or another descriptor.
pub(crate) fn share(transport: Transport, sink: Box<dyn Sink>) -> io::Result<Opened> {
    let socket = transport.socket();
    // Nagle's algorithm would hold a small write back until the last one is acknowledged, which
    // the broker delays: 44 ms a call.
    socket.set_nodelay(true)?;
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(WRITE_TIME))?;
    let outbox = Arc::new(Outbox {
        state: Mutex::new(OutboxState::default()),
        room: Condvar::new(),
        stalled: AtomicBool::new(false),
        writable: Poll::new()?,
        watched: socket.try_clone()?,
        transport: transport.clone(),
    });
    // Registered now, armed when needed.
    outbox.writable.register(
        &EventedFd(&outbox.watched.as_raw_fd()),
        Token(0),
        Ready::empty(),
        PollOpt::edge() | PollOpt::oneshot(),
    )?;
    let inbox = Arc::new(Inbox::new(transport, sink)?);
    let (alive, down) = bounded(0);
    let stream = Stream {
        inbox: Arc::clone(&inbox),
        outbox: Arc::clone(&outbox),
        _alive: alive,
    };
    Ok(Opened {
        stream,
        inbox,
        outbox,
        down,
    })
}

/// What carries the bytes.
#[derive(Clone)]
pub(crate) enum Transport {
    Plain(Arc<TcpStream>),
    #[cfg(feature = "tls")]
    Tls(Arc<TlsStream>),
}

impl Transport {
    pub fn socket(&self) -> &TcpStream {
        match self {
            Transport::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.socket(),
        }
    }

    /// Reads, and blocks for as long as the socket is set to. One thread at a time may.
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => (&**socket).read(out),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.read(out),
        }
    }

    /// Writes as much as goes; says how much that was. One thread at a time may, and what was not
    /// written must be given again.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => (&**socket).write(bytes),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.write(bytes),
        }
    }

    /// Ends the connection: whoever reads or writes gets an error.
    pub fn shut_down(&self) {
        // An error means that it is not connected any more, which is what we want.
        let _ = self.socket().shutdown(Shutdown::Both);
    }
}

/// What amiquip takes for the socket.
pub(crate) struct Stream {
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    _alive: Sender<Never>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.outbox.abort();
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.outbox.resume();
        match self.inbox.read_feed(out) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.inbox.stand_in();
                self.inbox.read_feed(out)
            }
            done => done,
        }
    }
}

impl Write for Stream {
    /// Accepts everything: what does not fit the socket now follows when it does. amiquip itself
    /// only writes methods, a few dozen bytes each.
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        match self
            .outbox
            .push(self.outbox.lock(), |out| out.extend_from_slice(frames))
        {
            Ok(()) => Ok(frames.len()),
            Err(Down) => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Evented for Stream {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inbox.register(poll, token, interest, opts)?;
        // When the socket has room again for what stalled, amiquip's thread is told to read, and
        // `read` writes the rest.
        EventedFd(&self.outbox.writable.as_raw_fd()).register(poll, token, Ready::readable(), opts)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inbox.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.outbox.writable.as_raw_fd()).deregister(poll)?;
        self.inbox.deregister(poll)
    }
}

impl amiquip::IoStream for Stream {}

/// The connection is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Down;

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
    state: Mutex<OutboxState>,
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
struct OutboxState {
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
    /// Sends the frames that `encode` appends, or leaves them to the thread that is writing.
    /// Never blocks.
    ///
    /// # Errors
    ///
    /// The backlog is full, or the connection dead; then `encode` has not been called.
    pub fn try_send(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), NotSent> {
        let state = self.lock_with_room()?;
        self.push(state, encode).map_err(|Down| NotSent::Down)
    }

    /// Takes the frames that `encode` appends, to leave with whatever is sent next; the caller
    /// sees to it that something is, by [`Outbox::flush`] at the latest.
    ///
    /// # Errors
    ///
    /// As of [`Outbox::try_send`].
    pub fn try_append(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<(), NotSent> {
        let mut state = self.lock_with_room()?;
        encode(&mut state.queue);
        if state.queue.len() >= APPENDED_MAX {
            return self.push(state, |_| {}).map_err(|Down| NotSent::Down);
        }
        Ok(())
    }

    /// Sends what was appended.
    pub fn flush(&self) {
        // A dead connection is known to everyone by other ways.
        let _ = self.push(self.lock(), |_| {});
    }

    fn lock_with_room(&self) -> Result<MutexGuard<'_, OutboxState>, NotSent> {
        let state = self.lock();
        if state.down {
            Err(NotSent::Down)
        } else if state.queue.len() >= BACKLOG_MAX {
            Err(NotSent::Full)
        } else {
            Ok(state)
        }
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
        self.push(state, encode).map_err(|Down| NotSent::Down)
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

    /// Aborts the connection after `time`, unless the fuse is dropped before. It gives a deadline
    /// to what has none: amiquip's own round trips.
    pub fn fuse(self: &Arc<Self>, time: Duration) -> Fuse {
        let (armed, disarmed) = bounded::<Never>(0);
        let outbox = Arc::clone(self);
        let burn = move || {
            if disarmed.recv_timeout(time) == Err(crossbeam_channel::RecvTimeoutError::Timeout) {
                outbox.abort();
            }
        };
        // Owned by nobody: it ends with the fuse, or after `time`.
        if thread::Builder::new()
            .name("fibrpc-fuse".to_owned())
            .spawn(burn)
            .is_err()
        {
            log::warn!("cannot start a thread to watch over a deadline; going on without");
        }
        Fuse { _armed: armed }
    }

    /// Writes what a full socket had stopped, if anything. Called by the I/O thread.
    fn resume(&self) {
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
        mut state: MutexGuard<'a, OutboxState>,
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
    fn write_out<'a>(&'a self, mut state: MutexGuard<'a, OutboxState>) {
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

    fn lock(&self) -> MutexGuard<'_, OutboxState> {
        // A panic in between leaves nothing half done that a later sender could not live with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a connection when its time is up, unless dropped before. See [`Outbox::fuse`].
pub(crate) struct Fuse {
    _armed: Sender<Never>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Our end of a connection, and the far end as a plain socket.
    fn pair() -> (Opened, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let sink = Box::new(crate::inbox::Nowhere);
        (share(Transport::Plain(Arc::new(near)), sink).unwrap(), far)
    }

    #[test]
    fn what_a_full_socket_holds_back_follows_in_order_when_the_far_end_reads() {
        let (opened, mut far) = pair();
        let Opened {
            stream,
            outbox,
            down,
            ..
        } = opened;
        // The I/O thread's part: poll, and read when told to.
        let poll = Poll::new().unwrap();
        poll.register(&stream, Token(9), Ready::readable(), PollOpt::edge())
            .unwrap();
        let io = thread::spawn(move || {
            let mut stream = stream;
            let mut events = Events::with_capacity(8);
            loop {
                poll.poll(&mut events, Some(Duration::from_secs(20)))
                    .unwrap();
                match stream.read(&mut [0; 16]) {
                    Ok(0) => return,
                    Ok(_) => panic!("the far end sends nothing"),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
        });
        let mut sent = 0_u32;
        while outbox
            .try_send(|out| out.extend((sent..sent + 1000).flat_map(u32::to_be_bytes)))
            .is_ok()
        {
            sent += 1000;
        }
        assert_eq!(
            outbox.try_send(|_| panic!("not called when full")),
            Err(NotSent::Full)
        );
        let soon = Some(Instant::now() + Duration::from_millis(20));
        assert_eq!(
            outbox.send(soon, |_| panic!("not called when full")),
            Err(NotSent::Full)
        );

        let waiting = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || outbox.send(None, |out| out.extend(sent.to_be_bytes()))
        });
        for expected in 0..=sent {
            let mut number = [0; 4];
            far.read_exact(&mut number).unwrap();
            assert_eq!(u32::from_be_bytes(number), expected);
        }
        assert_eq!(waiting.join().unwrap(), Ok(()));
        drop(far);
        io.join().unwrap();
        assert!(down.recv().is_err());
    }

    #[test]
    fn a_burnt_fuse_ends_the_connection_and_wakes_who_waits_for_room() {
        let (opened, _far) = pair();
        let outbox = Arc::clone(&opened.outbox);
        while outbox.try_send(|out| out.extend([0; 4096])).is_ok() {}
        let _fuse = outbox.fuse(Duration::from_millis(50));
        assert_eq!(outbox.send(None, |_| {}), Err(NotSent::Down));
        assert_eq!(outbox.try_send(|_| {}), Err(NotSent::Down));
    }

    #[test]
    fn a_dropped_fuse_does_nothing() {
        let (opened, _far) = pair();
        drop(opened.outbox.fuse(Duration::from_millis(20)));
        thread::sleep(Duration::from_millis(60));
        assert_eq!(opened.outbox.try_send(|out| out.push(0)), Ok(()));
    }
}
