//! The server: a supervisor and a pool of workers around one handler.
//!
//! One connection; each worker is a thread with a channel of its own, a prefetch limit and a
//! consumer. To the broker that is as many independent consumers, and it deals requests out
//! fairly. A worker receives, runs the handler, and sends reply and acknowledgement in one piece.
//!
//! The supervisor is the thread that calls [`Server::run`]. It connects, hands each worker its
//! channel, and when anything ends a channel it closes the connection, connects again and hands
//! out new ones. A worker that is still busy with a request of the old connection takes its new
//! channel when it is done, so there are never more handlers running than workers.

use crate::broker::{self, Backoff, Connection, Consuming, Endpoints, QueueType};
use crate::client::check_queue_name;
use crate::error::Error;
use crate::frame::{Publish, put_ack, put_cancel, put_publish, put_requeue};
use crate::socket::{Never, Outbox};
use crate::wire::{self, RemoteError};
use amiquip::{Channel, ConnectionBlockedNotification, ConsumerMessage, ConsumerOptions, Delivery};
use crossbeam_channel::{Receiver, RecvError, Sender, TryRecvError, bounded, select, unbounded};
use log::Level;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long one attempt to reconnect may take, for all brokers in the list together.
const RECONNECT_TIME: Duration = Duration::from_secs(10);

/// How often, while draining, busy workers' queues are looked at for requests to give back.
const GIVE_BACK_INTERVAL: Duration = Duration::from_millis(20);

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
        let (gate, opened) = bounded::<Never>(0);
        let (reports, reported) = unbounded();
        let job = Arc::new(Job {
            handler: Box::new(handler),
            config: self.config.clone(),
            reports,
            opened,
            stats: Stats::default(),
        });
        let workers = (0..self.config.workers).map(|index| Worker::spawn(index, &job));
        let supervisor = Supervisor {
            config: &self.config,
            workers: workers.collect::<Result<_, _>>()?,
            reported,
            stop,
            gate: Some(gate),
            session: 0,
        };
        supervisor.run(ready)?;
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
    config: ServerConfig,
    reports: Sender<Report>,
    /// Disconnected once every worker consumes for the first time: nobody begins before the
    /// server is announced.
    opened: Receiver<Never>,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    answered: AtomicU64,
    refused: AtomicU64,
    unanswerable: AtomicU64,
}

/// A worker's place in one session: what it consumes on.
struct Post {
    session: u64,
    channel: Channel,
    outbox: Arc<Outbox>,
}

/// What a worker tells the supervisor.
struct Report {
    session: u64,
    worker: usize,
    news: News,
}

enum News {
    /// It consumes.
    Consuming(Intake),
    /// It was told to stop, and has finished. It gives its channel back open, since the
    /// supervisor may still be sending on it: a frame on a closed channel is an offence for which
    /// the broker closes the connection.
    Finished(Channel),
    /// Something ended its channel.
    Failed(String),
}

/// Where a worker's requests arrive, for the supervisor to give back what a busy one has not
/// begun.
struct Intake {
    channel: u16,
    consumer_tag: String,
    deliveries: Receiver<ConsumerMessage>,
}

/// The supervisor's handle on a worker.
struct Worker {
    /// The way to its mailbox, which holds one post. The worker ends when this is dropped.
    posts: Sender<Post>,
    /// The mailbox itself, to take out what the worker was too busy to.
    mailbox: Receiver<Post>,
    /// Dropped when it is to stop.
    running: Option<Sender<Never>>,
    /// Where its requests arrive, while it consumes.
    intake: Option<Intake>,
    /// Whether it has a post in this session.
    on_duty: bool,
}

impl Worker {
    /// Starts a worker's thread, which is never joined: one whose handler does not return is
    /// left behind.
    fn spawn(index: usize, job: &Arc<Job>) -> Result<Worker, Error> {
        let (posts, mailbox) = bounded(1);
        // One for each worker: a receiver that all of them waited on would be a lock that all of
        // them fight for, with each request.
        let (running, stopping) = bounded(0);
        let hand = Hand {
            index,
            job: Arc::clone(job),
            mailbox: mailbox.clone(),
            stopping,
        };
        thread::Builder::new()
            .name(format!("fibrpc-worker-{}", index + 1))
            .spawn(move || hand.run())
            .map_err(|error| {
                Error::InvalidArgument(format!(
                    "cannot start a thread for worker {}: {error}",
                    index + 1
                ))
            })?;
        Ok(Worker {
            posts,
            mailbox,
            running: Some(running),
            intake: None,
            on_duty: false,
        })
    }

    /// Gives the worker its place in a new session. A post that it has not taken yet is from a
    /// session that is over.
    fn assign(&mut self, post: Post) {
        self.relieve();
        // There is room now, for we are the only one that puts something in.
        self.on_duty = self.posts.try_send(post).is_ok();
    }

    /// Takes back the post, if the worker has not taken it.
    fn relieve(&mut self) {
        if self.mailbox.try_recv().is_ok() {
            self.on_duty = false;
        }
    }
}

/// Why a worker stopped consuming.
enum Pause {
    /// The server is to stop.
    Stopping,
    /// The queue was deleted.
    QueueDeleted,
}

/// The worker's own side: what its thread owns.
struct Hand {
    index: usize,
    job: Arc<Job>,
    mailbox: Receiver<Post>,
    /// Disconnected when it is to stop.
    stopping: Receiver<Never>,
}

impl Hand {
    /// Works at each post that it is given; ends when the supervisor is gone.
    fn run(self) {
        for post in &self.mailbox {
            let session = post.session;
            match self.work(&post) {
                Ok(()) => self.report(session, News::Finished(post.channel)),
                Err(reason) => self.report(session, News::Failed(reason)),
            }
        }
    }

    fn report(&self, session: u64, news: News) {
        // The supervisor may be gone: then nobody needs to know.
        let _ = self.job.reports.send(Report {
            session,
            worker: self.index,
            news,
        });
    }

    /// Consumes until it is to stop or something ends the channel.
    fn work(&self, post: &Post) -> Result<(), String> {
        let config = &self.job.config;
        post.channel
            .qos(0, config.prefetch, false)
            .map_err(describe)?;
        loop {
            let options = ConsumerOptions::default();
            let consuming =
                Consuming::start(&post.channel, &config.queue, options).map_err(describe)?;
            let intake = Intake {
                channel: post.channel.channel_id(),
                consumer_tag: consuming.tag().to_owned(),
                deliveries: consuming.receiver().clone(),
            };
            self.report(post.session, News::Consuming(intake));
            select! {
                recv(self.job.opened) -> _ => {}
                recv(self.stopping) -> _ => return Ok(()),
            }
            match self.consume(post, &consuming)? {
                Pause::Stopping => return Ok(()),
                Pause::QueueDeleted => {
                    log::warn!(
                        "the queue '{}' was deleted; declaring it again",
                        config.queue
                    );
                    broker::redeclare_request_queue(
                        &post.channel,
                        &config.queue,
                        config.queue_type,
                    )
                    .map_err(describe)?;
                }
            }
        }
    }

    fn consume(&self, post: &Post, consuming: &Consuming<'_>) -> Result<Pause, String> {
        loop {
            let message = select! {
                recv(consuming.receiver()) -> message => message,
                recv(self.stopping) -> _ => return Ok(Pause::Stopping),
            };
            let reason = match message {
                Ok(ConsumerMessage::Delivery(delivery)) => {
                    if self.is_stopping() {
                        // Not begun and not acknowledged: closing the channel gives it back.
                        return Ok(Pause::Stopping);
                    }
                    self.answer(post, delivery)?;
                    continue;
                }
                Ok(ConsumerMessage::ServerCancelled) => return Ok(Pause::QueueDeleted),
                // While draining, the supervisor may have taken the news out of the receiver.
                Ok(ConsumerMessage::ClientCancelled) | Err(RecvError) if self.is_stopping() => {
                    return Ok(Pause::Stopping);
                }
                Ok(
                    ConsumerMessage::ServerClosedChannel(error)
                    | ConsumerMessage::ServerClosedConnection(error),
                ) => describe(error),
                Ok(
                    ConsumerMessage::ClientCancelled
                    | ConsumerMessage::ClientClosedChannel
                    | ConsumerMessage::ClientClosedConnection,
                )
                | Err(RecvError) => "the connection is gone".to_owned(),
            };
            return Err(reason);
        }
    }

    fn is_stopping(&self) -> bool {
        self.stopping.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Executes a request, and sends its reply and its acknowledgement, in this order: a crash in
    /// between makes the broker deliver the request again, and not lose it.
    fn answer(&self, post: &Post, delivery: Delivery) -> Result<(), String> {
        let channel = post.channel.channel_id();
        let tag = delivery.delivery_tag();
        let Delivery {
            body,
            properties,
            redelivered,
            ..
        } = delivery;
        let sent = match wire::return_address(&properties) {
            None => {
                self.job.stats.unanswerable.fetch_add(1, Ordering::Relaxed);
                log::warn!("dropped a request without reply_to ({} bytes)", body.len());
                post.outbox.send(None, |out| put_ack(out, channel, tag))
            }
            Some(address) => {
                let outcome = self.job.execute(Request { body, redelivered });
                let (properties, body) = wire::encode_reply(&address, &outcome);
                let reply = Publish {
                    routing_key: address.reply_to,
                    // A caller that is gone needs no answer.
                    mandatory: false,
                    properties,
                    body,
                };
                post.outbox.send(None, |out| {
                    put_publish(out, channel, &reply);
                    put_ack(out, channel, tag);
                })
            }
        };
        sent.map_err(|_| "the connection is gone".to_owned())
    }
}

impl Job {
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
    workers: Vec<Worker>,
    reported: Receiver<Report>,
    stop: Receiver<T>,
    /// Dropped when the workers may begin.
    gate: Option<Sender<Never>>,
    /// Counts connections, from 1. What a worker reports of an earlier one is old news.
    session: u64,
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
        let mut give_up_at = Some(Instant::now() + self.config.connect_timeout);
        let mut backoff = Backoff::default();
        while let Some(mut connection) = self.connect(&mut backoff, give_up_at)? {
            give_up_at = None;
            let began = Instant::now();
            let end = self.serve(&mut connection, &mut ready);
            // However it ended: whoever waits here finds out.
            self.gate = None;
            let reason = match end {
                End::Stopping => return self.drain(&mut connection),
                End::Lost(reason) => reason,
            };
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
        let attempt = move || {
            let connection = Connection::open(&config.endpoints, "server", deadline);
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

    /// Puts the workers to work on a new connection, until it is lost or the server is to stop.
    fn serve(&mut self, connection: &mut Connection, ready: &mut impl FnMut()) -> End {
        self.session += 1;
        for worker in &mut self.workers {
            worker.intake = None;
            worker.on_duty = false;
        }
        for worker in &mut self.workers {
            match connection.open_channel() {
                Ok(channel) => worker.assign(Post {
                    session: self.session,
                    channel,
                    outbox: Arc::clone(&connection.outbox),
                }),
                Err(error) => return End::Lost(describe(error)),
            }
        }
        let mut announced = false;
        loop {
            select! {
                recv(self.reported) -> report => {
                    // The sender is in the job, which outlives us.
                    let Ok(report) = report else { return End::Stopping };
                    if let Some(reason) = self.note(report) {
                        return End::Lost(reason);
                    }
                    if !announced && self.workers.iter().all(|worker| worker.intake.is_some()) {
                        announced = true;
                        // Whoever reads of a lost connection wants to read of its return.
                        let level = if self.session == 1 { Level::Info } else { Level::Warn };
                        let (workers, queue) = (self.workers.len(), &self.config.queue);
                        log::log!(level, "connected: {workers} workers consume '{queue}'");
                        ready();
                        self.gate = None;
                    }
                }
                recv(connection.down) -> _ => return End::Lost("the connection is gone".to_owned()),
                recv(connection.blocked) -> notice => match notice {
                    Ok(ConnectionBlockedNotification::Blocked(reason)) => {
                        log::warn!("the broker has blocked publishers ({reason}); replies wait");
                    }
                    Ok(ConnectionBlockedNotification::Unblocked) => {
                        log::warn!("the broker accepts publishers again");
                    }
                    Err(RecvError) => return End::Lost("the connection is gone".to_owned()),
                },
                recv(self.stop) -> _ => return End::Stopping,
            }
        }
    }

    /// Takes note of a report; returns the reason if the session is over.
    fn note(&mut self, report: Report) -> Option<String> {
        if report.session != self.session {
            return None;
        }
        let worker = &mut self.workers[report.worker];
        match report.news {
            News::Consuming(intake) => {
                worker.intake = Some(intake);
                None
            }
            News::Finished(channel) => {
                worker.intake = None;
                worker.on_duty = false;
                // Closing the channel gives back what was delivered on it and not acknowledged,
                // and it is behind the last reply: once it is closed, that has arrived.
                drop(channel);
                None
            }
            News::Failed(reason) => {
                worker.intake = None;
                worker.on_duty = false;
                Some(reason)
            }
        }
    }

    /// Stops consuming, lets the workers finish what they have begun, gives the rest back.
    fn drain(&mut self, connection: &mut Connection) -> Result<(), Error> {
        let deadline = Instant::now() + self.config.drain_timeout;
        // Whatever may still block gets an error when the time is up.
        let _fuse = connection.outbox.fuse(self.config.drain_timeout);
        for worker in &mut self.workers {
            worker.running = None;
            worker.relieve();
            // An idle worker cancels for itself, and does no harm by doing it twice; a busy one
            // would get more requests until it is done.
            if let Some(intake) = &worker.intake {
                let cancel =
                    |out: &mut Vec<u8>| put_cancel(out, intake.channel, &intake.consumer_tag);
                let _ = connection.outbox.send(Some(deadline), cancel);
            }
        }
        loop {
            let busy = self.workers.iter().filter(|worker| worker.on_duty).count();
            if busy == 0 {
                let _ = connection.close();
                return Ok(());
            }
            if Instant::now() >= deadline {
                connection.outbox.abort();
                let after = self.config.drain_timeout;
                return Err(Error::DrainTimeout {
                    after,
                    workers: busy,
                });
            }
            self.give_back(connection, deadline);
            select! {
                recv(self.reported) -> report => if let Ok(report) = report
                    && let Some(reason) = self.note(report)
                    && Instant::now() < deadline // else the fuse has ended it
                {
                    // Nothing can be answered any more; the broker gives it all to others.
                    log::warn!("lost the connection {} while draining: {reason}", connection.name);
                    return Ok(());
                },
                default(GIVE_BACK_INTERVAL) => {}
            }
        }
    }

    /// Gives back what has been delivered to busy workers and is not begun.
    fn give_back(&self, connection: &Connection, deadline: Instant) {
        for intake in self
            .workers
            .iter()
            .filter_map(|worker| worker.intake.as_ref())
        {
            while let Ok(ConsumerMessage::Delivery(delivery)) = intake.deliveries.try_recv() {
                let tag = delivery.delivery_tag();
                let requeue = |out: &mut Vec<u8>| put_requeue(out, intake.channel, tag);
                let _ = connection.outbox.send(Some(deadline), requeue);
            }
        }
    }
}

fn describe(error: amiquip::Error) -> String {
    broker::describe(&error)
}
