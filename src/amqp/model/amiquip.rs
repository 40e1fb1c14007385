//! amiquip's I/O thread, as far as we rely on it: it polls, and when the stream is reported it reads
//! until there is nothing more, or the end; then it drops the stream. There is no handshake, and
//! nothing is said at the end.

use crate::amqp::model::poll::{
    Evented, Events, Poll, PollOpt, Ready, Registration, SetReadiness, Token,
};
use shuttle::thread::{JoinHandle, spawn};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use ::amiquip::{
    AmqpValue, Auth, ConnectionOptions, ConnectionTuning, Error, Result, Sasl,
};

/// As [`::amiquip::IoStream`].
pub(crate) trait IoStream: Read + Write + Evented + Send + 'static {}

/// As [`::amiquip::Connection`].
pub(crate) struct Connection {
    closing: Arc<AtomicBool>,
    wake: SetReadiness,
    io: JoinHandle<Vec<u8>>,
    properties: HashMap<String, AmqpValue>,
}

impl Connection {
    /// Starts the I/O thread.
    pub fn insecure_open_stream<S: IoStream>(
        mut stream: S,
        _: ConnectionOptions<impl Sasl>,
        _: ConnectionTuning,
    ) -> Result<Connection> {
        let poll = Poll::new().unwrap();
        let (woken, wake) = Registration::new2();
        poll.register(&stream, Token(0), Ready::readable(), PollOpt::edge())
            .unwrap();
        poll.register(&woken, Token(1), Ready::readable(), PollOpt::edge())
            .unwrap();
        let closing = Arc::new(AtomicBool::new(false));
        let is_closing = Arc::clone(&closing);
        let run = move || {
            let (mut events, mut taken) = (Events::with_capacity(8), Vec::new());
            while !is_closing.load(Ordering::Relaxed) {
                poll.poll(&mut events, None).unwrap();
                if !read_all(&mut stream, &mut taken) {
                    break;
                }
            }
            let _ = poll.deregister(&stream);
            taken
        };
        Ok(Connection {
            closing,
            wake,
            io: spawn(run),
            properties: HashMap::new(),
        })
    }

    pub fn server_properties(&self) -> &HashMap<String, AmqpValue> {
        &self.properties
    }

    pub fn close(self) -> Result<()> {
        self.closing.store(true, Ordering::Relaxed);
        let _ = self.wake.set_readiness(Ready::readable());
        self.join();
        Ok(())
    }

    /// What it has read until the end of the connection, which it waits for.
    pub fn join(self) -> Vec<u8> {
        self.io.join().unwrap()
    }
}

/// Reads what there is; whether there may be more later.
fn read_all(stream: &mut impl Read, taken: &mut Vec<u8>) -> bool {
    let mut bytes = [0; 16];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return false,
            Ok(len) => taken.extend_from_slice(&bytes[..len]),
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
}
