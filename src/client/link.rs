//! A request on its way out, and the connection that it goes by.

use crate::amqp::frame::{Properties, Publish, put_publish};
use crate::amqp::inbox::Inbox;
use crate::amqp::incoming::Incoming;
use crate::amqp::outbox::{LARGE_MIN, NotSent, Outbox};
use crate::client::correlation::CorrelationId;
use crate::message::headers::Headers;
use crate::message::{MESSAGE_MAX, TEXT_PLAIN, check_content_type, check_queue_name};
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

/// A request as it was asked for.
#[derive(Debug, Clone)]
pub(crate) struct OutgoingRequest {
    pub queue: Arc<str>,
    pub content_type: Option<String>,
    pub headers: Headers,
    pub body: Vec<u8>,
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
    /// The channel that consumes the callback queue.
    pub consumes_on: u16,
    /// The channel that requests are published on: the same, until one of them has been overdue.
    pub publishes_on: AtomicU16,
    /// The callback queue.
    pub reply_to: String,
    /// The way to the connection manager, for what is not about a call.
    pub events: Sender<Incoming>,
}

impl Link {
    /// Sends a request if there is room. To `collect`, it is appended to what is sent next, unless
    /// it is large.
    ///
    /// # Errors
    ///
    /// The backlog is full, or the connection dead.
    pub fn send(
        &self,
        id: CorrelationId,
        request: &OutgoingRequest,
        deadline: Instant,
        collect: bool,
    ) -> Result<(), NotSent> {
        let publishes_on = || self.publishes_on.load(Ordering::Relaxed);
        // The channel is looked up with the outbox locked: so one that nothing is published on any
        // more can be closed.
        let encode = |out: &mut Vec<u8>| self.encode(id, request, deadline, publishes_on(), out);
        if request.body.len() >= LARGE_MIN {
            return self.send_large(id, request, deadline);
        }
        if !collect {
            return self.outbox.try_send(encode);
        }
        if self.outbox.try_append(encode)? {
            self.outbox.flush();
        }
        Ok(())
    }

    /// Encodes without the outbox locked; anew if the channel has changed meanwhile.
    fn send_large(
        &self,
        id: CorrelationId,
        request: &OutgoingRequest,
        deadline: Instant,
    ) -> Result<(), NotSent> {
        let publishes_on = || self.publishes_on.load(Ordering::Relaxed);
        loop {
            let channel = publishes_on();
            let encode = |out: &mut Vec<u8>| self.encode(id, request, deadline, channel, out);
            let sent = self
                .outbox
                .try_send_large(encode, || publishes_on() == channel);
            if sent != Err(NotSent::Outdated) {
                return sent;
            }
        }
    }

    /// Appends a request's frames.
    fn encode(
        &self,
        id: CorrelationId,
        request: &OutgoingRequest,
        deadline: Instant,
        channel: u16,
        out: &mut Vec<u8>,
    ) {
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
            body: &request.body,
        };
        put_publish(out, channel, &message);
    }
}
