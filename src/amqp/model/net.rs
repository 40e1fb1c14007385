//! A socket, and its far end. As `std::net::TcpStream` and what `rustix::net` does with it.

use crate::amqp::model::kernel::{Kernel, Pipe, Source, signal};
use crate::amqp::model::world::World;
use rustix::io::Errno;
use shuttle::rand::{Rng, thread_rng};
use std::borrow::Borrow;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

pub(crate) use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags};

/// Any number of bytes that there may be, from one; mostly all.
fn some_of(most: usize) -> usize {
    match most > 1 && thread_rng().gen_ratio(1, 4) {
        true => thread_rng().gen_range(1..most),
        false => most,
    }
}

/// Our end. Each has a descriptor of its own, as a clone has.
#[derive(Debug)]
pub(crate) struct TcpStream {
    index: usize,
    fd: RawFd,
}

/// The far end. One thread may read it, and others write.
#[derive(Debug, Clone)]
pub(crate) struct Far {
    index: usize,
}

/// A connection over which `room` bytes fit that the far end has not read.
pub(crate) fn connect(room: usize) -> (TcpStream, Far) {
    let world = World::get();
    let (near, index) = world.enter(|kernel| connect_in(kernel, room));
    (near, Far { index })
}

fn connect_in(kernel: &mut Kernel, room: usize) -> (TcpStream, usize) {
    let index = kernel.sockets.pipes.len();
    kernel.sockets.pipes.push(Pipe {
        arrived: VecDeque::new(),
        leaving: Vec::new(),
        room,
        ended: false,
        shut: false,
        read_time: None,
    });
    let fd = kernel.polls.descriptor(Source::Socket(index));
    (TcpStream { index, fd }, index)
}

/// Where connections are made, until it is dropped; each takes `room` bytes.
pub(crate) struct Listener;

impl Listener {
    pub fn new(room: usize) -> Listener {
        World::get().enter(|kernel| kernel.sockets.listening = Some((VecDeque::new(), room)));
        Listener
    }

    /// Waits for the next connection; `None` when nobody listens any more.
    pub fn accept() -> Option<Far> {
        let accepted = World::get().wait(None, |kernel| match &mut kernel.sockets.listening {
            Some((queue, _)) => Some(Some(queue.pop_front()?)),
            None => Some(None),
        });
        accepted.flatten().map(|index| Far { index })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        World::get().enter(|kernel| {
            for index in kernel
                .sockets
                .listening
                .take()
                .into_iter()
                .flat_map(|(queue, _)| queue)
            {
                kernel.sockets.pipes[index].ended = true;
                signal(kernel, Source::Socket(index));
            }
        });
    }
}

impl TcpStream {
    /// Connects to the [`Listener`], if there is one.
    pub fn connect_timeout(_: &SocketAddr, _: Duration) -> io::Result<TcpStream> {
        World::get().enter(|kernel| {
            let Some(&(_, room)) = kernel.sockets.listening.as_ref() else {
                return Err(ErrorKind::ConnectionRefused.into());
            };
            let (near, index) = connect_in(kernel, room);
            if let Some((queue, _)) = &mut kernel.sockets.listening {
                queue.push_back(index);
            }
            Ok(near)
        })
    }

    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        Err(ErrorKind::NotConnected.into())
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        Err(ErrorKind::NotConnected.into())
    }

    pub fn try_clone(&self) -> io::Result<TcpStream> {
        let index = self.index;
        let fd = World::get().enter(|kernel| kernel.polls.descriptor(Source::Socket(index)));
        Ok(TcpStream { index, fd })
    }

    pub fn set_nodelay(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_nonblocking(&self, _: bool) -> io::Result<()> {
        Ok(())
    }

    pub fn set_read_timeout(&self, time: Option<Duration>) -> io::Result<()> {
        World::get().enter(|kernel| kernel.sockets.pipes[self.index].read_time = time);
        Ok(())
    }

    /// [`sendmsg`] waits for no time at all.
    pub fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    pub fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        World::get().enter(|kernel| {
            kernel.sockets.pipes[self.index].shut = true;
            signal(kernel, Source::Socket(self.index));
        });
        Ok(())
    }

    /// `None` if there is nothing yet.
    fn receive(&self, kernel: &mut Kernel, parts: &mut [IoSliceMut<'_>]) -> Option<usize> {
        let pipe = &mut kernel.sockets.pipes[self.index];
        if pipe.arrived.is_empty() {
            return (pipe.ended || pipe.shut).then_some(0);
        }
        let most: usize = parts.iter().map(|part| part.len()).sum();
        let len = some_of(most.min(pipe.arrived.len()));
        let mut bytes = pipe.arrived.by_ref().take(len as u64);
        for part in parts {
            // Of two parts of a ring, it reads one at a time.
            let mut read = 0;
            while let Ok(more @ 1..) = bytes.read(&mut part[read..]) {
                read += more;
            }
        }
        Some(len)
    }
}

impl Read for &TcpStream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(out)])
    }

    fn read_vectored(&mut self, parts: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let world = World::get();
        let time = world.enter(|kernel| kernel.sockets.pipes[self.index].read_time);
        world
            .wait(time, |kernel| self.receive(kernel, parts))
            .ok_or_else(|| ErrorKind::WouldBlock.into())
    }
}

/// What [`recvmsg`] returns.
pub(crate) struct RecvMsg {
    pub bytes: usize,
}

/// As [`rustix::net::recv`] that does not wait.
pub(crate) fn recv(
    socket: &TcpStream,
    out: &mut [u8],
    flags: RecvFlags,
) -> io::Result<(usize, usize)> {
    let mut nothing = RecvAncillaryBuffer::default();
    let read = recvmsg(socket, &mut [IoSliceMut::new(out)], &mut nothing, flags)?;
    Ok((read.bytes, read.bytes))
}

/// As [`rustix::net::recvmsg`] that does not wait.
pub(crate) fn recvmsg(
    socket: &TcpStream,
    parts: &mut [IoSliceMut<'_>],
    _: &mut RecvAncillaryBuffer<'_>,
    flags: RecvFlags,
) -> io::Result<RecvMsg> {
    assert!(flags.contains(RecvFlags::DONTWAIT));
    let read = World::get().enter(|kernel| socket.receive(kernel, parts));
    read.map(|bytes| RecvMsg { bytes })
        .ok_or_else(|| ErrorKind::WouldBlock.into())
}

/// As [`rustix::net::sendmsg`] on a socket whose writes hardly wait.
pub(crate) fn sendmsg(
    socket: impl Borrow<TcpStream>,
    parts: &[IoSlice<'_>],
    _: &mut SendAncillaryBuffer<'_, '_, '_>,
    _: SendFlags,
) -> rustix::io::Result<usize> {
    let world = World::get();
    world.enter(|kernel| {
        let pipe = &mut kernel.sockets.pipes[socket.borrow().index];
        if pipe.shut {
            return Err(Errno::PIPE);
        }
        let given: usize = parts.iter().map(|part| part.len()).sum();
        let room = pipe.room - pipe.leaving.len();
        // What the far end's kernel does with bytes that nobody will read.
        if pipe.ended && (room == 0 || thread_rng().gen_ratio(1, 4)) {
            return Err(Errno::CONNRESET);
        }
        if room == 0 {
            world.advance(Duration::from_millis(1));
            return Err(Errno::AGAIN);
        }
        let len = some_of(given.min(room));
        let mut left = len;
        for part in parts {
            let part = &part[..part.len().min(left)];
            pipe.leaving.extend_from_slice(part);
            left -= part.len();
        }
        Ok(len)
    })
}

impl AsRawFd for TcpStream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl Far {
    /// Waits for something, and reads some of what there is; nothing when our end is shut.
    pub fn read(&mut self) -> Vec<u8> {
        let index = self.index;
        let read = World::get().wait(None, |kernel| {
            let pipe = &mut kernel.sockets.pipes[index];
            if pipe.leaving.is_empty() {
                return pipe.shut.then(Vec::new);
            }
            let len = some_of(pipe.leaving.len());
            let left = pipe.leaving.split_off(len);
            let read = std::mem::replace(&mut pipe.leaving, left);
            signal(kernel, Source::Socket(index));
            Some(read)
        });
        // Who waits for room is woken.
        World::get().enter(|_| ());
        read.expect("it waits for ever")
    }

    /// Sends bytes, which arrive at once; once it is closed, nothing.
    pub fn write(&self, bytes: &[u8]) {
        World::get().enter(|kernel| {
            let pipe = &mut kernel.sockets.pipes[self.index];
            if pipe.ended {
                return;
            }
            pipe.arrived.extend(bytes);
            signal(kernel, Source::Socket(self.index));
        });
    }

    /// Sends and reads nothing more.
    pub fn close(&self) {
        World::get().enter(|kernel| {
            kernel.sockets.pipes[self.index].ended = true;
            signal(kernel, Source::Socket(self.index));
        });
    }
}
