//! A poll, as mio's over epoll(7): with one-shot, with edge, and in another poll.

use crate::amqp::model::kernel::{Kernel, Source, signal, take};
use crate::amqp::model::world::World;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

pub(crate) use mio::{PollOpt, Ready, Token};

/// As [`mio::Evented`].
pub(crate) trait Evented {
    fn register(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt)
    -> io::Result<()>;
    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()>;
    fn deregister(&self, poll: &Poll) -> io::Result<()>;
}

/// As [`mio::Poll`].
#[derive(Debug)]
pub(crate) struct Poll {
    index: usize,
    fd: RawFd,
}

/// As [`mio::Events`], of which only the number counts.
pub(crate) struct Events;

impl Events {
    pub fn with_capacity(_: usize) -> Events {
        Events
    }
}

impl Poll {
    pub fn new() -> io::Result<Poll> {
        World::get().enter(|kernel| {
            let index = kernel.polls.polls.len();
            kernel.polls.polls.push(Vec::new());
            let fd = kernel.polls.descriptor(Source::Poll(index));
            Ok(Poll { index, fd })
        })
    }

    pub fn register<E: Evented + ?Sized>(
        &self,
        what: &E,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        what.register(self, token, interest, opts)
    }

    pub fn reregister<E: Evented + ?Sized>(
        &self,
        what: &E,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        what.reregister(self, token, interest, opts)
    }

    pub fn deregister<E: Evented + ?Sized>(&self, what: &E) -> io::Result<()> {
        what.deregister(self)
    }

    /// Takes what has happened; waits for it, or does not if the time is zero.
    pub fn poll(&self, _: &mut Events, time: Option<Duration>) -> io::Result<usize> {
        let take = |kernel: &mut Kernel| take(kernel, self.index);
        if time == Some(Duration::ZERO) {
            return Ok(World::get().enter(take));
        }
        let some = |kernel: &mut Kernel| Some(take(kernel)).filter(|count| *count > 0);
        Ok(World::get().wait(time, some).unwrap_or(0))
    }

    fn arm(&self, fd: RawFd, interest: Ready, opts: PollOpt) {
        World::get().enter(|kernel| kernel.arm(self.index, fd, interest, opts));
    }

    fn disarm(&self, fd: RawFd) {
        World::get().enter(|kernel| kernel.polls.polls[self.index].retain(|item| item.fd != fd));
    }
}

impl AsRawFd for Poll {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        let (index, fd) = (self.index, self.fd);
        World::get().enter(|kernel| {
            kernel.polls.polls[index].clear();
            for items in &mut kernel.polls.polls {
                items.retain(|item| item.fd != fd);
            }
        });
    }
}

/// As `mio::unix`.
pub(crate) mod unix {
    use crate::amqp::model::poll::{Evented, Poll, PollOpt, Ready, Token};
    use std::io;
    use std::os::fd::RawFd;

    /// As [`mio::unix::EventedFd`].
    pub(crate) struct EventedFd<'a>(pub &'a RawFd);

    impl Evented for EventedFd<'_> {
        fn register(
            &self,
            poll: &Poll,
            _: Token,
            interest: Ready,
            opts: PollOpt,
        ) -> io::Result<()> {
            poll.arm(*self.0, interest, opts);
            Ok(())
        }

        fn reregister(
            &self,
            poll: &Poll,
            token: Token,
            interest: Ready,
            opts: PollOpt,
        ) -> io::Result<()> {
            self.register(poll, token, interest, opts)
        }

        fn deregister(&self, poll: &Poll) -> io::Result<()> {
            poll.disarm(*self.0);
            Ok(())
        }
    }
}

/// As [`mio::Registration`].
pub(crate) struct Registration(RawFd);

/// As [`mio::SetReadiness`].
pub(crate) struct SetReadiness(usize);

impl Registration {
    pub fn new2() -> (Registration, SetReadiness) {
        World::get().enter(|kernel| {
            let index = kernel.polls.set.len();
            kernel.polls.set.push(Ready::empty());
            let fd = kernel.polls.descriptor(Source::Set(index));
            (Registration(fd), SetReadiness(index))
        })
    }
}

impl Evented for Registration {
    fn register(&self, poll: &Poll, _: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        poll.arm(self.0, interest, opts);
        Ok(())
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.register(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        poll.disarm(self.0);
        Ok(())
    }
}

impl SetReadiness {
    /// Each call is an event of its own, as long as the last one was taken.
    pub fn set_readiness(&self, ready: Ready) -> io::Result<()> {
        World::get().enter(|kernel| {
            kernel.polls.set[self.0] = ready;
            signal(kernel, Source::Set(self.0));
        });
        Ok(())
    }
}
