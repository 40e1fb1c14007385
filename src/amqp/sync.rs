//! What threads meet at and what they ask the kernel for, and small tools: a lock that survives a
//! panic, a channel that only ends, a watchdog.
//!
//! Whoever has to do with other threads takes these names from here. They are the real ones, except
//! in tests that search schedules ([`model`](crate::amqp)): there a model has them.

use crate::amqp::sync::channel::{RecvTimeoutError, Sender, bounded};
use std::convert::Infallible;
use std::sync::PoisonError;
use std::time::Duration;

#[cfg(not(all(test, shuttle)))]
mod platform {
    pub(crate) use rand::rngs::SysRng;
    pub(crate) use std::collections::{HashMap, HashSet};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};
    pub(crate) use std::thread;
    pub(crate) use std::time::Instant;

    pub(crate) use crossbeam_channel as channel;
    pub(crate) use mio as poll;

    /// What has the handshake, heartbeats, and a thread of its own.
    pub(crate) mod amiquip {
        pub(crate) use ::amiquip::{
            AmqpValue, Auth, Connection, ConnectionOptions, ConnectionTuning, Error, IoStream,
        };
    }

    /// A socket, and what std has not of it.
    pub(crate) mod net {
        pub(crate) use rustix::net::{
            RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recv, recvmsg, sendmsg,
        };
        pub(crate) use std::net::TcpStream;
    }
}

#[cfg(all(test, shuttle))]
mod platform {
    pub(crate) use crate::amqp::model::chance::{HashMap, HashSet, SysRng};
    pub(crate) use crate::amqp::model::world::{Condvar, Instant};
    pub(crate) use crate::amqp::model::{amiquip, channel, net, poll};
    pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
    pub(crate) use shuttle::thread;
}

pub(crate) use platform::*;

/// What is sent on a channel on which nothing is ever sent: it says something by being
/// disconnected.
pub(crate) type Never = Infallible;

/// Locks a mutex, also after a panic of another thread that held it. Nothing of ours panics
/// half-way through a change of what it has locked.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does something after a time, unless it is dropped before. It gives a deadline to what has none,
/// such as amiquip's round trips: it ends the connection that they wait for.
#[must_use = "a watchdog that is dropped does nothing"]
pub(crate) struct Watchdog {
    _armed: Sender<Never>,
}

impl Watchdog {
    /// Does `action` after `time`, in a thread of its own.
    pub fn start(time: Duration, action: impl FnOnce() + Send + 'static) -> Watchdog {
        let (armed, disarmed) = bounded::<Never>(0);
        let watch = move || {
            if disarmed.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
                action();
            }
        };
        // Nobody joins it: it ends when the watchdog is dropped, or after `time`.
        let spawned = thread::Builder::new()
            .name("fibrpc-watchdog".to_owned())
            .spawn(watch);
        if let Err(error) = spawned {
            log::warn!(
                "cannot start a thread to watch over a deadline ({error}); going on without"
            );
        }
        Watchdog { _armed: armed }
    }
}
