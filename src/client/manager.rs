//! The connection manager: the thread of a client that does what may block.
//!
//! It connects, reconnects, declares the callback queue, sends again what a lost connection left
//! unanswered, asks after queues, and closes. So nothing that hangs holds a caller past its
//! deadline.

use crate::amqp::brokers::Brokers;
use crate::amqp::channel::{Channel, SETUP_TIME};
use crate::amqp::connection::Connection;
use crate::amqp::error::GONE;
use crate::amqp::frame::reply_code::NOT_ALLOWED;
use crate::amqp::frame::{
    Content, Properties, Publish, put_confirm_select, put_consume, put_declare, put_publish,
    put_qos,
};
use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{ChannelEvent, CloseReason, Incoming};
use crate::amqp::outbox::NotSent;
use crate::amqp::queue;
use crate::amqp::sync::atomic::Ordering;
use crate::amqp::sync::channel::{Receiver, Sender, select, unbounded};
use crate::amqp::sync::{Instant, Never};
use crate::amqp::time::{Backoff, FAR_FUTURE, after};
use crate::client::link::Link;
use crate::client::options::ReplyTo;
use crate::client::pending::{Event, Pending, ReplySink, Resend, Shared};
use crate::error::Error;
use crate::message::{DIRECT_REPLY_TO, MESSAGE_MAX};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// How long one round of attempts to connect may take, for all brokers in the list together.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How often requests that could not be delivered, or not be sent, are tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// How many channels are kept open, at most, on which nothing is published any more, for the broker
/// to confirm what was.
const RETIRED_MAX: usize = 4;

/// The routing key of a message that is for nobody. See [`Manager::consume`].
const NOBODY: &[u8] = b"fibrpc.is-the-broker-blocked";

/// The thread that does what may block.
pub(crate) struct Manager {
    pub shared: Arc<Shared>,
    /// Says that there is something to look at.
    pub woken: Receiver<()>,
    /// Disconnected when the thread has ended.
    pub _alive: Sender<Never>,
}

/// What the connection manager is to do next.
enum Task {
    Wait,
    Connect,
    End,
}

/// What is to be done after something has come in.
enum Next {
    GoOn,
    ChangeChannel,
}

/// How a link ended.
enum End {
    /// The connection, its channel or the callback queue is gone, for this reason.
    Lost(String),
    /// The client is being closed.
    Closing,
}

impl Manager {
    /// Works until the client is closed.
    pub fn run(self) {
        let mut backoff = Backoff::default();
        let mut brokers = Brokers::new(self.shared.options.endpoints.clone());
        loop {
            match self.next_task() {
                Task::End => return,
                Task::Wait => {
                    // The sender is in `shared`, which we hold.
                    let _ = self.woken.recv();
                    continue;
                }
                Task::Connect => {}
            }
            let mut linked = None;
            let error = self.connect_and_serve(&mut brokers, &mut linked);
            self.shared.lock().blocked = None;
            // One that was lost as soon as it was made, and again, is not made again at once.
            if let Some(link) = linked {
                let was_useful = link.was_useful.load(Ordering::Relaxed);
                backoff.held_for(match was_useful {
                    true => FAR_FUTURE,
                    false => link.since.elapsed(),
                });
            }
            if let Some(error) = error
                && self.may_retry_after(&error)
            {
                self.pause(backoff.next());
            }
        }
    }

    fn next_task(&self) -> Task {
        let state = self.shared.lock();
        if state.closing {
            Task::End
        } else if state.has_work() {
            Task::Connect
        } else {
            Task::Wait
        }
    }

    /// Whether to try again after a failure; if not, the waiting calls end with it. A first
    /// attempt that fails is told at once, unless we are to wait; a broker that was there once
    /// is expected back.
    fn may_retry_after(&self, error: &Error) -> bool {
        let options = &self.shared.options;
        let retry = {
            let mut state = self.shared.lock();
            let retry = state.generation > 0 || options.wait_for_server;
            if retry {
                state.last_error = Some(error.reason());
            }
            retry
        };
        if retry {
            let reason = error.reason();
            log::warn!(
                "no connection to {}: {reason}; trying again",
                options.endpoints
            );
        } else {
            self.shared.fail_pending(|_| Some(error.clone()));
        }
        retry
    }

    /// Waits, unless the client is closed.
    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while self.woken.recv_deadline(until).is_ok() {
            if self.shared.lock().closing {
                return;
            }
        }
    }

    /// Connects, and serves the link until it is lost or the client closed. Returns why it was
    /// lost; `None` if it was not. Leaves the link in `linked`, if there was one.
    fn connect_and_serve(
        &self,
        brokers: &mut Brokers,
        linked: &mut Option<Arc<Link>>,
    ) -> Option<Error> {
        let options = &self.shared.options;
        let deadline = Instant::now() + CONNECT_TIME;
        let wanted_by = self.shared.lock().earliest_deadline().unwrap_or(deadline);
        let (events, told) = unbounded();
        let sink = || -> Box<dyn Sink> {
            Box::new(ReplySink {
                shared: Arc::clone(&self.shared),
                events: events.clone(),
            })
        };
        let mut connection = match brokers.connect("client", wanted_by, deadline, &sink) {
            Ok(connection) => connection,
            Err(error) => return Some(error.into()),
        };
        let served = self.set_up_and_serve(brokers, &mut connection, events, &told, linked);
        // amiquip tells the true cause only when closed.
        let reason = match (served, connection.close()) {
            (Ok(()), _) => return None,
            (Err(_), Err(cause)) => cause,
            (Err(reason), Ok(())) => reason,
        };
        let generation = self.shared.lock().generation;
        if generation == 0 {
            return Some(Error::Unreachable {
                endpoint: options.endpoints.to_string(),
                reason,
                source: None,
            });
        }
        let error = Error::ConnectionLost { reason };
        self.shared.fail_pending(|pending| {
            let ends = pending.sent_on == generation && matches!(pending.resend, Resend::Never);
            ends.then(|| error.clone())
        });
        Some(error)
    }

    /// Makes the callback queue, and serves the link until it is lost or the client closed.
    ///
    /// # Errors
    ///
    /// Why it was lost, as far as can be told before the connection is closed.
    fn set_up_and_serve(
        &self,
        brokers: &mut Brokers,
        connection: &mut Connection,
        events: Sender<Incoming>,
        told: &Receiver<Incoming>,
        linked: &mut Option<Arc<Link>>,
    ) -> Result<(), String> {
        let reason = |error: crate::amqp::error::Error| error.reason().to_owned();
        let consuming = connection.open_channel().map_err(reason)?;
        let publishing = match self.shared.options.reply_to {
            // Replies come to the channel that publishes.
            ReplyTo::Direct => Arc::clone(&consuming),
            // One that a request closes does not take the callback queue along.
            ReplyTo::Queue => connection.open_channel().map_err(reason)?,
        };
        let end = match self.consume(connection, &consuming, &publishing, told) {
            Err(end) => end,
            Ok(reply_to) => {
                let confirms = self.shared.options.confirms();
                if confirms {
                    publishing.say(put_confirm_select);
                }
                let ends = (
                    Arc::clone(&connection.inbox),
                    Arc::clone(&connection.outbox),
                );
                let link = Link::new(ends, publishing, reply_to, events, confirms);
                let link = self.link_up(link);
                *linked = Some(Arc::clone(&link));
                brokers.works();
                let mut questions = HashMap::new();
                let end = self.serve(&link, connection, consuming.id(), told, &mut questions);
                self.shared.report_broken(link.generation);
                // A question has a channel of its own, which may be more than the user may have.
                let why = connection.inbox.close_reason();
                if why.is_some_and(|why| why.code == NOT_ALLOWED) && !questions.is_empty() {
                    self.shared.lock().asks_no_more = true;
                }
                end
            }
        };
        let closed = connection.close();
        match end {
            End::Closing => Ok(()),
            End::Lost(reason) => Err(closed.map_or_else(|cause| cause, |()| reason)),
        }
    }

    /// Makes and consumes the callback queue; returns its name once the broker has confirmed it.
    ///
    /// A message for nobody is published before. The broker drops it. But one that blocks
    /// publishers says so only to a connection that has published, and then reads nothing more: so
    /// its answer to what follows tells that it does not block, and no request is written that it
    /// would read and execute when its caller has given up.
    /// Source: <https://www.rabbitmq.com/docs/connection-blocked>.
    fn consume(
        &self,
        connection: &mut Connection,
        consuming: &Channel,
        publishing: &Channel,
        told: &Receiver<Incoming>,
    ) -> Result<String, End> {
        let nothing: Arc<dyn Content> = Arc::new(Vec::new());
        let for_nobody = Publish {
            routing_key: NOBODY,
            mandatory: false,
            properties: Properties::default(),
            content: &nothing,
        };
        publishing.say(|out, id| put_publish(out, id, &for_nobody));
        let mut name = match self.shared.options.reply_to {
            ReplyTo::Direct => Some(DIRECT_REPLY_TO.to_owned()),
            ReplyTo::Queue => None,
        };
        consuming.say(|out, id| {
            if name.is_none() {
                put_declare(out, id, &queue::CALLBACK);
            }
            // Without a name, it is the queue that was declared last.
            put_consume(out, id, name.as_deref().unwrap_or("").as_bytes(), true);
        });
        let lost = |reason: &str| End::Lost(reason.to_owned());
        let mut deadline = after(Instant::now(), SETUP_TIME);
        loop {
            let incoming = select! {
                recv(told) -> incoming => incoming.map_err(|_| lost(GONE))?,
                recv(self.woken) -> _ => {
                    if self.shared.lock().closing {
                        return Err(End::Closing);
                    }
                    continue;
                }
                recv(connection.down) -> _ => return Err(lost(GONE)),
                default(deadline.saturating_duration_since(Instant::now())) => {
                    return Err(lost("it does not answer basic.consume"));
                }
            };
            connection.note(&incoming);
            match incoming {
                Incoming::Channel(_, ChannelEvent::Declared(declared)) => {
                    name = Some(String::from_utf8_lossy(&declared.name).into_owned());
                }
                Incoming::Channel(_, ChannelEvent::Consuming) => {
                    return name.ok_or_else(|| lost("it gave the callback queue no name"));
                }
                Incoming::Channel(_, ChannelEvent::Closed(reason)) => {
                    return Err(self.sent_away(&reason));
                }
                Incoming::Blocked(reason) => {
                    // It may take as long as it takes; heartbeats tell whether the broker is there.
                    deadline = after(Instant::now(), FAR_FUTURE);
                    self.shared.lock().blocked = Some(reason);
                }
                Incoming::Unblocked => {
                    deadline = after(Instant::now(), SETUP_TIME);
                    self.shared.lock().blocked = None;
                }
                Incoming::Channel(..)
                | Incoming::Confirm(_)
                | Incoming::Delivery(_)
                | Incoming::Returned(_) => {}
            }
        }
    }

    /// Makes a link known, and sends on it whatever is pending.
    fn link_up(&self, mut link: Link) -> Arc<Link> {
        let mut state = self.shared.lock();
        state.generation += 1;
        state.last_error = None;
        state.queues.clear();
        link.generation = state.generation;
        // Another broker, or its settings, may be others, unless it is just for that.
        if !std::mem::take(&mut state.knows_limit) {
            let message_max = &self.shared.message_max;
            message_max.store(MESSAGE_MAX, Ordering::Relaxed);
        }
        let link = Arc::new(link);
        state.link = Some(Arc::clone(&link));
        for pending in state.pending.values() {
            let _ = pending.events.send(Event::LinkUp);
        }
        drop(state);
        let stats = &self.shared.stats;
        stats.connections.fetch_add(1, Ordering::Relaxed);
        self.send_unsent(&link);
        link
    }

    /// Does what callers ask for, until the link ends.
    fn serve(
        &self,
        link: &Link,
        connection: &mut Connection,
        consuming: u16,
        told: &Receiver<Incoming>,
        questions: &mut Questions,
    ) -> End {
        let mut looked = Instant::now();
        let mut retired = VecDeque::new();
        loop {
            let next_look = self.shared.lock().plan_look(looked + RETRY_INTERVAL);
            let wait = next_look.map_or(FAR_FUTURE, |at| {
                at.saturating_duration_since(Instant::now())
            });
            let incoming = select! {
                recv(self.woken) -> _ => None,
                recv(connection.down) -> _ => return End::Lost(GONE.to_owned()),
                recv(told) -> incoming => incoming.ok(),
                default(wait) => None,
            };
            if let Some(incoming) = incoming {
                connection.note(&incoming);
                match self.learn(link, consuming, questions, incoming) {
                    Ok(Next::GoOn) => {}
                    Ok(Next::ChangeChannel) => {
                        if let Err(end) = self.change_channel(link, connection, &mut retired) {
                            return end;
                        }
                        self.send_unsent(link);
                    }
                    Err(end) => return end,
                }
            }
            let (asked_after, blocked) = {
                let mut state = self.shared.lock();
                if state.closing {
                    return End::Closing;
                }
                if state.broken >= link.generation {
                    return End::Lost(GONE.to_owned());
                }
                let mut asked_after = std::mem::take(&mut state.asked_after);
                if state.asks_no_more {
                    asked_after.clear();
                }
                if !asked_after.is_empty() {
                    state.asked_at = Some(Instant::now());
                }
                (asked_after, state.blocked.is_some())
            };
            if blocked {
                continue; // the broker would not read a question either
            }
            if next_look.is_some_and(|at| at <= Instant::now()) {
                if self.give_up_overdue(link)
                    && let Err(end) = self.change_channel(link, connection, &mut retired)
                {
                    return end;
                }
                if self.send_unsent(link) {
                    looked = Instant::now();
                }
            }
            for queue in asked_after {
                ask_after(queue, connection, questions, link);
            }
        }
    }

    /// Deals with what has come in and is not about a call.
    ///
    /// # Errors
    ///
    /// It is the end of the link.
    fn learn(
        &self,
        link: &Link,
        consuming: u16,
        questions: &mut Questions,
        incoming: Incoming,
    ) -> Result<Next, End> {
        match incoming {
            Incoming::Channel(id, ChannelEvent::Closed(reason)) if !questions.contains_key(&id) => {
                self.refuse_too_long(link, id, &reason);
                let is_current = id == link.channel().id();
                if id == consuming || is_current && reason.message_max().is_none() {
                    self.shared.lock().knows_limit = reason.message_max().is_some();
                    return Err(self.sent_away(&reason));
                }
                if is_current {
                    return Ok(Next::ChangeChannel);
                }
                // One that nothing is published on any more.
                link.forget_channel(id);
                self.send_unsent(link);
            }
            Incoming::Channel(id, ChannelEvent::QueueGone) if id == consuming => {
                return Err(End::Lost("the callback queue is gone".to_owned()));
            }
            Incoming::Channel(id, event) => {
                let is_over = matches!(event, ChannelEvent::Closed(_));
                if let Some((channel, queue)) = questions.get(&id)
                    && let Some(status) = queue::answer(channel, event)
                {
                    self.shared.lock().keep_status(Arc::clone(queue), status);
                    questions.remove(&id);
                } else if is_over {
                    questions.remove(&id);
                }
            }
            Incoming::Blocked(reason) => self.shared.lock().blocked = Some(reason),
            Incoming::Unblocked => {
                let mut state = self.shared.lock();
                state.blocked = None;
                state.restart_confirms();
                drop(state);
                self.send_unsent(link);
            }
            Incoming::Confirm(_) | Incoming::Delivery(_) | Incoming::Returned(_) => {}
        }
        Ok(Next::GoOn)
    }

    /// The broker has closed the channel. If that was to say that we may not publish, it would say
    /// so again, and all calls end with it.
    fn sent_away(&self, close: &CloseReason) -> End {
        self.shared.fail_pending(|pending| {
            queue::refusal(&pending.outgoing.request.queue, close).map(Error::from)
        });
        End::Lost(close.to_string())
    }

    /// The broker has closed a channel because a request was too long for it: that call ends with
    /// it, and the broker has not seen what was published after it.
    fn refuse_too_long(&self, link: &Link, channel: u16, close: &CloseReason) {
        let Some(max) = close.message_max() else {
            return;
        };
        self.shared.message_max.store(max, Ordering::Relaxed);
        let place = |pending: &Pending| {
            let place = pending.outgoing.place()?;
            (place.channel == channel && pending.sent_on == link.generation).then_some(place)
        };
        let is_too_long = |pending: &Pending| pending.outgoing.request.body.len() > max;
        let first = {
            let state = self.shared.lock();
            let too_long = state.pending.values().filter(|one| is_too_long(one));
            too_long.filter_map(place).min()
        };
        // If its caller has given up meanwhile, nobody knows what came before it.
        let is_lost = |pending: &Pending| {
            place(pending).is_some_and(|place| first.is_none_or(|first| place > first))
        };
        self.shared.fail_pending(|pending| {
            if place(pending).is_some() && is_too_long(pending) {
                return Some(Error::too_long(&pending.outgoing.request.queue, max));
            }
            let unknown = first.is_none() && matches!(pending.resend, Resend::Never);
            (unknown && is_lost(pending)).then(|| Error::ConnectionLost {
                reason: close.to_string(),
            })
        });
        for pending in self.shared.lock().pending.values_mut() {
            if is_lost(pending) {
                pending.sent_on = 0;
            }
        }
        link.forget_channel(channel);
    }

    /// Has what is overdue sent again; whether that, or what was refused, is to go out on another
    /// channel.
    fn give_up_overdue(&self, link: &Link) -> bool {
        let mut state = self.shared.lock();
        let overdue = state.give_up_overdue(link.generation);
        let refused = std::mem::take(&mut state.refused);
        drop(state);
        let stats = &self.shared.stats;
        stats.republished.fetch_add(overdue, Ordering::Relaxed);
        refused || overdue > 0
    }

    /// Opens another channel to publish on. A quorum queue takes what a channel publishes in
    /// sequence; if a part of that is lost with a node, it keeps what follows until the channel is
    /// closed.
    ///
    /// # Errors
    ///
    /// The broker allows no more channels.
    fn change_channel(
        &self,
        link: &Link,
        connection: &mut Connection,
        retired: &mut VecDeque<Arc<Channel>>,
    ) -> Result<(), End> {
        if self.shared.options.reply_to == ReplyTo::Direct {
            return Ok(()); // replies come to the channel that publishes
        }
        let lost = |error: crate::amqp::error::Error| End::Lost(error.reason().to_owned());
        let channel = connection.open_channel().map_err(lost)?;
        if link.confirms() {
            channel.say(put_confirm_select);
        }
        retired.push_back(link.channel());
        link.publish_on(channel);
        // One that is closed confirms nothing any more.
        while let Some(channel) = retired.front()
            && (retired.len() > RETIRED_MAX || !link.waits_for(channel.id()))
        {
            channel.close();
            link.forget_channel(channel.id());
            retired.pop_front();
        }
        Ok(())
    }

    /// Sends what is pending and was not sent on this link. If there is no room for all of it, it
    /// returns false after a short wait: it is to be called again at once, to wait on.
    fn send_unsent(&self, link: &Link) -> bool {
        // What has waited since before the limit was known.
        let max = self.shared.message_max.load(Ordering::Relaxed);
        self.shared.fail_pending(|pending| {
            let request = &pending.outgoing.request;
            let is_too_long = pending.sent_on < link.generation && request.body.len() > max;
            is_too_long.then(|| Error::too_long(&request.queue, max))
        });
        let unsent = self.shared.lock().unsent(link.generation);
        for id in unsent {
            let limit = after(Instant::now(), RETRY_INTERVAL);
            if let Err(error) = link.outbox.wait_for_room(Some(limit)) {
                return error != NotSent::Full; // there is more to do than to wait here
            }
            let Some(unsent) = self.shared.lock().begin_sending(id, link) else {
                continue; // its deadline has passed meanwhile
            };
            if let Err(error) = link.send(id, &unsent.outgoing, unsent.deadline, false) {
                self.shared.is_unsent(id, link.generation);
                return error != NotSent::Full;
            }
            let again = u64::from(unsent.again);
            let stats = &self.shared.stats;
            stats.republished.fetch_add(again, Ordering::Relaxed);
        }
        true
    }
}

/// Channels on which we have asked after a queue, by their numbers.
type Questions = HashMap<u16, (Arc<Channel>, Arc<str>)>;

/// Asks after a queue for those whose deadline is near. Nobody waits for the answer.
fn ask_after(queue: Arc<str>, connection: &mut Connection, questions: &mut Questions, link: &Link) {
    if questions.values().any(|(_, asked)| *asked == queue) {
        // The queue does not answer. Whether the broker does, this tells, which is always answered.
        return link.channel().say(|out, id| put_qos(out, id, 0));
    }
    match queue::ask_after(connection, &queue) {
        Ok(channel) => {
            questions.insert(channel.id(), (channel, queue));
        }
        Err(error) => log::debug!("cannot ask after the queue: {}", error.reason()),
    }
}
