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
use crate::amqp::sync::Never;
use crate::error::Error;
use crate::message::Reply;
use calls::{CallMany, Calls, RequestBuilder};
use crossbeam_channel::{Receiver, bounded};
use manager::Manager;
use options::{Options, ReplyTo, Retry};
use pending::Shared;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// How long dropping the last handle waits for an orderly close.
const CLOSE_TIME: Duration = Duration::from_millis(200);

/// A blocking RPC client for any number of queues: a handle that is cheap to clone and that many
/// threads can share.
///
/// The connection is made when the first call needs it, and again whenever a call finds it
/// lost. Dropping the last handle closes it, which takes at most 0.2 s.
///
/// ```no_run
/// use fibrpc::Client;
///
/// let client = Client::new("amqp://localhost")?;
/// let reply = client.call("shout", "hello")?; // blocks, at most for the timeout
/// assert_eq!(reply.body, b"HELLO");
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
    /// How long a call may take, everything included: connect, send, wait, reconnect. A request
    /// can have [its own](RequestBuilder::timeout). Default: 30 s.
    pub fn timeout(mut self, timeout: Duration) -> ClientBuilder {
        self.options.timeout = timeout;
        self
    }

    /// How hard a call tries. A request can have [its own](RequestBuilder::retry). Default:
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

    /// Whether calls wait, until their deadline, for a broker that is not up and a request queue
    /// that does not exist yet. If not, they end at once. Default: `false`.
    pub fn wait_for_server(mut self, wait: bool) -> ClientBuilder {
        self.options.wait_for_server = wait;
        self
    }

    /// Makes the client; connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`]: the timeout is zero, or the operating system has no thread to
    /// spare.
    pub fn build(self) -> Result<Client, Error> {
        if self.options.timeout.is_zero() {
            let reason = "the timeout must be longer than 0".to_owned();
            return Err(Error::InvalidArgument(reason));
        }
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

/// What has happened to a client so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ClientStats {
    /// Connections made.
    pub connections: u64,
    /// Requests sent again, as [`Retry`] says.
    pub republished: u64,
    /// Replies dropped because no call waits for them: duplicates, and those after a deadline.
    pub dropped_replies: u64,
}

impl Client {
    /// Makes a client with every option at its default; connects to nothing yet. `brokers` are a
    /// URL, several separated by commas, or [`Endpoints`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`], and [`Error::InvalidArgument`] if the operating system has no thread
    /// to spare.
    pub fn new<B>(brokers: B) -> Result<Client, Error>
    where
        B: TryInto<Endpoints>,
        InvalidUrl: From<B::Error>,
    {
        Client::builder(brokers)?.build()
    }

    /// Begins a client with options.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidUrl`].
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

    /// Sends a request to a queue and waits for the reply, at most for the client's timeout.
    ///
    /// # Errors
    ///
    /// Any [`Error`] that is not a server's; each says when it happens.
    pub fn call(&self, queue: &str, body: impl Into<Vec<u8>>) -> Result<Reply, Error> {
        self.request(queue).send(body)
    }

    /// Begins a request to a queue, with headers, a content type or a timeout of its own.
    pub fn request(&self, queue: &str) -> RequestBuilder<'_> {
        RequestBuilder::new(&self.handle.shared, queue)
    }

    /// Sends many requests, at most `window` at a time unanswered, and gives the answers in the
    /// order of the requests; the keys count them from 0. Memory is bounded by the window.
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

    /// A set of calls that are in flight together, answered in any order.
    pub fn calls<K>(&self) -> Calls<'_, K> {
        Calls::new(&self.handle.shared)
    }

    /// Ends every call that is waiting, in any thread, with [`Error::Closed`]; later ones, too.
    pub fn close(&self) {
        self.handle.shared.close();
    }

    /// Whether [`Client::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.handle.shared.lock().closing
    }

    /// What has happened so far.
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
