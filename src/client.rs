//! The client: calls with deadlines, over one connection that many threads share.
//!
//! A call costs no hop between threads while all is well. The calling thread registers its
//! correlation id, writes the request to the socket itself, and then reads the socket itself, if
//! nobody else does. Whoever takes a reply off the wire hands it to its owner, so any waiting
//! caller serves the others, and when none waits, amiquip's I/O thread does (see
//! [`crate::inbox`]).
//!
//! What may block is left to one thread, the keeper: resolve names, connect, reconnect, declare
//! the callback queue, publish again what a lost connection left unanswered, close. So nothing
//! that hangs holds a caller past its deadline.
//!
//! RPC handlers are idempotent by contract: a server may die between its reply and its ack, and
//! then the request runs twice. So publishing again, under the same correlation id, adds no new
//! kind of surprise, and a reply whose correlation id nobody knows (any more) is dropped.

use crate::arrival::{Arrival, ChannelNews, Goodbye, Message};
use crate::broker::{self, Backoff, Connection, Endpoints, FAR_FUTURE, random};
use crate::error::{Error, QueueStatus, WaitingFor};
use crate::frame::{Properties, Publish, SHORT_STRING_MAX, put_consume, put_publish};
use crate::inbox::{Inbox, Sink};
use crate::socket::{Never, NotSent, Outbox};
use crate::wire;
use amiquip::{Channel, ConnectionBlockedNotification, QueueDeclareOptions};
use crossbeam_channel::{Receiver, Sender, bounded, select, unbounded};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long one round of attempts to connect may take, for each broker in the list.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How often requests that could not be delivered, or not be sent, are tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// How often it is checked, at least, whether a request is to be sent again.
const RESEND_INTERVAL: Duration = Duration::from_millis(500);

/// How long after a reconnect a missing queue is waited for: a server that lost the same broker
/// is back after at most one of its own waits between attempts, and some time to connect.
const RETURN_GRACE: Duration = Duration::from_secs(10);

/// How long before its deadline a call asks after the queue, to say what it was waiting for:
/// this, or a fifth of the call's whole time if that is less.
const DIAGNOSIS_TIME: Duration = Duration::from_millis(200);

/// How long a request may be held back to leave together with others.
const COLLECT_TIME: Duration = Duration::from_micros(500);

/// How long dropping the last handle waits for an orderly close.
const CLOSE_TIME: Duration = Duration::from_millis(200);

/// What is said of a lost connection when nothing more is known.
const GONE: &str = "the connection is gone";

/// Where replies are to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ReplyTo {
    /// One callback queue for each connection: named by the broker, exclusive, auto-delete.
    #[default]
    Queue,
    /// RabbitMQ's direct reply-to: no queue at all.
    /// Source: <https://www.rabbitmq.com/docs/direct-reply-to>.
    Direct,
}

/// What a [`Client`] needs to know.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ClientConfig {
    /// The broker, or several of a cluster.
    pub endpoints: Endpoints,
    /// The request queue. Default: `rpc_queue`.
    pub queue: String,
    /// Where replies are to be sent. Default: a callback queue.
    pub reply_to: ReplyTo,
    /// How long a call may take, everything included: connect, send, wait, reconnect.
    /// Default: 30 s.
    pub timeout: Duration,
    /// Whether a request that was sent is sent again when its connection is lost. If not, the
    /// call ends with [`Error::ConnectionLost`]. Default: true.
    pub retry: bool,
    /// After how long an unanswered request is sent again, under the same correlation id; then
    /// after twice that, and so on. It saves calls whose request was lost where no client can
    /// see it: the queue was purged or deleted, or was on another node of a cluster that died.
    /// The price: a handler that takes longer runs more than once. Default: never.
    pub resend_after: Option<Duration>,
    /// Whether calls wait, until their deadline, for a broker that is not up and a request queue
    /// that does not exist yet. If not, they end at once. Default: false.
    pub wait_for_server: bool,
}

impl Default for ClientConfig {
    fn default() -> ClientConfig {
        ClientConfig {
            endpoints: Endpoints::default(),
            queue: "rpc_queue".to_owned(),
            reply_to: ReplyTo::Queue,
            timeout: Duration::from_secs(30),
            retry: true,
            resend_after: None,
            wait_for_server: false,
        }
    }
}

/// A blocking RPC client: a handle that is cheap to clone and that many threads can share.
///
/// The connection is made when the first call needs it, and again whenever a call finds it
/// lost. Dropping the last handle closes it.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

/// What all clones of a client hold together; the keeper does not, so that its end can be seen.
struct Handle {
    shared: Arc<Shared>,
    /// Disconnected when the keeper has ended.
    ended: Receiver<Never>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.close();
        // A keeper that is still resolving a name or connecting ends when that does.
        let _ = self.ended.recv_timeout(CLOSE_TIME);
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client")
            .field(&self.handle.shared.config)
            .finish()
    }
}

/// What has happened to a client so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ClientStats {
    /// Connections made.
    pub connections: u64,
    /// Requests sent again: after a lost connection, or as [`ClientConfig::resend_after`] says.
    pub republished: u64,
    /// Replies dropped because no call waits for them: duplicates, and those after a deadline.
    pub dropped_replies: u64,
}

impl Client {
    /// Makes a client; connects to nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`]: the queue's name is empty or longer than 255 bytes, the
    /// timeout is zero, or the operating system has no thread to spare.
    pub fn new(config: ClientConfig) -> Result<Client, Error> {
        check_queue_name(&config.queue)?;
        if config.timeout.is_zero() {
            return Err(Error::InvalidArgument(
                "the timeout must be longer than 0".to_owned(),
            ));
        }
        // One kick is enough: it says "look", not what to see.
        let (kick, kicked) = bounded(1);
        let shared = Arc::new(Shared {
            config,
            state: Mutex::new(State::default()),
            ids: Ids::new(),
            kick,
            stats: Stats::default(),
        });
        let (alive, ended) = bounded(0);
        let keeper = Keeper {
            shared: Arc::clone(&shared),
            kicked,
            _alive: alive,
        };
        // The thread owns the connection, its channel and its consumer, and ends when the last
        // handle is dropped.
        thread::Builder::new()
            .name("fibrpc-keeper".to_owned())
            .spawn(move || keeper.run())
            .map_err(|error| Error::InvalidArgument(format!("cannot start a thread: {error}")))?;
        Ok(Client {
            handle: Arc::new(Handle { shared, ended }),
        })
    }

    /// Sends a request and waits for its answer, at most for the configured timeout.
    ///
    /// # Errors
    ///
    /// Any [`Error`] but [`Error::DrainTimeout`]; each says when it happens.
    pub fn call(&self, request: &[u8]) -> Result<Vec<u8>, Error> {
        let mut calls = self.calls();
        calls.submit((), request);
        calls
            .next()
            .map_or(Err(Error::Closed), |answer| answer.result)
    }

    /// Sends many requests, at most `window` at a time unanswered, and gives the answers in the
    /// order of the requests. Memory is bounded by the window.
    pub fn call_many<I>(&self, requests: I, window: usize) -> CallMany<'_, I::IntoIter>
    where
        I: IntoIterator,
        I::Item: AsRef<[u8]>,
    {
        CallMany {
            calls: self.calls(),
            requests: requests.into_iter(),
            window: window.max(1),
            answers: VecDeque::new(),
            given: 0,
        }
    }

    /// A set of calls that are in flight together, answered in any order.
    pub fn calls<K>(&self) -> Calls<'_, K> {
        let (events, inbox) = unbounded();
        Calls {
            shared: &self.handle.shared,
            events,
            inbox,
            open: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: VecDeque::new(),
            link: None,
            unflushed: None,
            given: Instant::now(),
            asked: None,
        }
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

/// A queue's name travels as an AMQP short string.
pub(crate) fn check_queue_name(queue: &str) -> Result<(), Error> {
    match queue.len() {
        0 => Err(Error::InvalidArgument(
            "the queue's name is empty".to_owned(),
        )),
        1..=SHORT_STRING_MAX => Ok(()),
        len => Err(Error::InvalidArgument(format!(
            "the queue's name has {len} bytes; AMQP allows {SHORT_STRING_MAX}"
        ))),
    }
}

/// How one call ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Answer<K> {
    /// What the call was submitted with.
    pub key: K,
    /// The reply's body, or why there is none.
    pub result: Result<Vec<u8>, Error>,
    /// The time from submitting to the answer.
    pub latency: Duration,
}

/// Calls in flight together. Submit some, then take answers with [`Iterator::next`], which
/// waits, and is `None` only when no call is open. Dropping it abandons the open calls.
pub struct Calls<'c, K> {
    shared: &'c Shared,
    /// Other threads' way to our inbox, given along with each call.
    events: Sender<Event>,
    inbox: Receiver<Event>,
    open: HashMap<CorrelationId, OpenCall<K>>,
    /// The open calls by deadline, the next to pass first.
    deadlines: BTreeSet<(Instant, CorrelationId)>,
    /// Calls of ours that have ended and whose answers are still to be given out.
    ready: VecDeque<Settled>,
    /// The link we listen on.
    link: Option<Arc<Link>>,
    /// The link on which requests are collected that are not sent yet, and since when.
    unflushed: Option<(Arc<Link>, Instant)>,
    /// When we last gave an answer out.
    given: Instant,
    /// When we last asked after the queue.
    asked: Option<Instant>,
}

struct OpenCall<K> {
    key: K,
    submitted: Instant,
    deadline: Instant,
}

impl<K> Calls<'_, K> {
    /// Sends a request. Never blocks, never fails: what goes wrong is the call's answer. A
    /// request that cannot be sent now is sent as soon as it can. While answers are there to be
    /// taken, requests are collected, and leave together when the last of those is taken, or
    /// half a millisecond has passed.
    pub fn submit(&mut self, key: K, request: &[u8]) {
        let id = self.shared.ids.next();
        let submitted = Instant::now();
        let deadline = broker::after(submitted, self.shared.config.timeout);
        self.open.insert(
            id,
            OpenCall {
                key,
                submitted,
                deadline,
            },
        );
        self.deadlines.insert((deadline, id));
        if request.len() > wire::MESSAGE_MAX {
            let error = Error::InvalidArgument(format!(
                "the request has {} bytes; the broker takes {}",
                request.len(),
                wire::MESSAGE_MAX
            ));
            let _ = self.events.send(Event::Settled(id, Err(error)));
            return;
        }
        let pending = Pending {
            request: request.into(),
            deadline,
            sent_on: 0,
            returned: false,
            resend: self
                .shared
                .config
                .resend_after
                .map(|after| (broker::after(submitted, after), after)),
            events: self.events.clone(),
        };
        // With answers still to be taken, and a caller who is quick, we will be back in no time.
        let collect = !self.ready.is_empty()
            && submitted.duration_since(self.given) < COLLECT_TIME
            && self
                .unflushed
                .as_ref()
                .is_none_or(|(_, since)| submitted.duration_since(*since) < COLLECT_TIME);
        match self.shared.begin(id, pending, collect) {
            Some(link) => {
                self.unflushed.get_or_insert((link, submitted));
            }
            None => self.unflushed = None,
        }
    }

    /// How many calls are open.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether no call is open.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The next answer, if one comes before `limit`.
    pub fn next_before(&mut self, limit: Instant) -> Option<Answer<K>> {
        loop {
            // A deadline that has passed outranks everything: an answer that comes now is late.
            let &(deadline, id) = self.deadlines.first()?;
            let now = Instant::now();
            if now >= deadline {
                let error = self.shared.time_out(id);
                return self.settle(id, Err(error));
            }
            if now >= limit {
                return None;
            }
            let wake_at = deadline.min(limit).min(self.diagnosis_at(deadline, now));
            if let Some((id, result)) = self.wait(wake_at)
                && let Some(answer) = self.settle(id, result)
            {
                return Some(answer);
            }
        }
    }

    /// Asks after the queue if the deadline is near; says when to look again.
    fn diagnosis_at(&mut self, deadline: Instant, now: Instant) -> Instant {
        let margin = DIAGNOSIS_TIME.min(self.shared.config.timeout / 5);
        let ask_at = deadline.checked_sub(margin).unwrap_or(now);
        if now < ask_at {
            return ask_at;
        }
        if self
            .asked
            .is_none_or(|asked| now.duration_since(asked) > margin)
        {
            self.asked = Some(now);
            self.shared.ask_after_queue();
        }
        deadline
    }

    /// Waits for something to happen, at most until `wake_at`; whatever it is, it is dealt with,
    /// and if it ends a call of ours, that is returned.
    fn wait(&mut self, wake_at: Instant) -> Option<Settled> {
        let settled = self.ready.pop_front();
        // The caller may be back late.
        if self.ready.is_empty()
            && let Some((link, _)) = self.unflushed.take()
        {
            link.outbox.flush();
        }
        if settled.is_some() {
            return settled;
        }
        if self.link.is_none() {
            self.link = self.shared.lock().link.clone();
        }
        let timeout = wake_at.saturating_duration_since(Instant::now());
        let link = self.link.clone();
        let lead = link.as_ref().and_then(|link| link.inbox.try_lead());
        let (Some(link), Some(mut lead)) = (&link, lead) else {
            // Whoever leads, or the keeper, will tell us.
            let event = self.inbox.recv_timeout(timeout).ok()?;
            return self.hear(event);
        };
        // From before we led. While we lead, we hear of nothing but what we read.
        if let Ok(event) = self.inbox.try_recv() {
            drop(lead);
            return self.hear(event);
        }
        let (shared, open, ready) = (self.shared, &self.open, &mut self.ready);
        let read = lead.read(timeout, |arrival| {
            ready.extend(shared.take(link, arrival, open));
        });
        drop(lead);
        if read.is_err() {
            // However a link ends, the keeper finds out why.
            self.shared.report_broken(link.generation);
            self.link = None;
        }
        self.ready.pop_front()
    }

    /// Deals with what another thread has told us.
    fn hear(&mut self, event: Event) -> Option<Settled> {
        match event {
            Event::Settled(id, result) => Some((id, result)),
            Event::LinkUp => {
                self.link = None;
                None
            }
        }
    }

    /// Closes one of our open calls with its result; `None` if it is not open any more.
    fn settle(&mut self, id: CorrelationId, result: Outcome) -> Option<Answer<K>> {
        let call = self.open.remove(&id)?;
        self.deadlines.remove(&(call.deadline, id));
        self.given = Instant::now();
        Some(Answer {
            key: call.key,
            result,
            latency: self.given.duration_since(call.submitted),
        })
    }
}

impl<K> Iterator for Calls<'_, K> {
    type Item = Answer<K>;

    fn next(&mut self) -> Option<Answer<K>> {
        self.next_before(Instant::now() + FAR_FUTURE)
    }
}

impl<K> Drop for Calls<'_, K> {
    fn drop(&mut self) {
        if !self.open.is_empty() {
            let mut state = self.shared.lock();
            for id in self.open.keys() {
                state.pending.remove(id);
            }
        }
    }
}

/// The answers to [`Client::call_many`], in the order of the requests.
pub struct CallMany<'c, I> {
    calls: Calls<'c, u64>,
    requests: I,
    window: usize,
    /// The calls begun and not yet given out, in order; `None` while unanswered.
    answers: VecDeque<Option<Answer<u64>>>,
    /// How many answers have been given out: the key of `answers[0]`.
    given: u64,
}

impl<I> Iterator for CallMany<'_, I>
where
    I: Iterator,
    I::Item: AsRef<[u8]>,
{
    type Item = Answer<u64>;

    fn next(&mut self) -> Option<Answer<u64>> {
        loop {
            while self.answers.len() < self.window
                && let Some(request) = self.requests.next()
            {
                let key = self.given + self.answers.len() as u64;
                self.calls.submit(key, request.as_ref());
                self.answers.push_back(None);
            }
            if let Some(answer) = self.answers.front_mut()?.take() {
                self.answers.pop_front();
                self.given += 1;
                return Some(answer);
            }
            let answer = self.calls.next()?;
            let index = usize::try_from(answer.key - self.given).ok()?;
            self.answers[index] = Some(answer);
        }
    }
}

/// Gives each call of a client an id: half of it random, the other half counted. Nobody who has
/// not been sent one can guess it and answer in the server's place.
struct Ids {
    client: u64,
    next: AtomicU64,
}

impl Ids {
    fn new() -> Ids {
        Ids {
            client: random(),
            next: AtomicU64::new(0),
        }
    }

    fn next(&self) -> CorrelationId {
        let call = self.next.fetch_add(1, Ordering::Relaxed);
        CorrelationId(u128::from(self.client) << 64 | u128::from(call))
    }
}

/// Says which call a reply is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct CorrelationId(u128);

impl CorrelationId {
    const LEN: usize = 32;

    fn parse(text: &[u8]) -> Option<CorrelationId> {
        if text.len() != Self::LEN {
            return None;
        }
        let text = std::str::from_utf8(text).ok()?;
        u128::from_str_radix(text, 16).ok().map(CorrelationId)
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

type Outcome = Result<Vec<u8>, Error>;
type Settled = (CorrelationId, Outcome);

/// What a waiting caller is told by other threads.
enum Event {
    /// One of its calls has ended.
    Settled(CorrelationId, Outcome),
    /// There is a link to listen on.
    LinkUp,
}

/// A call that is not answered yet, as every thread must know it.
struct Pending {
    request: Arc<[u8]>,
    deadline: Instant,
    /// The generation of the link that it was last sent on; 0 if it is to be sent yet.
    sent_on: u64,
    /// Whether the broker returned it because there is no such queue.
    returned: bool,
    /// When it is to be sent again, and how long it will have been unanswered then.
    resend: Option<(Instant, Duration)>,
    /// The way to its caller.
    events: Sender<Event>,
}

impl Pending {
    /// Whether it is time to send it again; if so, the next time will be after twice as long.
    fn is_overdue(&mut self, now: Instant) -> bool {
        match &mut self.resend {
            Some((at, after)) if now >= *at => {
                *after = after.saturating_mul(2);
                true
            }
            _ => false,
        }
    }
}

/// One live connection, as the callers see it.
struct Link {
    /// Counts the links of a client, from 1.
    generation: u64,
    since: Instant,
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    /// The channel that consumes the callback queue.
    consumes_on: u16,
    /// The channel that requests are published on: the same, until one of them has been overdue.
    publishes_on: AtomicU16,
    /// The callback queue.
    reply_to: String,
    /// The way to the keeper, for what is about the channel and not about a call.
    news: Sender<Arrival>,
    /// The broker's reason, while it blocks publishers.
    blocked: Mutex<Option<String>>,
}

impl Link {
    /// To be called with the outbox locked: so a channel that nothing is published on any more can
    /// be closed.
    fn encode(&self, queue: &str, id: CorrelationId, pending: &Unsent, out: &mut Vec<u8>) {
        let correlation_id = id.to_string();
        // At least 1: a message that expires in 0 ms is only delivered to a consumer that is
        // waiting for it. At most what the broker accepts, 49 days.
        let left = pending
            .deadline
            .saturating_duration_since(Instant::now())
            .as_millis();
        let expiration = left.clamp(1, u128::from(u32::MAX)).to_string();
        let message = Publish {
            routing_key: queue.as_bytes(),
            mandatory: true,
            properties: Properties {
                content_type: Some(wire::TEXT_PLAIN),
                correlation_id: Some(correlation_id.as_bytes()),
                reply_to: Some(self.reply_to.as_bytes()),
                expiration: Some(expiration.as_bytes()),
                header: None,
            },
            body: &pending.request,
        };
        put_publish(out, self.publishes_on.load(Ordering::Relaxed), &message);
    }

    fn blocked(&self) -> MutexGuard<'_, Option<String>> {
        self.blocked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is needed to send a request.
struct Unsent {
    request: Arc<[u8]>,
    deadline: Instant,
}

/// What callers and keeper share.
struct Shared {
    config: ClientConfig,
    state: Mutex<State>,
    ids: Ids,
    /// Tells the keeper to look at the state.
    kick: Sender<()>,
    stats: Stats,
}

#[derive(Default)]
struct Stats {
    connections: AtomicU64,
    republished: AtomicU64,
    dropped_replies: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The live link, if there is one.
    link: Option<Arc<Link>>,
    /// The generation of the latest link.
    generation: u64,
    /// The latest generation known to be broken.
    broken: u64,
    pending: HashMap<CorrelationId, Pending>,
    /// Why the latest attempt to connect failed, until one succeeds.
    last_error: Option<String>,
    /// Whether a caller wants to know about the queue, and what was last found out, and when.
    asked_after_queue: bool,
    queue: Option<(Instant, Option<QueueStatus>)>,
    closing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        // Full means that a kick is already on its way.
        let _ = self.kick.try_send(());
    }

    /// Registers a call and sends its request, or leaves that to the keeper. To `collect`, it is
    /// appended to what is sent next; then the link is returned.
    fn begin(&self, id: CorrelationId, mut pending: Pending, collect: bool) -> Option<Arc<Link>> {
        let mut state = self.lock();
        if state.closing {
            let _ = pending.events.send(Event::Settled(id, Err(Error::Closed)));
            return None;
        }
        let link = state.link.clone();
        let generation = link.as_ref().map_or(0, |link| link.generation);
        // Before it is sent, so that its reply finds it, and a new link does not send it again.
        pending.sent_on = generation;
        let unsent = Unsent {
            request: Arc::clone(&pending.request),
            deadline: pending.deadline,
        };
        state.pending.insert(id, pending);
        drop(state);
        let sent = link.as_ref().is_some_and(|link| {
            let encode = |out: &mut Vec<u8>| link.encode(&self.config.queue, id, &unsent, out);
            match collect {
                true => link.outbox.try_append(encode).is_ok(),
                false => link.outbox.try_send(encode).is_ok(),
            }
        });
        if sent {
            return link.filter(|_| collect);
        }
        if let Some(pending) = self.lock().pending.get_mut(&id)
            && pending.sent_on == generation
        {
            pending.sent_on = 0;
        }
        self.kick();
        None
    }

    /// Deals with what has arrived on a link. If it ends a call, its caller is told, or, if that is
    /// whoever holds `mine`, it is returned.
    fn take(&self, link: &Link, arrival: Arrival, mine: &impl Knows) -> Option<Settled> {
        match arrival {
            Arrival::Delivery { message, .. } => self.take_reply(message, mine),
            Arrival::Returned(message) => self.take_return(link, &message, mine),
            Arrival::Channel(..) => {
                // A keeper that has moved on to another link does not need to know.
                let _ = link.news.send(arrival);
                None
            }
        }
    }

    fn take_reply(&self, reply: Message, mine: &impl Knows) -> Option<Settled> {
        let properties = reply.head.properties();
        let id = properties.correlation_id.and_then(CorrelationId::parse);
        let pending = id.and_then(|id| self.lock().pending.remove(&id));
        let (Some(id), Some(pending)) = (id, pending) else {
            // A second answer to a request that was executed twice, or one too late.
            self.stats.dropped_replies.fetch_add(1, Ordering::Relaxed);
            log::debug!("dropped a reply that no call waits for");
            return None;
        };
        let result = wire::decode_reply(&properties, reply.body).map_err(Error::Remote);
        hand_over(id, result, &pending, mine)
    }

    /// Deals with a request that the broker returned because there is no such queue.
    fn take_return(&self, link: &Link, returned: &Message, mine: &impl Knows) -> Option<Settled> {
        let id = CorrelationId::parse(returned.head.properties().correlation_id?)?;
        let mut state = self.lock();
        let just_reconnected = link.generation > 1 && link.since.elapsed() < RETURN_GRACE;
        if self.config.wait_for_server || just_reconnected {
            let pending = state.pending.get_mut(&id)?;
            (pending.sent_on, pending.returned) = (0, true);
            drop(state);
            self.kick();
            return None;
        }
        let pending = state.pending.remove(&id)?;
        drop(state);
        let error = Error::NoServer {
            queue: self.config.queue.clone(),
        };
        hand_over(id, Err(error), &pending, mine)
    }

    fn report_broken(&self, generation: u64) {
        let mut state = self.lock();
        state.broken = state.broken.max(generation);
        // Newcomers must not pick up what is known to be broken.
        if state
            .link
            .as_ref()
            .is_some_and(|link| link.generation == generation)
        {
            state.link = None;
        }
        drop(state);
        self.kick();
    }

    fn ask_after_queue(&self) {
        self.lock().asked_after_queue = true;
        self.kick();
    }

    /// Forgets a call whose deadline has passed, and says what it was waiting for.
    fn time_out(&self, id: CorrelationId) -> Error {
        let mut state = self.lock();
        let pending = state.pending.remove(&id);
        let queue = || self.config.queue.clone();
        let waiting_for = match (&state.link, &pending) {
            (None, _) => WaitingFor::Connection {
                endpoint: self.config.endpoints.to_string(),
                last_error: state.last_error.clone(),
            },
            (Some(link), pending) => {
                let blocked = link.blocked().clone();
                let fresh = |at: Instant| at.elapsed() <= 2 * DIAGNOSIS_TIME;
                match (blocked, pending, state.queue) {
                    (Some(reason), _, _) => WaitingFor::BlockedBroker { reason },
                    (None, Some(pending), _) if pending.returned => {
                        WaitingFor::Queue { queue: queue() }
                    }
                    (None, Some(pending), _) if pending.sent_on == 0 => WaitingFor::Room,
                    (None, _, Some((at, None))) if fresh(at) => {
                        WaitingFor::Queue { queue: queue() }
                    }
                    (None, _, Some((at, status))) if fresh(at) => WaitingFor::Answer {
                        queue: queue(),
                        status,
                    },
                    _ => WaitingFor::Answer {
                        queue: queue(),
                        status: None,
                    },
                }
            }
        };
        Error::Timeout {
            after: self.config.timeout,
            waiting_for,
        }
    }

    /// Ends every call, and the keeper.
    fn close(&self) {
        self.lock().closing = true;
        self.fail_pending(|_| true, &Error::Closed);
        self.kick();
    }

    /// Ends the pending calls that `which` picks with an error.
    fn fail_pending(&self, which: impl Fn(&Pending) -> bool, error: &Error) {
        for (id, pending) in self.lock().pending.extract_if(|_, pending| which(pending)) {
            let _ = pending.events.send(Event::Settled(id, Err(error.clone())));
        }
    }
}

/// Ends a call: returns its result to whoever holds `mine` if it is among those, and otherwise
/// sends it to its owner. One that is gone needs none.
fn hand_over(
    id: CorrelationId,
    result: Outcome,
    pending: &Pending,
    mine: &impl Knows,
) -> Option<Settled> {
    if mine.knows(id) {
        return Some((id, result));
    }
    let _ = pending.events.send(Event::Settled(id, result));
    None
}

/// Some calls, as far as it matters to whom a reply is given.
trait Knows {
    fn knows(&self, id: CorrelationId) -> bool;
}

impl<K> Knows for HashMap<CorrelationId, OpenCall<K>> {
    fn knows(&self, id: CorrelationId) -> bool {
        self.contains_key(&id)
    }
}

/// Nobody's calls.
struct Nobody;

impl Knows for Nobody {
    fn knows(&self, _: CorrelationId) -> bool {
        false
    }
}

/// Deals out what arrives while no caller reads.
struct Unattended {
    shared: Arc<Shared>,
    news: Sender<Arrival>,
}

impl Sink for Unattended {
    fn take(&self, arrival: Arrival) {
        let link = self.shared.lock().link.clone();
        match (link, &arrival) {
            // About this connection's channel, whatever the link is by now.
            (_, Arrival::Channel(..)) => {
                let _ = self.news.send(arrival);
            }
            (Some(link), _) => {
                let _ = self.shared.take(&link, arrival, &Nobody);
            }
            // The link is known to be broken, but an answer is an answer.
            (None, _) => {
                if let Arrival::Delivery { message, .. } = arrival {
                    let _ = self.shared.take_reply(message, &Nobody);
                }
            }
        }
    }

    fn done(&self) {}
}

/// The thread that does what may block.
struct Keeper {
    shared: Arc<Shared>,
    kicked: Receiver<()>,
    _alive: Sender<Never>,
}

/// What the keeper is to do next.
enum Duty {
    Wait,
    Connect,
    End,
}

/// How a link ended.
enum End {
    /// The connection, its channel or the callback queue is gone, for this reason.
    Lost(String),
    /// The client is being closed.
    Closing,
}

impl Keeper {
    fn run(self) {
        let mut backoff = Backoff::default();
        loop {
            match self.duty() {
                Duty::End => return,
                Duty::Wait => {
                    // The sender is in `shared`, which we hold.
                    let _ = self.kicked.recv();
                    continue;
                }
                Duty::Connect => {}
            }
            let began = Instant::now();
            let error = self.connect_and_serve();
            backoff.held_for(began.elapsed());
            if let Some(error) = error
                && self.may_retry_after(&error)
            {
                self.pause(backoff.next());
            }
        }
    }

    fn duty(&self) -> Duty {
        let state = self.shared.lock();
        if state.closing {
            Duty::End
        } else if state.pending.is_empty() {
            Duty::Wait
        } else {
            Duty::Connect
        }
    }

    /// Whether to try again after a failure; if not, the waiting calls end with it. A first
    /// attempt that fails is told at once, unless we are to wait; a broker that was there once
    /// is expected back.
    fn may_retry_after(&self, error: &Error) -> bool {
        let mut state = self.shared.lock();
        if state.generation > 0 || self.shared.config.wait_for_server {
            let reason = match error {
                Error::Unreachable { reason, .. } | Error::ConnectionLost { reason } => {
                    reason.clone()
                }
                other => other.to_string(),
            };
            log::warn!(
                "no connection to {}: {reason}; trying again",
                self.shared.config.endpoints
            );
            state.last_error = Some(reason);
            return true;
        }
        drop(state);
        self.shared.fail_pending(|_| true, error);
        false
    }

    /// Waits, unless the client is closed.
    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while self.kicked.recv_deadline(until).is_ok() {
            if self.shared.lock().closing {
                return;
            }
        }
    }

    /// Connects, and serves the link until it is lost or the client closed. Returns why it was
    /// lost; `None` if it was not.
    fn connect_and_serve(&self) -> Option<Error> {
        let config = &self.shared.config;
        let deadline = Instant::now() + CONNECT_TIME;
        let (news, told) = unbounded();
        let sink = || -> Box<dyn Sink> {
            Box::new(Unattended {
                shared: Arc::clone(&self.shared),
                news: news.clone(),
            })
        };
        let mut connection = match Connection::open(&config.endpoints, "client", deadline, &sink) {
            Ok(connection) => connection,
            Err(error) => return Some(error),
        };
        let served = self.set_up_and_serve(&mut connection, news, &told);
        // amiquip tells the true cause only when closed.
        let reason = match (served, connection.close()) {
            (Ok(()), _) => return None,
            (Err(_), Err(cause)) => broker::describe(&cause),
            (Err(reason), Ok(())) => reason,
        };
        let generation = self.shared.lock().generation;
        if !config.retry && generation > 0 {
            let error = Error::ConnectionLost {
                reason: reason.clone(),
            };
            self.shared
                .fail_pending(|pending| pending.sent_on == generation, &error);
        }
        Some(if generation > 0 {
            Error::ConnectionLost { reason }
        } else {
            Error::Unreachable {
                endpoint: config.endpoints.to_string(),
                reason,
                source: None,
            }
        })
    }

    /// Makes the callback queue, and serves the link until it is lost or the client closed.
    ///
    /// # Errors
    ///
    /// Why it was lost, as far as can be told before the connection is closed.
    fn set_up_and_serve(
        &self,
        connection: &mut Connection,
        news: Sender<Arrival>,
        told: &Receiver<Arrival>,
    ) -> Result<(), String> {
        let fuse = connection.outbox.fuse(broker::SETUP_TIME); // outlives the channel
        let channel = connection.open_channel().map_err(describe)?;
        let reply_to = match self.shared.config.reply_to {
            ReplyTo::Direct => wire::DIRECT_REPLY_TO.to_owned(),
            ReplyTo::Queue => {
                let options = QueueDeclareOptions {
                    exclusive: true,
                    auto_delete: true,
                    ..QueueDeclareOptions::default()
                };
                channel
                    .queue_declare("", options)
                    .map_err(describe)?
                    .name()
                    .to_owned()
            }
        };
        let consume = |out: &mut Vec<u8>| {
            put_consume(out, channel.channel_id(), reply_to.as_bytes(), true);
        };
        let _ = connection.outbox.send(None, consume);
        select! {
            recv(told) -> news => match news {
                Ok(Arrival::Channel(_, ChannelNews::Consuming)) => {}
                Ok(Arrival::Channel(_, ChannelNews::Closed(goodbye))) => return Err(goodbye.to_string()),
                other => return Err(format!("the broker answered basic.consume with {other:?}")),
            },
            recv(connection.down) -> _ => return Err(GONE.to_owned()),
        }
        drop(fuse);
        let link = self.link_up(Link {
            generation: 0,
            since: Instant::now(),
            inbox: Arc::clone(&connection.inbox),
            outbox: Arc::clone(&connection.outbox),
            consumes_on: channel.channel_id(),
            publishes_on: AtomicU16::new(channel.channel_id()),
            reply_to,
            news,
            blocked: Mutex::new(None),
        });
        let mut publishing = None; // outlives the connection as well
        let end = self.serve(&link, connection, told, &mut publishing);
        self.shared.report_broken(link.generation);
        // Before the channel is dropped: then that has nothing to wait for.
        let closed = connection.close();
        match end {
            End::Closing => Ok(()),
            End::Lost(reason) => Err(closed.map_or_else(describe, |()| reason)),
        }
    }

    /// Makes a link known, and sends on it whatever is pending.
    fn link_up(&self, mut link: Link) -> Arc<Link> {
        let mut state = self.shared.lock();
        state.generation += 1;
        state.last_error = None;
        state.queue = None;
        link.generation = state.generation;
        let link = Arc::new(link);
        state.link = Some(Arc::clone(&link));
        for pending in state.pending.values() {
            let _ = pending.events.send(Event::LinkUp);
        }
        drop(state);
        self.shared
            .stats
            .connections
            .fetch_add(1, Ordering::Relaxed);
        self.send_unsent(&link);
        link
    }

    /// Does what callers ask for, until the link ends.
    fn serve(
        &self,
        link: &Link,
        connection: &mut Connection,
        told: &Receiver<Arrival>,
        publishing: &mut Option<Channel>,
    ) -> End {
        let mut looked = Instant::now();
        let mut unsent = true; // for all we know
        loop {
            let interval = match self.shared.config.resend_after {
                _ if unsent => RETRY_INTERVAL,
                Some(after) => after.clamp(RETRY_INTERVAL, RESEND_INTERVAL),
                _ => FAR_FUTURE,
            };
            select! {
                recv(self.kicked) -> _ => {}
                recv(connection.down) -> _ => return End::Lost(GONE.to_owned()),
                recv(told) -> news => match news {
                    // Of a channel on which we have asked after the queue, or published.
                    Ok(Arrival::Channel(channel, _))
                        if channel != link.consumes_on
                            && channel != link.publishes_on.load(Ordering::Relaxed) => {}
                    Ok(Arrival::Channel(_, ChannelNews::Closed(goodbye))) => {
                        return self.sent_away(&goodbye);
                    }
                    // Nothing else that we are told now means that all is well.
                    _ => return End::Lost("the callback queue is gone".to_owned()),
                },
                recv(connection.blocked) -> notice => match notice {
                    Ok(ConnectionBlockedNotification::Blocked(reason)) => *link.blocked() = Some(reason),
                    Ok(ConnectionBlockedNotification::Unblocked) => *link.blocked() = None,
                    Err(_) => return End::Lost(GONE.to_owned()),
                },
                default(interval.saturating_sub(looked.elapsed())) => {}
            }
            let mut state = self.shared.lock();
            if state.closing {
                return End::Closing;
            }
            if state.broken >= link.generation {
                return End::Lost(GONE.to_owned());
            }
            unsent = state.pending.values().any(|pending| pending.sent_on == 0);
            let asked = std::mem::take(&mut state.asked_after_queue);
            drop(state);
            if looked.elapsed() >= interval {
                looked = Instant::now();
                // What a closed channel leaves to be told must not be taken for news of a new one
                // that gets its number.
                if told.is_empty()
                    && self.give_up_overdue(link)
                    && let Err(error) = self.change_channel(link, connection, publishing)
                {
                    return End::Lost(describe(error));
                }
                self.send_unsent(link);
            }
            if asked {
                self.look_at_queue(link, connection);
            }
        }
    }

    /// The broker has closed the channel. If that was to say that we may not publish, it would say
    /// so again, and all calls end with it.
    fn sent_away(&self, goodbye: &Goodbye) -> End {
        let reason = goodbye.to_string();
        if let Some(refusal) = broker::refusal(&self.shared.config.queue, goodbye.code, &reason) {
            self.shared.fail_pending(|_| true, &refusal);
        }
        End::Lost(reason)
    }

    /// Has what is overdue sent again; whether anything is.
    fn give_up_overdue(&self, link: &Link) -> bool {
        if link.blocked().is_some() {
            return false; // the broker has not read it yet, and would not read it again
        }
        let (mut overdue, now) = (0, Instant::now());
        for pending in self.shared.lock().pending.values_mut() {
            if pending.sent_on == link.generation && pending.is_overdue(now) {
                pending.sent_on = 0;
                overdue += 1;
            }
        }
        let stats = &self.shared.stats;
        stats.republished.fetch_add(overdue, Ordering::Relaxed);
        overdue > 0
    }

    /// Opens another channel to publish on. A quorum queue takes what a channel publishes in
    /// sequence; if a part of that is lost with a node, it keeps what follows until the channel is
    /// closed.
    fn change_channel(
        &self,
        link: &Link,
        connection: &mut Connection,
        publishing: &mut Option<Channel>,
    ) -> Result<(), amiquip::Error> {
        if self.shared.config.reply_to == ReplyTo::Direct {
            return Ok(()); // replies come to the channel that publishes
        }
        let channel = connection.open_channel()?;
        link.publishes_on
            .store(channel.channel_id(), Ordering::Relaxed);
        let _fuse = connection.outbox.fuse(broker::SETUP_TIME);
        drop(publishing.replace(channel)); // closes the one before
        Ok(())
    }

    /// Finds out about the queue for those whose deadline is near.
    fn look_at_queue(&self, link: &Link, connection: &mut Connection) {
        if link.blocked().is_some() {
            return; // the broker would not read the question
        }
        match broker::queue_status(connection, &self.shared.config.queue) {
            Ok(status) => self.shared.lock().queue = Some((Instant::now(), status)),
            Err(error) => log::debug!("cannot ask after the queue: {error}"),
        }
    }

    /// Sends what is pending and was not sent on this link.
    fn send_unsent(&self, link: &Link) {
        let (mut unsent, now) = (Vec::new(), Instant::now());
        for (&id, pending) in &mut self.shared.lock().pending {
            if pending.sent_on < link.generation {
                let again = pending.sent_on > 0;
                (pending.sent_on, pending.returned) = (link.generation, false);
                if let Some((at, after)) = &mut pending.resend {
                    *at = broker::after(now, *after);
                }
                let message = Unsent {
                    request: Arc::clone(&pending.request),
                    deadline: pending.deadline,
                };
                unsent.push((id, message, again));
            }
        }
        let mut unsent = unsent.into_iter();
        while let Some((id, message, again)) = unsent.next() {
            let encode =
                |out: &mut Vec<u8>| link.encode(&self.shared.config.queue, id, &message, out);
            match link
                .outbox
                .send(Some(Instant::now() + RETRY_INTERVAL), encode)
            {
                Ok(()) if again => {
                    self.shared
                        .stats
                        .republished
                        .fetch_add(1, Ordering::Relaxed);
                }
                Ok(()) => {}
                Err(NotSent::Full | NotSent::Down) => {
                    // Nor would the rest be. There is more to do than to wait here.
                    let mut state = self.shared.lock();
                    for id in std::iter::once(id).chain(unsent.map(|(id, ..)| id)) {
                        if let Some(pending) = state.pending.get_mut(&id) {
                            pending.sent_on = 0;
                        }
                    }
                    return;
                }
            }
        }
    }
}

fn describe(error: amiquip::Error) -> String {
    broker::describe(&error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_client_is_a_handle_that_threads_share() {
        fn shared_by_threads<T: Send + Sync + Clone>() {}
        shared_by_threads::<Client>();
    }

    #[test]
    fn a_queue_name_must_fit_a_short_string() {
        assert!(check_queue_name(&"q".repeat(255)).is_ok());
        assert!(
            check_queue_name(&"q".repeat(256))
                .unwrap_err()
                .to_string()
                .contains("256 bytes")
        );
        assert!(check_queue_name("").is_err());
    }

    proptest! {
        #[test]
        fn a_correlation_id_reads_back(id: u128) {
            prop_assert_eq!(
                CorrelationId::parse(CorrelationId(id).to_string().as_bytes()),
                Some(CorrelationId(id))
            );
        }

        #[test]
        fn a_foreign_correlation_id_is_no_panic(text: Vec<u8>) {
            let _ = CorrelationId::parse(&text);
        }
    }
}
