//! The connection manager: the thread of a client that does what may block.
//!
//! It connects, reconnects, declares the callback queue, sends again what a lost connection left
//! unanswered, asks after queues, and closes. So nothing that hangs holds a caller past its
//! deadline.

use crate::amqp::channel::{Channel, SETUP_TIME};
use crate::amqp::connection::Connection;
use crate::amqp::error::GONE;
use crate::amqp::frame::{Properties, Publish, put_consume, put_publish};
use crate::amqp::inbox::Sink;
use crate::amqp::incoming::{ChannelEvent, CloseReason, Incoming};
use crate::amqp::outbox::NotSent;
use crate::amqp::queue;
use crate::amqp::sync::Never;
use crate::amqp::time::{Backoff, FAR_FUTURE, after};
use crate::client::link::Link;
use crate::client::options::ReplyTo;
use crate::client::pending::{Event, ReplySink, Resend, Shared};
use crate::error::Error;
use crate::message::DIRECT_REPLY_TO;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How long one round of attempts to connect may take, for all brokers in the list together.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// How often requests that could not be delivered, or not be sent, are tried again.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

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
            let began = Instant::now();
            let error = self.connect_and_serve();
            self.shared.lock().blocked = None;
            backoff.held_for(began.elapsed());
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
    /// lost; `None` if it was not.
    fn connect_and_serve(&self) -> Option<Error> {
        let options = &self.shared.options;
        let deadline = Instant::now() + CONNECT_TIME;
        let (events, told) = unbounded();
        let sink = || -> Box<dyn Sink> {
            Box::new(ReplySink {
                shared: Arc::clone(&self.shared),
                events: events.clone(),
            })
        };
        let mut connection = match Connection::open(&options.endpoints, "client", deadline, &sink) {
            Ok(connection) => connection,
            Err(error) => return Some(error.into()),
        };
        let served = self.set_up_and_serve(&mut connection, events, &told);
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
        connection: &mut Connection,
        events: Sender<Incoming>,
        told: &Receiver<Incoming>,
    ) -> Result<(), String> {
        let reason = |error: crate::amqp::error::Error| error.reason().to_owned();
        let channel = connection.open_channel().map_err(reason)?;
        let reply_to = match self.shared.options.reply_to {
            ReplyTo::Direct => DIRECT_REPLY_TO.to_owned(),
            ReplyTo::Queue => queue::declare_exclusive(&channel).map_err(reason)?,
        };
        let mut publishing = None;
        let end = match self.consume(connection, &channel, &reply_to, told) {
            Some(end) => end,
            None => {
                let link = self.link_up(Link {
                    generation: 0,
                    since: Instant::now(),
                    inbox: Arc::clone(&connection.inbox),
                    outbox: Arc::clone(&connection.outbox),
                    consumes_on: channel.id(),
                    publishes_on: AtomicU16::new(channel.id()),
                    reply_to,
                    events,
                });
                let end = self.serve(&link, connection, told, &mut publishing);
                self.shared.report_broken(link.generation);
                end
            }
        };
        // Before the channels are dropped: then they have nothing to wait for.
        let closed = connection.close();
        match end {
            End::Closing => Ok(()),
            End::Lost(reason) => Err(closed.map_or_else(|cause| cause, |()| reason)),
        }
    }

    /// Consumes the callback queue; `None` once the broker has confirmed it.
    ///
    /// A message for nobody is published before. The broker drops it. But one that blocks
    /// publishers says so only to a connection that has published, and then reads nothing more: so
    /// its answer to what follows tells that it does not block, and no request is written that it
    /// would read and execute when its caller has given up.
    /// Source: <https://www.rabbitmq.com/docs/connection-blocked>.
    fn consume(
        &self,
        connection: &Connection,
        channel: &Channel,
        reply_to: &str,
        told: &Receiver<Incoming>,
    ) -> Option<End> {
        let mut watchdog = Some(connection.outbox.abort_after(SETUP_TIME));
        let for_nobody = Publish {
            routing_key: NOBODY,
            mandatory: false,
            properties: Properties::default(),
            body: b"",
        };
        let _ = connection.outbox.send(None, |out| {
            put_publish(out, channel.id(), &for_nobody);
            put_consume(out, channel.id(), reply_to.as_bytes(), true);
        });
        loop {
            let event = select! {
                recv(told) -> event => event,
                recv(self.woken) -> _ => {
                    if self.shared.lock().closing {
                        return Some(End::Closing);
                    }
                    continue;
                }
                recv(connection.down) -> _ => return Some(End::Lost(GONE.to_owned())),
            };
            match event {
                Ok(Incoming::Channel(_, ChannelEvent::Consuming)) => return None,
                Ok(Incoming::Channel(_, ChannelEvent::Closed(reason))) => {
                    return Some(self.sent_away(&reason));
                }
                Ok(Incoming::Blocked(reason)) => {
                    // It may take as long as it takes; heartbeats tell whether the broker is there.
                    watchdog = None;
                    self.shared.lock().blocked = Some(reason);
                }
                Ok(Incoming::Unblocked) => {
                    watchdog.get_or_insert_with(|| connection.outbox.abort_after(SETUP_TIME));
                    self.shared.lock().blocked = None;
                }
                other => {
                    let answer = format!("the broker answered basic.consume with {other:?}");
                    return Some(End::Lost(answer));
                }
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
        told: &Receiver<Incoming>,
        publishing: &mut Option<Channel>,
    ) -> End {
        let mut looked = Instant::now();
        loop {
            let next_look = self.shared.lock().plan_look(looked + RETRY_INTERVAL);
            let wait = next_look.map_or(FAR_FUTURE, |at| {
                at.saturating_duration_since(Instant::now())
            });
            select! {
                recv(self.woken) -> _ => {}
                recv(connection.down) -> _ => return End::Lost(GONE.to_owned()),
                recv(told) -> event => if let Some(end) = self.learn(link, event.ok()) {
                    return end;
                },
                default(wait) => {}
            }
            let (asked_after, blocked) = {
                let mut state = self.shared.lock();
                if state.closing {
                    return End::Closing;
                }
                if state.broken >= link.generation {
                    return End::Lost(GONE.to_owned());
                }
                let asked_after = std::mem::take(&mut state.asked_after);
                (asked_after, state.blocked.is_some())
            };
            if !blocked && next_look.is_some_and(|at| at <= Instant::now()) {
                // What a closed channel leaves to be told must not be taken for an event of a new
                // one that gets its number.
                if told.is_empty()
                    && self.give_up_overdue(link)
                    && let Err(reason) = self.change_channel(link, connection, publishing)
                {
                    return End::Lost(reason);
                }
                if self.send_unsent(link) {
                    looked = Instant::now();
                }
            }
            for queue in asked_after {
                self.look_at_queue(&queue, connection);
            }
        }
    }

    /// Deals with what has come in and is not about a call; says if that ends the link.
    fn learn(&self, link: &Link, event: Option<Incoming>) -> Option<End> {
        match event {
            // Of a channel on which we have asked after a queue, or published.
            Some(Incoming::Channel(channel, _))
                if channel != link.consumes_on
                    && channel != link.publishes_on.load(Ordering::Relaxed) =>
            {
                None
            }
            Some(Incoming::Channel(_, ChannelEvent::Closed(reason))) => {
                Some(self.sent_away(&reason))
            }
            Some(Incoming::Blocked(reason)) => {
                self.shared.lock().blocked = Some(reason);
                None
            }
            Some(Incoming::Unblocked) => {
                self.shared.lock().blocked = None;
                self.send_unsent(link);
                None
            }
            // Nothing else that we are told now means that all is well.
            Some(Incoming::Channel(..) | Incoming::Delivery(_) | Incoming::Returned(_)) | None => {
                Some(End::Lost("the callback queue is gone".to_owned()))
            }
        }
    }

    /// The broker has closed the channel. If that was to say that we may not publish, it would say
    /// so again, and all calls end with it.
    fn sent_away(&self, close: &CloseReason) -> End {
        let reason = close.to_string();
        self.shared.fail_pending(|pending| {
            queue::refusal(&pending.request.queue, close.code, &reason).map(Error::from)
        });
        End::Lost(reason)
    }

    /// Has what is overdue sent again; whether anything is.
    fn give_up_overdue(&self, link: &Link) -> bool {
        let overdue = self.shared.lock().give_up_overdue(link.generation);
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
    ) -> Result<(), String> {
        if self.shared.options.reply_to == ReplyTo::Direct {
            return Ok(()); // replies come to the channel that publishes
        }
        let channel = connection
            .open_channel()
            .map_err(|error| error.reason().to_owned())?;
        link.publishes_on.store(channel.id(), Ordering::Relaxed);
        drop(publishing.replace(channel)); // closes the one before
        Ok(())
    }

    /// Finds out about a queue for those whose deadline is near.
    fn look_at_queue(&self, queue: &Arc<str>, connection: &mut Connection) {
        if self.shared.lock().blocked.is_some() {
            return; // the broker would not read the question
        }
        match queue::status(connection, queue) {
            Ok(status) => self.shared.lock().keep_status(Arc::clone(queue), status),
            Err(error) => log::debug!("cannot ask after the queue: {}", error.reason()),
        }
    }

    /// Sends what is pending and was not sent on this link. If there is no room for all of it, it
    /// returns false after a short wait: it is to be called again at once, to wait on.
    fn send_unsent(&self, link: &Link) -> bool {
        let unsent = self.shared.lock().unsent(link.generation);
        for id in unsent {
            let limit = after(Instant::now(), RETRY_INTERVAL);
            if let Err(error) = link.outbox.wait_for_room(Some(limit)) {
                return error != NotSent::Full; // there is more to do than to wait here
            }
            let Some(unsent) = self.shared.lock().begin_sending(id, link.generation) else {
                continue; // its deadline has passed meanwhile
            };
            if let Err(error) = link.send(id, &unsent.request, unsent.deadline, false) {
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
