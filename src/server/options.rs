//! What a server is told, with the defaults.

use crate::amqp::endpoint::Endpoints;
use crate::amqp::queue::QueueType;
use crate::error::Error;
use crate::message::check_queue_name;
use std::thread;
use std::time::Duration;

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub endpoints: Endpoints,
    pub queue: String,
    pub queue_type: QueueType,
    pub workers: usize,
    pub prefetch: u16,
    pub connect_timeout: Duration,
    pub drain_timeout: Duration,
}

impl Options {
    pub fn new(endpoints: Endpoints) -> Options {
        Options {
            endpoints,
            queue: "rpc_queue".to_owned(),
            queue_type: QueueType::default(),
            workers: thread::available_parallelism().map_or(1, usize::from),
            prefetch: 1,
            connect_timeout: Duration::from_secs(10),
            drain_timeout: Duration::from_secs(30),
        }
    }

    /// # Errors
    ///
    /// [`Error::InvalidArgument`], as [`Server::start`](crate::Server::start) has it.
    pub fn check(&self) -> Result<(), Error> {
        check_queue_name(&self.queue).map_err(Error::InvalidArgument)?;
        let nothing = match (self.workers, self.prefetch) {
            (0, _) => "a server needs at least 1 worker",
            // To AMQP, a prefetch of 0 means that there is no limit.
            (_, 0) => "the prefetch must be at least 1",
            _ => return Ok(()),
        };
        Err(Error::InvalidArgument(nothing.to_owned()))
    }
}
