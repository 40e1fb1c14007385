//! Calls: one request with all that can be said of it, and many in flight together.

use crate::amqp::body::Body;
use crate::amqp::sync::Instant;
use crate::amqp::sync::channel::{Receiver, Sender, unbounded};
use crate::amqp::time::{FAR_FUTURE, after};
use crate::client::correlation::CorrelationId;
use crate::client::link::{Link, Outgoing, OutgoingRequest};
use crate::client::options::{Retry, check_times};
use crate::client::pending::{Event, Pending, Resend, Settled, Shared, diagnosis_time};
use crate::error::Error;
use crate::message::Reply;
use crate::message::headers::Headers;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::iter::Fuse;
use std::sync::Arc;
use std::time::Duration;

/// How many calls a thread may have under way and still spin ([`crate::amqp::wait`]). From three on
/// it gained nothing that could be measured, and cost up to a tenth of the rate.
const SPINNING_CALLS_MAX: usize = 2;

/// A request to be sent: to which queue, and what else there is to say. Made by
/// [`Client::request`](crate::Client::request).
///
/// [`RequestBuilder::send`] sends it alone, [`Calls::submit`] and
/// [`Client::call_many`](crate::Client::call_many) send it beside others. Until then nothing is
/// sent, and dropping it does nothing. A clone is a request of its own, so one can be a template.
///
/// ```no_run
/// use std::time::Duration;
///
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let reply = client
///     .request("shout")
///     .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
///     .timeout(Duration::from_secs(2))
///     .send("hello")?;
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Clone)]
#[must_use = "a request does nothing until it is sent, or submitted to `Calls`"]
pub struct RequestBuilder<'c> {
    shared: &'c Arc<Shared>,
    request: OutgoingRequest,
    timeout: Duration,
    retry: Retry,
}

impl<'c> RequestBuilder<'c> {
    pub(crate) fn new(shared: &'c Arc<Shared>, queue: &str) -> RequestBuilder<'c> {
        RequestBuilder {
            shared,
            request: OutgoingRequest {
                queue: queue.into(),
                content_type: None,
                headers: Headers::new(),
                body: Body::default(),
            },
            timeout: shared.options.timeout,
            retry: shared.options.retry,
        }
    }

    /// The request's body: any bytes, at most 128 MiB, which is checked when it is sent; a broker
    /// may take less (RabbitMQ 4: 16 MiB unless configured otherwise). Default: empty.
    ///
    /// It is for [`Calls::submit`] and [`Client::call_many`](crate::Client::call_many);
    /// [`RequestBuilder::send`] puts its own body in place of this one.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.request.body = Body::from(body.into());
        self
    }

    /// What the body is: a media type of at most 255 bytes, which is checked when it is sent.
    /// Default: `text/plain`.
    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.request.content_type = Some(content_type.into());
        self
    }

    #[cfg(feature = "json")]
    pub(crate) fn content_type_unless_set(mut self, content_type: &str) -> Self {
        let set = &mut self.request.content_type;
        set.get_or_insert_with(|| content_type.to_owned());
        self
    }

    /// Sets a header, within the limits of [`Headers::insert`]; the same name again replaces the
    /// value. Default: none.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.headers.insert(name, value);
        self
    }

    /// How long the call may take from when it is sent or submitted, everything included: connect,
    /// send, wait, reconnect. Longer than 0. Default: the client's.
    ///
    /// What is left of it when the request leaves is the message's `expiration`: the broker drops a
    /// request that has waited for longer, and [`Request::time_left`](crate::Request::time_left)
    /// tells the handler. Source: <https://www.rabbitmq.com/docs/ttl>.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// When the request is sent again. Default: as the client was told.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sends the request with this body, and waits for the reply. Blocks for at most the timeout.
    ///
    /// # Errors
    ///
    /// As of [`Client::call`](crate::Client::call), which lists them; and
    /// [`Error::InvalidArgument`] also if the timeout is 0, the content type longer than 255 bytes,
    /// or a header not within the limits of [`Headers::insert`].
    ///
    /// ```
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// // Found before anything is sent, so this needs no broker.
    /// let result = client.request("shout").header("x-error-kind", "mine").send("hello");
    /// assert!(matches!(result, Err(fibrpc::Error::InvalidArgument(_))));
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn send(self, body: impl Into<Vec<u8>>) -> Result<Reply, Error> {
        self.body(body).wait()
    }

    /// Sends the request with the body that it has, and waits for the reply.
    pub(crate) fn wait(self) -> Result<Reply, Error> {
        let mut calls = Calls::new(self.shared);
        calls.submit((), self);
        calls
            .next()
            .map_or(Err(Error::Closed), |answer| answer.result)
    }

    /// Whether it can be sent, which is checked then, too: for a template that many requests are made
    /// of, or for what a user has typed. Sends nothing, and does not block.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`], as of [`RequestBuilder::send`]; it says what is wrong.
    ///
    /// ```
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// assert!(client.request("shout").header("tenant", "7").check().is_ok());
    /// assert!(client.request("shout").header("CC", "elsewhere").check().is_err());
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn check(&self) -> Result<(), Error> {
        check_times(self.timeout, self.retry)?;
        self.request.check().map_err(Error::InvalidArgument)
    }
}

impl fmt::Debug for RequestBuilder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestBuilder")
            .field("request", &self.request)
            .field("timeout", &self.timeout)
            .field("retry", &self.retry)
            .finish()
    }
}

/// How one call ended. Given out by [`Calls`] and [`CallMany`].
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let mut calls = client.calls();
/// calls.submit(42, client.request("users").body("42"));
/// let fibrpc::Answer { key, result, latency, .. } = calls.next().expect("one call is open");
/// match result {
///     Ok(reply) => println!("user {key}: {} bytes after {latency:?}", reply.body.len()),
///     Err(error) => println!("user {key}: {error}"),
/// }
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Answer<K> {
    /// What the call was submitted with.
    pub key: K,
    /// The reply, or why there is none: any error of [`RequestBuilder::send`].
    pub result: Result<Reply, Error>,
    /// The time from submitting the request until its reply arrived, however late it is taken from
    /// here; without a reply, until it was found that there is none.
    pub latency: Duration,
}

/// Calls in flight together, answered in any order. Made by
/// [`Client::calls`](crate::Client::calls).
///
/// Submit some, then take answers with [`Iterator::next`], which waits, and is `None` only when no
/// call is open; after that, more can be submitted. Each call has its own queue, headers and
/// deadline.
///
/// It is for one thread, which may hand it to another; threads that call at the same time have one
/// each, of the same client. It has no thread of its own: answers wait here, and count from when
/// they arrived. So a caller that is away for longer than the timeout finds a reply that came in
/// time, and [`Error::Timeout`] in place of one that did not.
///
/// Dropping it abandons the open calls and does not block: their answers are dropped when they
/// come, and requests that were sent may still be executed.
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let mut calls = client.calls();
/// for name in ["ada", "grace", "barbara"] {
///     calls.submit(name, client.request("shout").body(name));
/// }
/// for answer in calls {
///     println!("{}: {:?} after {:?}", answer.key, answer.result?.body, answer.latency);
/// }
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[must_use = "calls that are dropped are abandoned"]
pub struct Calls<'c, K> {
    shared: &'c Shared,
    /// Other threads' way to us, given along with each call.
    events: Sender<Event>,
    told: Receiver<Event>,
    open: HashMap<CorrelationId, OpenCall<K>>,
    /// The open calls by deadline, the next to pass first.
    deadlines: BTreeSet<(Instant, CorrelationId)>,
    /// Calls of ours that have ended and whose answers are still to be given out.
    ready: VecDeque<Settled>,
    /// The link we listen on.
    link: Option<Arc<Link>>,
    /// When we last asked after queues.
    asked: Option<Instant>,
}

struct OpenCall<K> {
    key: K,
    queue: Arc<str>,
    submitted: Instant,
    timeout: Duration,
    deadline: Instant,
    /// How many replies had been dropped before.
    dropped_before: u64,
}

impl<'c, K> Calls<'c, K> {
    pub(crate) fn new(shared: &'c Shared) -> Calls<'c, K> {
        let (events, told) = unbounded();
        Calls {
            shared,
            events,
            told,
            open: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: VecDeque::new(),
            link: None,
            asked: None,
        }
    }

    /// Sends a request, or has it sent as soon as that can be. It does not wait for the broker to
    /// read, and never fails: what goes wrong is the call's answer. The call's time begins now.
    ///
    /// `key` comes back with the answer; keys need not differ. The request goes out by the client
    /// whose calls these are, whichever client it was made by.
    ///
    /// When it returns, the request has left, or is on its way by another thread. For several that
    /// are to leave together there is [`Calls::extend`].
    pub fn submit(&mut self, key: K, request: RequestBuilder<'_>) {
        self.begin(key, request, false);
    }

    /// Sends a request, or collects it: then the link is returned by which it is to leave.
    fn begin(&mut self, key: K, request: RequestBuilder<'_>, collect: bool) -> Option<Arc<Link>> {
        let id = self.shared.ids.next();
        let submitted = Instant::now();
        let invalid = request.check();
        let RequestBuilder {
            request,
            timeout,
            retry,
            ..
        } = request;
        let deadline = after(submitted, timeout);
        let call = OpenCall {
            key,
            queue: Arc::clone(&request.queue),
            submitted,
            timeout,
            deadline,
            dropped_before: self.shared.dropped_replies(),
        };
        self.open.insert(id, call);
        self.deadlines.insert((deadline, id));
        if let Err(error) = invalid {
            self.ready.push_back(Settled::now(id, Err(error)));
            return None;
        }
        let pending = Pending {
            outgoing: Arc::new(Outgoing::new(request)),
            deadline,
            sent_on: 0,
            returned: false,
            resend: Resend::new(retry, submitted),
            unconfirmed: None,
            events: self.events.clone(),
        };
        self.shared.begin(id, pending, collect)
    }

    /// How many calls are open: submitted, and their answers not taken yet. Does not block.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether no call is open, so that there is no answer to wait for.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// The next answer, if one comes before `limit`: blocks until then at most. `None` at once when
    /// no call is open, which [`Calls::is_empty`] tells.
    ///
    /// With a `limit` that has passed, such as `Instant::now()`, it does not wait: it gives out
    /// what has arrived already.
    ///
    /// ```no_run
    /// use std::time::{Duration, Instant};
    ///
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let mut calls = client.calls();
    /// calls.submit((), client.request("shout").body("hello"));
    /// while !calls.is_empty() {
    ///     match calls.next_before(Instant::now() + Duration::from_millis(100)) {
    ///         Some(answer) => println!("{:?}", answer.result),
    ///         None => println!("still waiting for {} answers", calls.len()),
    ///     }
    /// }
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn next_before(&mut self, limit: Instant) -> Option<Answer<K>> {
        loop {
            if let Some(settled) = self.next_ready() {
                match self.settle(settled) {
                    None => continue,
                    answer => return answer,
                }
            }
            let &(deadline, id) = self.deadlines.first()?;
            let now = Instant::now();
            if now >= deadline {
                let error = self.time_out(id);
                return self.settle(Settled::now(id, Err(error)));
            }
            if now >= limit {
                return None;
            }
            let wake_at = deadline
                .min(limit)
                .min(self.diagnosis_at(deadline, id, now));
            self.wait(wake_at);
        }
    }

    fn time_out(&self, id: CorrelationId) -> Error {
        match self.open.get(&id) {
            Some(call) => {
                let strangers = self.shared.dropped_replies() - call.dropped_before;
                self.shared
                    .time_out(id, &call.queue, call.timeout, strangers)
            }
            None => Error::Closed,
        }
    }

    /// Asks after the queues of the calls that end soon, if it is time; says when to look again.
    fn diagnosis_at(&mut self, deadline: Instant, id: CorrelationId, now: Instant) -> Instant {
        let Some(call) = self.open.get(&id) else {
            return deadline;
        };
        let margin = diagnosis_time(call.timeout);
        let ask_at = deadline.checked_sub(margin).unwrap_or(now);
        if now < ask_at {
            return ask_at;
        }
        if self
            .asked
            .is_none_or(|asked| now.duration_since(asked) > margin)
        {
            self.asked = Some(now);
            // Those that end shortly after this one could not ask in time themselves.
            let ending = self
                .deadlines
                .iter()
                .take_while(|(at, _)| *at <= deadline + margin)
                .filter_map(|(_, id)| self.open.get(id));
            self.shared.ask_after(ending.map(|call| &call.queue));
        }
        deadline
    }

    /// The next call that has ended, if that is known already.
    fn next_ready(&mut self) -> Option<Settled> {
        while let Ok(event) = self.told.try_recv() {
            self.learn(event);
        }
        self.ready.pop_front()
    }

    /// Waits for something to happen, at most until `wake_at`; whatever it is, it is dealt with.
    /// Calls that have ended are ready then.
    fn wait(&mut self, wake_at: Instant) {
        if self.link.is_none() {
            self.link = self.shared.lock().link.clone();
        }
        let timeout = wake_at.saturating_duration_since(Instant::now());
        let link = self.link.clone();
        let lead = link.as_ref().and_then(|link| link.inbox.try_lead());
        let (Some(link), Some(mut lead)) = (&link, lead) else {
            // Whoever leads, or the connection manager, will tell us.
            if let Ok(event) = self.told.recv_timeout(timeout) {
                self.learn(event);
            }
            return;
        };
        // From just before we led. While we lead, we learn of nothing but what we read.
        if let Ok(event) = self.told.try_recv() {
            drop(lead);
            return self.learn(event);
        }
        // With more of them, the next reply is seldom far, and the broker needs the core for it.
        let spin = match self.open.len() {
            ..=SPINNING_CALLS_MAX => self.shared.spin,
            _ => Duration::ZERO,
        };
        let (shared, open, ready) = (self.shared, &self.open, &mut self.ready);
        let read = lead.read(timeout, spin, |incoming| {
            ready.extend(shared.accept(link, incoming, |id| open.contains_key(&id)));
        });
        drop(lead);
        if read.is_err() {
            // However a link ends, the connection manager finds out why.
            self.shared.report_broken(link.generation);
            self.link = None;
        }
    }

    /// Deals with what another thread has told us.
    fn learn(&mut self, event: Event) {
        match event {
            Event::Settled(settled) => self.ready.push_back(settled),
            Event::LinkUp => self.link = None,
        }
    }

    /// Closes one of our open calls with its outcome; `None` if it is not open any more.
    fn settle(&mut self, settled: Settled) -> Option<Answer<K>> {
        let Settled { id, outcome, at } = settled;
        // A reply that came in time is an answer, however late its caller looks; one that came too
        // late is none, however early.
        let is_late = |call: &OpenCall<K>| outcome.is_ok() && at > call.deadline;
        let late = self.open.get(&id).is_some_and(is_late);
        let outcome = if late {
            Err(self.time_out(id))
        } else {
            outcome
        };
        let call = self.open.remove(&id)?;
        self.deadlines.remove(&(call.deadline, id));
        Some(Answer {
            key: call.key,
            result: outcome,
            latency: at.saturating_duration_since(call.submitted),
        })
    }
}

impl<K> Iterator for Calls<'_, K> {
    type Item = Answer<K>;

    /// The next answer, in the order in which they come: blocks until there is one, at most until
    /// the earliest deadline of the open calls. `None` when no call is open.
    fn next(&mut self) -> Option<Answer<K>> {
        self.next_before(Instant::now() + FAR_FUTURE)
    }
}

/// Sends requests together, each as by [`Calls::submit`]: in one write, which costs less than one
/// for each. They leave when the iterator has no more, and some of them before, as they become many.
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let mut calls = client.calls();
/// calls.extend(["many", "at", "once"].map(|word| (word, client.request("shout").body(word))));
/// while let Some(answer) = calls.next() {
///     println!("{}: {:?}", answer.key, answer.result?.body);
/// }
/// # Ok::<(), fibrpc::Error>(())
/// ```
impl<'r, K> Extend<(K, RequestBuilder<'r>)> for Calls<'_, K> {
    fn extend<T: IntoIterator<Item = (K, RequestBuilder<'r>)>>(&mut self, requests: T) {
        let mut collected = Collected(None);
        for (key, request) in requests {
            let link = self.begin(key, request, true);
            if link.is_some() {
                collected.leave_by(link);
            }
        }
    }
}

/// The link by which collected requests are to leave: at the latest when this is dropped, even if
/// the iterator that they come from panics.
struct Collected(Option<Arc<Link>>);

impl Collected {
    fn leave_by(&mut self, link: Option<Arc<Link>>) {
        let before = std::mem::replace(&mut self.0, link);
        if let (Some(before), Some(link)) = (before, &self.0)
            && before.generation != link.generation
        {
            before.outbox.flush();
        }
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        if let Some(link) = &self.0 {
            link.outbox.flush();
        }
    }
}

impl<K> Drop for Calls<'_, K> {
    fn drop(&mut self) {
        if !self.open.is_empty() {
            self.shared.forget(self.open.keys());
        }
    }
}

impl<K> fmt::Debug for Calls<'_, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calls")
            .field("open", &self.open.len())
            .finish_non_exhaustive()
    }
}

/// The answers to [`Client::call_many`](crate::Client::call_many), in the order of the requests.
///
/// It is lazy: the first [`Iterator::next`] sends the first requests. Like [`Calls`] it is for one
/// thread, and has no thread of its own: requests are sent while answers are asked for.
///
/// Dropping it abandons the calls that are open, takes no further request, and does not block.
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let requests = (0..1_000_000).map(|n| client.request("fib").body(format!("{n}")));
/// let failed = client.call_many(requests, 64).filter(|answer| answer.result.is_err());
/// println!("{} failed", failed.count());
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[must_use = "no request is sent before the first answer is asked for"]
pub struct CallMany<'c, I> {
    calls: Calls<'c, u64>,
    requests: Fuse<I>,
    window: usize,
    /// The calls begun and not yet given out, in order; `None` while unanswered.
    answers: VecDeque<Option<Answer<u64>>>,
    /// How many answers have been given out: the key of `answers[0]`.
    given: u64,
}

impl<'c, I: Iterator> CallMany<'c, I> {
    pub(crate) fn new(shared: &'c Shared, requests: I, window: usize) -> CallMany<'c, I> {
        CallMany {
            calls: Calls::new(shared),
            requests: requests.fuse(),
            window: window.max(1),
            answers: VecDeque::new(),
            given: 0,
        }
    }

    /// Submits the next request, if there is one and room for it.
    fn submit_one<'r>(&mut self) -> bool
    where
        I: Iterator<Item = RequestBuilder<'r>>,
    {
        if self.answers.len() >= self.window {
            return false;
        }
        let Some(request) = self.requests.next() else {
            return false;
        };
        let key = self.given + self.answers.len() as u64;
        self.calls.submit(key, request);
        self.answers.push_back(None);
        true
    }

    /// Keeps an answer until it is its turn.
    fn keep(&mut self, answer: Answer<u64>) {
        let index = usize::try_from(answer.key - self.given);
        if let Some(place) = index.ok().and_then(|index| self.answers.get_mut(index)) {
            *place = Some(answer);
        }
    }
}

impl<'r, I> Iterator for CallMany<'_, I>
where
    I: Iterator<Item = RequestBuilder<'r>>,
{
    type Item = Answer<u64>;

    /// The answer to the next request: takes and sends requests as far as the window allows, and
    /// blocks until this one is answered, at most until its deadline, and for as long as the
    /// iterator of the requests blocks. `None` when all are answered.
    fn next(&mut self) -> Option<Answer<u64>> {
        // One goes out for each that was given out, so that the servers do not run dry.
        if self.given > 0 {
            self.submit_one();
        }
        loop {
            // What is there is given out before the iterator is asked for more: it may take its
            // time.
            while let Some(answer) = self.calls.next_before(Instant::now()) {
                self.keep(answer);
            }
            if let Some(answer) = self.answers.front_mut().and_then(Option::take) {
                self.answers.pop_front();
                self.given += 1;
                return Some(answer);
            }
            if !self.submit_one() {
                let answer = self.calls.next()?;
                self.keep(answer);
            }
        }
    }
}

impl<I> fmt::Debug for CallMany<'_, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallMany")
            .field("given", &self.given)
            .field("open", &self.answers.len())
            .finish_non_exhaustive()
    }
}
