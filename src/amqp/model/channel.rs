//! Channels, as those of `crossbeam_channel`, and `select!`.

use crate::amqp::model::world::{Instant, World};
use shuttle::rand::{Rng, thread_rng};
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use crossbeam_channel::{
    RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError,
};

struct Channel<T> {
    queue: VecDeque<T>,
    room: usize,
    senders: usize,
    receivers: usize,
}

/// Nobody waits for the lock: it is held between two of the schedule's points.
struct Shared<T>(Mutex<Channel<T>>);

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, Channel<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Sender<T>(Arc<Shared<T>>);

pub(crate) struct Receiver<T>(Arc<Shared<T>>);

pub(crate) fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    bounded(usize::MAX)
}

pub(crate) fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared(Mutex::new(Channel {
        queue: VecDeque::new(),
        room,
        senders: 1,
        receivers: 1,
    })));
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Nobody of ours waits for room in a channel.
    pub fn send(&self, value: T) -> Result<(), SendError<T>> {
        self.try_send(value).map_err(|error| match error {
            TrySendError::Disconnected(value) => SendError(value),
            TrySendError::Full(_) => panic!("a wait for room that the model has not"),
        })
    }

    pub fn try_send(&self, value: T) -> Result<(), TrySendError<T>> {
        World::get().enter(|_| {
            let mut channel = self.0.lock();
            if channel.receivers == 0 {
                Err(TrySendError::Disconnected(value))
            } else if channel.queue.len() >= channel.room {
                Err(TrySendError::Full(value))
            } else {
                channel.queue.push_back(value);
                Ok(())
            }
        })
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.0.lock().senders += 1;
        Sender(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        World::get().enter(|_| self.0.lock().senders -= 1);
    }
}

impl<T> Receiver<T> {
    /// What there is, if that is not nothing; for [`select`], too.
    pub fn look(&self) -> Option<Result<T, RecvError>> {
        let mut channel = self.0.lock();
        match channel.queue.pop_front() {
            Some(value) => Some(Ok(value)),
            None => (channel.senders == 0).then_some(Err(RecvError)),
        }
    }

    pub fn recv(&self) -> Result<T, RecvError> {
        let received = World::get().wait(None, |_| self.look());
        received.expect("it waits for ever")
    }

    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        match World::get().enter(|_| self.look()) {
            Some(Ok(value)) => Ok(value),
            Some(Err(RecvError)) => Err(TryRecvError::Disconnected),
            None => Err(TryRecvError::Empty),
        }
    }

    pub fn recv_timeout(&self, time: Duration) -> Result<T, RecvTimeoutError> {
        match World::get().wait(Some(time), |_| self.look()) {
            Some(Ok(value)) => Ok(value),
            Some(Err(RecvError)) => Err(RecvTimeoutError::Disconnected),
            None => Err(RecvTimeoutError::Timeout),
        }
    }

    /// The connection manager pauses so between two attempts to connect. Nobody is to wake it, so its
    /// time is over even where it stands still. (The other who waits so resolves a host's name, and
    /// here hosts have addresses.)
    pub fn recv_deadline(&self, until: Instant) -> Result<T, RecvTimeoutError> {
        if World::get().stands_still() {
            return self.try_recv().map_err(|error| match error {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            });
        }
        self.recv_timeout(until.saturating_duration_since(Instant::now()))
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.0.lock().receivers += 1;
        Receiver(Arc::clone(&self.0))
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut channel = self.0.lock();
        channel.receivers -= 1;
        let left = (channel.receivers == 0).then(|| std::mem::take(&mut channel.queue));
        drop(channel);
        // What is in it may be a sender.
        drop(left);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Receiver")
    }
}

/// As `crossbeam_channel::select`, as far as we use it: some `recv`, and a `default` with a time.
macro_rules! select {
    ($($arms:tt)+) => { crate::amqp::model::channel::select_arms!([] $($arms)+) };
}

/// Gives each `recv` a slot of its own, and waits until one is filled.
macro_rules! select_arms {
    ([$($done:tt)*] , $($rest:tt)*) => {
        crate::amqp::model::channel::select_arms!([$($done)*] $($rest)*)
    };
    ([$($done:tt)*] recv($from:expr) -> $what:pat => $body:block $($rest:tt)*) => {
        crate::amqp::model::channel::select_arms!(
            [$($done)* (slot $from, $what, $body)] $($rest)*
        )
    };
    ([$($done:tt)*] recv($from:expr) -> $what:pat => $body:expr, $($rest:tt)*) => {
        crate::amqp::model::channel::select_arms!(
            [$($done)* (slot $from, $what, $body)] $($rest)*
        )
    };
    ([$($done:tt)*] default($time:expr) => $body:expr $(,)?) => {
        crate::amqp::model::channel::select_arms!([$($done)*] @ Some($time); $body)
    };
    ([$($done:tt)*]) => {
        crate::amqp::model::channel::select_arms!([$($done)*] @ None; unreachable!())
    };
    ([$(($slot:ident $from:expr, $what:pat, $body:expr))+] @ $time:expr; $default:expr) => {{
        $(let mut $slot = None;)+
        let first = crate::amqp::model::channel::any_of([$(stringify!($what)),+].len());
        let _ = crate::amqp::model::world::World::get().wait($time, |_| {
            // From any of them on, and then those before it.
            for is_second in [false, true] {
                let mut index = 0;
                $(
                    if is_second || index >= first {
                        $slot = $from.look();
                        if $slot.is_some() {
                            return Some(());
                        }
                    }
                    index += 1;
                )+
                let _ = index;
            }
            None
        });
        $(if let Some(received) = $slot {
            let $what = received;
            $body
        } else)+ {
            $default
        }
    }};
}

/// Any number below that.
pub(crate) fn any_of(count: usize) -> usize {
    thread_rng().gen_range(0..count)
}

pub(crate) use {select, select_arms};
