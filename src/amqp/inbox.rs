//! The way in: who reads the socket.
//!
//! A thread that hands a message to another pays for it twice, once to wake it and once to be
//! woken. So here the thread that waits for a message reads the socket itself: it becomes the
//! leader, waits for bytes, and dispatches whatever comes in, to itself and to others. There is
//! one leader at a time. While there is none, because everyone is busy or nobody waits, amiquip's
//! I/O thread follows: the socket is then watched for it, and it dispatches to the connection's
//! [`Sink`]. (The pattern is known as Leader/Followers, from Schmidt's paper of that name.)
//!
//! What is not ours ([`super::incoming`]) is left to amiquip: the leader puts it into a buffer that
//! amiquip reads instead of the socket ([`super::stream::Stream`]).

use crate::amqp::incoming::{Assembler, CloseReason, Incoming, Malformed, Taken, Tune, frame_len};
use crate::amqp::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::amqp::sync::channel::Sender;
use crate::amqp::sync::net::TcpStream;
use crate::amqp::sync::poll::unix::EventedFd;
use crate::amqp::sync::poll::{
    Evented, Events, Poll, PollOpt, Ready, Registration, SetReadiness, Token,
};
use crate::amqp::sync::{Instant, Mutex, MutexGuard, lock};
use crate::amqp::transport::{Down, Transport};
use crate::amqp::wait::{Spin, Wait};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::sync::{OnceLock, TryLockError};
use std::time::Duration;

/// How much is read from the socket at a time, in bytes.
const READ_LEN: usize = 64 << 10;

/// How often amiquip's I/O thread reads a large message before it sees what else there is to do.
const READS_MAX: usize = 16;

/// How long a leader blocks at most before it looks around.
pub(crate) const READ_TIME_MAX: Duration = Duration::from_millis(250);

/// How often amiquip gets a sign of life, at most. It counts what it reads as that, and gives a
/// broker up that is silent for two heartbeats; but a busy broker sends no heartbeats, and what it
/// does send does not come by amiquip.
const LIFE_SIGN_INTERVAL: Duration = Duration::from_secs(1);

/// How many bytes are told of a peer that sends something else than frames.
const SHOWN_LEN: usize = 24;
const HEARTBEAT_FRAME: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];

/// Where amiquip's I/O thread puts what arrives while no thread of ours leads.
pub(crate) trait Sink: Send + Sync {
    /// Something has come in.
    fn accept(&self, incoming: Incoming);
    /// That was all for now.
    fn done(&self);
}

/// For a connection on which nothing but its events is of interest.
impl Sink for Sender<Incoming> {
    fn accept(&self, incoming: Incoming) {
        let _ = self.send(incoming);
    }

    fn done(&self) {}
}

/// The way in.
pub(crate) struct Inbox {
    /// Held by the leader.
    reader: Mutex<Reader>,
    transport: Transport,
    /// Becomes readable when the socket does, while it is watched. Another descriptor than the
    /// transport's, because a socket can be in a poll once.
    watch: Poll,
    watched: TcpStream,
    /// Whether the socket is being watched, as far as is known.
    watching: AtomicBool,
    /// What amiquip is to read.
    feed: Mutex<Feed>,
    /// Tells amiquip to do that.
    registration: Registration,
    call: SetReadiness,
    sink: Box<dyn Sink>,
    /// Why the broker has closed the connection, if it said so. amiquip forgets that when the
    /// socket then fails before it has answered.
    close_reason: OnceLock<CloseReason>,
    /// What the broker has offered in the handshake.
    tune: OnceLock<Tune>,
    opened: Instant,
    /// When anything was read last, in nanoseconds after that.
    latest_read: AtomicU64,
}

struct Reader {
    /// What has arrived and is not yet dispatched is `bytes[..filled]`.
    bytes: Vec<u8>,
    filled: usize,
    assembler: Assembler,
    /// How long a read blocks, as the socket is set.
    read_time: Duration,
    /// When amiquip last got anything.
    life_sign: Instant,
    spin: Spin,
}

#[derive(Default)]
struct Feed {
    bytes: Vec<u8>,
    /// How much of it amiquip has read.
    read: usize,
    /// How the connection ended, if it has.
    end: Option<End>,
}

enum End {
    Closed,
    /// The kind of the error, and what it says.
    Failed(ErrorKind, String),
}

impl Inbox {
    /// # Errors
    ///
    /// The operating system refuses another descriptor.
    pub fn new(transport: Transport, sink: Box<dyn Sink>) -> io::Result<Inbox> {
        let watched = transport.socket().try_clone()?;
        let watch = Poll::new()?;
        watch.register(
            &EventedFd(&watched.as_raw_fd()),
            Token(0),
            Ready::empty(),
            PollOpt::level() | PollOpt::oneshot(),
        )?;
        transport.socket().set_read_timeout(Some(READ_TIME_MAX))?;
        let (registration, call) = Registration::new2();
        let inbox = Inbox {
            reader: Mutex::new(Reader {
                bytes: Vec::new(),
                filled: 0,
                assembler: Assembler::default(),
                read_time: READ_TIME_MAX,
                life_sign: Instant::now(),
                spin: Spin::default(),
            }),
            transport,
            watch,
            watched,
            watching: AtomicBool::new(false),
            feed: Mutex::default(),
            registration,
            call,
            sink,
            close_reason: OnceLock::new(),
            tune: OnceLock::new(),
            opened: Instant::now(),
            latest_read: AtomicU64::new(0),
        };
        inbox.watch();
        Ok(inbox)
    }

    /// Takes the lead, if nobody has it.
    pub fn try_lead(&self) -> Option<Lead<'_>> {
        let lead = self.try_read()?;
        // Nobody else needs to know of what we are about to read.
        if self.watching.swap(false, Ordering::AcqRel) {
            self.rearm(Ready::empty());
        }
        Some(lead)
    }

    fn try_read(&self) -> Option<Lead<'_>> {
        let reader = match self.reader.try_lock() {
            Ok(reader) => reader,
            Err(TryLockError::WouldBlock) => return None,
            Err(TryLockError::Poisoned(_)) => {
                // Nothing of ours panics while it leads. If something does, the connection is
                // done for: what had arrived is half dispatched.
                self.fail(&io::Error::other("a thread panicked while it read"));
                return None;
            }
        };
        Some(Lead {
            inbox: self,
            reader: Some(reader),
        })
    }

    /// Has the socket watched for amiquip's thread.
    fn watch(&self) {
        self.watching.store(true, Ordering::Release);
        self.rearm(Ready::readable());
    }

    fn rearm(&self, interest: Ready) {
        let opts = PollOpt::level() | PollOpt::oneshot();
        let fd = self.watched.as_raw_fd();
        if let Err(error) = self
            .watch
            .reregister(&EventedFd(&fd), Token(0), interest, opts)
        {
            log::warn!("cannot watch a socket ({error}); closing it");
            self.transport.shut_down();
        }
    }

    /// Reads in place of a leader, if there is none and the socket has something. Called by
    /// amiquip's I/O thread.
    pub fn follow(&self) {
        let Some(mut lead) = self.try_read() else {
            // Whoever leads has the socket watched again afterwards. But a watch that has fired
            // tells of nothing more until that is taken; and if it was, and the leader has left
            // meanwhile, it is for us to watch again.
            if self.has_fired() {
                drop(self.try_read());
            }
            return;
        };
        // Only now does it hold that what is there to read stays there.
        if self.has_fired() {
            let _ = lead.read_what_is_there(|incoming| self.sink.accept(incoming));
            drop(lead);
            self.sink.done();
        } else {
            // The watch has not fired, so it still holds.
            lead.reader = None;
        }
    }

    /// Why the broker has closed the connection, if it said so.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.close_reason.get()
    }

    /// What the broker has offered in the handshake, once it has.
    pub fn tune(&self) -> Option<&Tune> {
        self.tune.get()
    }

    /// For how long nothing has come in.
    pub fn silence(&self) -> Duration {
        let latest = Duration::from_nanos(self.latest_read.load(Ordering::Relaxed));
        self.opened.elapsed().saturating_sub(latest)
    }

    /// Gives amiquip a frame to read.
    fn pass_on(&self, frame: &[u8]) {
        let mut feed = self.feed();
        let at = feed.bytes.len();
        feed.bytes.extend_from_slice(frame);
        if let Some(close_reason) = CloseReason::from_frame(frame) {
            let _ = self.close_reason.set(close_reason); // the first counts
        } else if let Some(tune) = Tune::from_frame(frame) {
            // amiquip takes the smaller of the broker's and ours, and 0 for none at all: a broker
            // that falls silent would never be found out. The broker takes what we answer.
            if tune.heartbeat == 0 {
                Tune::set_heartbeat(&mut feed.bytes[at..], u16::MAX);
            }
            let _ = self.tune.set(tune);
        }
    }

    /// Whether the watch has fired; if so, that is taken.
    fn has_fired(&self) -> bool {
        let fired = self
            .watch
            .poll(&mut Events::with_capacity(1), Some(Duration::ZERO));
        matches!(fired, Ok(count) if count > 0)
    }

    /// What amiquip is to read; as of [`io::Read::read`].
    pub fn read_feed(&self, out: &mut [u8]) -> io::Result<usize> {
        let mut feed = self.feed();
        let left = &feed.bytes[feed.read..];
        if !left.is_empty() {
            let len = left.len().min(out.len());
            out[..len].copy_from_slice(&left[..len]);
            feed.read += len;
            if feed.read == feed.bytes.len() {
                feed.bytes.clear();
                feed.read = 0;
            }
            return Ok(len);
        }
        match &feed.end {
            None => Err(ErrorKind::WouldBlock.into()),
            Some(End::Closed) => Ok(0),
            Some(End::Failed(kind, reason)) => Err(io::Error::new(*kind, reason.clone())),
        }
    }

    /// How much memory the way in holds, in bytes.
    #[cfg(any(all(test, not(shuttle)), fuzzing))]
    pub fn memory(&self) -> usize {
        let mut reader = lock(&self.reader);
        let buffers = reader.bytes.capacity() + self.feed().bytes.capacity();
        buffers + reader.assembler.memory()
    }

    fn fail(&self, error: &io::Error) {
        self.end(End::Failed(error.kind(), error.to_string()));
    }

    fn end(&self, end: End) {
        self.feed().end.get_or_insert(end);
        self.call_amiquip();
    }

    fn call_amiquip(&self) {
        // Each call is an event of its own, whatever the readiness was before.
        if let Err(error) = self
            .call
            .set_readiness(Ready::readable() | Ready::writable())
        {
            log::warn!("cannot wake the I/O thread: {error}");
        }
    }

    fn feed(&self) -> MutexGuard<'_, Feed> {
        lock(&self.feed)
    }
}

impl Evented for Inbox {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.registration.register(poll, token, interest, opts)?;
        // A poll is itself something that can be polled.
        EventedFd(&self.watch.as_raw_fd()).register(poll, token, Ready::readable(), opts)?;
        // There is always room to write: see `Stream::write`.
        self.call_amiquip();
        Ok(())
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        // Fires again whatever it is interested in and ready for.
        self.registration.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.watch.as_raw_fd()).deregister(poll)?;
        poll.deregister(&self.registration)
    }
}

/// The right to read the socket, and the duty to dispatch what comes in.
pub(crate) struct Lead<'a> {
    inbox: &'a Inbox,
    /// `None` only while being dropped.
    reader: Option<MutexGuard<'a, Reader>>,
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        if self.reader.take().is_some() {
            // In this order: if amiquip's thread looked while we still led, it would leave again,
            // and nobody would watch.
            self.inbox.watch();
        }
    }
}

impl Lead<'_> {
    /// Waits for a message to arrive, for about `time` and never much longer than
    /// [`READ_TIME_MAX`], and dispatches whatever arrives. Nothing may arrive. Before it blocks, it
    /// asks the socket again and again for up to `spin`, if that pays ([`Spin`]).
    ///
    /// # Errors
    ///
    /// The connection is dead.
    pub fn read(
        &mut self,
        time: Duration,
        spin: Duration,
        mut take: impl FnMut(Incoming),
    ) -> Result<(), Down> {
        let inbox = self.inbox;
        let reader = self.reader.as_deref_mut().ok_or(Down)?;
        let until = Instant::now() + time.min(READ_TIME_MAX);
        loop {
            let read = reader.wait(&inbox.transport, until, spin);
            // Who waits for a message has nothing to do about a part of one.
            if !reader.take(inbox, read, &mut take)? || Instant::now() >= until {
                return Ok(());
            }
        }
    }

    /// Reads what is there, or a good part of it, and dispatches it; does not wait.
    fn read_what_is_there(&mut self, mut take: impl FnMut(Incoming)) -> Result<(), Down> {
        let inbox = self.inbox;
        let reader = self.reader.as_deref_mut().ok_or(Down)?;
        for _ in 0..READS_MAX {
            let read = reader.fill(&inbox.transport, Wait::Not);
            let was_all = read.is_err();
            if !reader.take(inbox, read, &mut take)? || was_all {
                break;
            }
        }
        Ok(())
    }
}

impl Reader {
    /// Has a read block for about `time`. As it costs a system call, it is left as it is while
    /// that will do.
    fn set_read_time(&mut self, transport: &Transport, time: Duration) -> io::Result<()> {
        let time = time.clamp(Duration::from_millis(1), READ_TIME_MAX);
        // Amid a message, a little less is left each time.
        let slack = match self.assembler.has_begun() {
            true => READ_TIME_MAX / 8,
            false => Duration::ZERO,
        };
        if self.read_time > time + slack || self.read_time < time / 2 {
            transport.socket().set_read_timeout(Some(time))?;
            self.read_time = time;
        }
        Ok(())
    }

    /// Reads once something has arrived.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::WouldBlock`] or [`ErrorKind::TimedOut`]: nothing has, until that time.
    fn wait(&mut self, transport: &Transport, until: Instant, spin: Duration) -> io::Result<usize> {
        let spin = spin.min(until.saturating_duration_since(Instant::now()));
        let mut state = self.spin;
        let found = state.ask(spin, || match self.fill(transport, Wait::Not) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            done => Some(done),
        });
        self.spin = state;
        if let Some(done) = found {
            return done;
        }
        let began = Instant::now();
        let left = until.saturating_duration_since(began);
        if left.is_zero() {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.set_read_time(transport, left)?;
        let done = self.fill(transport, Wait::AsSet);
        if !spin.is_zero() {
            self.spin.slept(began.elapsed() <= spin);
        }
        done
    }

    fn fill(&mut self, transport: &Transport, wait: Wait) -> io::Result<usize> {
        if self.bytes.len() < self.filled + READ_LEN {
            self.bytes.resize(self.filled + READ_LEN, 0);
        }
        let behind = &mut self.bytes[self.filled..];
        // Until what is in the buffer has been taken, it is its turn.
        let place = match self.filled {
            0 => self.assembler.place().unwrap_or_default(),
            _ => &mut [],
        };
        let room = place.len();
        let len = transport.read(place, behind, wait)?;
        self.assembler.put(len.min(room));
        self.filled += len.saturating_sub(room);
        Ok(len)
    }

    /// Dispatches what was read; says whether a message has begun, and nothing else has come.
    ///
    /// # Errors
    ///
    /// The connection is dead.
    fn take(
        &mut self,
        inbox: &Inbox,
        read: io::Result<usize>,
        take: &mut impl FnMut(Incoming),
    ) -> Result<bool, Down> {
        match read {
            Ok(0) => {
                inbox.end(End::Closed);
                Err(Down)
            }
            Ok(_) => self.dispatch(inbox, take),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                // With TLS, a part of a record is nothing yet.
                Ok(self.assembler.has_begun())
            }
            Err(error) => {
                inbox.fail(&error);
                Err(Down)
            }
        }
    }

    /// Dispatches what has come; says whether a message has begun, and none has been completed.
    ///
    /// # Errors
    ///
    /// The connection is dead: a frame was malformed.
    fn dispatch(&mut self, inbox: &Inbox, take: &mut impl FnMut(Incoming)) -> Result<bool, Down> {
        let mut at = 0;
        let mut taken = false;
        let mut fed = false;
        loop {
            let bytes = &self.bytes[at..self.filled];
            match self.assembler.take(bytes) {
                Ok(Some(Taken { len, parsed })) => {
                    if parsed.pass_on {
                        inbox.pass_on(&bytes[..len]);
                        fed = true;
                    }
                    if let Some(incoming) = parsed.incoming {
                        take(incoming);
                        taken = true;
                    }
                    at += len;
                }
                Ok(None) => break,
                Err(Malformed) => {
                    // amiquip would take what is no frame for the beginning of a large one. A
                    // message's content is not to be told.
                    let reason = if self.assembler.is_amid_a_frame() || frame_len(bytes).is_ok() {
                        "the broker sent a malformed frame".to_owned()
                    } else {
                        let shown = bytes[..bytes.len().min(SHOWN_LEN)].escape_ascii();
                        format!("what it sends is not AMQP 0-9-1: \"{shown}\"")
                    };
                    inbox.fail(&io::Error::new(ErrorKind::InvalidData, reason));
                    self.filled = 0;
                    return Err(Down);
                }
            }
        }
        let now = Instant::now();
        let since = now.duration_since(inbox.opened).as_nanos() as u64;
        inbox.latest_read.store(since, Ordering::Relaxed);
        if !fed && now.duration_since(self.life_sign) >= LIFE_SIGN_INTERVAL {
            inbox.feed().bytes.extend_from_slice(&HEARTBEAT_FRAME);
            fed = true;
        }
        self.bytes.copy_within(at..self.filled, 0);
        self.filled -= at;
        if fed {
            self.life_sign = now;
            inbox.call_amiquip();
        }
        Ok(!taken && self.assembler.has_begun())
    }
}
