//! The client: calls with deadlines, over one connection that many threads share.
//!
//! A call costs no hop between threads while all is well. The calling thread registers its
//! correlation id, writes the request to the socket itself, and then reads the socket itself, if
//! nobody else does. Whoever takes a reply off the wire hands it to its owner, so any waiting
//! caller serves the others, and when none waits, amiquip's I/O thread does (see
//! [`crate::amqp::inbox`]).
//!
//! What may block is left to one thread, the connection manager: resolve names, connect,
//! reconnect, declare the callback queue, send again what a lost connection left unanswered, close.
//! So nothing that hangs holds a caller past its deadline.
//!
//! RPC handlers are idempotent by contract: a server may die between its reply and its ack, and
//! then the request runs twice. So sending again, under the same correlation id, adds no new kind
//! of surprise, and a reply whose correlation id nobody knows (any more) is dropped.

pub(crate) mod calls; // what a caller's thread does
mod correlation; // which call a reply is for
mod link; // a live connection, and a request on it
mod manager; // what the client's own thread does
pub(crate) mod options;
mod pending; // what all of them share

use crate::amqp::endpoint::{Endpoints, InvalidUrl};
use crate::amqp::sync::atomic::Ordering;
use crate::amqp::sync::channel::{Receiver, bounded};
use crate::amqp::sync::{Never, thread};
use crate::error::Error;
use crate::message::Reply;
use calls::{CallMany, Calls, RequestBuilder};
use manager::Manager;
use options::{Confirms, Options, ReplyTo, Retry, check_times};
use pending::Shared;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// How long dropping the last handle waits for an orderly close.
const CLOSE_TIME: Duration = Duration::from_millis(200);

/// A blocking RPC client for any number of queues: a handle that is cheap to clone and that many
/// threads can share.
///
/// All clones share one connection, which a thread of the client's own keeps. It is made when the
/// first call needs it, and again when a call needs it and it was lost. A client is [`Send`] and
/// [`Sync`]: any number of threads can call at the same time, by a reference or by a clone each.
///
/// Dropping a clone does nothing. Dropping the last one closes the connection and ends the thread;
/// it blocks for at most 0.2 s.
///
/// Each process needs a client of its own. After a `fork`, make one in the child: a client that was
/// made before has lost its thread there, and shares its socket with the parent.
///
/// ```no_run
/// use fibrpc::Client;
/// use std::thread;
///
/// let client = Client::new("amqp://localhost")?;
/// let reply = client.call("shout", "hello")?; // blocks, at most for the timeout
/// assert_eq!(reply.body, b"HELLO");
///
/// thread::scope(|scope| {
///     for word in ["many", "threads"] {
///         let client = &client;
///         scope.spawn(move || println!("{:?}", client.call("shout", word)));
///     }
/// });
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

/// What all clones of a client hold together; the connection manager does not, so that its end can
/// be seen.
struct Handle {
    shared: Arc<Shared>,
    /// Disconnected when the connection manager has ended.
    ended: Receiver<Never>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
        // A manager that is still resolving a name or connecting ends when that does.
        let _ = self.ended.recv_timeout(CLOSE_TIME);
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client")
            .field(&self.handle.shared.options)
            .finish()
    }
}

/// A client that is still to be told some options. Made by [`Client::builder`].
///
/// It holds no connection and no thread; dropping it does nothing.
///
/// ```no_run
/// use fibrpc::{Client, Retry};
/// use std::time::Duration;
///
/// let client = Client::builder("amqp://a.example,amqp://b.example")?
///     .timeout(Duration::from_secs(5))
///     .retry(Retry::Unanswered(Duration::from_secs(1)))
///     .wait_for_server(true)
///     .build()?;
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct ClientBuilder {
    options: Options,
}

impl ClientBuilder {
    /// How long a call may take, everything included: connect, send, wait, reconnect. Longer than
    /// 0, which [`ClientBuilder::build`] checks. A request can have
    /// [its own](RequestBuilder::timeout). Default: 30 s.
    pub fn timeout(mut self, timeout: Duration) -> ClientBuilder {
        self.options.timeout = timeout;
        self
    }

    /// When a request is sent again. A request can have [its own](RequestBuilder::retry). Default:
    /// [`Retry::LostConnection`].
    pub fn retry(mut self, retry: Retry) -> ClientBuilder {
        self.options.retry = retry;
        self
    }

    /// Where replies are to be sent. Default: [`ReplyTo::Queue`].
    pub fn reply_to(mut self, reply_to: ReplyTo) -> ClientBuilder {
        self.options.reply_to = reply_to;
        self
    }

    /// Whether the broker is to confirm each request that it has taken. Default:
    /// [`Confirms::Auto`].
    pub fn confirms(mut self, confirms: Confirms) -> ClientBuilder {
        self.options.confirms = confirms;
        self
    }

    /// Whether calls wait, until their deadline, for a broker that is not up and a request queue
    /// that does not exist yet. Default: `false`, and they end with [`Error::Unreachable`] or
    /// [`Error::NoServer`] as soon as that is known.
    ///
    /// A client that has been connected once waits for a lost broker in any case. In the first 10 s
    /// after it has connected again, it waits for a missing queue, too: the server may not be back
    /// yet.
    pub fn wait_for_server(mut self, wait: bool) -> ClientBuilder {
        self.options.wait_for_server = wait;
        self
    }

    /// How long a thread that waits for a reply asks for it again and again, before it sleeps until
    /// the reply comes; zero: not at all. Default: 500 µs.
    ///
    /// A thread that sleeps, on a core that falls asleep with it, takes longer to wake up than a
    /// short call does otherwise: so this halves the latency of calls that are answered at once. The
    /// price is the CPU time of the wait. One thread of a client spins at a time, only where there is
    /// more than one core, with at most two calls of its own under way, and only while it pays: it
    /// gives up, for longer and longer, where replies take longer than this, or where other threads
    /// want its core.
    pub fn spin(mut self, time: Duration) -> ClientBuilder {
        self.options.spin = time;
        self
    }

    /// Makes the client and its thread; connects to nothing yet, and does not block.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`]: the timeout or that of [`Retry::Unanswered`] is zero, or the operating system has no thread to
    /// spare.
    ///
    /// # Panics
    ///
    /// If the operating system has no random numbers, which Linux says of itself only while it
    /// boots.
    ///
    /// ```
    /// use fibrpc::{Client, Error};
    /// use std::time::Duration;
    ///
    /// let never = Client::builder("amqp://localhost")?.timeout(Duration::ZERO);
    /// assert!(matches!(never.build(), Err(Error::InvalidArgument(_))));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn build(self) -> Result<Client, Error> {
        check_times(self.options.timeout, self.options.retry)?;
        // One message is enough: it says "look", not what to see.
        let (wake, woken) = bounded(1);
        let shared = Arc::new(Shared::new(self.options, wake));
        let (alive, ended) = bounded(0);
        let manager = Manager {
            shared: Arc::clone(&shared),
            woken,
            _alive: alive,
        };
        // The thread owns the connection, its channels and its consumer, and ends when the last
        // handle is dropped.
        thread::Builder::new()
            .name("fibrpc-connection".to_owned())
            .spawn(move || manager.run())
            .map_err(|error| Error::InvalidArgument(format!("cannot start a thread: {error}")))?;
        Ok(Client {
            handle: Arc::new(Handle { shared, ended }),
        })
    }
}

/// What has happened to a client so far, all its clones together. Made by [`Client::stats`].
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// client.call("shout", "hello")?;
/// let stats = client.stats();
/// assert_eq!((stats.connections, stats.republished), (1, 0));
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ClientStats {
    /// Connections made, each with its callback queue. The first is one, too.
    pub connections: u64,
    /// How often a request was sent again, as [`Retry`] says.
    pub republished: u64,
    /// Replies dropped because no call waits for them: a second answer to a request that was
    /// executed twice, one after its call's deadline, one to a call that was abandoned, and what
    /// was never ours.
    pub dropped_replies: u64,
}

impl Client {
    /// Makes a client with every option of [`ClientBuilder`] at its default; connects to nothing
    /// yet, and does not block. `brokers` are a URL, several separated by commas, or [`Endpoints`].
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidUrl`]: a URL cannot be used.
    /// - [`Error::InvalidArgument`]: the operating system has no thread to spare.
    ///
    /// # Panics
    ///
    /// As of [`ClientBuilder::build`].
    ///
    /// ```
    /// use fibrpc::{Client, Endpoints, Error};
    ///
    /// let _one = Client::new("amqp://app:secret@broker.example/shop")?;
    /// let _several = Client::new("amqp://a.example,amqp://b.example")?;
    /// let _the_default = Client::new(Endpoints::default())?; // guest at localhost
    /// assert!(matches!(Client::new("localhost"), Err(Error::InvalidUrl(_))));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn new<B>(brokers: B) -> Result<Client, Error>
    where
        B: TryInto<Endpoints>,
        InvalidUrl: From<B::Error>,
    {
        Client::builder(brokers)?.build()
    }

    /// Begins a client with options. `brokers` are as of [`Client::new`]; [`ClientBuilder`] has an
    /// example.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`]: a URL cannot be used.
    pub fn builder<B>(brokers: B) -> Result<ClientBuilder, Error>
    where
        B: TryInto<Endpoints>,
        InvalidUrl: From<B::Error>,
    {
        let endpoints = brokers.try_into().map_err(InvalidUrl::from)?;
        Ok(ClientBuilder {
            options: Options::new(endpoints),
        })
    }

    /// Sends a request to a queue and waits for the reply. Blocks for at most the client's timeout,
    /// by default 30 s, whatever the broker does.
    ///
    /// The body is any bytes; it travels as `text/plain`. [`Client::request`] says otherwise.
    ///
    /// # Errors
    ///
    /// Was the request executed? Not with those marked *no*; with the others it may have been.
    ///
    /// - [`Error::InvalidArgument`] (*no*): the queue's name is empty or longer than 255 bytes, or
    ///   the body longer than 128 MiB.
    /// - [`Error::Unreachable`] (*no*): no broker could be reached, by a client that has not been
    ///   connected yet and does not [wait](ClientBuilder::wait_for_server). It takes one round of
    ///   all brokers, which gets 10 s.
    /// - [`Error::NoServer`] (*no*, unless it was sent before, see [`Retry`]): the request queue
    ///   does not exist, and the client does not [wait](ClientBuilder::wait_for_server) for it.
    /// - [`Error::Timeout`]: the deadline passed. It says what was waited for.
    /// - [`Error::Remote`]: the server answered with an error.
    /// - [`Error::ConnectionLost`]: the connection was lost after the request was sent, and
    ///   [`Retry::Never`] forbids to send it again.
    /// - [`Error::Rejected`] (*no*): the broker did not take the request: its body is over the
    ///   broker's limit, or, where it [confirms](ClientBuilder::confirms), its queue is full.
    /// - [`Error::QueueRefused`] (*no*): the user may not publish (403), which ends all calls of the
    ///   client that are in flight.
    /// - [`Error::Closed`]: [`Client::close`] was called, before or meanwhile.
    ///
    /// ```no_run
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let reply = client.call("shout", "hello")?;
    /// println!("{}", String::from_utf8_lossy(&reply.body));
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn call(&self, queue: &str, body: impl Into<Vec<u8>>) -> Result<Reply, Error> {
        self.request(queue).send(body)
    }

    /// Begins a request to a queue, with headers, a content type or a timeout of its own; sends
    /// nothing yet. The queue's name has 1 to 255 bytes, which is checked when the request is sent.
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let reply = client.request("shout").timeout(Duration::from_secs(2)).send("hello")?;
    /// assert_eq!(reply.body, b"HELLO");
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn request(&self, queue: &str) -> RequestBuilder<'_> {
        RequestBuilder::new(&self.handle.shared, queue)
    }

    /// Sends many requests, to one queue or several, and gives the answers in their order; the keys
    /// count them from 0. One that fails does not keep the rest from going on.
    ///
    /// At most `window` requests are sent and not given out yet (0 is taken as 1), so one that
    /// takes long holds back those that are a window behind it. Memory is bounded by the window.
    ///
    /// ```no_run
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let requests = ["many", "at", "once"].map(|word| client.request("shout").body(word));
    /// for answer in client.call_many(requests, 64) {
    ///     println!("{}: {:?}", answer.key, answer.result?.body);
    /// }
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn call_many<'r, I>(&self, requests: I, window: usize) -> CallMany<'_, I::IntoIter>
    where
        I: IntoIterator<Item = RequestBuilder<'r>>,
    {
        CallMany::new(&self.handle.shared, requests.into_iter(), window)
    }

    /// Begins a set of calls that are in flight together, answered in any order; sends nothing yet.
    /// `K` is what you tell the answers by.
    ///
    /// ```no_run
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let mut calls = client.calls();
    /// calls.submit("first", client.request("shout").body("hello"));
    /// calls.submit("second", client.request("shout").body("world"));
    /// while let Some(answer) = calls.next() {
    ///     println!("{}: {:?}", answer.key, answer.result);
    /// }
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn calls<K>(&self) -> Calls<'_, K> {
        Calls::new(&self.handle.shared)
    }

    /// Ends every call that is waiting, in any thread and of any clone, with [`Error::Closed`]; and
    /// later ones at once. Returns at once; the waiting threads learn of it within 0.3 s.
    ///
    /// A request that was sent already may still be executed. A closed client stays closed.
    ///
    /// ```no_run
    /// # use std::thread;
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let caller = thread::spawn({
    ///     let client = client.clone();
    ///     move || client.call("shout", "hello")
    /// });
    /// client.close();
    /// println!("{:?}", caller.join()); // Closed, unless the answer was quicker
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn close(&self) {
        self.handle.shared.close();
    }

    /// Whether [`Client::close`] was called, on this clone or another.
    pub fn is_closed(&self) -> bool {
        self.handle.shared.lock().closing
    }

    /// What has happened so far, to all clones together. Does not block.
    pub fn stats(&self) -> ClientStats {
        let stats = &self.handle.shared.stats;
        ClientStats {
            connections: stats.connections.load(Ordering::Relaxed),
            republished: stats.republished.load(Ordering::Relaxed),
            dropped_replies: stats.dropped_replies.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_a_handle_that_threads_share() {
        fn shared_by_threads<T: Send + Sync + Clone>() {}
        shared_by_threads::<Client>();
    }

    #[test]
    fn brokers_are_a_url_or_endpoints() {
        let endpoints = Endpoints::default();
        assert!(Client::new("amqp://localhost").is_ok());
        assert!(Client::new(String::from("amqp://a,amqp://b")).is_ok());
        assert!(Client::new(&endpoints).is_ok());
        assert!(Client::new(endpoints).is_ok());
        assert!(matches!(
            Client::new("http://localhost"),
            Err(Error::InvalidUrl(_))
        ));
    }
}
