//! The work queue: where requests that have arrived wait for workers, and workers for requests.
//!
//! Any free worker takes the next request. A worker that finds nothing to do reads the socket
//! itself (see [`crate::amqp::inbox`]).
//!
//! A request is delivered on a channel, and answered and acknowledged there. If the channel ends
//! meanwhile, the broker delivers the request again, perhaps to us: then it is not begun a second
//! time, and the answer goes to where it has come back. Until it does, it is an *orphan*. It may come
//! back before we are told that the channel has ended, which is said on another one; so one that has
//! come back, while its like is executed, waits until that channel has given a sign of life.

use crate::amqp::backlog::Backlog;
use crate::amqp::channel::Channel;
use crate::amqp::frame::{Publish, put_ack, put_qos};
use crate::amqp::inbox::{Inbox, Lead, READ_TIME_MAX, Sink};
use crate::amqp::incoming::{ChannelEvent, CloseReason, Delivery, Incoming};
use crate::amqp::outbox::{APPENDED_MAX, NotSent, Outbox};
use crate::amqp::sync::atomic::{AtomicUsize, Ordering};
use crate::amqp::sync::channel::Sender;
use crate::amqp::sync::{Condvar, Instant, Mutex, MutexGuard, lock};
use crate::amqp::transport::Down;
use crate::message::MESSAGE_MAX;
use crate::server::suspects::{Key, Suspects};
use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

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

/// A request that nobody has begun yet.
struct Task {
    delivery: Delivery,
    arrived: Instant,
    channel: Arc<Channel>,
    key: Key,
    /// It is not begun until this channel has given a sign of life, or is known to be closed: there, a
    /// request like it is being executed, and this may be the same one, come back.
    held_for: Option<u16>,
    /// That channel is alive: so this is another request.
    is_another: bool,
}

/// What a worker is to do.
pub(crate) struct Job {
    pub delivery: Delivery,
    pub arrived: Instant,
    /// Why the reply to this request cannot be sent, if that is known: it has been tried.
    pub guilty: Option<CloseReason>,
}

/// A request that is being executed.
struct Execution {
    key: Key,
    /// Where it is to be answered; `None` for an orphan.
    place: Option<Place>,
}

struct Place {
    channel: Arc<Channel>,
    tag: u64,
}

/// Where requests wait for workers, and workers for requests.
pub(crate) struct WorkQueue {
    state: Mutex<State>,
    /// There is something to do for a worker.
    work: Condvar,
    /// The way to the supervisor.
    events: Sender<Event>,
    prefetch: u16,
    /// The longest reply that the broker takes, as far as is known, in bytes.
    message_max: AtomicUsize,
    /// What makes keys of requests, as nobody outside can.
    hashing: RandomState,
}

#[derive(Default)]
struct State {
    /// The number of the latest attempt to connect, from 1. What arrives on the connection of an
    /// earlier one has been given to others already.
    number: u64,
    /// That connection, once every channel consumes: nobody begins before.
    session: Option<Arc<Session>>,
    /// Its channels on which requests come.
    channels: HashMap<u16, Arc<Channel>>,
    /// What nobody has begun yet.
    backlog: VecDeque<Task>,
    /// What each worker is executing.
    executing: Vec<Option<Execution>>,
    /// Requests whose replies have cost a channel, or may have.
    suspects: Suspects,
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

    /// Whether a request may be begun now. One that may be the same as one that is being executed is
    /// held; what it is held for is asked for a sign of life.
    fn may_begin(
        task: &mut Task,
        executing: &[Option<Execution>],
        suspects: &Suspects,
        prefetch: u16,
    ) -> bool {
        if task.held_for.is_some() || !suspects.may_begin(task.key) {
            return false;
        }
        if !task.delivery.redelivered || task.is_another {
            return true;
        }
        // On its own channel it is another, for that one is not acknowledged there.
        let place = executing
            .iter()
            .flatten()
            .filter(|execution| execution.key == task.key)
            .filter_map(|execution| execution.place.as_ref())
            .find(|place| place.channel.id() != task.channel.id());
        if let Some(place) = place {
            task.held_for = Some(place.channel.id());
            place.channel.say(|out, id| put_qos(out, id, prefetch));
        }
        place.is_none()
    }

    /// Gives the next request to a worker.
    fn begin(&mut self, worker: usize, prefetch: u16) -> Option<Job> {
        let (executing, suspects) = (&self.executing, &self.suspects);
        let at = self
            .backlog
            .iter_mut()
            .position(|task| State::may_begin(task, executing, suspects, prefetch))?;
        let task = self.backlog.remove(at)?;
        let guilty = match task.delivery.redelivered {
            true => self.suspects.begin(task.key),
            false => None,
        };
        self.busy += 1;
        self.executing[worker] = Some(Execution {
            key: task.key,
            place: Some(Place {
                channel: task.channel,
                tag: task.delivery.tag,
            }),
        });
        Some(Job {
            delivery: task.delivery,
            arrived: task.arrived,
            guilty,
        })
    }

    /// Takes a request that has arrived. It waits for a worker, unless it is an orphan's.
    fn arrive(&mut self, delivery: Delivery, key: Key, prefetch: u16) {
        // Of a channel that is closed: the broker gives it to others.
        let Some(channel) = self.channels.get(&delivery.channel).cloned() else {
            return;
        };
        if prefetch == 1 {
            // It comes after the broker has seen the last acknowledgement.
            self.suspects.clear(delivery.channel);
        }
        let redelivered = delivery.redelivered;
        if redelivered {
            let answered_on = self.suspects.has_come_back(key);
            if let Some(channel) = answered_on.and_then(|id| self.channels.get(&id)) {
                channel.say(|out, id| put_qos(out, id, prefetch));
            }
        }
        self.backlog.push_back(Task {
            delivery,
            arrived: Instant::now(),
            channel,
            key,
            held_for: None,
            is_another: false,
        });
        if redelivered {
            self.adopt_orphans();
        }
    }

    /// Lets what was held for a channel be begun.
    fn release(&mut self, id: u16, is_alive: bool) {
        for task in &mut self.backlog {
            let told = task.held_for.take_if(|held_for| *held_for == id);
            task.is_another |= told.is_some() && is_alive;
        }
    }

    /// Has the answers to orphans go to where these have come back.
    fn adopt_orphans(&mut self) {
        let executing = self.executing.iter_mut().flatten();
        for orphan in executing.filter(|execution| execution.place.is_none()) {
            let has_come_back = |task: &Task| {
                task.delivery.redelivered && !task.is_another && task.key == orphan.key
            };
            if let Some(at) = self.backlog.iter().position(has_come_back)
                && let Some(task) = self.backlog.remove(at)
            {
                let (channel, tag) = (task.channel, task.delivery.tag);
                orphan.place = Some(Place { channel, tag });
            }
        }
    }

    /// Forgets a channel. What came on it, the broker delivers again.
    fn forget_channel(&mut self, id: u16) {
        self.channels.remove(&id);
        self.backlog.retain(|task| task.channel.id() != id);
        for execution in self.executing.iter_mut().flatten() {
            execution.place.take_if(|place| place.channel.id() == id);
        }
        self.adopt_orphans();
        self.release(id, false);
    }

    /// Forgets the connection.
    fn forget_session(&mut self) {
        self.session = None;
        self.channels.clear();
        self.backlog.clear();
        for execution in self.executing.iter_mut().flatten() {
            execution.place = None;
        }
    }
}

impl WorkQueue {
    pub fn new(events: Sender<Event>, workers: usize, prefetch: u16) -> WorkQueue {
        WorkQueue {
            state: Mutex::new(State {
                executing: (0..workers).map(|_| None).collect(),
                ..State::default()
            }),
            work: Condvar::new(),
            events,
            prefetch,
            message_max: AtomicUsize::new(MESSAGE_MAX),
            hashing: RandomState::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The longest reply that the broker takes, as far as is known, in bytes.
    pub fn message_max(&self) -> usize {
        self.message_max.load(Ordering::Relaxed)
    }

    /// The next request for the worker of that number, from 0: waits for it, and reads the socket
    /// meanwhile if nobody else does. `None` when the server has ended.
    pub fn next(&self, worker: usize) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let session = state.session.clone().filter(|_| !state.stopping);
            if let Some(session) = session {
                if let Some(job) = state.begin(worker, self.prefetch) {
                    let wake = state.wake_one();
                    drop(state);
                    if wake {
                        self.work.notify_one();
                    }
                    return Some(job);
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
        let spin = Duration::ZERO;
        let read = lead.read(READ_TIME_MAX, spin, |incoming| {
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

    /// Ends what the worker of that number has begun: sends the reply, if there is to be one, and
    /// the acknowledgement.
    pub fn finish(&self, worker: usize, reply: Option<&Publish<'_>>) {
        let mut state = self.lock();
        while let Some(execution) = &state.executing[worker] {
            let key = execution.key;
            // An orphan's answer goes to its caller all the same; whoever gets the request again
            // acknowledges it.
            let (channel, tag) = match (&execution.place, reply) {
                (Some(place), _) => (Arc::clone(&place.channel), Some(place.tag)),
                (None, Some(_)) => match state.channels.values().next() {
                    Some(channel) => (Arc::clone(channel), None),
                    None => break, // no connection: it is delivered and executed again
                },
                (None, None) => break,
            };
            if reply.is_some() {
                state.suspects.sent(channel.id(), key, self.prefetch);
            }
            let on_trial = state.suspects.is_on_trial(key);
            let encode = |out: &mut Backlog, id: u16| {
                if let Some(reply) = reply {
                    out.publish(id, reply);
                }
                out.append(|out| {
                    if let Some(tag) = tag {
                        put_ack(out, id, tag);
                    }
                    if on_trial {
                        put_qos(out, id, self.prefetch);
                    }
                });
            };
            // Two workers, two requests that are quickly done: this worker has the first, and has
            // woken the other for the second. The other sends what is there to be sent when it
            // comes, so this reply can leave with that one in one write. A long one is not copied
            // under the lock that all workers need.
            let len = reply.map_or(0, |reply| reply.content.body().len());
            let leave = len < APPENDED_MAX && !state.backlog.is_empty() && state.woken > 0;
            let appended = match leave {
                true => channel.try_append(encode),
                false => Err(NotSent::Full),
            };
            let result = match appended {
                Ok(false) => Ok(()),
                Ok(true) => {
                    drop(state);
                    channel.flush();
                    state = self.lock();
                    Ok(())
                }
                Err(NotSent::Full) => {
                    drop(state);
                    let sent = channel.send(encode);
                    state = self.lock();
                    sent
                }
                Err(other) => Err(other),
            };
            // A dead connection is known by other ways, and its requests are given to others. A
            // channel that was closed meanwhile is forgotten by now.
            if result == Err(NotSent::Outdated) {
                continue;
            }
            // Or it has come back elsewhere while that was sent: it is answered there, too, because
            // the broker reads no more of the channel that it has closed.
            let has_moved = state.executing[worker]
                .as_ref()
                .and_then(|execution| execution.place.as_ref())
                .is_some_and(|place| {
                    Some(place.tag) != tag || !Arc::ptr_eq(&place.channel, &channel)
                });
            if !has_moved {
                break;
            }
        }
        if let Some(execution) = state.executing[worker].take() {
            state.suspects.has_ended(execution.key);
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
                let key = Key::of(&delivery.message, &self.hashing);
                let mut state = self.lock();
                if state.number == number {
                    state.arrive(delivery, key, self.prefetch);
                }
            }
            Incoming::Returned(_) | Incoming::Confirm(_) => {
                log::debug!("the broker answered what was not asked: {incoming:?}");
            }
            Incoming::Channel(..) | Incoming::Blocked(_) | Incoming::Unblocked => {
                if let Incoming::Channel(channel, event) = &incoming {
                    self.learn(number, *channel, event);
                }
                // The supervisor may be gone: then nobody needs to know.
                let _ = self.events.send(Event::Incoming(number, incoming));
            }
        }
    }

    /// Sees what has happened to a channel, before the supervisor does anything about it.
    fn learn(&self, number: u64, channel: u16, event: &ChannelEvent) {
        let mut state = self.lock();
        if state.number != number {
            return;
        }
        match event {
            ChannelEvent::Closed(reason) => {
                if let Some(max) = reason.message_max() {
                    self.message_max.store(max, Ordering::Relaxed);
                }
                state.suspects.channel_closed(channel, reason);
                state.forget_channel(channel);
            }
            ChannelEvent::Limited => {
                state.suspects.acquit(channel);
                state.release(channel, true);
            }
            _ => {}
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
        state.forget_session();
        // Another broker, or its settings, may be others.
        self.message_max.store(MESSAGE_MAX, Ordering::Relaxed);
    }

    /// Announces a channel of that connection on which requests will come.
    pub fn add_channel(&self, channel: &Arc<Channel>) {
        let channels = &mut self.lock().channels;
        channels.insert(channel.id(), Arc::clone(channel));
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
            state.forget_session();
        }
    }

    /// Learns how the latest connection has ended: why the broker has closed it, if it did.
    pub fn connection_closed(&self, reason: Option<&CloseReason>) {
        self.lock().suspects.connection_closed(reason);
    }

    /// Lets nobody begin anything any more.
    pub fn stop(&self) {
        self.lock().stopping = true;
    }

    /// How many workers execute a request; and what nobody has begun, to be given back.
    pub fn take_backlog(&self) -> (usize, Vec<(Arc<Channel>, u64)>) {
        let mut state = self.lock();
        let backlog = std::mem::take(&mut state.backlog);
        let places = backlog
            .into_iter()
            .map(|task| (task.channel, task.delivery.tag));
        (state.busy, places.collect())
    }

    /// Ends the workers, each when it is free.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        // It holds the connection, and that holds us.
        state.forget_session();
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
