//! What carries the bytes: a TCP socket, plain or with TLS. It blocks, and is used by two threads at
//! a time: one that reads and one that writes.

use crate::amqp::backlog::Parts;
use crate::amqp::frame::OVERHEAD;
use crate::amqp::sync::net::{SendAncillaryBuffer, SendFlags, TcpStream, sendmsg};
#[cfg(feature = "tls")]
use crate::amqp::tls::TlsStream;
use crate::amqp::wait::Wait;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::Shutdown;
use std::sync::Arc;

/// How much of a body is worth a read of its own, in bytes. A frame can have 4 KiB.
const READ_MIN: usize = 16 << 10;

/// The connection is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Down;

/// What came of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// How much was taken, in bytes.
    pub len: usize,
    /// Whether the socket takes no more now. What it did not take must be given again.
    pub full: bool,
}

/// Not to end the process by SIGPIPE when the connection is dead. Apple's systems have an option of
/// the socket for that, which std sets.
#[cfg(not(target_vendor = "apple"))]
const NO_SIGNAL: SendFlags = SendFlags::NOSIGNAL;
#[cfg(target_vendor = "apple")]
const NO_SIGNAL: SendFlags = SendFlags::empty();

/// What carries the bytes.
#[derive(Clone)]
pub(crate) enum Transport {
    Plain(Arc<TcpStream>),
    #[cfg(feature = "tls")]
    Tls(Arc<TlsStream>),
}

impl Transport {
    pub fn socket(&self) -> &TcpStream {
        match self {
            Transport::Plain(socket) => socket,
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.socket(),
        }
    }

    /// Reads to a place for a part of a large body, which may be none, and what does not belong
    /// there into the buffer behind it, which has room for 64 KiB. One thread at a time may.
    pub fn read(&self, place: &mut [u8], behind: &mut [u8], wait: Wait) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) if place.is_empty() => wait.read(socket, behind),
            Transport::Plain(socket) => {
                let behind = match place.len() {
                    ..READ_MIN => behind,
                    // What follows the frame's end and the next one's beginning is likely to be the
                    // next part, which has its place then.
                    _ => &mut behind[..OVERHEAD],
                };
                wait.read_parts(socket, &mut [place, behind].map(IoSliceMut::new))
            }
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.read(&mut [place, behind], wait),
        }
    }

    /// Writes as much as goes, and waits for no longer than the socket is set to. One thread at a
    /// time may, and what was not taken must be given again.
    ///
    /// # Errors
    ///
    /// The connection is dead.
    pub fn write(&self, parts: &Parts<'_>) -> io::Result<Written> {
        loop {
            let written = match self {
                // Not `write_vectored`, which would be SIGPIPE when the connection is dead.
                Transport::Plain(socket) => {
                    let mut nothing = SendAncillaryBuffer::default();
                    sendmsg(&**socket, parts.slices(), &mut nothing, NO_SIGNAL)
                        .map(|len| Written {
                            len,
                            full: len < parts.len(),
                        })
                        .map_err(io::Error::from)
                }
                // It takes as much at a time as it encrypts at a time.
                #[cfg(feature = "tls")]
                Transport::Tls(stream) => stream
                    .write(parts.slices())
                    .map(|len| Written { len, full: false }),
            };
            return match written {
                Ok(Written { len: 0, .. }) => Err(ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    Ok(Written { len: 0, full: true })
                }
                done => done,
            };
        }
    }

    /// Ends the connection: whoever reads or writes gets an error.
    pub fn shut_down(&self) {
        // An error means that it is not connected any more, which is what we want.
        let _ = self.socket().shutdown(Shutdown::Both);
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn small_frames_are_read_many_at_a_time_and_large_ones_each_to_its_place() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        far.write_all(&[1; 60 << 10]).unwrap();
        while near.peek(&mut [0; 60 << 10]).unwrap() < 60 << 10 {}
        let transport = Transport::Plain(Arc::new(near));
        let (mut place, mut behind) = (vec![0; READ_MIN], vec![0; 64 << 10]);
        let mut read = |len: usize| {
            let place = &mut place[..len];
            transport.read(place, &mut behind, Wait::Not).unwrap()
        };
        assert_eq!(read(READ_MIN), READ_MIN + OVERHEAD);
        assert_eq!(read(4088), (60 << 10) - READ_MIN - OVERHEAD);
    }
}
