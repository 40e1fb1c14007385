//! The server: a supervisor and a pool of workers around one handler.
//!
//! One connection, and a channel for each worker, with a prefetch limit and a consumer of its own.
//! To the broker that is as many independent consumers, and it deals requests out fairly. The
//! requests arrive on a common [`Floor`], where any free worker takes the next one, runs the
//! handler, and sends reply and acknowledgement in one piece, on the channel that the request came
//! by. A worker that finds nothing to do reads the socket itself (see [`crate::inbox`]).
//!
//! The supervisor is the thread that calls [`Server::run`]. It connects, opens the channels, and
//! when anything ends one of them it closes the connection and connects again. A worker that is
//! still busy with a request of the old connection is not disturbed; there are never more
//! handlers running than workers.

use crate::arrival::{Arrival, ChannelNews, Message};
use crate::broker::{self, Backoff, Connection, Endpoints, QueueType};
use crate::client::check_queue_name;
use crate::error::Error;
use crate::frame::{Publish, put_ack, put_cancel, put_consume, put_publish, put_qos, put_requeue};
use crate::inbox::{Inbox, Lead, Sink};
use crate::socket::{Down, Outbox};
use crate::wire::{self, RemoteError};
use amiquip::{Channel, ConnectionBlockedNotification};
use crossbeam_channel::{Receiver, RecvError, Sender, bounded, select, unbounded};
use log::Level;
use std::any::Any;
use std::collections::{HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long one attempt to reconnect may take, for all brokers in the list together.
const RECONNECT_TIME: Duration = Duration::from_secs(10);

/// How long a server that has nothing left to do waits for the broker to confirm that it consumes
/// no more.
const CANCEL_TIME: Duration = Duration::from_secs(1);

/// How long an idle worker that leads waits for a request before it looks around.
const LEAD_TIME: Duration = Duration::from_secs(3600);

/// What a [`Server`] needs to know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServerConfig {
    /// The broker, or several of a cluster.
    pub endpoints: Endpoints,
    /// The request queue. Default: `rpc_queue`.
    pub queue: String,
    /// Which queue to declare if there is none. Default: a transient one, as in the tutorial.
    pub queue_type: QueueType,
    /// How many requests are executed at the same time. Default: the number of CPUs.
    pub workers: usize,
    /// How many requests the broker may give a worker ahead of its acknowledgements. Default: 1,
    /// so that a request never waits for a busy worker while another is free.
    pub prefetch: u16,
    /// How long to try for the first connection. A server that has been connected once tries
    /// again for ever. Default: 10 s.
    pub connect_timeout: Duration,
    /// How long requests being executed may take to finish once the server is told to stop.
    /// Default: 30 s.
    pub drain_timeout: Duration,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            endpoints: Endpoints::default(),
            queue: "rpc_queue".to_owned(),
            queue_type: QueueType::default(),
            workers: thread::available_parallelism().map_or(1, usize::from),
            prefetch: 1,
            connect_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// A request, as a handler sees it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Request {
    /// The message's body: whatever the caller sent.
    pub body: Vec<u8>,
    /// Whether the broker has delivered it before: somebody may have executed it already.
    pub redelivered: bool,
}

/// What a server has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ServerStats {
    /// Requests answered with a result.
    pub answered: u64,
    /// Requests answered with an error.
    pub refused: u64,
    /// Requests without `reply_to`, which nobody can be answered: acknowledged, not executed.
    pub unanswerable: u64,
}

/// A server: executes the requests of a queue with one handler, in several threads.
///
/// ```no_run
/// use fibrpc::{Request, Server, ServerConfig};
///
/// let server = Server::new(ServerConfig::default())?;
/// // Dropping `stop` stops the server; `run` returns when it has drained.
/// let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
/// server.run(|request: Request| Ok(request.body.to_ascii_uppercase()), || (), stopped)?;
/// # drop(stop);
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Server {
    config: ServerConfig,
}

impl Server {
    /// Makes a server; connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`]: the queue's name is empty or longer than 255 bytes, or there
    /// are no workers, or no prefetch (which to AMQP means: no limit).
    pub fn new(config: ServerConfig) -> Result<Server, Error> {
        check_queue_name(&config.queue)?;
        if config.workers == 0 {
            return Err(Error::InvalidArgument(
                "a server needs at least 1 worker".to_owned(),
            ));
        }
        if config.prefetch == 0 {
            return Err(Error::InvalidArgument(
                "the prefetch must be at least 1".to_owned(),
            ));
        }
        Ok(Server { config })
    }

    /// Serves until `stop` is disconnected or says something, and all requests being executed
    /// are answered.
    ///
    /// Requests must be idempotent: one that was executed by a server that died before its
    /// acknowledgement is executed again. A handler that panics answers with an `internal`
    /// error. `ready` is called whenever every worker consumes: after each (re)connect.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`]: no connection within the connect timeout.
    /// [`Error::QueueRefused`]: the first connection cannot have the queue.
    /// [`Error::DrainTimeout`]: some handlers did not return in time; their threads are left
    /// behind, and the broker gives their requests to another server.
    pub fn run<H, T>(
        &self,
        handler: H,
        ready: impl FnMut(),
        stop: Receiver<T>,
    ) -> Result<ServerStats, Error>
    where
        H: Fn(Request) -> Result<Vec<u8>, RemoteError> + Send + Sync + 'static,
    {
        let (news, told) = unbounded();
        let job = Arc::new(Job {
            handler: Box::new(handler),
            floor: Arc::new(Floor::new(news)),
            stats: Stats::default(),
        });
        for index in 1..=self.config.workers {
            let (started, job) = (&job, Arc::clone(&job));
            // Never joined: one whose handler does not return is left behind.
            thread::Builder::new()
                .name(format!("fibrpc-worker-{index}"))
                .spawn(move || job.work())
                .map_err(|error| {
                    started.floor.close();
                    let worker = format!("cannot start a thread for worker {index}: {error}");
                    Error::InvalidArgument(worker)
                })?;
        }
        let supervisor = Supervisor {
            config: &self.config,
            floor: &job.floor,
            told,
            stop,
            number: 0,
        };
        let end = supervisor.run(ready);
        job.floor.close();
        end?;
        let stats = &job.stats;
        Ok(ServerStats {
            answered: stats.answered.load(Ordering::Relaxed),
            refused: stats.refused.load(Ordering::Relaxed),
            unanswerable: stats.unanswerable.load(Ordering::Relaxed),
        })
    }
}

/// What all workers share.
struct Job {
    handler: Box<dyn Fn(Request) -> Result<Vec<u8>, RemoteError> + Send + Sync>,
    floor: Arc<Floor>,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    answered: AtomicU64,
    refused: AtomicU64,
    unanswerable: AtomicU64,
}

/// What the supervisor is told.
enum News {
    /// Something about a channel: the connection's number, the channel's, and what it is.
    Channel(u64, u16, ChannelNews),
    /// A worker has finished while the server was to stop.
    Finished,
}

/// One connection, as the workers see it.
struct Session {
    number: u64,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
}

/// A request that has arrived, and by which way.
struct Delivery {
    channel: u16,
    delivery_tag: u64,
    redelivered: bool,
    message: Message,
}

/// Where requests wait for workers, and workers for requests.
struct Floor {
    state: Mutex<FloorState>,
    /// There is something to do for a worker.
    work: Condvar,
    news: Sender<News>,
}

#[derive(Default)]
struct FloorState {
    /// The number of the latest connection, from 1. What arrives on an earlier one has been given
    /// to others already.
    number: u64,
    /// That connection, once every channel consumes: nobody begins before.
    session: Option<Arc<Session>>,
    /// What nobody has begun yet.
    waiting: VecDeque<Delivery>,
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

impl FloorState {
    /// Whether to wake another worker; if so, it is counted. One at a time: it wakes the next if
    /// there is still something waiting then. Much of what is quickly done is done before.
    fn wake_one(&mut self) -> bool {
        let wake = !self.waiting.is_empty() && self.woken == 0 && self.idle > 0;
        self.woken += usize::from(wake);
        wake
    }
}

impl Floor {
    fn new(news: Sender<News>) -> Floor {
        Floor {
            state: Mutex::default(),
            work: Condvar::new(),
            news,
        }
    }

    fn lock(&self) -> MutexGuard<'_, FloorState> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next request for this worker: waits for it, and reads the socket meanwhile if nobody
    /// else does. `None` when the server has ended.
    fn next(&self) -> Option<(Arc<Session>, Delivery)> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let session = state.session.clone().filter(|_| !state.stopping);
            if let Some(session) = session {
                if let Some(delivery) = state.waiting.pop_front() {
                    state.busy += 1;
                    let wake = state.wake_one();
                    drop(state);
                    if wake {
                        self.work.notify_one();
                    }
                    return Some((session, delivery));
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
        let read = lead.read(LEAD_TIME, |arrival| self.take(session.number, arrival));
        if read == Err(Down) {
            // The supervisor finds out for itself; until then there is nothing to read.
            self.end_session(session.number);
        }
    }

    /// Waits to be woken. Whoever wakes up sends what others have left to be sent.
    fn wait<'f>(&'f self, mut state: MutexGuard<'f, FloorState>) -> MutexGuard<'f, FloorState> {
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

    /// Sends what ends a request: its reply and its acknowledgement.
    fn finish(&self, session: &Session, encode: impl Fn(&mut Vec<u8>)) {
        let mut state = self.lock();
        // With more to do here, and another worker on its way who will send whatever is there to
        // be sent, it can leave together with the next one's.
        if !state.waiting.is_empty()
            && state.woken > 0
            && session.outbox.try_append(&encode).is_ok()
        {
            state.busy -= 1;
        } else {
            drop(state);
            // A dead connection is known by other ways, and its requests are given to others.
            let _ = session.outbox.send(None, &encode);
            state = self.lock();
            state.busy -= 1;
        }
        if state.stopping {
            let _ = self.news.send(News::Finished);
        }
    }

    /// Takes what has arrived on the connection of that number.
    fn take(&self, number: u64, arrival: Arrival) {
        match arrival {
            Arrival::Delivery {
                channel,
                delivery_tag,
                redelivered,
                message,
            } => {
                let mut state = self.lock();
                if state.number == number {
                    state.waiting.push_back(Delivery {
                        channel,
                        delivery_tag,
                        redelivered,
                        message,
                    });
                }
            }
            Arrival::Returned(_) => log::debug!("a reply came back, though none is mandatory"),
            Arrival::Channel(channel, news) => {
                // The supervisor may be gone: then nobody needs to know.
                let _ = self.news.send(News::Channel(number, channel, news));
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
    fn begin_session(&self, number: u64) {
        let mut state = self.lock();
        state.number = number;
        state.session = None;
        state.waiting.clear();
    }

    /// Lets the workers begin.
    fn open_session(&self, session: Session) {
        self.lock().session = Some(Arc::new(session));
        self.wake();
    }

    /// Forgets a connection that is gone. The broker gives its requests to others.
    fn end_session(&self, number: u64) {
        let mut state = self.lock();
        if state.number == number {
            state.session = None;
            state.waiting.clear();
        }
    }

    /// Lets nobody begin anything any more.
    fn stop(&self) {
        self.lock().stopping = true;
    }

    /// Ends the workers, each when it is free.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        // It holds the connection, and that holds us.
        state.session = None;
        drop(state);
        self.work.notify_all();
    }
}

/// Takes what arrives while no worker reads.
struct Unattended {
    floor: Arc<Floor>,
    number: u64,
}

impl Sink for Unattended {
    fn take(&self, arrival: Arrival) {
        self.floor.take(self.number, arrival);
    }

    fn done(&self) {
        self.floor.wake();
    }
}

impl Job {
    /// Works until the server has ended.
    fn work(&self) {
        while let Some((session, delivery)) = self.floor.next() {
            self.answer(&session, delivery);
        }
    }

    /// Executes a request, and sends its reply and its acknowledgement, in this order: a crash in
    /// between makes the broker deliver the request again, and not lose it.
    fn answer(&self, session: &Session, delivery: Delivery) {
        let Delivery {
            channel,
            delivery_tag,
            redelivered,
            message: Message { head, body },
        } = delivery;
        let Some(address) = wire::return_address(&head.properties()) else {
            self.stats.unanswerable.fetch_add(1, Ordering::Relaxed);
            log::warn!("dropped a request without reply_to ({} bytes)", body.len());
            return self
                .floor
                .finish(session, |out| put_ack(out, channel, delivery_tag));
        };
        let outcome = self.execute(Request { body, redelivered });
        let (properties, body) = wire::encode_reply(&address, &outcome);
        let reply = Publish {
            routing_key: address.reply_to,
            // A caller that is gone needs no answer.
            mandatory: false,
            properties,
            body,
        };
        self.floor.finish(session, |out| {
            put_publish(out, channel, &reply);
            put_ack(out, channel, delivery_tag);
        });
    }

    fn execute(&self, request: Request) -> Result<Vec<u8>, RemoteError> {
        // The handler is shared by reference and has no state of ours to leave half changed.
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.handler)(request)));
        let outcome = outcome.unwrap_or_else(|panic| {
            Err(RemoteError::internal(format!(
                "the handler panicked: {}",
                panic_message(&*panic)
            )))
        });
        let outcome = outcome.and_then(wire::check_result);
        let counter = if outcome.is_ok() {
            &self.stats.answered
        } else {
            &self.stats.refused
        };
        counter.fetch_add(1, Ordering::Relaxed);
        outcome
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// The thread that calls [`Server::run`].
struct Supervisor<'s, T> {
    config: &'s ServerConfig,
    floor: &'s Arc<Floor>,
    told: Receiver<News>,
    stop: Receiver<T>,
    /// Counts connections, from 1. What arrived on an earlier one is old news.
    number: u64,
}

/// How a session ended.
enum End {
    /// The server is to stop.
    Stopping,
    /// Something ended the connection or one of its channels.
    Lost(String),
}

impl<T> Supervisor<'_, T> {
    fn run(mut self, mut ready: impl FnMut()) -> Result<(), Error> {
        let mut give_up_at = Some(broker::after(Instant::now(), self.config.connect_timeout));
        let mut backoff = Backoff::default();
        while let Some(mut connection) = self.connect(&mut backoff, give_up_at)? {
            give_up_at = None;
            let began = Instant::now();
            let mut channels = Vec::new();
            let end = self.serve(&mut connection, &mut channels, &mut ready);
            let reason = match end {
                End::Stopping => return self.drain(&mut connection, channels),
                End::Lost(reason) => reason,
            };
            self.floor.end_session(self.number);
            // Closing tells the true cause, if it was the connection.
            let reason = connection.close().map_or_else(describe, |()| reason);
            log::warn!("lost the connection {}: {reason}", connection.name);
            backoff.held_for(began.elapsed());
            if self.stopped_within(backoff.next()) {
                break;
            }
        }
        Ok(())
    }

    /// Connects and makes sure of the queue: tries until `give_up_at`, or else for ever. `None`
    /// if the server is to stop.
    fn connect(
        &mut self,
        backoff: &mut Backoff,
        give_up_at: Option<Instant>,
    ) -> Result<Option<Connection>, Error> {
        loop {
            let deadline = give_up_at.unwrap_or_else(|| Instant::now() + RECONNECT_TIME);
            let Some(attempt) = self.attempt(deadline)? else {
                return Ok(None);
            };
            let error = match attempt {
                Ok(connection) => return Ok(Some(connection)),
                Err(error) => error,
            };
            let wait = backoff.next();
            if let Some(at) = give_up_at {
                let hopeless = matches!(error, Error::QueueRefused { .. });
                if hopeless || Instant::now() + wait >= at {
                    return Err(error);
                }
            }
            log::warn!("{error}; trying again in {wait:.1?}");
            if self.stopped_within(wait) {
                return Ok(None);
            }
        }
    }

    /// One attempt, in a thread of its own, since it cannot be interrupted: `None`, and the
    /// thread left behind, if the server is to stop meanwhile.
    fn attempt(&mut self, deadline: Instant) -> Result<Option<Result<Connection, Error>>, Error> {
        let (done, outcome) = bounded(1);
        let config = self.config.clone();
        self.number += 1;
        self.floor.begin_session(self.number);
        let (floor, number) = (Arc::clone(self.floor), self.number);
        let attempt = move || {
            let sink = || -> Box<dyn Sink> {
                let floor = Arc::clone(&floor);
                Box::new(Unattended { floor, number })
            };
            let connection = Connection::open(&config.endpoints, "server", deadline, &sink);
            let declared = connection.and_then(|mut connection| {
                broker::declare_request_queue(&mut connection, &config.queue, config.queue_type)?;
                Ok(connection)
            });
            // If nobody waits any more, the connection is dropped here, which closes it.
            let _ = done.send(declared);
        };
        thread::Builder::new()
            .name("fibrpc-connect".to_owned())
            .spawn(attempt)
            .map_err(|error| Error::InvalidArgument(format!("cannot start a thread: {error}")))?;
        select! {
            recv(outcome) -> outcome => Ok(Some(outcome.unwrap_or_else(|RecvError| {
                Err(Error::ConnectionLost { reason: "the attempt to connect panicked".to_owned() })
            }))),
            recv(self.stop) -> _ => Ok(None),
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
    fn serve(
        &mut self,
        connection: &mut Connection,
        channels: &mut Vec<Channel>,
        ready: &mut impl FnMut(),
    ) -> End {
        // The channel on which we have asked after the queue may have been closed, and a new one gets
        // its number.
        while self.told.try_recv().is_ok() {}
        for _ in 0..self.config.workers {
            match connection.open_channel() {
                Ok(channel) => channels.push(channel),
                Err(error) => return End::Lost(describe(error)),
            }
        }
        for channel in &*channels {
            self.consume(connection, channel);
        }
        let mut consuming = HashSet::new();
        loop {
            let news = select! {
                recv(self.told) -> news => news,
                recv(connection.down) -> _ => return End::Lost("the connection is gone".to_owned()),
                recv(connection.blocked) -> notice => match notice {
                    Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                        log::warn!("the broker has blocked publishers ({reason}); replies wait");
                        continue;
                    }
                    Ok(ConnectionBlockedNotification::Unblocked) => {
                        log::warn!("the broker accepts publishers again");
                        continue;
                    }
                    Err(RecvError) => return End::Lost("the connection is gone".to_owned()),
                },
                recv(self.stop) -> _ => return End::Stopping,
            };
            match news {
                Ok(News::Channel(number, channel, news)) if number == self.number => match news {
                    ChannelNews::Consuming => {
                        let first = consuming.insert(channel);
                        if first && consuming.len() == channels.len() {
                            self.announce(connection, ready);
                        }
                    }
                    ChannelNews::QueueGone => {
                        if let Err(reason) = self.consume_again(connection, channels, channel) {
                            return End::Lost(reason);
                        }
                    }
                    ChannelNews::Closed(goodbye) => return End::Lost(goodbye.to_string()),
                    ChannelNews::Cancelled => {} // not asked for yet
                },
                Ok(News::Channel(..) | News::Finished) => {}
                // The floor has a sender, and we have the floor.
                Err(RecvError) => return End::Stopping,
            }
        }
    }

    /// Begins to consume on a channel.
    fn consume(&self, connection: &Connection, channel: &Channel) {
        let id = channel.channel_id();
        // A dead connection is known by other ways.
        let _ = connection.outbox.send(None, |out| {
            put_qos(out, id, self.config.prefetch);
            put_consume(out, id, self.config.queue.as_bytes(), false);
        });
    }

    /// Every channel consumes: the workers may begin.
    fn announce(&self, connection: &Connection, ready: &mut impl FnMut()) {
        // Whoever reads of a lost connection wants to read of its return.
        let level = if self.number == 1 {
            Level::Info
        } else {
            Level::Warn
        };
        let (workers, queue) = (self.config.workers, &self.config.queue);
        log::log!(level, "connected: {workers} workers consume '{queue}'");
        ready();
        self.floor.open_session(Session {
            number: self.number,
            inbox: Arc::clone(&connection.inbox),
            outbox: Arc::clone(&connection.outbox),
        });
    }

    /// The queue of a channel's consumer was deleted: declares it again, and consumes it.
    fn consume_again(
        &self,
        connection: &Connection,
        channels: &[Channel],
        id: u16,
    ) -> Result<(), String> {
        let Some(channel) = channels.iter().find(|channel| channel.channel_id() == id) else {
            return Ok(());
        };
        let (queue, queue_type) = (&self.config.queue, self.config.queue_type);
        log::warn!("the queue '{queue}' was deleted; declaring it again");
        let fuse = connection.outbox.fuse(broker::SETUP_TIME);
        broker::redeclare_request_queue(channel, queue, queue_type).map_err(describe)?;
        drop(fuse);
        self.consume(connection, channel);
        Ok(())
    }

    /// Stops consuming, lets the workers finish what they have begun, gives the rest back.
    fn drain(&mut self, connection: &mut Connection, channels: Vec<Channel>) -> Result<(), Error> {
        let after = self.config.drain_timeout;
        let deadline = broker::after(Instant::now(), after);
        let give_up_at = deadline.min(Instant::now() + CANCEL_TIME);
        // Whatever may still block gets an error when the time is up.
        let _fuse = connection.outbox.fuse(after);
        self.floor.stop();
        for channel in &channels {
            let cancel = |out: &mut Vec<u8>| put_cancel(out, channel.channel_id());
            let _ = connection.outbox.send(Some(deadline), cancel);
        }
        let mut cancelled = 0;
        loop {
            let (busy, waiting) = {
                let mut state = self.floor.lock();
                (state.busy, std::mem::take(&mut state.waiting))
            };
            for delivery in waiting {
                let requeue =
                    |out: &mut Vec<u8>| put_requeue(out, delivery.channel, delivery.delivery_tag);
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
                // The broker does not listen; it gives back what it has given us when it finds
                // the connection closed.
                let _ = connection.close();
                return Ok(());
            }
            if Instant::now() >= deadline {
                connection.outbox.abort();
                return Err(Error::DrainTimeout {
                    after,
                    workers: busy,
                });
            }
            let wake_at = if busy == 0 { give_up_at } else { deadline };
            let reason = select! {
                recv(self.told) -> news => match news {
                    Ok(News::Channel(number, _, news)) if number == self.number => match news {
                        ChannelNews::Cancelled => {
                            cancelled += 1;
                            continue;
                        }
                        ChannelNews::Closed(goodbye) => goodbye.to_string(),
                        ChannelNews::Consuming | ChannelNews::QueueGone => continue,
                    },
                    _ => continue,
                },
                recv(connection.down) -> _ => "the connection is gone".to_owned(),
                default(wake_at.saturating_duration_since(Instant::now())) => continue,
            };
            if Instant::now() >= deadline {
                continue; // the fuse has ended it
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

fn describe(error: amiquip::Error) -> String {
    broker::describe(&error)
}
