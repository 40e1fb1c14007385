//! The supervisor: the thread of a server that connects, opens a channel for each worker, and when
//! anything ends one of them, closes the connection and connects again.
//!
//! A worker that is still busy with a request of the old connection is not disturbed; there are
//! never more handlers running than workers.

use crate::amqp::channel::{Channel, SETUP_TIME};
use crate::amqp::connection::Connection;
use crate::amqp::error::GONE;
use crate::amqp::frame::{put_cancel, put_consume, put_qos, put_requeue};
use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{ChannelEvent, Incoming};
use crate::amqp::queue;
use crate::amqp::sync::Never;
use crate::amqp::time::{Backoff, FAR_FUTURE, after, time_left};
use crate::error::Error;
use crate::server::options::Options;
use crate::server::work_queue::{Event, RequestSink, Session, Task, WorkQueue};
use crate::server::worker::Stats;
use crossbeam_channel::{Receiver, RecvError, Sender, bounded, select};
use log::Level;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// How long one attempt to reconnect may take, for all brokers in the list together.
const RECONNECT_TIME: Duration = Duration::from_secs(10);

/// How long after its deadline a first attempt to connect may still tell what it was that took so
/// long.
const GRACE: Duration = Duration::from_millis(250);

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

impl End {
    fn lost(reason: impl Into<String>) -> End {
        let reason = reason.into();
        End::Lost(Error::ConnectionLost { reason })
    }
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
        served
    }

    fn serve_connections(&mut self) -> Result<(), Error> {
        let mut backoff = Backoff::default();
        while let Some(mut connection) = self.connect(&mut backoff)? {
            let began = Instant::now();
            let mut channels = Vec::new();
            let mut error = match self.serve(&mut connection, &mut channels) {
                End::Stopping => return self.drain(&mut connection, channels),
                End::Lost(error) => error,
            };
            self.queue.end_session(self.number);
            // Closing tells the true cause, if it was the connection.
            if let Err(reason) = connection.close()
                && matches!(error, Error::ConnectionLost { .. })
            {
                error = Error::ConnectionLost { reason };
            }
            log::warn!(
                "lost the connection {}: {}",
                connection.name,
                error.reason()
            );
            backoff.held_for(began.elapsed());
            let wait = backoff.next();
            self.check_patience(error, wait)?;
            if self.stopped_within(wait) {
                break;
            }
        }
        Ok(())
    }

    /// Connects and makes sure of the queue: tries as long as there is patience. `None` if the
    /// server is to stop.
    fn connect(&mut self, backoff: &mut Backoff) -> Result<Option<Connection>, Error> {
        loop {
            let error = match self.attempt() {
                None => return Ok(None),
                Some(Ok(connection)) => return Ok(Some(connection)),
                Some(Err(error)) => error,
            };
            let wait = backoff.next();
            let said = error.to_string();
            self.check_patience(error, wait)?;
            log::warn!("{said}; trying again in {wait:.1?}");
            if self.stopped_within(wait) {
                return Ok(None);
            }
        }
    }

    /// A server that has started once tries again for ever. Before that, until its time is up, or
    /// the broker has said that it does not let us have the queue.
    ///
    /// # Errors
    ///
    /// Why it could not start.
    fn check_patience(&mut self, error: Error, wait: Duration) -> Result<(), Error> {
        let Some(starting) = &mut self.starting else {
            return Ok(());
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
        let now = Instant::now();
        if matches!(error, Error::QueueRefused { .. }) {
            Err(error)
        } else if now >= starting.give_up_at {
            Err(after_another(starting.latest.take(), error))
        } else if now + wait >= starting.give_up_at {
            Err(error)
        } else {
            starting.latest = Some(error);
            Ok(())
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
        let options = self.options.clone();
        self.number += 1;
        self.queue.begin_session(self.number);
        let (queue, number) = (Arc::clone(&self.queue), self.number);
        let attempt = move || {
            let sink = || -> Box<dyn Sink> {
                let queue = Arc::clone(&queue);
                Box::new(RequestSink { queue, number })
            };
            let connection = Connection::open(&options.endpoints, "server", deadline, &sink);
            let declared = connection.and_then(|mut connection| {
                queue::ensure(&mut connection, &options.queue, options.queue_type)?;
                Ok(connection)
            });
            // If nobody waits any more, the connection is dropped here, which closes it.
            let _ = done.send(declared.map_err(Error::from));
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
            recv(outcome) -> outcome => Some(outcome.unwrap_or_else(|RecvError| {
                Err(lost("the attempt to connect panicked"))
            })),
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
    fn serve(&mut self, connection: &mut Connection, channels: &mut Vec<Channel>) -> End {
        // The broker may have closed the channel on which we have asked after the queue, and a new
        // one gets its number.
        while self.told.try_recv().is_ok() {}
        // A broker that is alive may still not answer `basic.consume`: a quorum queue without a
        // majority, for example.
        let patience = match &self.starting {
            Some(Starting { give_up_at, .. }) => time_left(*give_up_at),
            None => SETUP_TIME,
        };
        let consume_by = after(Instant::now(), patience);
        let mut watchdog = Some(connection.outbox.abort_after(patience));
        for _ in 0..self.options.workers {
            match connection.open_channel() {
                Ok(channel) => channels.push(channel),
                Err(error) => return End::lost(error.reason()),
            }
        }
        for channel in &*channels {
            self.consume(connection, channel);
        }
        let mut consuming = HashSet::new();
        loop {
            let event = select! {
                recv(self.told) -> event => event,
                recv(connection.down) -> _ => {
                    if watchdog.is_none() || Instant::now() < consume_by {
                        return End::lost(GONE);
                    }
                    return End::Lost(Error::Unreachable {
                        endpoint: self.options.endpoints.to_string(),
                        reason: "it does not answer basic.consume".to_owned(),
                        source: None,
                    });
                }
                recv(self.stop) -> _ => return End::Stopping,
            };
            match event {
                Ok(Event::Incoming(number, incoming)) if number == self.number => match incoming {
                    // On which we have asked after the queue.
                    Incoming::Channel(other, _)
                        if !channels.iter().any(|one| one.id() == other) => {}
                    Incoming::Channel(channel, ChannelEvent::Consuming) => {
                        let first = consuming.insert(channel);
                        if first && consuming.len() == channels.len() {
                            watchdog = None;
                            self.announce(connection);
                        }
                    }
                    Incoming::Channel(channel, ChannelEvent::QueueGone) => {
                        if let Err(error) = self.consume_again(connection, channels, channel) {
                            return End::Lost(error);
                        }
                    }
                    Incoming::Channel(_, ChannelEvent::Closed(close)) => {
                        let (queue, said) = (&self.options.queue, close.to_string());
                        return match queue::refusal(queue, close.code, &said) {
                            Some(refusal) => End::Lost(refusal.into()),
                            None => End::lost(said),
                        };
                    }
                    Incoming::Blocked(reason) => {
                        log::warn!("the broker has blocked publishers ({reason}); replies wait");
                    }
                    Incoming::Unblocked => log::warn!("the broker accepts publishers again"),
                    // Not asked for yet; not sent here.
                    Incoming::Channel(_, ChannelEvent::Cancelled)
                    | Incoming::Delivery(_)
                    | Incoming::Returned(_) => {}
                },
                Ok(Event::Incoming(..) | Event::Finished) => {}
                // The work queue has a sender, and we have the work queue.
                Err(RecvError) => return End::Stopping,
            }
        }
    }

    /// Begins to consume on a channel.
    fn consume(&self, connection: &Connection, channel: &Channel) {
        // A dead connection is known by other ways.
        let _ = connection.outbox.send(None, |out| {
            put_qos(out, channel.id(), self.options.prefetch);
            put_consume(out, channel.id(), self.options.queue.as_bytes(), false);
        });
    }

    /// Every channel consumes: the workers may begin.
    fn announce(&mut self, connection: &Connection) {
        // Whoever reads of a lost connection wants to read of its return.
        let level = match self.starting {
            Some(_) => Level::Info,
            None => Level::Warn,
        };
        let (workers, queue) = (self.options.workers, &self.options.queue);
        log::log!(level, "connected: {workers} workers consume '{queue}'");
        self.stats.connections.fetch_add(1, Ordering::Relaxed);
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
        channels: &[Channel],
        id: u16,
    ) -> Result<(), Error> {
        let Some(channel) = channels.iter().find(|channel| channel.id() == id) else {
            return Ok(());
        };
        let (queue, queue_type) = (&self.options.queue, self.options.queue_type);
        log::warn!("the queue '{queue}' was deleted; declaring it again unless somebody else has");
        queue::ensure(connection, queue, queue_type)?;
        self.consume(connection, channel);
        Ok(())
    }

    /// Stops consuming, lets the workers finish what they have begun, gives the rest back.
    fn drain(&mut self, connection: &mut Connection, channels: Vec<Channel>) -> Result<(), Error> {
        let time = self.options.drain_timeout;
        let deadline = after(Instant::now(), time);
        let mut give_up_at = deadline.min(Instant::now() + CANCEL_TIME);
        // Whatever may still block gets an error when the time is up.
        let _watchdog = connection.outbox.abort_after(time);
        self.queue.stop();
        for channel in &channels {
            let cancel = |out: &mut Vec<u8>| put_cancel(out, channel.id());
            let _ = connection.outbox.send(Some(deadline), cancel);
        }
        let mut cancelled = 0;
        let mut written = connection.outbox.written();
        loop {
            let (busy, backlog) = self.queue.take_backlog();
            for Task { delivery, .. } in backlog {
                let requeue = |out: &mut Vec<u8>| put_requeue(out, delivery.channel, delivery.tag);
                let _ = connection.outbox.send(Some(deadline), requeue);
            }
            if busy == 0 && cancelled == channels.len() {
                // Closing a channel is behind the last reply on it: once that is done, it has
                // arrived.
                drop(channels);
                let _ = connection.close();
                return Ok(());
            }
            if busy == 0 && Instant::now() >= give_up_at {
                // A large reply may be ahead of what we have said. It takes the time that it takes.
                let latest = connection.outbox.written();
                if latest != written && Instant::now() < deadline {
                    written = latest;
                    give_up_at = deadline.min(Instant::now() + CANCEL_TIME);
                    continue;
                }
                // The broker does not listen; it gives back what it has given us when it finds
                // the connection closed.
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
            let wake_at = if busy == 0 { give_up_at } else { deadline };
            let reason = select! {
                recv(self.told) -> event => match event {
                    Ok(Event::Incoming(number, incoming)) if number == self.number => match incoming {
                        Incoming::Channel(_, ChannelEvent::Cancelled) => {
                            cancelled += 1;
                            continue;
                        }
                        Incoming::Channel(_, ChannelEvent::Closed(reason)) => reason.to_string(),
                        _ => continue,
                    },
                    _ => continue,
                },
                recv(connection.down) -> _ => GONE.to_owned(),
                default(wake_at.saturating_duration_since(Instant::now())) => continue,
            };
            if Instant::now() >= deadline {
                continue; // the watchdog has ended it
            }
            // Nothing can be answered any more; the broker gives it all to others.
            log::warn!(
                "lost the connection {} while draining: {reason}",
                connection.name
            );
            return Ok(());
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
