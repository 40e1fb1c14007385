//! A request on its way out, and the connection that it goes by.

use crate::amqp::backlog::Backlog;
use crate::amqp::body::Body;
use crate::amqp::channel::Channel;
use crate::amqp::frame::{Content, Properties, Publish};
use crate::amqp::inbox::Inbox;
use crate::amqp::incoming::{Confirm, Incoming};
use crate::amqp::outbox::{NotSent, Outbox};
use crate::amqp::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::amqp::sync::channel::Sender;
use crate::amqp::sync::{Instant, Mutex, lock};
use crate::client::correlation::CorrelationId;
use crate::message::headers::Headers;
use crate::message::{MESSAGE_MAX, TEXT_PLAIN, check_content_type, check_queue_name};
use std::collections::VecDeque;
use std::sync::Arc;

/// A request as it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct OutgoingRequest {
    pub queue: Arc<str>,
    pub content_type: Option<String>,
    pub headers: Headers,
    pub body: Body,
}

/// Where a request was published: on which channel, and as which message on it, from 1. The later
/// of two on one channel is the greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub channel: u16,
    pub number: u64,
}

/// A request on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub request: OutgoingRequest,
    /// Where it was published last, in one word. Set with the outbox locked.
    place: AtomicU64,
}

impl Outgoing {
    pub fn new(request: OutgoingRequest) -> Outgoing {
        Outgoing {
            request,
            place: AtomicU64::new(0),
        }
    }

    fn set_place(&self, place: Place) {
        let packed = u64::from(place.channel) << 48 | place.number;
        self.place.store(packed, Ordering::Relaxed);
    }

    /// Where it was published last, on whatever link; `None` if it was not yet.
    pub fn place(&self) -> Option<Place> {
        let packed = self.place.load(Ordering::Relaxed);
        (packed > 0).then_some(Place {
            channel: (packed >> 48) as u16,
            number: packed & (u64::MAX >> 16),
        })
    }
}

impl Content for Outgoing {
    fn body(&self) -> &[u8] {
        &self.request.body
    }
}

impl OutgoingRequest {
    /// Whether it can be sent; if not, why.
    pub fn check(&self) -> Result<(), String> {
        check_queue_name(&self.queue)?;
        self.headers.check().map_err(|error| error.to_string())?;
        check_content_type(self.content_type())?;
        match self.body.len() {
            0..=MESSAGE_MAX => Ok(()),
            len => Err(format!(
                "the request has {len} bytes; the broker takes {MESSAGE_MAX}"
            )),
        }
    }

    fn content_type(&self) -> &str {
        self.content_type.as_deref().unwrap_or(TEXT_PLAIN)
    }
}

/// One live connection, as the callers see it.
pub(crate) struct Link {
    /// Counts the links of a client, from 1.
    pub generation: u64,
    pub since: Instant,
    pub inbox: Arc<Inbox>,
    pub outbox: Arc<Outbox>,
    /// The callback queue.
    pub reply_to: String,
    /// The way to the connection manager, for what is not about a call.
    pub events: Sender<Incoming>,
    /// Whether a reply has come by it.
    pub was_useful: AtomicBool,
    publishing: Mutex<Publishing>,
    /// Where the broker confirms what is published: what it has not confirmed yet, in order.
    unconfirmed: Option<Mutex<VecDeque<(Place, CorrelationId)>>>,
}

/// The channel that requests are published on.
struct Publishing {
    channel: Arc<Channel>,
    /// How many were.
    count: u64,
}

impl Link {
    /// A link that publishes on `channel`, on which the broker confirms if `confirms`.
    pub fn new(
        (inbox, outbox): (Arc<Inbox>, Arc<Outbox>),
        channel: Arc<Channel>,
        reply_to: String,
        events: Sender<Incoming>,
        confirms: bool,
    ) -> Link {
        Link {
            generation: 0,
            since: Instant::now(),
            inbox,
            outbox,
            reply_to,
            events,
            was_useful: AtomicBool::new(false),
            publishing: Mutex::new(Publishing { channel, count: 0 }),
            unconfirmed: confirms.then(Mutex::default),
        }
    }

    /// The channel that requests are published on.
    pub fn channel(&self) -> Arc<Channel> {
        Arc::clone(&lock(&self.publishing).channel)
    }

    /// Has requests published on another channel from now on.
    pub fn publish_on(&self, channel: Arc<Channel>) {
        *lock(&self.publishing) = Publishing { channel, count: 0 };
    }

    /// Whether the broker confirms what is published.
    pub fn confirms(&self) -> bool {
        self.unconfirmed.is_some()
    }

    /// Sends a request if there is room. To `collect`, it is appended to what is sent next.
    ///
    /// # Errors
    ///
    /// The backlog is full, the connection dead, or the channel closed.
    pub fn send(
        &self,
        id: CorrelationId,
        outgoing: &Arc<Outgoing>,
        deadline: Instant,
        collect: bool,
    ) -> Result<(), NotSent> {
        let mut place = None;
        let encode = |out: &mut Backlog| {
            place = self.take_place(id, outgoing);
            if let Some(place) = place {
                self.encode(id, outgoing, deadline, place.channel, out);
            }
        };
        if !collect {
            self.outbox.try_send(encode)?;
        } else if self.outbox.try_append(encode)? {
            self.outbox.flush();
        }
        place.map(drop).ok_or(NotSent::Outdated)
    }

    /// Gives a request its place on the channel; `None` if that is closed. To be called with the
    /// outbox locked: so places are in the order in which requests leave, and nothing is sent on a
    /// channel after it is closed.
    fn take_place(&self, id: CorrelationId, outgoing: &Outgoing) -> Option<Place> {
        let mut publishing = lock(&self.publishing);
        if !publishing.channel.is_open() {
            return None;
        }
        publishing.count += 1;
        let place = Place {
            channel: publishing.channel.id(),
            number: publishing.count,
        };
        drop(publishing);
        outgoing.set_place(place);
        if let Some(unconfirmed) = &self.unconfirmed {
            lock(unconfirmed).push_back((place, id));
        }
        Some(place)
    }

    /// Appends a request's frames.
    fn encode(
        &self,
        id: CorrelationId,
        outgoing: &Arc<Outgoing>,
        deadline: Instant,
        channel: u16,
        out: &mut Backlog,
    ) {
        let request = &outgoing.request;
        let content: Arc<dyn Content> = outgoing.clone();
        let correlation_id = id.to_string();
        // At least 1: a message that expires in 0 ms is only delivered to a consumer that is
        // waiting for it. At most what the broker accepts, 49 days.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .as_millis();
        let expiration = left.clamp(1, u128::from(u32::MAX)).to_string();
        let message = Publish {
            routing_key: request.queue.as_bytes(),
            mandatory: true,
            properties: Properties {
                content_type: Some(request.content_type().as_bytes()),
                headers: request.headers.fields(),
                correlation_id: Some(correlation_id.as_bytes()),
                reply_to: Some(self.reply_to.as_bytes()),
                expiration: Some(expiration.as_bytes()),
            },
            content: &content,
        };
        out.publish(channel, &message);
    }

    /// What the broker has confirmed, or says that it has lost.
    pub fn confirmed(&self, confirm: Confirm) -> Vec<(Place, CorrelationId)> {
        let Some(unconfirmed) = &self.unconfirmed else {
            return Vec::new();
        };
        let is_meant = |place: Place| {
            place.channel == confirm.channel
                && match confirm.multiple {
                    true => place.number <= confirm.tag,
                    false => place.number == confirm.tag,
                }
        };
        let mut unconfirmed = lock(unconfirmed);
        let mut confirmed = Vec::new();
        // Mostly they come in order.
        while let Some((place, id)) = unconfirmed.pop_front_if(|(place, _)| is_meant(*place)) {
            confirmed.push((place, id));
            if !confirm.multiple {
                return confirmed;
            }
        }
        unconfirmed.retain(|&(place, id)| {
            let meant = is_meant(place);
            if meant {
                confirmed.push((place, id));
            }
            !meant
        });
        confirmed
    }

    /// Whether something on that channel is to be confirmed still.
    pub fn waits_for(&self, channel: u16) -> bool {
        self.unconfirmed.as_ref().is_some_and(|unconfirmed| {
            lock(unconfirmed)
                .iter()
                .any(|(place, _)| place.channel == channel)
        })
    }

    /// Forgets what was to be confirmed on a channel that is closed.
    pub fn forget_channel(&self, channel: u16) {
        if let Some(unconfirmed) = &self.unconfirmed {
            lock(unconfirmed).retain(|(place, _)| place.channel != channel);
        }
    }
}
