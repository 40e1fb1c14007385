//! What carries the bytes: a TCP socket, plain or with TLS. It blocks, and is used by two threads at
//! a time: one that reads and one that writes.

#[cfg(feature = "tls")]
use crate::amqp::tls::TlsStream;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

/// The connection is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Down;

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

    /// Reads, and blocks for as long as the socket is set to. One thread at a time may.
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => (&**socket).read(out),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.read(out),
        }
    }

    /// Writes as much as goes; says how much that was. One thread at a time may, and what was not
    /// written must be given again.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Transport::Plain(socket) => (&**socket).write(bytes),
            #[cfg(feature = "tls")]
            Transport::Tls(stream) => stream.write(bytes),
        }
    }

    /// Ends the connection: whoever reads or writes gets an error.
    pub fn shut_down(&self) {
        // An error means that it is not connected any more, which is what we want.
        let _ = self.socket().shutdown(Shutdown::Both);
    }
}
