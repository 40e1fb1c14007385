//! AMQP 0-9-1 over a socket that amiquip and we share. It does not know what a request is.
//!
//! amiquip has the handshake, heartbeats and the end; it is named in this folder alone. All that is
//! said on a channel is ours, in both directions, because a message that amiquip carries costs
//! several wake-ups of threads, and one that we carry costs none. In reading order:

pub(crate) mod endpoint; // brokers' URLs
pub(crate) mod error; // what goes wrong, in our words

pub(crate) mod body; // memory of large bodies; pure
pub(crate) mod frame; // the frames that we write; pure
pub(crate) mod incoming; // the frames that we read; pure

pub(crate) mod backlog; // what waits to be written; pure
pub(crate) mod inbox; // who reads the socket
pub(crate) mod outbox; // who writes it
#[cfg(feature = "tls")]
pub(crate) mod pem; // certificates and keys in files
pub(crate) mod stream; // what amiquip takes for it
#[cfg(feature = "tls")]
pub(crate) mod tls;
pub(crate) mod transport; // plain, or TLS
pub(crate) mod wait; // asleep or not

pub(crate) mod brokers; // which one to connect to
pub(crate) mod channel;
pub(crate) mod connection; // opening and closing one
pub(crate) mod queue; // declaring one, asking after one

pub(crate) mod sync; // locks and watchdogs
pub(crate) mod time; // deadlines and back-off

#[cfg(all(test, shuttle))]
pub(crate) mod model; // threads, sockets and polls, for the search of schedules
#[cfg(all(test, shuttle))]
pub(crate) mod schedules; // who writes, who reads
