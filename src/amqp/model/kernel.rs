//! The kernel of an execution: sockets, and polls as of epoll(7), with one-shot, with edge, and in
//! another poll. No thread is in here.

use mio::{PollOpt, Ready};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::time::Duration;

/// What threads ask the kernel for.
#[derive(Default)]
pub(crate) struct Kernel {
    pub sockets: Sockets,
    pub polls: Polls,
    /// How many threads wait here.
    pub waiting: usize,
}

/// All sockets of an execution.
#[derive(Default)]
pub(crate) struct Sockets {
    pub pipes: Vec<Pipe>,
    /// Who is accepted next, if somebody listens, and how many bytes fit then.
    pub listening: Option<(VecDeque<usize>, usize)>,
}

/// What is between the two ends of a connection.
pub(crate) struct Pipe {
    /// What has arrived and is not read.
    pub arrived: VecDeque<u8>,
    /// What was written and the far end has not read.
    pub leaving: Vec<u8>,
    /// How much of that there may be.
    pub room: usize,
    /// The far end is closed.
    pub ended: bool,
    /// Our end is shut.
    pub shut: bool,
    pub read_time: Option<Duration>,
}

impl Sockets {
    /// What a socket is ready for.
    pub fn ready(&self, index: usize) -> Ready {
        let pipe = &self.pipes[index];
        let is_over = pipe.ended || pipe.shut;
        let mut ready = Ready::empty();
        if is_over || !pipe.arrived.is_empty() {
            ready |= Ready::readable();
        }
        // Linux calls a socket writable when a third of its buffer is free.
        if is_over || pipe.leaving.len() <= pipe.room * 2 / 3 {
            ready |= Ready::writable();
        }
        ready
    }
}

/// What can be in a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Socket(usize),
    Poll(usize),
    /// What mio's `SetReadiness` sets.
    Set(usize),
}

/// All polls of an execution, and what a descriptor is.
#[derive(Default)]
pub(crate) struct Polls {
    pub polls: Vec<Vec<Item>>,
    pub set: Vec<Ready>,
    pub descriptors: Vec<(RawFd, Source)>,
}

/// Something in a poll.
pub(crate) struct Item {
    /// The descriptor by which it is there: a socket can be in a poll twice by two.
    pub fd: RawFd,
    pub source: Source,
    pub interest: Ready,
    pub opts: PollOpt,
    pub armed: bool,
    /// An event waits to be taken.
    pub fired: bool,
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
pub(crate) fn take(kernel: &mut Kernel, poll: usize) -> usize {
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

impl Kernel {
    /// Arms what has that descriptor, which may be in that poll already.
    pub fn arm(&mut self, poll: usize, fd: RawFd, interest: Ready, opts: PollOpt) {
        let source = self.polls.descriptors[fd as usize].1;
        let items = &mut self.polls.polls[poll];
        let index = items.iter().position(|item| item.fd == fd);
        let index = index.unwrap_or_else(|| {
            items.push(Item {
                fd,
                source,
                interest,
                opts,
                armed: true,
                fired: false,
            });
            items.len() - 1
        });
        let item = &mut items[index];
        (item.interest, item.opts, item.armed) = (interest, opts, true);
        // Whatever holds already. What has fired and was not taken does not fire again.
        let item = &self.polls.polls[poll][index];
        if !item.fired && holds(self, item) {
            self.polls.polls[poll][index].fired = true;
            signal(self, Source::Poll(poll));
        }
    }
}
