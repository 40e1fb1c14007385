//! The work queue: where requests that have arrived wait for workers, and workers for requests.
//!
//! Any free worker takes the next request. A worker that finds nothing to do reads the socket
//! itself (see [`crate::amqp::inbox`]).

use crate::amqp::inbox::{Inbox, Lead, READ_TIME_MAX, Sink};
use crate::amqp::incoming::{Delivery, Incoming};
use crate::amqp::outbox::{APPENDED_MAX, LARGE_MIN, Outbox};
use crate::amqp::sync::lock;
use crate::amqp::transport::Down;
use crossbeam_channel::Sender;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the supervisor is told.
pub(crate) enum Event {
    /// Something that is no request has come in on the connection of the attempt of that number.
    Incoming(u64, Incoming),
    /// A worker has finished while the server was to stop.
    Finished,
}

/// One connection, as the workers see it.
pub(crate) struct Session {
    /// Counts a server's attempts to connect, from 1; this is the one that led to it.
    pub number: u64,
    pub inbox: Arc<Inbox>,
    pub outbox: Arc<Outbox>,
}

/// A delivery, and when it arrived.
pub(crate) struct Task {
    pub delivery: Delivery,
    pub arrived: Instant,
}

/// Where requests wait for workers, and workers for requests.
pub(crate) struct WorkQueue {
    state: Mutex<State>,
    /// There is something to do for a worker.
    work: Condvar,
    /// The way to the supervisor.
    events: Sender<Event>,
}

#[derive(Default)]
struct State {
    /// The number of the latest attempt to connect, from 1. What arrives on the connection of an
    /// earlier one has been given to others already.
    number: u64,
    /// That connection, once every channel consumes: nobody begins before.
    session: Option<Arc<Session>>,
    /// What nobody has begun yet.
    backlog: VecDeque<Task>,
    /// Workers that wait to be woken.
    idle: usize,
    /// How many of those have been woken and are still on their way.
    woken: usize,
    /// Workers that execute a request.
    busy: usize,
    /// Whether nothing is to be begun any more.
    stopping: bool,
    /// Whether the workers are to end.
    closed: bool,
}

impl State {
    /// Whether to wake another worker; if so, it is counted. One at a time: it wakes the next if
    /// there is still something waiting then. Much of what is quickly done is done before.
    fn wake_one(&mut self) -> bool {
        let wake = !self.backlog.is_empty() && self.woken == 0 && self.idle > 0;
        self.woken += usize::from(wake);
        wake
    }
}

impl WorkQueue {
    pub fn new(events: Sender<Event>) -> WorkQueue {
        WorkQueue {
            state: Mutex::default(),
            work: Condvar::new(),
            events,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The next request for this worker: waits for it, and reads the socket meanwhile if nobody
    /// else does. `None` when the server has ended.
    pub fn next(&self) -> Option<(Arc<Session>, Task)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let session = state.session.clone().filter(|_| !state.stopping);
            if let Some(session) = session {
                if let Some(task) = state.backlog.pop_front() {
                    state.busy += 1;
                    let wake = state.wake_one();
                    drop(state);
                    if wake {
                        self.work.notify_one();
                    }
                    return Some((session, task));
                }
                if let Some(lead) = session.inbox.try_lead() {
                    drop(state);
                    self.lead(&session, lead);
                    state = self.lock();
                    continue;
                }
            }
            state = self.wait(state);
        }
    }

    fn lead(&self, session: &Session, mut lead: Lead<'_>) {
        session.outbox.flush();
        let read = lead.read(READ_TIME_MAX, |incoming| {
            self.accept(session.number, incoming)
        });
        if read == Err(Down) {
            // The supervisor finds out for itself; until then there is nothing to read.
            self.end_session(session.number);
        }
    }

    /// Waits to be woken. Then it sends the replies that other workers have finished and left for
    /// it to send (see [`WorkQueue::finish`]).
    fn wait<'q>(&'q self, mut state: MutexGuard<'q, State>) -> MutexGuard<'q, State> {
        state.idle += 1;
        state = self
            .work
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
        state.idle -= 1;
        state.woken = state.woken.saturating_sub(1);
        if let Some(session) = state.session.clone() {
            drop(state);
            session.outbox.flush();
            state = self.lock();
        }
        state
    }

    /// Sends what ends a request, its reply and its acknowledgement: `encode` appends them, about
    /// `len` bytes.
    pub fn finish(&self, session: &Session, len: usize, encode: impl Fn(&mut Vec<u8>)) {
        let mut state = self.lock();
        // Two workers, two requests that are quickly done: this worker has the first, and has woken
        // the other for the second. The other sends what is there to be sent when it comes, so this
        // reply can leave with that one in one write. A long one is neither copied nor written
        // under the lock that all workers need.
        let leave = len < APPENDED_MAX && !state.backlog.is_empty() && state.woken > 0;
        match leave.then(|| session.outbox.try_append(&encode)) {
            Some(Ok(enough)) => {
                if enough {
                    drop(state);
                    session.outbox.flush();
                    state = self.lock();
                }
            }
            Some(Err(_)) | None => {
                drop(state);
                // A dead connection is known by other ways, and its requests are given to others.
                let _ = if len >= LARGE_MIN {
                    session.outbox.send_large(None, &encode, || true)
                } else {
                    session.outbox.send(None, &encode)
                };
                state = self.lock();
            }
        }
        state.busy -= 1;
        if state.stopping {
            let _ = self.events.send(Event::Finished);
        }
    }

    /// Takes what has come in on the connection of that number.
    fn accept(&self, number: u64, incoming: Incoming) {
        match incoming {
            Incoming::Delivery(delivery) => {
                let arrived = Instant::now();
                let mut state = self.lock();
                if state.number == number {
                    state.backlog.push_back(Task { delivery, arrived });
                }
            }
            Incoming::Returned(_) => log::debug!("a reply came back, though none is mandatory"),
            Incoming::Channel(..) | Incoming::Blocked(_) | Incoming::Unblocked => {
                // The supervisor may be gone: then nobody needs to know.
                let _ = self.events.send(Event::Incoming(number, incoming));
            }
        }
    }

    /// Wakes a worker if there is something for it to do.
    fn wake(&self) {
        let wake = self.lock().wake_one();
        if wake {
            self.work.notify_one();
        }
    }

    /// Announces a connection on which something may arrive.
    pub fn begin_session(&self, number: u64) {
        let mut state = self.lock();
        state.number = number;
        state.session = None;
        state.backlog.clear();
    }

    /// Lets the workers begin.
    pub fn open_session(&self, session: Session) {
        self.lock().session = Some(Arc::new(session));
        self.wake();
    }

    /// Forgets a connection that is gone. The broker gives its requests to others.
    pub fn end_session(&self, number: u64) {
        let mut state = self.lock();
        if state.number == number {
            state.session = None;
            state.backlog.clear();
        }
    }

    /// Lets nobody begin anything any more.
    pub fn stop(&self) {
        self.lock().stopping = true;
    }

    /// How many workers execute a request; and what nobody has begun, to be given back.
    pub fn take_backlog(&self) -> (usize, VecDeque<Task>) {
        let mut state = self.lock();
        (state.busy, std::mem::take(&mut state.backlog))
    }

    /// Ends the workers, each when it is free.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        // It holds the connection, and that holds us.
        state.session = None;
        drop(state);
        self.work.notify_all();
    }
}

/// Takes what comes in while no worker reads.
pub(crate) struct RequestSink {
    pub queue: Arc<WorkQueue>,
    pub number: u64,
}

impl Sink for RequestSink {
    fn accept(&self, incoming: Incoming) {
        self.queue.accept(self.number, incoming);
    }

    fn done(&self) {
        self.queue.wake();
    }
}
