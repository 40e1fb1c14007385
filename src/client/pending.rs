//! The calls that are not answered yet, as all threads of a client share them: registered, sent,
//! sent again, answered, given up.

use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{Confirm, Delivery, Incoming, Message};
use crate::amqp::queue::QueueStatus;
use crate::amqp::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::amqp::sync::channel::Sender;
use crate::amqp::sync::{HashMap, HashSet, Instant, Mutex, MutexGuard, lock};
use crate::amqp::time::after;
use crate::client::correlation::{CorrelationId, CorrelationIds};
use crate::client::link::{Link, Outgoing};
use crate::client::options::{Options, Retry};
use crate::error::{Error, WaitingFor};
use crate::message::{MESSAGE_MAX, Reply};
use std::sync::Arc;
use std::time::Duration;

/// How long after a reconnect a missing queue is waited for: a server that lost the same broker
/// is back after at most one of its own waits between attempts, and some time to connect.
const RETURN_GRACE: Duration = Duration::from_secs(10);

/// How long before its deadline a call asks after its queue, to say what it was waiting for.
const DIAGNOSIS_TIME: Duration = Duration::from_millis(200);

/// That, or a fifth of the call's whole time if that is less.
pub(crate) fn diagnosis_time(timeout: Duration) -> Duration {
    DIAGNOSIS_TIME.min(timeout / 5)
}

/// How long a cluster may take to choose another node for a queue.
const FAILOVER_TIME: Duration = Duration::from_secs(3);

/// How long the broker may take to confirm a request before it is sent again.
const CONFIRM_TIME: Duration = Duration::from_secs(1);

pub(crate) type Outcome = Result<Reply, Error>;

/// A call that has ended.
pub(crate) struct Settled {
    pub id: CorrelationId,
    pub outcome: Outcome,
    /// When: a reply counts from when it was taken off the wire, and not from when its caller
    /// looks.
    pub at: Instant,
}

impl Settled {
    pub fn now(id: CorrelationId, outcome: Outcome) -> Settled {
        let at = Instant::now();
        Settled { id, outcome, at }
    }
}

/// What a waiting caller is told by other threads.
pub(crate) enum Event {
    /// One of its calls has ended.
    Settled(Settled),
    /// There is a link to listen on.
    LinkUp,
}

/// A call that is not answered yet, as every thread must know it.
pub(crate) struct Pending {
    pub outgoing: Arc<Outgoing>,
    pub deadline: Instant,
    /// The generation of the link that it was last sent on; 0 if it is to be sent yet.
    pub sent_on: u64,
    /// Whether the broker returned it because there is no such queue.
    pub returned: bool,
    pub resend: Resend,
    /// Until the broker has confirmed it, where it confirms.
    pub unconfirmed: Option<Unconfirmed>,
    /// The way to its caller.
    pub events: Sender<Event>,
}

/// What the broker has not confirmed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unconfirmed {
    /// When it is sent again; it will have been unconfirmed for so long then.
    at: Instant,
    time: Duration,
    /// What is known since the broker said that it has not taken it, if it did.
    refused: Option<Refused>,
}

/// A request that the broker has not taken.
#[derive(Debug, Clone, Copy)]
struct Refused {
    /// When it said so first.
    at: Instant,
    /// When its queue was known to be there after that, the first time.
    queue_seen: Option<Instant>,
}

impl Refused {
    fn now() -> Refused {
        Refused {
            at: Instant::now(),
            queue_seen: None,
        }
    }
}

impl Unconfirmed {
    /// When it was sent last.
    fn sent(&self) -> Instant {
        self.at.checked_sub(self.time).unwrap_or(self.at)
    }
}

/// When a request is to be sent again.
pub(crate) enum Resend {
    Never,
    /// On the next link.
    WhenLost,
    /// On the next link, and at that time; it will have been unanswered for so long then.
    At(Instant, Duration),
}

impl Resend {
    pub fn new(retry: Retry, submitted: Instant) -> Resend {
        match retry {
            Retry::Never => Resend::Never,
            Retry::LostConnection => Resend::WhenLost,
            Retry::Unanswered(time) => Resend::At(after(submitted, time), time),
        }
    }

    fn time(&self) -> Option<Instant> {
        match self {
            Resend::Never | Resend::WhenLost => None,
            Resend::At(at, _) => Some(*at),
        }
    }
}

impl Pending {
    /// When the connection manager has to send it, if it knows of a time; now, if it is unsent.
    fn due(&self, now: Instant) -> Option<Instant> {
        match self.sent_on {
            _ if self.is_over(now) => None,
            0 => Some(now),
            _ => self.due_once_sent(),
        }
    }

    /// Whether the broker has said that it has not taken it, and nothing else since.
    fn was_refused(&self) -> bool {
        let refused = |unconfirmed: Unconfirmed| unconfirmed.refused.is_some();
        self.unconfirmed.is_some_and(refused)
    }

    /// When it is sent again, if it stays unanswered and unconfirmed.
    fn due_once_sent(&self) -> Option<Instant> {
        let unconfirmed = self.unconfirmed.map(|unconfirmed| unconfirmed.at);
        let times = [self.resend.time(), unconfirmed];
        times.into_iter().flatten().min()
    }

    /// It is being published where the broker confirms. What must not be executed twice is not
    /// sent again for want of a confirm.
    fn expect_confirm(&mut self, now: Instant) {
        if !matches!(self.resend, Resend::Never) {
            let before = self.unconfirmed;
            let time = before.map_or(CONFIRM_TIME, |before| before.time);
            self.unconfirmed = Some(Unconfirmed {
                at: after(now, time),
                time,
                refused: before.and_then(|before| before.refused),
            });
        }
    }

    /// Whether its deadline has passed. It is still there if its caller has not looked since, and
    /// it is not sent any more.
    fn is_over(&self, now: Instant) -> bool {
        now >= self.deadline
    }
}

/// A request that the connection manager is to send.
pub(crate) struct Unsent {
    pub outgoing: Arc<Outgoing>,
    pub deadline: Instant,
    /// Whether it was sent on an earlier link. What is overdue is counted when it is given up.
    pub again: bool,
}

/// What callers and connection manager share.
pub(crate) struct Shared {
    pub options: Options,
    /// How long whoever reads spins.
    pub spin: Duration,
    state: Mutex<State>,
    pub ids: CorrelationIds,
    /// Tells the connection manager to look at the state.
    wake: Sender<()>,
    pub stats: Stats,
    /// The longest request that the broker takes, as far as is known, in bytes.
    pub message_max: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct Stats {
    pub connections: AtomicU64,
    pub republished: AtomicU64,
    pub dropped_replies: AtomicU64,
}

#[derive(Default)]
pub(crate) struct State {
    /// The live link, if there is one.
    pub link: Option<Arc<Link>>,
    /// The generation of the latest link.
    pub generation: u64,
    /// The latest generation known to be broken.
    pub broken: u64,
    /// The broker's reason, while it blocks publishers: nothing is published meanwhile.
    pub blocked: Option<String>,
    /// The open calls. One that is removed is dropped once the state is unlocked, because to free a
    /// large body takes its time.
    pub pending: HashMap<CorrelationId, Pending>,
    /// Whether the broker has not taken something on the channel that requests are published on.
    pub refused: bool,
    /// When the connection manager looks next for what is to be sent; `None` if nothing is.
    pub next_look: Option<Instant>,
    /// Why the latest attempt to connect failed, until one succeeds.
    pub last_error: Option<String>,
    /// The queues that callers want to know about, and what was last found out, and when.
    pub asked_after: HashSet<Arc<str>>,
    /// Whether the latest link ended because of the broker's limit for messages, which holds for
    /// the next, too.
    pub knows_limit: bool,
    /// Whether a question has cost the connection: the user may have no more channels than are
    /// needed otherwise.
    pub asks_no_more: bool,
    /// When the broker was asked last.
    pub asked_at: Option<Instant>,
    pub queues: HashMap<Arc<str>, (Instant, Option<QueueStatus>)>,
    pub closing: bool,
}

impl Shared {
    pub fn new(options: Options, wake: Sender<()>) -> Shared {
        Shared {
            spin: options.spin(),
            options,
            state: Mutex::default(),
            ids: CorrelationIds::new(),
            wake,
            stats: Stats::default(),
            message_max: AtomicUsize::new(MESSAGE_MAX),
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// How many replies were dropped so far, because they belong to no call.
    pub fn dropped_replies(&self) -> u64 {
        self.stats.dropped_replies.load(Ordering::Relaxed)
    }

    /// Has the connection manager look at the state.
    pub fn wake_manager(&self) {
        // Full means that it is on its way already.
        let _ = self.wake.try_send(());
    }

    /// Registers a call and sends its request, or leaves that to the connection manager. To
    /// `collect`, it is appended to what is sent next on the link that is returned.
    pub fn begin(
        &self,
        id: CorrelationId,
        mut pending: Pending,
        collect: bool,
    ) -> Option<Arc<Link>> {
        let max = self.message_max.load(Ordering::Relaxed);
        let mut state = self.lock();
        let refusal = if state.closing {
            Some(Error::Closed)
        } else if pending.outgoing.request.body.len() > max {
            Some(Error::too_long(&pending.outgoing.request.queue, max))
        } else {
            None
        };
        if let Some(error) = refusal {
            drop(state);
            let settled = Settled::now(id, Err(error));
            let _ = pending.events.send(Event::Settled(settled));
            return None;
        }
        // What a broker that blocks is sent now, it would read and execute when nobody waits for
        // it any more. The connection manager sends it when the broker reads again.
        let held_back = state.blocked.is_some();
        let link = state.link.clone().filter(|_| !held_back);
        let generation = link.as_ref().map_or(0, |link| link.generation);
        // Before it is sent, so that its reply finds it, and a new link does not send it again.
        pending.sent_on = generation;
        if link.as_ref().is_some_and(|link| link.confirms()) {
            pending.expect_confirm(Instant::now());
        }
        let (outgoing, deadline) = (Arc::clone(&pending.outgoing), pending.deadline);
        let look = pending.due_once_sent().is_some_and(|at| state.look_at(at));
        state.pending.insert(id, pending);
        drop(state);
        let sent = link
            .as_ref()
            .is_some_and(|link| link.send(id, &outgoing, deadline, collect).is_ok());
        if !sent {
            self.is_unsent(id, generation);
        }
        if look || !(sent || held_back) {
            self.wake_manager();
        }
        link.filter(|_| sent)
    }

    /// Leaves a request that could not be sent on that link to the connection manager.
    pub fn is_unsent(&self, id: CorrelationId, generation: u64) {
        if let Some(pending) = self.lock().pending.get_mut(&id)
            && pending.sent_on == generation
        {
            pending.sent_on = 0;
        }
    }

    /// Forgets calls that nobody waits for any more.
    pub fn forget<'i>(&self, ids: impl Iterator<Item = &'i CorrelationId>) {
        let mut state = self.lock();
        let forgotten: Vec<_> = ids.filter_map(|id| state.pending.remove(id)).collect();
        drop(state);
        drop(forgotten);
    }

    /// Deals with what has come in on a link. If it ends a call, its caller is told, or, if that
    /// call `is_mine`, it is returned.
    pub fn accept(
        &self,
        link: &Link,
        incoming: Incoming,
        is_mine: impl Fn(CorrelationId) -> bool,
    ) -> Option<Settled> {
        match incoming {
            Incoming::Delivery(Delivery { message, .. }) => {
                link.was_useful.store(true, Ordering::Relaxed);
                self.accept_reply(message, is_mine)
            }
            Incoming::Returned(message) => self.accept_return(link, &message, is_mine),
            Incoming::Confirm(confirm) => {
                self.accept_confirm(link, confirm);
                None
            }
            Incoming::Channel(..) | Incoming::Blocked(_) | Incoming::Unblocked => {
                // A connection manager that has moved on to another link does not need to know.
                let _ = link.events.send(incoming);
                None
            }
        }
    }

    fn accept_reply(
        &self,
        reply: Message,
        is_mine: impl Fn(CorrelationId) -> bool,
    ) -> Option<Settled> {
        let properties = reply.head.properties();
        let id = properties.correlation_id.and_then(CorrelationId::parse);
        let pending = id.and_then(|id| self.lock().pending.remove(&id));
        let (Some(id), Some(pending)) = (id, pending) else {
            // A second answer to a request that was executed twice, or one too late.
            self.stats.dropped_replies.fetch_add(1, Ordering::Relaxed);
            log::debug!("dropped a reply that no call waits for");
            return None;
        };
        let outcome = Reply::read(&properties, reply.body).map_err(Error::Remote);
        hand_over(id, outcome, &pending, is_mine)
    }

    /// Deals with a request that the broker returned because there is no such queue.
    fn accept_return(
        &self,
        link: &Link,
        returned: &Message,
        is_mine: impl Fn(CorrelationId) -> bool,
    ) -> Option<Settled> {
        let id = CorrelationId::parse(returned.head.properties().correlation_id?)?;
        let mut state = self.lock();
        let just_reconnected = link.generation > 1 && link.since.elapsed() < RETURN_GRACE;
        if self.options.wait_for_server || just_reconnected {
            let pending = state.pending.get_mut(&id)?;
            (pending.sent_on, pending.returned) = (0, true);
            drop(state);
            self.wake_manager();
            return None;
        }
        let pending = state.pending.remove(&id)?;
        drop(state);
        let queue = pending.outgoing.request.queue.to_string();
        hand_over(id, Err(Error::NoServer { queue }), &pending, is_mine)
    }

    /// Deals with what the broker says of requests that were published: it has taken them, or not.
    fn accept_confirm(&self, link: &Link, confirm: Confirm) {
        for (place, id) in link.confirmed(confirm) {
            let mut locked = self.lock();
            let state = &mut *locked;
            let Some(pending) = state.pending.get_mut(&id) else {
                continue; // answered already
            };
            if pending.outgoing.place() != Some(place) || pending.sent_on != link.generation {
                continue; // sent again meanwhile
            }
            if confirm.taken {
                pending.unconfirmed = None;
                continue;
            }
            // Its queue is full, or has lost its node. So it is sent again on another channel, and
            // the queue asked after. If the queue was there then, and it is refused after that,
            // then the queue is full. One that looks empty and unused may be without a node still,
            // for as long as that takes.
            let queue = Arc::clone(&pending.outgoing.request.queue);
            let is_full = pending.unconfirmed.as_mut().is_none_or(|unconfirmed| {
                let sent = unconfirmed.sent();
                let refused = unconfirmed.refused.get_or_insert_with(Refused::now);
                let first = refused.at;
                let is_there = |status: QueueStatus| {
                    status.ready > 0 || status.consumers > 0 || first.elapsed() > FAILOVER_TIME
                };
                if let Some(&(at, Some(status))) = state.queues.get(&queue)
                    && at > first
                    && is_there(status)
                {
                    // The first time: it is asked after again and again.
                    refused.queue_seen.get_or_insert(at);
                }
                refused.queue_seen.is_some_and(|seen| seen < sent)
            });
            if !is_full {
                pending.sent_on = 0;
                state.refused = true;
                state.asked_after.insert(queue);
                self.stats.republished.fetch_add(1, Ordering::Relaxed);
                self.wake_manager();
            } else if let Some(pending) = state.pending.remove(&id) {
                drop(locked);
                let settled = Settled::now(id, Err(Error::refused(&queue)));
                let _ = pending.events.send(Event::Settled(settled));
            }
        }
    }

    pub fn report_broken(&self, generation: u64) {
        let mut state = self.lock();
        state.broken = state.broken.max(generation);
        // Newcomers must not pick up what is known to be broken.
        if state
            .link
            .as_ref()
            .is_some_and(|link| link.generation == generation)
        {
            state.link = None;
            state.blocked = None;
        }
        drop(state);
        self.wake_manager();
    }

    /// Has the connection manager find out about queues.
    pub fn ask_after<'q>(&self, queues: impl Iterator<Item = &'q Arc<str>>) {
        self.lock().asked_after.extend(queues.cloned());
        self.wake_manager();
    }

    /// Forgets a call whose deadline has passed, and says what it was waiting for.
    /// `strangers` are the replies that came meanwhile and belong to no call.
    pub fn time_out(
        &self,
        id: CorrelationId,
        queue: &Arc<str>,
        after: Duration,
        strangers: u64,
    ) -> Error {
        // In this order the lock is dropped first.
        let (pending, state) = {
            let mut state = self.lock();
            (state.pending.remove(&id), state)
        };
        if pending.as_ref().is_some_and(Pending::was_refused) {
            return Error::refused(queue);
        }
        let waiting_for = match (&state.blocked, &state.link, &pending) {
            (Some(reason), ..) => WaitingFor::BlockedBroker {
                reason: reason.clone(),
            },
            (None, None, _) => WaitingFor::Connection {
                endpoint: self.options.endpoints.to_string(),
                last_error: state.last_error.clone(),
            },
            (None, Some(_), Some(pending)) if pending.returned => WaitingFor::Queue {
                queue: queue.to_string(),
            },
            (None, Some(_), Some(pending)) if pending.sent_on == 0 => WaitingFor::Room,
            (None, Some(link), _) => {
                let found = state.queues.get(queue).filter(|(at, _)| is_fresh(*at));
                let (queue, silence) = (queue.to_string(), link.inbox.silence());
                // Nothing has come in since, and it was some time ago.
                let is_silent = state
                    .asked_at
                    .map(|at| at.elapsed())
                    .is_some_and(|ago| silence > ago && ago >= diagnosis_time(after) / 2);
                match found {
                    Some((_, None)) => WaitingFor::Queue { queue },
                    None if is_silent => WaitingFor::SilentBroker { queue, silence },
                    found => WaitingFor::Answer {
                        queue,
                        status: found.and_then(|&(_, status)| status),
                        strangers,
                    },
                }
            }
        };
        Error::Timeout { after, waiting_for }
    }

    /// Ends every call, and the connection manager.
    pub fn close(&self) {
        self.lock().closing = true;
        self.fail_pending(|_| Some(Error::Closed));
        self.wake_manager();
    }

    /// Ends the pending calls for which `error` has one.
    pub fn fail_pending(&self, error: impl Fn(&Pending) -> Option<Error>) {
        let mut requests = Vec::new(); // dropped last, without the lock
        self.lock().pending.retain(|&id, pending| {
            let Some(error) = error(pending) else {
                return true;
            };
            let settled = Settled::now(id, Err(error));
            let _ = pending.events.send(Event::Settled(settled));
            requests.push(Arc::clone(&pending.outgoing));
            false
        });
    }
}

impl State {
    /// Whether the connection manager has to be told that it is needed at this time, because it
    /// would come later.
    fn look_at(&mut self, at: Instant) -> bool {
        let earlier = self.next_look.is_none_or(|planned| at < planned);
        if earlier {
            self.next_look = Some(at);
        }
        earlier
    }

    /// Plans the next look for what is to be sent, at `soonest` or later; says when it is.
    pub fn plan_look(&mut self, soonest: Instant) -> Option<Instant> {
        self.next_look = match self.blocked {
            Some(_) => None,
            None => self
                .pending
                .values()
                .filter_map(|pending| pending.due(soonest))
                .min()
                .map(|at| at.max(soonest)),
        };
        self.next_look
    }

    /// Whether there is a call that waits for something.
    pub fn has_work(&self) -> bool {
        let now = Instant::now();
        self.pending.values().any(|pending| !pending.is_over(now))
    }

    /// When the first of those gives up who wait for something.
    pub fn earliest_deadline(&self) -> Option<Instant> {
        let now = Instant::now();
        let waiting = self
            .pending
            .values()
            .filter(|pending| !pending.is_over(now));
        waiting.map(|pending| pending.deadline).min()
    }

    /// Marks what is overdue as unsent; says how many those are.
    pub fn give_up_overdue(&mut self, generation: u64) -> u64 {
        let (mut overdue, now) = (0, Instant::now());
        for pending in self.pending.values_mut() {
            if pending.is_over(now) {
                continue;
            }
            if pending.sent_on != generation {
                continue;
            }
            let mut is_overdue = false;
            if let Resend::At(at, time) = &mut pending.resend
                && now >= *at
            {
                *time = time.saturating_mul(2);
                is_overdue = true;
            }
            if let Some(unconfirmed) = &mut pending.unconfirmed
                && now >= unconfirmed.at
            {
                unconfirmed.time = unconfirmed.time.saturating_mul(2);
                is_overdue = true;
            }
            if is_overdue {
                pending.sent_on = 0;
                overdue += 1;
            }
        }
        overdue
    }

    /// The broker reads again, and has not confirmed anything meanwhile.
    pub fn restart_confirms(&mut self) {
        let now = Instant::now();
        for unconfirmed in self
            .pending
            .values_mut()
            .filter_map(|one| one.unconfirmed.as_mut())
        {
            unconfirmed.at = after(now, unconfirmed.time);
        }
    }

    /// What is pending and was not sent on this link, in the order in which it was submitted.
    pub fn unsent(&self, generation: u64) -> Vec<CorrelationId> {
        let now = Instant::now();
        let unsent = |(&id, pending): (_, &Pending)| {
            (pending.sent_on < generation && !pending.is_over(now)).then_some(id)
        };
        let mut unsent: Vec<_> = self.pending.iter().filter_map(unsent).collect();
        unsent.sort_unstable();
        unsent
    }

    /// Marks a request as sent on a link, before it is, so that its reply finds it; `None` if it is
    /// not to be sent any more.
    pub fn begin_sending(&mut self, id: CorrelationId, link: &Link) -> Option<Unsent> {
        let now = Instant::now();
        let pending = self
            .pending
            .get_mut(&id)
            .filter(|pending| !pending.is_over(now))?;
        let again = pending.sent_on > 0;
        (pending.sent_on, pending.returned) = (link.generation, false);
        if link.confirms() {
            pending.expect_confirm(now);
        }
        if let Resend::At(at, time) = &mut pending.resend {
            *at = after(now, *time);
        }
        Some(Unsent {
            outgoing: Arc::clone(&pending.outgoing),
            deadline: pending.deadline,
            again,
        })
    }

    /// Keeps what was found out about a queue, and forgets what is old.
    pub fn keep_status(&mut self, queue: Arc<str>, status: Option<QueueStatus>) {
        self.queues.retain(|_, (at, _)| is_fresh(*at));
        self.queues.insert(queue, (Instant::now(), status));
    }
}

/// Whether what was found out about a queue still tells why a call was not answered.
fn is_fresh(at: Instant) -> bool {
    at.elapsed() <= 2 * DIAGNOSIS_TIME
}

/// Ends a call: returns its outcome if it `is_mine`, and otherwise sends it to its owner. One that
/// is gone needs none.
fn hand_over(
    id: CorrelationId,
    outcome: Outcome,
    pending: &Pending,
    is_mine: impl Fn(CorrelationId) -> bool,
) -> Option<Settled> {
    if is_mine(id) {
        return Some(Settled::now(id, outcome));
    }
    let settled = Settled::now(id, outcome);
    let _ = pending.events.send(Event::Settled(settled));
    None
}

/// Takes what comes in while no caller reads.
pub(crate) struct ReplySink {
    pub shared: Arc<Shared>,
    pub events: Sender<Incoming>,
}

impl Sink for ReplySink {
    fn accept(&self, incoming: Incoming) {
        let link = self.shared.lock().link.clone();
        match (link, incoming) {
            // Of this connection, whatever the link is by now.
            (
                _,
                incoming @ (Incoming::Channel(..) | Incoming::Blocked(_) | Incoming::Unblocked),
            ) => {
                let _ = self.events.send(incoming);
            }
            (Some(link), incoming) => {
                let _ = self.shared.accept(&link, incoming, |_| false);
            }
            // The link is known to be broken, but an answer is an answer.
            (None, Incoming::Delivery(Delivery { message, .. })) => {
                let _ = self.shared.accept_reply(message, |_| false);
            }
            (None, Incoming::Returned(_) | Incoming::Confirm(_)) => {}
        }
    }

    fn done(&self) {}
}
