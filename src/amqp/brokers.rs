//! Which broker of a cluster to connect to, and how long to try each.

use crate::amqp::connection::{Connection, Failure};
use crate::amqp::endpoint::{Endpoint, Endpoints};
use crate::amqp::error::Error;
use crate::amqp::inbox::Sink;
use crate::amqp::sync::Instant;
use crate::amqp::time::{random, share_of, time_left};
use std::sync::Arc;
use std::time::Duration;

/// How long one broker may take while there are others to try; twice as long after each round in
/// vain, for brokers that are slow, and not dead.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_MAX: Duration = Duration::from_secs(16);

/// The brokers, and what is known of them.
#[derive(Clone)]
pub(crate) struct Brokers {
    endpoints: Endpoints,
    /// The one to begin with: the one that worked last, or the next after one that did not. At
    /// first it is chosen by chance, so that those who start together do not all meet at the same.
    first: usize,
    /// The one that we are connected to.
    latest: usize,
    patience: Duration,
}

impl Brokers {
    pub fn new(endpoints: Endpoints) -> Brokers {
        Brokers {
            first: random() as usize % endpoints.len(),
            latest: 0,
            endpoints,
            patience: PATIENCE,
        }
    }

    /// Connects to the first of the brokers that answers, in one round until the deadline. While
    /// there are others, each gets a share of the time until `wanted_by`, when somebody gives up
    /// who waits for the connection.
    ///
    /// `purpose` says in the broker's list of connections what this one is for. `sink` makes what
    /// takes the messages that no thread of ours reads.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`], with what happened at each of them.
    pub fn connect(
        &mut self,
        purpose: &str,
        wanted_by: Instant,
        deadline: Instant,
        sink: &dyn Fn() -> Box<dyn Sink>,
    ) -> Result<Connection, Error> {
        if let Err(error) = self.endpoints.read_again() {
            return Err(self.unreachable(error.to_string(), None));
        }
        let count = self.endpoints.len();
        let mut failures = Vec::new();
        for tried in 0..count {
            // There may be fewer in the file than there were.
            let index = (self.first + tried) % count;
            let endpoint = &self.endpoints.list[index];
            let left = count - tried;
            let mut until = share_of(deadline, left);
            if count > 1 {
                let share = time_left(wanted_by) / left as u32;
                let time = share.clamp(self.patience / 8, self.patience);
                until = until.min(Instant::now() + time);
            }
            match endpoint.open(&self.endpoints, purpose, until, sink) {
                Ok(connection) => {
                    log::info!("connected to {endpoint} as {}", connection.name);
                    self.latest = index;
                    self.first = (index + 1) % count;
                    self.patience = PATIENCE;
                    return Ok(connection);
                }
                Err(failure) => failures.push((endpoint.clone(), failure)),
            }
        }
        self.patience = (2 * self.patience).min(PATIENCE_MAX);
        Err(self.all_failed(failures))
    }

    /// The broker that we are connected to works, beyond the handshake: it is the first to be tried
    /// when it is lost.
    pub fn works(&mut self) {
        self.first = self.latest;
    }

    fn all_failed(&self, failures: Vec<(Endpoint, Failure)>) -> Error {
        let reason = match &failures[..] {
            [(_, only)] => only.reason.clone(),
            all => all
                .iter()
                .map(|(endpoint, failure)| format!("{endpoint}: {}", failure.reason))
                .collect::<Vec<_>>()
                .join("; "),
        };
        let first = failures.into_iter().next();
        self.unreachable(reason, first.and_then(|(_, failure)| failure.source))
    }

    fn unreachable(&self, reason: String, source: Option<std::io::Error>) -> Error {
        Error::Unreachable {
            endpoint: self.endpoints.to_string(),
            reason,
            source: source.map(|error| Arc::new(error) as _),
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::amqp::sync::channel::unbounded;

    #[test]
    fn a_name_that_does_not_resolve_is_unreachable_and_says_so() {
        let endpoints: Endpoints = "amqp://no-such-host.invalid".parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let (events, _told) = unbounded();
        let error = Brokers::new(endpoints)
            .connect("test", deadline, deadline, &|| Box::new(events.clone()))
            .map(drop)
            .unwrap_err();
        assert!(error.reason().contains("no-such-host.invalid"), "{error:?}");
    }

    #[test]
    fn those_who_start_together_begin_at_different_brokers() {
        let endpoints: Endpoints = "amqp://a,amqp://b,amqp://c".parse().unwrap();
        let mut begun = [0; 3];
        for _ in 0..300 {
            begun[Brokers::new(endpoints.clone()).first] += 1;
        }
        assert!(begun.iter().all(|&count| count > 30), "{begun:?}");
    }
}
