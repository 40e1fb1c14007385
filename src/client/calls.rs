//! Calls: one request with all that can be said of it, and many in flight together.

use crate::amqp::time::{FAR_FUTURE, after};
use crate::client::correlation::CorrelationId;
use crate::client::link::{Link, OutgoingRequest};
use crate::client::options::Retry;
use crate::client::pending::{DIAGNOSIS_TIME, Event, Outcome, Pending, Resend, Settled, Shared};
use crate::error::Error;
use crate::message::Reply;
use crate::message::headers::Headers;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a request may be held back to leave together with others.
const COLLECT_TIME: Duration = Duration::from_micros(500);

/// A request to be sent: to which queue, and what else there is to say. Made by
/// [`Client::request`](crate::Client::request).
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
                body: Vec::new(),
            },
            timeout: shared.options.timeout,
            retry: shared.options.retry,
        }
    }

    /// The request's body. Default: empty.
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.request.body = body.into();
        self
    }

    /// What the body is: a media type of at most 255 bytes. Default: `text/plain`.
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

    /// Sets a header, within the limits of [`Headers::insert`]. Default: none.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.headers.insert(name, value);
        self
    }

    /// How long the call may take, everything included: connect, send, wait, reconnect. Default:
    /// the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How hard the call tries. Default: as the client was told.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Sends the request with this body, and waits for the reply.
    ///
    /// # Errors
    ///
    /// As of [`Client::call`](crate::Client::call).
    pub fn send(self, body: impl Into<Vec<u8>>) -> Result<Reply, Error> {
        let mut calls = Calls::new(self.shared);
        calls.submit((), self.body(body));
        calls
            .next()
            .map_or(Err(Error::Closed), |answer| answer.result)
    }

    /// Whether it can be sent.
    fn check(&self) -> Result<(), Error> {
        if self.timeout.is_zero() {
            let reason = "the timeout must be longer than 0".to_owned();
            return Err(Error::InvalidArgument(reason));
        }
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

/// How one call ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Answer<K> {
    /// What the call was submitted with.
    pub key: K,
    /// The reply, or why there is none.
    pub result: Result<Reply, Error>,
    /// The time from submitting to the answer.
    pub latency: Duration,
}

/// Calls in flight together, answered in any order. Made by [`Client::calls`](crate::Client::calls).
///
/// Submit some, then take answers with [`Iterator::next`], which waits, and is `None` only when no
/// call is open. Each call has its own queue, headers and deadline. Dropping it abandons the open
/// calls: their answers are dropped when they come.
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
    /// The link on which requests are collected that are not sent yet, and since when.
    unflushed: Option<(Arc<Link>, Instant)>,
    /// When we last gave an answer out.
    given: Instant,
    /// When we last asked after queues.
    asked: Option<Instant>,
}

struct OpenCall<K> {
    key: K,
    queue: Arc<str>,
    submitted: Instant,
    timeout: Duration,
    deadline: Instant,
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
            unflushed: None,
            given: Instant::now(),
            asked: None,
        }
    }

    /// Sends a request, or has it sent as soon as that can be. It does not wait for the broker to
    /// read, and never fails: what goes wrong is the call's answer. While answers are there to be
    /// taken, requests are collected, and leave together when the last of those is taken, or half a
    /// millisecond has passed.
    pub fn submit(&mut self, key: K, request: RequestBuilder<'_>) {
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
        };
        self.open.insert(id, call);
        self.deadlines.insert((deadline, id));
        if let Err(error) = invalid {
            self.ready.push_back((id, Err(error)));
            return;
        }
        let pending = Pending {
            request: Arc::new(request),
            deadline,
            sent_on: 0,
            returned: false,
            resend: Resend::new(retry, submitted),
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
            // What was taken off the wire before is not late, however late it is taken from us.
            if let Some((id, outcome)) = self.next_ready() {
                match self.settle(id, outcome) {
                    None => continue,
                    answer => return answer,
                }
            }
            // A deadline that has passed outranks the rest: an answer that comes now is late.
            let &(deadline, id) = self.deadlines.first()?;
            let now = Instant::now();
            if now >= deadline {
                let error = self.time_out(id);
                return self.settle(id, Err(error));
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
            Some(call) => self.shared.time_out(id, &call.queue, call.timeout),
            None => Error::Closed,
        }
    }

    /// Asks after the queues of the calls that end soon, if it is time; says when to look again.
    fn diagnosis_at(&mut self, deadline: Instant, id: CorrelationId, now: Instant) -> Instant {
        let Some(call) = self.open.get(&id) else {
            return deadline;
        };
        let margin = DIAGNOSIS_TIME.min(call.timeout / 5);
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
        let settled = self.ready.pop_front();
        // The caller may be back late.
        if self.ready.is_empty()
            && let Some((link, _)) = self.unflushed.take()
        {
            link.outbox.flush();
        }
        settled
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
        // From before we led. While we lead, we learn of nothing but what we read.
        if let Ok(event) = self.told.try_recv() {
            drop(lead);
            return self.learn(event);
        }
        let (shared, open, ready) = (self.shared, &self.open, &mut self.ready);
        let read = lead.read(timeout, |incoming| {
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
            Event::Settled(id, outcome) => self.ready.push_back((id, outcome)),
            Event::LinkUp => self.link = None,
        }
    }

    /// Closes one of our open calls with its outcome; `None` if it is not open any more.
    fn settle(&mut self, id: CorrelationId, outcome: Outcome) -> Option<Answer<K>> {
        let call = self.open.remove(&id)?;
        self.deadlines.remove(&(call.deadline, id));
        self.given = Instant::now();
        Some(Answer {
            key: call.key,
            result: outcome,
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
/// Dropping it abandons the calls that are open, and takes no further request.
pub struct CallMany<'c, I> {
    calls: Calls<'c, u64>,
    requests: I,
    window: usize,
    /// The calls begun and not yet given out, in order; `None` while unanswered.
    answers: VecDeque<Option<Answer<u64>>>,
    /// How many answers have been given out: the key of `answers[0]`.
    given: u64,
}

impl<'c, I> CallMany<'c, I> {
    pub(crate) fn new(shared: &'c Shared, requests: I, window: usize) -> CallMany<'c, I> {
        CallMany {
            calls: Calls::new(shared),
            requests,
            window: window.max(1),
            answers: VecDeque::new(),
            given: 0,
        }
    }
}

impl<'r, I> Iterator for CallMany<'_, I>
where
    I: Iterator<Item = RequestBuilder<'r>>,
{
    type Item = Answer<u64>;

    fn next(&mut self) -> Option<Answer<u64>> {
        loop {
            while self.answers.len() < self.window
                && let Some(request) = self.requests.next()
            {
                let key = self.given + self.answers.len() as u64;
                self.calls.submit(key, request);
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

impl<I> fmt::Debug for CallMany<'_, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallMany")
            .field("given", &self.given)
            .field("open", &self.answers.len())
            .finish_non_exhaustive()
    }
}
