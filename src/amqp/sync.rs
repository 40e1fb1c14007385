//! Small tools for threads: a lock that survives a panic, a channel that only ends, a watchdog.

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

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
