//! The supervisor: the thread of a server that connects, opens a channel for each worker, and
//! opens another when the broker has closed one, or connects again when the connection is lost.
//!
//! A worker that is still busy with a request of the old channel is not disturbed; there are never
//! more handlers running than workers.

use crate::amqp::brokers::Brokers;
use crate::amqp::channel::{Channel, SETUP_TIME};
use crate::amqp::connection::Connection;
use crate::amqp::error::{Error as AmqpError, GONE, with_way_out};
use crate::amqp::frame::{put_cancel, put_consume, put_qos, put_requeue, reply_code};
use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{ChannelEvent, Incoming};
use crate::amqp::queue::{self, Events};
use crate::amqp::sync::atomic::Ordering;
use crate::amqp::sync::channel::{Receiver, RecvError, Sender, TryRecvError, bounded, select};
use crate::amqp::sync::{Instant, Never, thread};
use crate::amqp::time::{Backoff, FAR_FUTURE, after, time_left};
use crate::error::Error;
use crate::server::options::Options;
use crate::server::work_queue::{Event, RequestSink, Session, WorkQueue};
use crate::server::worker::Stats;
use log::Level;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How long one attempt to reconnect may take, for all brokers in the list together.
const RECONNECT_TIME: Duration = Duration::from_secs(10);

/// How long after its deadline a first attempt to connect may still tell what it was that took so
/// long.
const GRACE: Duration = Duration::from_millis(250);

/// With less time than that, a first start does not try again.
const LAST_ATTEMPT_TIME: Duration = Duration::from_millis(50);

/// How long a server that has nothing left to do, and nothing left to write, waits for the broker
/// to confirm that it consumes no more.
const CANCEL_TIME: Duration = Duration::from_secs(1);

/// The thread that keeps a server connected.
pub(crate) struct Supervisor {
    pub options: Options,
    pub queue: Arc<WorkQueue>,
    pub stats: Arc<Stats>,
    pub told: Receiver<Event>,
    /// Disconnected when the server is to stop.
    pub stop: Receiver<Never>,
    /// `None` once every worker has consumed for the first time.
    pub starting: Option<Starting>,
    /// Counts attempts to connect, from 1. What came in by an earlier one is of no interest any
    /// more.
    pub number: u64,
    pub brokers: Brokers,
}

/// The first start, which has a deadline.
pub(crate) struct Starting {
    pub give_up_at: Instant,
    /// Why an attempt failed that was not cut off by the deadline. It tells more than that there
    /// was no answer in time.
    pub latest: Option<Error>,
    /// Disconnected when it is over.
    pub _waiting: Sender<Never>,
}

/// How a session ended.
enum End {
    /// The server is to stop.
    Stopping,
    /// Something ended the connection or one of its channels.
    Lost(Error),
}

impl Supervisor {
    /// Serves until the server is told to stop, and all requests being executed are answered.
    ///
    /// # Errors
    ///
    /// As [`Server::start`](crate::Server::start) and [`Serving::stop`](crate::Serving::stop) have
    /// them.
    pub fn run(mut self) -> Result<(), Error> {
        let served = self.serve_connections();
        self.queue.close();
        self.stats.connected.store(false, Ordering::Relaxed);
        served
    }

    fn serve_connections(&mut self) -> Result<(), Error> {
        let mut backoff = Backoff::default();
        while let Some(mut connection) = self.connect(&mut backoff)? {
            let mut channels = Channels::default();
            let mut error = match self.serve(&mut connection, &mut channels) {
                End::Stopping => return self.drain(&mut connection, channels),
                End::Lost(error) => error,
            };
            self.queue.end_session(self.number);
            self.stats.connected.store(false, Ordering::Relaxed);
            // Closing tells the true cause, if it was the connection.
            if let Err(cause) = connection.close()
                && let Error::ConnectionLost { reason } = &mut error
                && reason == GONE
            {
                *reason = cause;
            }
            self.queue
                .connection_closed(connection.inbox.close_reason());
            log::warn!(
                "lost the connection {}: {}",
                connection.name,
                error.reason()
            );
            let announced = channels.announced;
            backoff.held_for(announced.map_or(Duration::ZERO, |at| at.elapsed()));
            let wait = self.check_patience(error, backoff.next())?;
            if self.stopped_within(wait) {
                break;
            }
        }
        Ok(())
    }

    /// Connects: tries as long as there is patience. `None` if the server is to stop.
    fn connect(&mut self, backoff: &mut Backoff) -> Result<Option<Connection>, Error> {
        loop {
            let error = match self.attempt() {
                None => return Ok(None),
                Some(Ok(connection)) => return Ok(Some(connection)),
                Some(Err(error)) => error,
            };
            let said = error.to_string();
            let wait = self.check_patience(error, backoff.next())?;
            log::warn!("{said}; trying again in {wait:.1?}");
            if self.stopped_within(wait) {
                return Ok(None);
            }
        }
    }

    /// How long to wait before the next attempt, of the wait that is due. A server that has started
    /// once tries again for ever. Before that, until its time is up, or the broker has said that it
    /// does not let us have the queue.
    ///
    /// # Errors
    ///
    /// Why it could not start.
    fn check_patience(&mut self, error: Error, wait: Duration) -> Result<Duration, Error> {
        let Some(starting) = &mut self.starting else {
            return Ok(wait);
        };
        let error = match error {
            // It was reached, and does not let us begin.
            Error::ConnectionLost { reason } => Error::Unreachable {
                endpoint: self.options.endpoints.to_string(),
                reason,
                source: None,
            },
            other => other,
        };
        let left = starting
            .give_up_at
            .saturating_duration_since(Instant::now());
        if matches!(error, Error::QueueRefused { .. }) {
            Err(error)
        } else if left.is_zero() {
            Err(after_another(starting.latest.take(), error))
        } else if left < LAST_ATTEMPT_TIME {
            Err(error)
        } else {
            starting.latest = Some(error);
            // All the time is used, and in the end there is some for an attempt.
            Ok(wait.min(left / 2))
        }
    }

    /// One attempt, in a thread of its own, since it cannot be interrupted: `None`, and the
    /// thread left behind, if the server is to stop meanwhile.
    fn attempt(&mut self) -> Option<Result<Connection, Error>> {
        let (deadline, patience) = match &self.starting {
            Some(Starting { give_up_at, .. }) => (*give_up_at, time_left(*give_up_at) + GRACE),
            None => (Instant::now() + RECONNECT_TIME, FAR_FUTURE),
        };
        let (done, outcome) = bounded(1);
        let mut brokers = self.brokers.clone();
        self.number += 1;
        self.queue.begin_session(self.number);
        let (queue, number) = (Arc::clone(&self.queue), self.number);
        let attempt = move || {
            let sink = || -> Box<dyn Sink> {
                let queue = Arc::clone(&queue);
                Box::new(RequestSink { queue, number })
            };
            let connection = brokers.connect("server", deadline, deadline, &sink);
            // If nobody waits any more, the connection is dropped here, which closes it.
            let _ = done.send((brokers, connection.map_err(Error::from)));
        };
        let spawned = thread::Builder::new()
            .name("fibrpc-connect".to_owned())
            .spawn(attempt);
        if let Err(error) = spawned {
            let reason = format!("cannot start a thread: {error}");
            return Some(Err(Error::InvalidArgument(reason)));
        }
        let lost = |reason: &str| Error::ConnectionLost {
            reason: reason.to_owned(),
        };
        select! {
            recv(outcome) -> outcome => Some(match outcome {
                Ok((brokers, connection)) => {
                    self.brokers = brokers;
                    connection
                }
                Err(RecvError) => Err(lost("the attempt to connect panicked")),
            }),
            recv(self.stop) -> _ => None,
            default(patience) => Some(Err(lost("the broker does not answer"))),
        }
    }

    /// Waits; whether the server is to stop meanwhile.
    fn stopped_within(&mut self, time: Duration) -> bool {
        select! {
            recv(self.stop) -> _ => true,
            default(time) => false,
        }
    }

    /// Has the workers serve a new connection, until it is lost or the server is to stop.
    fn serve(&mut self, connection: &mut Connection, channels: &mut Channels) -> End {
        // A broker that is alive may still not answer: a quorum queue without a majority, for
        // example.
        let patience = match &self.starting {
            Some(Starting { give_up_at, .. }) => time_left(*give_up_at),
            None => SETUP_TIME,
        };
        let mut told = Told {
            told: self.told.clone(),
            stop: self.stop.clone(),
            number: self.number,
            later: VecDeque::new(),
            deadline: after(Instant::now(), patience),
        };
        let served = self
            .set_up(connection, channels, &mut told)
            .and_then(|()| self.keep_up(connection, channels, &mut told));
        match served {
            Err(error) if !self.is_to_stop() => End::Lost(error),
            _ => End::Stopping,
        }
    }

    fn is_to_stop(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable {
            endpoint: self.options.endpoints.to_string(),
            reason: reason.into(),
            source: None,
        }
    }

    /// Makes sure of the queue, and begins to consume it on a channel for each worker.
    ///
    /// # Errors
    ///
    /// Why that cannot be.
    fn set_up(
        &self,
        connection: &mut Connection,
        channels: &mut Channels,
        told: &mut Told,
    ) -> Result<(), Error> {
        let (workers, max) = (self.options.workers, connection.channel_max());
        // One more, to ask after the queue.
        if workers >= usize::from(max) {
            return Err(self.unreachable(format!(
                "it allows {max} channels on a connection; {workers} workers need one each, and \
                 one is for questions, so start fewer workers, or several servers"
            )));
        }
        let queue = &self.options.queue;
        let was_there = self.ensure_queue(connection, told)?;
        if was_there && self.starting.is_some() && queue::is_stream(connection, told, queue)? {
            return Err(Error::QueueRefused {
                queue: queue.clone(),
                reason: "it is a stream, of which every worker would get each request; choose \
                         another name, or delete it"
                    .to_owned(),
            });
        }
        self.fill_up(connection, channels)
    }

    /// Deals with what the broker says of the channels, until the server is to stop.
    ///
    /// # Errors
    ///
    /// Why the connection is of no use any more.
    fn keep_up(
        &mut self,
        connection: &mut Connection,
        channels: &mut Channels,
        told: &mut Told,
    ) -> Result<(), Error> {
        let lost = |reason: &str| Error::ConnectionLost {
            reason: reason.to_owned(),
        };
        let mut backoff = Backoff::default();
        loop {
            let now = Instant::now();
            if channels.reopen_at.is_some_and(|at| now >= at) {
                channels.reopen_at = None;
                channels.opened = now;
                told.deadline = now + SETUP_TIME;
                self.fill_up(connection, channels)?;
            }
            let overdue_at =
                (channels.consuming.len() < channels.open.len()).then_some(told.deadline);
            let wake_at = [overdue_at, channels.reopen_at].into_iter().flatten().min();
            let incoming = match told.next(connection, wake_at) {
                Ok(incoming) => incoming,
                Err(Silence::Stop) => return Ok(()),
                Err(Silence::Down) => return Err(lost(GONE)),
                Err(Silence::Deadline) if overdue_at.is_some_and(|at| Instant::now() >= at) => {
                    return Err(self.unreachable("it does not answer basic.consume"));
                }
                Err(Silence::Deadline) => continue,
            };
            match incoming {
                Incoming::Channel(id, ChannelEvent::Consuming) => {
                    let is_new = channels.open.contains_key(&id) && channels.consuming.insert(id);
                    if is_new && channels.consuming.len() == self.options.workers {
                        self.announce(connection, channels);
                    }
                }
                Incoming::Channel(id, ChannelEvent::QueueGone) => {
                    if let Some(channel) = channels.open.get(&id) {
                        channels.consuming.remove(&id);
                        self.consume_again(connection, channel, told)?;
                    }
                }
                Incoming::Channel(id, ChannelEvent::Closed(close)) => {
                    if channels.open.remove(&id).is_none() {
                        continue; // one on which we have asked after the queue
                    }
                    channels.consuming.remove(&id);
                    if channels.announced.is_none() {
                        return Err(match queue::refusal(&self.options.queue, &close) {
                            Some(refusal) => refusal.into(),
                            None => lost(&close.to_string()),
                        });
                    }
                    let said = with_way_out(&close);
                    log::warn!("lost a channel: {said}; opening another");
                    if close.code == reply_code::NOT_FOUND {
                        told.deadline = now + SETUP_TIME;
                        self.ensure_queue(connection, told)?;
                    }
                    if channels.reopen_at.is_none() {
                        backoff.held_for(channels.opened.elapsed());
                        channels.reopen_at = Some(now + backoff.next());
                    }
                }
                Incoming::Blocked(reason) => {
                    log::warn!("the broker has blocked publishers ({reason}); replies wait");
                }
                Incoming::Unblocked => log::warn!("the broker accepts publishers again"),
                // Not asked for, or of no consequence.
                Incoming::Channel(..)
                | Incoming::Delivery(_)
                | Incoming::Returned(_)
                | Incoming::Confirm(_) => {}
            }
        }
    }

    fn ensure_queue(&self, connection: &mut Connection, told: &mut Told) -> Result<bool, Error> {
        let (queue, queue_type) = (&self.options.queue, self.options.queue_type);
        Ok(queue::ensure(connection, told, queue, queue_type)?)
    }

    /// Opens channels until there is one for each worker, and begins to consume on them.
    fn fill_up(&self, connection: &mut Connection, channels: &mut Channels) -> Result<(), Error> {
        while channels.open.len() < self.options.workers {
            let channel = connection.open_channel()?;
            channels.open.insert(channel.id(), Arc::clone(&channel));
            self.queue.add_channel(&channel);
            self.consume(&channel);
        }
        Ok(())
    }

    /// Begins to consume on a channel.
    fn consume(&self, channel: &Channel) {
        channel.say(|out, id| {
            put_qos(out, id, self.options.prefetch);
            put_consume(out, id, self.options.queue.as_bytes(), false);
        });
    }

    /// Every channel consumes: the workers may begin.
    fn announce(&mut self, connection: &Connection, channels: &mut Channels) {
        if channels.announced.is_some() {
            return;
        }
        channels.announced = Some(Instant::now());
        self.brokers.works();
        // Whoever reads of a lost connection wants to read of its return.
        let level = match self.starting {
            Some(_) => Level::Info,
            None => Level::Warn,
        };
        let (workers, queue) = (self.options.workers, &self.options.queue);
        log::log!(level, "connected: {workers} workers consume '{queue}'");
        self.stats.connections.fetch_add(1, Ordering::Relaxed);
        self.stats.connected.store(true, Ordering::Relaxed);
        self.queue.open_session(Session {
            number: self.number,
            inbox: Arc::clone(&connection.inbox),
            outbox: Arc::clone(&connection.outbox),
        });
        // After it is counted, by which `Server::start` knows that it has started.
        self.starting = None;
    }

    /// The queue of a channel's consumer was deleted: makes sure that there is one, and consumes
    /// it.
    fn consume_again(
        &self,
        connection: &mut Connection,
        channel: &Channel,
        told: &mut Told,
    ) -> Result<(), Error> {
        let queue = &self.options.queue;
        log::warn!("the queue '{queue}' was deleted; declaring it again unless somebody else has");
        told.deadline = Instant::now() + SETUP_TIME;
        self.ensure_queue(connection, told)?;
        self.consume(channel);
        Ok(())
    }

    /// Stops consuming, lets the workers finish what they have begun, gives the rest back.
    fn drain(&mut self, connection: &mut Connection, mut channels: Channels) -> Result<(), Error> {
        let time = self.options.drain_timeout;
        let deadline = after(Instant::now(), time);
        // Whatever may still block gets an error when the time is up.
        let _watchdog = connection.outbox.abort_after(time);
        self.queue.stop();
        for channel in channels.open.values() {
            channel.say(put_cancel);
        }
        let mut closing = false;
        let (mut written, mut quiet_since) = (0, Instant::now());
        loop {
            let (busy, backlog) = self.queue.take_backlog();
            for (channel, tag) in backlog {
                channel.say(|out, id| put_requeue(out, id, tag));
            }
            if busy == 0 && channels.consuming.is_empty() && !closing {
                // Closing a channel is behind the last reply on it: once that is confirmed, it has
                // arrived.
                closing = true;
                for channel in channels.open.values() {
                    channel.close();
                }
            }
            // A large reply may be ahead of what we have said. It takes the time that it takes.
            let latest = connection.outbox.written();
            if busy > 0 || latest != written {
                (written, quiet_since) = (latest, Instant::now());
            }
            // Or the broker does not listen; it gives back what it has given us when it finds the
            // connection closed.
            let give_up_at = match busy {
                0 => quiet_since + CANCEL_TIME,
                _ => deadline,
            };
            let is_deaf = busy == 0 && Instant::now() >= give_up_at;
            if is_deaf || closing && channels.open.is_empty() {
                let _ = connection.close();
                return Ok(());
            }
            if Instant::now() >= deadline {
                connection.outbox.abort();
                return Err(Error::DrainTimeout {
                    after: time,
                    workers: busy,
                });
            }
            let wake_at = give_up_at.min(deadline);
            let event = select! {
                recv(self.told) -> event => event,
                recv(connection.down) -> _ => {
                    if Instant::now() >= deadline {
                        continue; // the watchdog has ended it
                    }
                    // Nothing can be answered any more; the broker gives it all to others.
                    log::warn!("lost the connection {} while draining", connection.name);
                    return Ok(());
                }
                default(wake_at.saturating_duration_since(Instant::now())) => continue,
            };
            let Ok(Event::Incoming(number, incoming)) = event else {
                continue;
            };
            if number != self.number {
                continue;
            }
            connection.note(&incoming);
            match incoming {
                Incoming::Channel(id, ChannelEvent::Cancelled) => {
                    channels.consuming.remove(&id);
                }
                // What had come on it is given to others.
                Incoming::Channel(id, ChannelEvent::ClosedAsAsked | ChannelEvent::Closed(_)) => {
                    channels.open.remove(&id);
                    channels.consuming.remove(&id);
                }
                _ => {}
            }
        }
    }
}

/// The channels of a connection on which requests come, one for each worker.
struct Channels {
    /// Those that are open, by their numbers.
    open: HashMap<u16, Arc<Channel>>,
    /// Those of them on which the broker has begun to deliver.
    consuming: HashSet<u16>,
    /// When all of them consumed, if that was so.
    announced: Option<Instant>,
    /// When others are to be opened in place of those that were lost.
    reopen_at: Option<Instant>,
    /// When the latest were opened.
    opened: Instant,
}

impl Default for Channels {
    fn default() -> Channels {
        Channels {
            open: HashMap::new(),
            consuming: HashSet::new(),
            announced: None,
            reopen_at: None,
            opened: Instant::now(),
        }
    }
}

/// What comes in on the connection of one attempt.
struct Told {
    told: Receiver<Event>,
    stop: Receiver<Never>,
    number: u64,
    /// What came in while something else was waited for.
    later: VecDeque<Incoming>,
    /// How long an answer is waited for.
    deadline: Instant,
}

/// Why nothing comes in.
enum Silence {
    /// The server is to stop.
    Stop,
    /// The connection is dead.
    Down,
    Deadline,
}

impl Told {
    /// What comes in next, before the deadline, if there is one.
    fn next(
        &mut self,
        connection: &mut Connection,
        deadline: Option<Instant>,
    ) -> Result<Incoming, Silence> {
        match self.later.pop_front() {
            Some(incoming) => Ok(incoming),
            None => self.hear(connection, deadline),
        }
    }

    fn hear(
        &mut self,
        connection: &mut Connection,
        deadline: Option<Instant>,
    ) -> Result<Incoming, Silence> {
        loop {
            let wait = deadline.map_or(FAR_FUTURE, |at| {
                at.saturating_duration_since(Instant::now())
            });
            let event = select! {
                recv(self.told) -> event => event,
                recv(connection.down) -> _ => return Err(Silence::Down),
                recv(self.stop) -> _ => return Err(Silence::Stop),
                default(wait) => return Err(Silence::Deadline),
            };
            match event {
                Ok(Event::Incoming(number, incoming)) if number == self.number => {
                    connection.note(&incoming);
                    return Ok(incoming);
                }
                Ok(_) => {} // of an earlier connection
                // The work queue has a sender, and the supervisor has the work queue.
                Err(RecvError) => return Err(Silence::Stop),
            }
        }
    }
}

impl Events for Told {
    fn next_of(
        &mut self,
        connection: &mut Connection,
        channel: u16,
    ) -> Result<ChannelEvent, AmqpError> {
        loop {
            match self.hear(connection, Some(self.deadline)) {
                Ok(Incoming::Channel(id, event)) if id == channel => return Ok(event),
                Ok(incoming) => self.later.push_back(incoming),
                Err(silence) => {
                    let reason = match silence {
                        Silence::Deadline => "the broker does not answer queue.declare",
                        Silence::Down | Silence::Stop => GONE,
                    };
                    return Err(AmqpError::Lost {
                        reason: reason.to_owned(),
                    });
                }
            }
        }
    }
}

/// An error that came of being cut off, and what it came after.
fn after_another(before: Option<Error>, error: Error) -> Error {
    let Some(before) = before else {
        return error;
    };
    match before {
        Error::Unreachable {
            endpoint,
            reason,
            source,
        } => Error::Unreachable {
            endpoint,
            reason: format!("{reason}; then {}", error.reason()),
            source,
        },
        other => other,
    }
}
