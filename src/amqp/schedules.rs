//! Searches of schedules: who writes and who reads a socket ([`model`](crate::amqp::model)).

pub(crate) mod scene; // what all have in common

mod inbox;
mod outbox;
