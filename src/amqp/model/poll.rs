//! A poll, as mio's over epoll(7): with one-shot, with edge, and in another poll.

use crate::amqp::model::world::{Kernel, World};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

pub(crate) use mio::{PollOpt, Ready, Token};

/// What can be in a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Socket(usize),
    Poll(usize),
    /// What a [`SetReadiness`] sets.
    Set(usize),
}

/// All polls of an execution, and what a descriptor is.
#[derive(Default)]
pub(crate) struct Polls {
    polls: Vec<Vec<Item>>,
    set: Vec<Ready>,
    descriptors: Vec<(RawFd, Source)>,
}

/// Something in a poll.
struct Item {
    /// The descriptor by which it is there: a socket can be in a poll twice by two.
    fd: RawFd,
    source: Source,
    interest: Ready,
    opts: PollOpt,
    armed: bool,
    /// An event waits to be taken.
    fired: bool,
}

impl Polls {
    /// Another descriptor of that.
    pub fn descriptor(&mut self, source: Source) -> RawFd {
        let fd = RawFd::try_from(self.descriptors.len()).unwrap();
        self.descriptors.push((fd, source));
        fd
    }
}

/// What it is ready for.
fn ready(kernel: &Kernel, source: Source) -> Ready {
    match source {
        Source::Socket(index) => kernel.sockets.ready(index),
        Source::Set(index) => kernel.polls.set[index],
        Source::Poll(index) => {
            let items = &kernel.polls.polls[index];
            match items.iter().any(|item| item.fired && holds(kernel, item)) {
                true => Ready::readable(),
                false => Ready::empty(),
            }
        }
    }
}

fn holds(kernel: &Kernel, item: &Item) -> bool {
    item.armed && !(ready(kernel, item.source) & item.interest).is_empty()
}

/// Something has happened to it: it is told of wherever it is armed and that holds. What is told of
/// already and not taken is not told of again.
pub(crate) fn signal(kernel: &mut Kernel, source: Source) {
    for poll in 0..kernel.polls.polls.len() {
        for item in 0..kernel.polls.polls[poll].len() {
            let found = &kernel.polls.polls[poll][item];
            if found.source == source && !found.fired && holds(kernel, found) {
                kernel.polls.polls[poll][item].fired = true;
                signal(kernel, Source::Poll(poll));
            }
        }
    }
}

/// Takes the events of a poll; says how many.
fn take(kernel: &mut Kernel, poll: usize) -> usize {
    let mut count = 0;
    for index in 0..kernel.polls.polls[poll].len() {
        let found = &kernel.polls.polls[poll][index];
        if found.fired {
            let holds = holds(kernel, found);
            if let Source::Poll(inner) = found.source {
                forget_stale(kernel, inner);
            }
            let item = &mut kernel.polls.polls[poll][index];
            item.fired = false;
            item.armed &= !(holds && item.opts.is_oneshot());
            count += usize::from(holds);
        }
    }
    count
}

/// A look at a poll finds out what holds no more.
fn forget_stale(kernel: &mut Kernel, poll: usize) {
    for index in 0..kernel.polls.polls[poll].len() {
        let holds = holds(kernel, &kernel.polls.polls[poll][index]);
        kernel.polls.polls[poll][index].fired &= holds;
    }
}

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

    /// Arms what has that descriptor, which may be there already.
    fn arm(&self, fd: RawFd, interest: Ready, opts: PollOpt) {
        World::get().enter(|kernel| {
            let source = kernel.polls.descriptors[fd as usize].1;
            let items = &mut kernel.polls.polls[self.index];
            match items.iter_mut().find(|item| item.fd == fd) {
                Some(item) => (item.interest, item.opts, item.armed) = (interest, opts, true),
                None => items.push(Item {
                    fd,
                    source,
                    interest,
                    opts,
                    armed: true,
                    fired: false,
                }),
            }
            let armed = |item: &Item| item.fd == fd;
            let index = kernel.polls.polls[self.index]
                .iter()
                .position(armed)
                .unwrap();
            let item = &kernel.polls.polls[self.index][index];
            // Whatever holds already. What has fired and was not taken does not fire again.
            if !item.fired && holds(kernel, item) {
                kernel.polls.polls[self.index][index].fired = true;
                signal(kernel, Source::Poll(self.index));
            }
        });
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
            _: Token,
            interest: Ready,
            opts: PollOpt,
        ) -> io::Result<()> {
            poll.arm(*self.0, interest, opts);
            Ok(())
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

    fn reregister(&self, poll: &Poll, _: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        poll.arm(self.0, interest, opts);
        Ok(())
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
