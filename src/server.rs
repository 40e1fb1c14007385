//! The server: a supervisor and a pool of workers around one handler.
//!
//! One connection, and a channel for each worker, with a prefetch limit and a consumer of its own.
//! To the broker that is as many independent consumers, and it deals requests out fairly. The
//! requests arrive in a common [`WorkQueue`], where any free worker takes the next one, runs the
//! handler, and sends reply and acknowledgement in one piece, on the channel that the request came
//! by. A worker that finds nothing to do reads the socket itself (see [`crate::amqp::inbox`]).

mod options;
pub(crate) mod request; // what a handler sees
#[cfg(all(test, shuttle))]
mod schedules;
mod supervisor; // the thread that keeps the server connected
mod suspects; // requests whose replies the broker does not take
mod work_queue; // where requests meet workers
mod worker; // the threads that run the handler

use crate::amqp::brokers::Brokers;
use crate::amqp::endpoint::{Endpoints, InvalidUrl};
use crate::amqp::queue::QueueType;
use crate::amqp::sync::atomic::{AtomicBool, Ordering};
use crate::amqp::sync::channel::{Receiver, Sender, bounded, unbounded};
use crate::amqp::sync::{Instant, Mutex, Never, lock, thread};
use crate::amqp::time::after;
use crate::error::Error;
use crate::message::{HandlerError, RemoteError, Response};
use options::Options;
use request::Request;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use supervisor::{Starting, Supervisor};
use work_queue::WorkQueue;
use worker::{Stats, Worker};

/// A server that is still to be started: executes the requests of a queue with one handler, in
/// several threads.
///
/// Until [`Server::start`] it holds no connection and no thread, and dropping it does nothing. Any
/// number of servers, in any processes, can serve the same queue: the broker deals the requests
/// out.
///
/// ```no_run
/// use fibrpc::{Request, Server};
///
/// let serving = Server::new("amqp://localhost")?
///     .queue("shout")
///     .workers(4)
///     .start(|request: &Request| Ok(request.body().to_ascii_uppercase()))?;
/// // Every worker consumes now.
/// let stats = serving.stop()?; // answers what it has begun
/// println!("{} answered", stats.answered);
/// # Ok::<(), fibrpc::Error>(())
/// ```
///
/// Handlers must be idempotent; [`Server::start`] says why, and how.
#[must_use = "a server does nothing until it is started"]
pub struct Server {
    options: Options,
    stopper: Stopper,
    stop: Receiver<Never>,
}

impl Server {
    /// Begins a server with every option at its default; connects to nothing yet. `brokers` are a
    /// URL, several separated by commas, or [`Endpoints`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`]: a URL cannot be used.
    ///
    /// ```
    /// use fibrpc::{Error, Server};
    ///
    /// let server = Server::new("amqp://app:secret@a.example,amqp://app:secret@b.example")?;
    /// let server = server.queue("shout").workers(4); // to be started
    /// assert!(matches!(Server::new("localhost"), Err(Error::InvalidUrl(_))));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn new<B>(brokers: B) -> Result<Server, Error>
    where
        B: TryInto<Endpoints>,
        InvalidUrl: From<B::Error>,
    {
        let endpoints = brokers.try_into().map_err(InvalidUrl::from)?;
        let (running, stop) = bounded(0);
        Ok(Server {
            options: Options::new(endpoints),
            stopper: Stopper(Arc::new(Mutex::new(Some(running)))),
            stop,
        })
    }

    /// The request queue: a name of 1 to 255 bytes, which [`Server::start`] checks. Names that
    /// begin with `amq.` are the broker's own. Default: `rpc_queue`.
    /// Source: <https://www.rabbitmq.com/docs/queues>.
    pub fn queue(mut self, queue: impl Into<String>) -> Server {
        self.options.queue = queue.into();
        self
    }

    /// Which queue to declare if there is none; one that exists is used as it is. Default:
    /// [`QueueType::Transient`].
    pub fn queue_type(mut self, queue_type: QueueType) -> Server {
        self.options.queue_type = queue_type;
        self
    }

    /// How many requests are executed at the same time; at least 1. Each worker is a thread, and
    /// has a channel of its own, of which RabbitMQ gives a connection 2047 unless configured
    /// otherwise. A handler that mostly waits can do with many more than there are CPUs. Default:
    /// the number of CPUs. Source: <https://www.rabbitmq.com/docs/channels>.
    pub fn workers(mut self, workers: usize) -> Server {
        self.options.workers = workers;
        self
    }

    /// How many requests the broker may give the server for each worker, the one being executed
    /// included; at least 1. More saves a fast handler the wait for the next request; but what
    /// waits here for a worker cannot go to another server that has a free one. Default: 1.
    /// Source: <https://www.rabbitmq.com/docs/consumer-prefetch>.
    pub fn prefetch(mut self, prefetch: u16) -> Server {
        self.options.prefetch = prefetch;
        self
    }

    /// How long [`Server::start`] tries for the first connection, all brokers together. A server
    /// that has been connected once tries again for ever. Default: 10 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Server {
        self.options.connect_timeout = timeout;
        self
    }

    /// How long requests being executed may take to finish once the server is told to stop; then
    /// their threads are left behind. Default: 30 s.
    pub fn drain_timeout(mut self, timeout: Duration) -> Server {
        self.options.drain_timeout = timeout;
        self
    }

    /// A handle that stops the server, and also ends a [`Server::start`] that is still connecting.
    ///
    /// ```no_run
    /// # use fibrpc::{Error, Request, Server};
    /// let server = Server::new("amqp://localhost")?;
    /// let stopper = server.stopper();
    /// std::thread::spawn(move || stopper.stop()); // when it takes too long, for example
    /// match server.start(|request: &Request| Ok(request.body().to_vec())) {
    ///     Ok(serving) => drop(serving.wait()),
    ///     Err(Error::Stopped) => println!("stopped while it was connecting"),
    ///     Err(other) => println!("{other}"),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Starts the server; returns when every worker consumes.
    ///
    /// Blocks for at most the [connect timeout](Server::connect_timeout), in which it tries again
    /// and again, and for half a second more.
    ///
    /// **After the first start, the server reconnects by itself, for ever**: it waits 0.1 s between
    /// attempts, doubling to 5 s. If the queue was deleted, it declares it again.
    ///
    /// # The handler
    ///
    /// It runs in several threads at once, one for each worker, all by the same reference. It
    /// answers whatever is [`Into`] a [`Response`], such as bytes or a text, and does not borrow
    /// from the request: `Ok(request.body().to_vec())`. Or any error by `?` or `.into()`, see
    /// [`HandlerError`]. A closure has to name the type of its argument, `|request: &Request|`.
    ///
    /// **One that panics** answers with an error of kind `internal` that holds the panic's message,
    /// and its worker goes on. A program built with `panic = "abort"` ends instead.
    ///
    /// **One that blocks** keeps its own worker, and nothing else, from going on; no timeout ends
    /// it. After 30 minutes, unless configured otherwise, RabbitMQ closes its channel and delivers
    /// the request again, perhaps to another server, which executes it, too. This one does not
    /// begin it a second time, and its answer is sent when it is there.
    /// Source: <https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout>.
    ///
    /// **It must be idempotent**: executing a request twice must do what executing it once does. A
    /// request is acknowledged after its reply was sent, so one that was begun when the server or
    /// the connection died is delivered again, to this server or another, with
    /// [`Request::redelivered`] set. A client that lost its connection sends again, too
    /// ([`Retry`](crate::Retry)); to the broker that is a new message, and `redelivered` is not
    /// set. What all of them have in common is [`Request::correlation_id`]: keep it with what was
    /// done, in the same transaction, and answer from there if it comes again.
    /// Source: <https://www.rabbitmq.com/docs/confirms#automatic-requeueing>.
    ///
    /// A request whose caller has given up before a worker was free is not begun, and is
    /// acknowledged. Nor is one without `reply_to`, since nobody could be answered.
    ///
    /// # Errors
    ///
    /// - [`Error::Unreachable`]: within the connect timeout, no broker could be reached, or the one
    ///   that was did not give us a consumer for each worker.
    /// - [`Error::QueueRefused`]: the broker does not let us have the queue. Told at once.
    /// - [`Error::InvalidArgument`]: the queue's name is empty or longer than 255 bytes, there are
    ///   no workers or no prefetch, or the operating system has no thread to spare.
    /// - [`Error::ConnectionLost`]: a thread of the server has panicked, which is a bug of ours.
    /// - [`Error::Stopped`]: a [`Stopper`] was quicker.
    ///
    /// ```no_run
    /// use fibrpc::{HandlerError, Request, Server};
    /// use std::collections::HashMap;
    /// use std::sync::Mutex;
    ///
    /// // In earnest a table in a database, with the balance.
    /// let done: Mutex<HashMap<Vec<u8>, String>> = Mutex::default();
    ///
    /// let withdraw = move |request: &Request| -> Result<String, HandlerError> {
    ///     let id = request.correlation_id().ok_or("a withdrawal needs a correlation id")?;
    ///     let mut done = done.lock().map_err(|_| "a withdrawal has panicked")?;
    ///     if let Some(receipt) = done.get(id) {
    ///         return Ok(receipt.clone()); // the second time
    ///     }
    ///     let receipt = format!("withdrew {}", str::from_utf8(request.body())?);
    ///     done.insert(id.to_vec(), receipt.clone());
    ///     Ok(receipt)
    /// };
    /// let serving = Server::new("amqp://localhost")?.queue("withdraw").start(withdraw)?;
    /// serving.wait()?; // until it is stopped
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn start<H, R>(self, handler: H) -> Result<Serving, Error>
    where
        H: Fn(&Request) -> Result<R, HandlerError> + Send + Sync + 'static,
        R: Into<Response>,
    {
        self.options.check()?;
        // Here all that is the user's code runs, so that a panic of it is caught in one place.
        let handler = move |request: &Request| match handler(request) {
            Ok(response) => response.into().checked(),
            Err(error) => Err(RemoteError::of(error)),
        };
        let (events, told) = unbounded();
        let worker = Arc::new(Worker {
            handler: Box::new(handler),
            queue: Arc::new(WorkQueue::new(
                events,
                self.options.workers,
                self.options.prefetch,
            )),
            stats: Arc::default(),
        });
        let give_up_at = after(Instant::now(), self.options.connect_timeout);
        let (waiting, started) = bounded(0);
        let brokers = Brokers::new(self.options.endpoints.clone());
        let supervisor = Supervisor {
            options: self.options,
            queue: Arc::clone(&worker.queue),
            stats: Arc::clone(&worker.stats),
            told,
            stop: self.stop,
            starting: Some(Starting {
                give_up_at,
                latest: None,
                _waiting: waiting,
            }),
            number: 0,
            brokers,
        };
        start_workers(&worker, supervisor.options.workers)?;
        let outcome = Arc::new(OnceLock::new());
        let (alive, ended) = bounded::<Never>(0);
        let serving = Serving {
            stopper: self.stopper,
            stats: Arc::clone(&worker.stats),
            outcome: Arc::clone(&outcome),
            ended,
            told: AtomicBool::new(false),
        };
        let supervise = move || {
            let _ = outcome.set(supervisor.run());
            drop(alive);
        };
        // It owns the connection and its channels, and ends when the server is stopped. Nobody
        // joins it; `ended` says when it has.
        thread::Builder::new()
            .name("fibrpc-supervisor".to_owned())
            .spawn(supervise)
            .map_err(|error| {
                worker.queue.close();
                no_thread(&error)
            })?;
        // Ends when every worker consumes, or with the supervisor.
        let _ = started.recv();
        if serving.stats().connections > 0 {
            return Ok(serving);
        }
        match serving.wait() {
            Ok(_) => Err(Error::Stopped),
            Err(error) => Err(error),
        }
    }
}

/// Starts the threads that run the handler. Nobody joins them: one whose handler does not return
/// is left behind.
fn start_workers(worker: &Arc<Worker>, count: usize) -> Result<(), Error> {
    for number in 0..count {
        let started = Arc::clone(worker);
        thread::Builder::new()
            .name(format!("fibrpc-worker-{}", number + 1))
            .spawn(move || started.run(number))
            .map_err(|error| {
                worker.queue.close();
                no_thread(&error)
            })?;
    }
    Ok(())
}

fn no_thread(error: &std::io::Error) -> Error {
    Error::InvalidArgument(format!("cannot start a thread: {error}"))
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Server").field(&self.options).finish()
    }
}

/// A server that has started. Made by [`Server::start`].
///
/// It serves until it is stopped, and connects again whenever it has to. Keep it: dropping it stops
/// the server, as [`Serving::stop`] does, and blocks for as long; an error is only logged then. It
/// is [`Send`] and [`Sync`]. A handler of its own must not drop it, or it would wait for itself: it
/// has a [`Stopper`] for that.
///
/// ```no_run
/// use fibrpc::{Request, Server};
/// use std::{thread, time::Duration};
///
/// let serving = Server::new("amqp://localhost")?
///     .queue("shout")
///     .start(|request: &Request| Ok(request.body().to_ascii_uppercase()))?;
/// thread::sleep(Duration::from_secs(60));
/// println!("{} so far", serving.stats().answered);
/// drop(serving); // takes no more requests, answers what it has begun
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[must_use = "a server that is dropped stops"]
pub struct Serving {
    stopper: Stopper,
    stats: Arc<Stats>,
    /// How the supervisor has ended, once it has; nothing if it panicked.
    outcome: Arc<OnceLock<Result<(), Error>>>,
    /// Disconnected when the supervisor has ended.
    ended: Receiver<Never>,
    /// Whether somebody knows how it has ended.
    told: AtomicBool,
}

impl Serving {
    /// Stops the server: takes no more requests, answers what it has begun, and gives the rest back
    /// to the broker.
    ///
    /// Blocks for at most the [drain timeout](Server::drain_timeout); for up to 30 s in its place
    /// if a new connection is just being set up with a broker that does not answer. Without a
    /// connection, or once it is lost, it does not wait for handlers, since nothing can be
    /// answered: their threads are left behind, and the broker delivers their requests again.
    ///
    /// # Errors
    ///
    /// - [`Error::DrainTimeout`]: some handlers did not return in time. Their threads are left
    ///   behind to run on, and the broker gives their requests to another server.
    /// - [`Error::ConnectionLost`]: a thread of the server has panicked, which is a bug of ours.
    ///
    /// ```no_run
    /// # use fibrpc::{Error, Request, Server};
    /// let serving = Server::new("amqp://localhost")?
    ///     .start(|request: &Request| Ok(request.body().to_vec()))?;
    /// match serving.stop() {
    ///     Ok(stats) => println!("{} answered, {} refused", stats.answered, stats.refused),
    ///     Err(Error::DrainTimeout { workers, .. }) => println!("{workers} are still at work"),
    ///     Err(other) => println!("{other}"),
    /// }
    /// # Ok::<(), Error>(())
    /// ```
    pub fn stop(self) -> Result<ServerStats, Error> {
        self.stopper.stop();
        self.wait()
    }

    /// Serves until a [`Stopper`] stops the server, then drains as of [`Serving::stop`]. Blocks for
    /// as long as that takes; without a stopper, for ever. Several threads may wait.
    /// [`Serving::stopper`] has an example.
    ///
    /// # Errors
    ///
    /// As of [`Serving::stop`].
    pub fn wait(&self) -> Result<ServerStats, Error> {
        let _ = self.ended.recv();
        self.told.store(true, Ordering::Relaxed);
        match self.outcome.get() {
            Some(Ok(())) => Ok(self.stats()),
            Some(Err(error)) => Err(error.clone()),
            None => Err(Error::ConnectionLost {
                reason: "the supervisor of the server panicked".to_owned(),
            }),
        }
    }

    /// A handle that stops the server, to be kept where this is not: in a thread that waits for a
    /// signal, for example.
    ///
    /// ```no_run
    /// # let server = fibrpc::Server::new("amqp://localhost")?;
    /// let serving = server.start(|request: &fibrpc::Request| Ok(request.body().to_vec()))?;
    /// let stopper = serving.stopper();
    /// std::thread::spawn(move || {
    ///     // ... when it is time:
    ///     stopper.stop();
    /// });
    /// serving.wait()?;
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// What the server has done so far. Does not block.
    pub fn stats(&self) -> ServerStats {
        let stats = &self.stats;
        ServerStats {
            answered: stats.answered.load(Ordering::Relaxed),
            refused: stats.refused.load(Ordering::Relaxed),
            internal: stats.internal.load(Ordering::Relaxed),
            expired: stats.expired.load(Ordering::Relaxed),
            unanswerable: stats.unanswerable.load(Ordering::Relaxed),
            connections: stats.connections.load(Ordering::Relaxed),
            connected: stats.connected.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stopper.stop();
        let told = self.told.load(Ordering::Relaxed);
        if let Err(error) = self.wait()
            && !told
        {
            log::warn!("stopping: {error}");
        }
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Serving").field(&self.stats()).finish()
    }
}

/// Stops a server, from any thread. Made by [`Server::stopper`] and [`Serving::stopper`], which has
/// an example. Dropping it does nothing; a clone stops the same server.
///
/// ```no_run
/// # let server = fibrpc::Server::new("amqp://localhost")?;
/// let stopper = server.stopper();
/// let serving = server.start(|request: &fibrpc::Request| Ok(request.body().to_vec()))?;
/// let timer = std::thread::spawn(move || {
///     std::thread::sleep(std::time::Duration::from_secs(60));
///     stopper.stop();
/// });
/// let stats = serving.wait()?; // a minute, and the drain
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Clone)]
pub struct Stopper(Arc<Mutex<Option<Sender<Never>>>>);

impl Stopper {
    /// Tells the server to stop, and returns at once; [`Serving::wait`] tells when it has. Told
    /// again, it does nothing. It takes a lock, so call it from a thread that has been told of a
    /// signal, and not from a signal handler.
    pub fn stop(&self) {
        // The supervisor sees that its receiver is disconnected.
        drop(lock(&self.0).take());
    }
}

impl fmt::Debug for Stopper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopper").finish_non_exhaustive()
    }
}

/// What a server has done so far. Made by [`Serving::stats`], [`Serving::stop`] and
/// [`Serving::wait`].
///
/// ```no_run
/// # use fibrpc::{Request, Server};
/// let serving = Server::new("amqp://localhost")?
///     .start(|request: &Request| Ok(request.body().to_vec()))?;
/// let stats = serving.stop()?;
/// println!("{} of {} refused", stats.refused, stats.answered + stats.refused);
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ServerStats {
    /// Requests answered with a result, counted when the handler has returned.
    pub answered: u64,
    /// Requests answered with an error, a panic included, counted when the handler has returned.
    pub refused: u64,
    /// Those of the refused whose error was of kind `internal`: the handler has panicked, has
    /// returned an error without a kind of its own, or a response longer than the broker takes.
    pub internal: u64,
    /// Requests whose caller had given up before a worker was free: acknowledged, not executed.
    pub expired: u64,
    /// Requests without `reply_to`, which nobody can be answered: acknowledged, not executed.
    pub unanswerable: u64,
    /// Connections on which every worker has consumed. The first is one, too.
    pub connections: u64,
    /// Whether it is connected now, and every worker has consumed on that connection. A connection
    /// of which nothing comes any more counts until that is noticed.
    pub connected: bool,
}
