//! The server: a supervisor and a pool of workers around one handler.
//!
//! One connection, and a channel for each worker, with a prefetch limit and a consumer of its own.
//! To the broker that is as many independent consumers, and it deals requests out fairly. The
//! requests arrive in a common [`WorkQueue`], where any free worker takes the next one, runs the
//! handler, and sends reply and acknowledgement in one piece, on the channel that the request came
//! by. A worker that finds nothing to do reads the socket itself (see [`crate::amqp::inbox`]).

mod options;
pub(crate) mod request; // what a handler sees
mod supervisor; // the thread that keeps the server connected
mod work_queue; // where requests meet workers
mod worker; // the threads that run the handler

use crate::amqp::endpoint::{Endpoints, InvalidUrl};
use crate::amqp::queue::QueueType;
use crate::amqp::sync::{Never, lock};
use crate::error::Error;
use crate::message::{HandlerError, RemoteError, Response};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use options::Options;
use request::Request;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use supervisor::Supervisor;
use work_queue::WorkQueue;
use worker::{Stats, Worker};

/// A server that is still to be started: executes the requests of a queue with one handler, in
/// several threads.
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
/// Requests must be idempotent: one that was executed by a server that died before its
/// acknowledgement is executed again.
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
    /// [`Error::InvalidUrl`].
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

    /// The request queue: a name of 1 to 255 bytes. Default: `rpc_queue`.
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

    /// How many requests are executed at the same time, each in a thread of its own; at least 1.
    /// Default: the number of CPUs.
    pub fn workers(mut self, workers: usize) -> Server {
        self.options.workers = workers;
        self
    }

    /// How many requests the broker may give a worker ahead of its acknowledgements; at least 1.
    /// Default: 1, so that a request never waits for a busy worker while another is free.
    pub fn prefetch(mut self, prefetch: u16) -> Server {
        self.options.prefetch = prefetch;
        self
    }

    /// How long [`Server::start`] tries for the first connection. A server that has been connected
    /// once tries again for ever. Default: 10 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Server {
        self.options.connect_timeout = timeout;
        self
    }

    /// How long requests being executed may take to finish once the server is told to stop.
    /// Default: 30 s.
    pub fn drain_timeout(mut self, timeout: Duration) -> Server {
        self.options.drain_timeout = timeout;
        self
    }

    /// A handle that stops the server, and also ends a [`Server::start`] that is still connecting.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Starts the server; returns when every worker consumes.
    ///
    /// The handler runs in several threads at once. It answers bytes, a text, or a [`Response`]; or
    /// any error by `?`. A handler that panics answers with an `internal` error. One that blocks
    /// keeps its worker, and nothing else, from going on. A request whose caller has given up
    /// before a worker was free is not begun, and is acknowledged.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`]: no connection within the connect timeout.
    /// [`Error::QueueRefused`]: the broker does not let us have the queue.
    /// [`Error::InvalidArgument`]: the queue's name is empty or longer than 255 bytes, there are no
    /// workers or no prefetch, or the operating system has no thread to spare.
    /// [`Error::Stopped`]: a [`Stopper`] was quicker.
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
            queue: Arc::new(WorkQueue::new(events)),
            stats: Arc::default(),
        });
        let (starting, started) = bounded(0);
        let supervisor = Supervisor {
            options: self.options,
            queue: Arc::clone(&worker.queue),
            stats: Arc::clone(&worker.stats),
            told,
            stop: self.stop,
            starting: Some(starting),
            number: 0,
        };
        start_workers(&worker, supervisor.options.workers)?;
        let mut serving = Serving {
            stopper: self.stopper,
            stats: Arc::clone(&worker.stats),
            supervisor: None,
        };
        // It owns the connection and its channels, and ends when the server is stopped.
        let supervisor = thread::Builder::new()
            .name("fibrpc-supervisor".to_owned())
            .spawn(move || supervisor.run())
            .map_err(|error| {
                worker.queue.close();
                no_thread(&error)
            })?;
        // Ends when every worker consumes, or with the supervisor.
        let _ = started.recv();
        serving.supervisor = Some(supervisor);
        if serving.stats().connections > 0 {
            return Ok(serving);
        }
        match serving.join() {
            Ok(_) => Err(Error::Stopped),
            Err(error) => Err(error),
        }
    }
}

/// Starts the threads that run the handler. Nobody joins them: one whose handler does not return
/// is left behind.
fn start_workers(worker: &Arc<Worker>, count: usize) -> Result<(), Error> {
    for index in 1..=count {
        let started = Arc::clone(worker);
        thread::Builder::new()
            .name(format!("fibrpc-worker-{index}"))
            .spawn(move || started.run())
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
/// It serves until it is stopped, and connects again whenever it has to. Dropping it stops it, as
/// [`Serving::stop`] does, and so blocks for at most the drain timeout.
#[must_use = "a server that is dropped stops"]
pub struct Serving {
    stopper: Stopper,
    stats: Arc<Stats>,
    /// `None` only while it starts, and once it has ended.
    supervisor: Option<JoinHandle<Result<(), Error>>>,
}

impl Serving {
    /// Stops the server: takes no more requests, answers what it has begun, and gives the rest back
    /// to the broker.
    ///
    /// # Errors
    ///
    /// [`Error::DrainTimeout`]: some handlers did not return in time; their threads are left
    /// behind, and the broker gives their requests to another server.
    pub fn stop(self) -> Result<ServerStats, Error> {
        self.stopper.stop();
        self.wait()
    }

    /// Serves until a [`Stopper`] stops the server.
    ///
    /// # Errors
    ///
    /// As of [`Serving::stop`].
    pub fn wait(mut self) -> Result<ServerStats, Error> {
        self.join()
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

    /// What the server has done so far.
    pub fn stats(&self) -> ServerStats {
        let stats = &self.stats;
        ServerStats {
            answered: stats.answered.load(Ordering::Relaxed),
            refused: stats.refused.load(Ordering::Relaxed),
            expired: stats.expired.load(Ordering::Relaxed),
            unanswerable: stats.unanswerable.load(Ordering::Relaxed),
            connections: stats.connections.load(Ordering::Relaxed),
        }
    }

    /// Waits for the end.
    fn join(&mut self) -> Result<ServerStats, Error> {
        if let Some(supervisor) = self.supervisor.take() {
            supervisor.join().unwrap_or_else(|_| {
                let reason = "the supervisor of the server panicked".to_owned();
                Err(Error::ConnectionLost { reason })
            })?;
        }
        Ok(self.stats())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Err(error) = self.join() {
            log::warn!("stopping: {error}");
        }
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Serving").field(&self.stats()).finish()
    }
}

/// Stops a server, from any thread. Dropping it does nothing. Made by [`Server::stopper`] and
/// [`Serving::stopper`].
#[derive(Clone)]
pub struct Stopper(Arc<Mutex<Option<Sender<Never>>>>);

impl Stopper {
    /// Tells the server to stop, and returns at once. Told again, it does nothing.
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

/// What a server has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ServerStats {
    /// Requests answered with a result.
    pub answered: u64,
    /// Requests answered with an error.
    pub refused: u64,
    /// Requests whose caller had given up before a worker was free: acknowledged, not executed.
    pub expired: u64,
    /// Requests without `reply_to`, which nobody can be answered: acknowledged, not executed.
    pub unanswerable: u64,
    /// Connections on which every worker has consumed.
    pub connections: u64,
}
