//! A worker: a thread that takes a request, runs the handler, and sends reply and acknowledgement.

use crate::amqp::frame::{Content, Publish};
use crate::amqp::incoming::{Delivery, Message};
use crate::amqp::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::message::{RemoteError, Response, return_address};
use crate::server::request::Request;
use crate::server::work_queue::{Job, WorkQueue};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

impl Content for Response {
    fn body(&self) -> &[u8] {
        Response::body(self)
    }
}

/// A user's function, and whatever makes a message of its outcome.
pub(crate) type Handler = dyn Fn(&Request) -> Result<Response, RemoteError> + Send + Sync;

/// What all workers of a server share.
pub(crate) struct Worker {
    pub handler: Box<Handler>,
    pub queue: Arc<WorkQueue>,
    pub stats: Arc<Stats>,
}

#[derive(Default)]
pub(crate) struct Stats {
    pub answered: AtomicU64,
    pub refused: AtomicU64,
    pub internal: AtomicU64,
    pub expired: AtomicU64,
    pub unanswerable: AtomicU64,
    pub connections: AtomicU64,
    pub connected: AtomicBool,
}

impl Stats {
    /// Counts an error that is sent in the place of a result.
    fn refuse(&self, error: &RemoteError) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        if error.kind_sent() == RemoteError::INTERNAL {
            self.internal.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Worker {
    /// Works, as the one of that number, from 0, until the server has ended.
    pub fn run(&self, number: usize) {
        while let Some(job) = self.queue.next(number) {
            self.answer(number, job);
        }
    }

    /// Executes a request, and sends its reply and its acknowledgement, in this order: a crash in
    /// between makes the broker deliver the request again, and not lose it.
    fn answer(&self, number: usize, job: Job) {
        let Delivery {
            redelivered,
            message: Message { head, body },
            ..
        } = job.delivery;
        let properties = head.properties();
        let Some((reply_to, correlation_id)) = return_address(&properties) else {
            self.stats.unanswerable.fetch_add(1, Ordering::Relaxed);
            log::warn!("dropped a request without reply_to ({} bytes)", body.len());
            return self.queue.finish(number, None);
        };
        let response = match job.guilty {
            None => {
                let request = Request::read(&properties, body, redelivered, job.arrived);
                if request.time_left() == Some(Duration::ZERO) {
                    self.stats.expired.fetch_add(1, Ordering::Relaxed);
                    log::debug!("dropped a request whose caller has given up");
                    return self.queue.finish(number, None);
                }
                self.execute(&request)
            }
            // The reply was too long, and another can be sent.
            Some(reason) if reason.message_max().is_some() => {
                let error = RemoteError::unsendable(&reason.to_string());
                self.stats.refuse(&error);
                error.into_response()
            }
            Some(reason) => {
                self.stats.unanswerable.fetch_add(1, Ordering::Relaxed);
                log::warn!(
                    "dropped a request for '{}', because its reply cannot be sent: {reason}",
                    String::from_utf8_lossy(reply_to)
                );
                return self.queue.finish(number, None);
            }
        };
        let response = Arc::new(response);
        let content: Arc<dyn Content> = response.clone();
        let reply = Publish {
            routing_key: reply_to,
            // A caller that is gone needs no answer.
            mandatory: false,
            properties: response.properties(correlation_id),
            content: &content,
        };
        self.queue.finish(number, Some(&reply));
    }

    /// Runs the handler.
    fn execute(&self, request: &Request) -> Response {
        // The handler is shared by reference and has no state of ours to leave half changed.
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.handler)(request)));
        let outcome = outcome.unwrap_or_else(|panic| {
            let message = format!("the handler panicked: {}", panic_message(&*panic));
            // What a panic carries may panic itself when it is dropped.
            std::mem::forget(panic);
            Err(RemoteError::internal(message))
        });
        let outcome = outcome.and_then(|response| response.fitting(self.queue.message_max()));
        match &outcome {
            Ok(_) => {
                self.stats.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => self.stats.refuse(error),
        }
        outcome.unwrap_or_else(|error| {
            if !error.has_valid_kind() {
                log::warn!(
                    "an error of the kind {:?} was sent as 'internal': a kind is lower-case words \
                     with hyphens",
                    error.kind()
                );
            }
            error.into_response()
        })
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
