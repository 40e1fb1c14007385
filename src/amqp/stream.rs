//! The socket that amiquip and we share: what amiquip takes for the socket, and our two ends of it.
//!
//! - [`Inbox`] is the way in: whoever waits for a message reads the socket.
//! - [`Outbox`] is the way out: whoever has something to send writes it.
//! - [`Stream`] is what amiquip takes for the socket: it reads what the inbox leaves to it, and
//!   writes into the outbox.
//!
//! Who owns what: amiquip's I/O thread owns the `Stream` and drops it when it ends, for whatever
//! reason. That closes the socket and tells everyone ([`Opened::down`]).

use crate::amqp::frame::{OVERHEAD, PREFIX_LEN};
use crate::amqp::inbox::{Inbox, Sink};
use crate::amqp::outbox::Outbox;
use crate::amqp::sync::channel::{Receiver, Sender, bounded};
use crate::amqp::sync::poll::unix::EventedFd;
use crate::amqp::sync::poll::{Evented, Poll, PollOpt, Ready, Token};
use crate::amqp::sync::{Never, amiquip};
use crate::amqp::transport::{Down, Transport};
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;
use std::time::Duration;

/// How long a write blocks when the socket is full: as little as the kernel's clock allows, some
/// milliseconds. The socket is a blocking one, because a leader blocks in its reads.
const WRITE_TIME: Duration = Duration::from_millis(1);

/// The ends of a connection, for amiquip and for us.
pub(crate) struct Opened {
    /// amiquip's end.
    pub stream: Stream,
    /// Our ends.
    pub inbox: Arc<Inbox>,
    pub outbox: Arc<Outbox>,
    /// Disconnected when the connection is dead.
    pub down: Receiver<Never>,
}

/// Shares a connected socket out. What arrives while nobody reads it goes to `sink`; `credentials`
/// go out in the handshake.
///
/// # Errors
///
/// The operating system refuses an option or another descriptor.
pub(crate) fn share(
    transport: Transport,
    credentials: Option<Credentials>,
    sink: Box<dyn Sink>,
) -> io::Result<Opened> {
    let socket = transport.socket();
    // Nagle's algorithm would hold a small write back until the last one is acknowledged, which
    // the broker delays: 44 ms a call.
    socket.set_nodelay(true)?;
    socket.set_nonblocking(false)?;
    socket.set_write_timeout(Some(WRITE_TIME))?;
    let outbox = Arc::new(Outbox::new(transport.clone())?);
    let inbox = Arc::new(Inbox::new(transport, sink)?);
    let (alive, down) = bounded(0);
    let stream = Stream {
        inbox: Arc::clone(&inbox),
        outbox: Arc::clone(&outbox),
        credentials,
        _alive: alive,
    };
    Ok(Opened {
        stream,
        inbox,
        outbox,
        down,
    })
}

/// What amiquip takes for the socket.
pub(crate) struct Stream {
    inbox: Arc<Inbox>,
    outbox: Arc<Outbox>,
    /// The user and the password, until they are sent.
    credentials: Option<Credentials>,
    _alive: Sender<Never>,
}

/// Whom the broker is to take us for. amiquip logs what it sends in the handshake, and keeps it in
/// errors: so it gets a word in the password's place, and the password is put in on the way out.
pub(crate) struct Credentials {
    pub user: String,
    pub password: String,
}

impl Credentials {
    /// What amiquip takes for the password.
    pub const PLACEHOLDER: &str = "(the password, which fibrpc keeps to itself)";

    /// Puts the password into the frame of `connection.start-ok`; `None` if this is another one.
    fn put_into(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let response = |password: &str| format!("\0{}\0{password}", self.user).into_bytes();
        let (wrong, right) = (response(Self::PLACEHOLDER), response(&self.password));
        let at = frame.windows(wrong.len()).position(|part| part == wrong)?;
        let (start, end) = (&frame[..at], &frame[at + wrong.len()..]);
        let mut filled = [start, &right, end].concat();
        // The lengths of the frame's payload and, just before it, of the response.
        let payload = filled.len().checked_sub(OVERHEAD)?;
        for (place, len) in [(PREFIX_LEN, payload), (at, right.len())] {
            let octets = u32::try_from(len).ok()?.to_be_bytes();
            filled[place.checked_sub(4)?..place].copy_from_slice(&octets);
        }
        Some(asking_for_a_reason(&filled).unwrap_or(filled))
    }
}

/// Says in `connection.start-ok` that we take `connection.close` for an answer to wrong credentials.
/// Otherwise RabbitMQ closes the socket without a word, and after 3 s. `None` if the frame is not
/// as amiquip makes it. Source: <https://www.rabbitmq.com/docs/auth-notification>.
fn asking_for_a_reason(frame: &[u8]) -> Option<Vec<u8>> {
    const CAPABILITIES: &[u8] = b"\x0ccapabilitiesF";
    const FIELD: &[u8] = b"\x1cauthentication_failure_closet\x01";
    let at = frame
        .windows(CAPABILITIES.len())
        .position(|part| part == CAPABILITIES)?;
    // Behind the length of their table, and of that in which it is, the first argument.
    let (inner, outer) = (at + CAPABILITIES.len() + 4, PREFIX_LEN + 4 + 4);
    let mut longer = [frame.get(..inner)?, FIELD, &frame[inner..]].concat();
    for place in [PREFIX_LEN, outer, inner] {
        let octets: [u8; 4] = longer.get(place - 4..place)?.try_into().ok()?;
        let len = u32::from_be_bytes(octets) + FIELD.len() as u32;
        longer[place - 4..place].copy_from_slice(&len.to_be_bytes());
    }
    Some(longer)
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.outbox.abort();
    }
}

impl Read for Stream {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.outbox.resume();
        match self.inbox.read_feed(out) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.inbox.follow();
                self.inbox.read_feed(out)
            }
            done => done,
        }
    }
}

impl Write for Stream {
    /// Accepts everything: what does not fit the socket now follows when it does. amiquip itself
    /// only writes methods, a few dozen bytes each.
    fn write(&mut self, frames: &[u8]) -> io::Result<usize> {
        let filled = self
            .credentials
            .as_ref()
            .and_then(|credentials| credentials.put_into(frames));
        if filled.is_some() {
            self.credentials = None;
        }
        let bytes = filled.as_deref().unwrap_or(frames);
        match self.outbox.send_anyway(|out| out.extend_from_slice(bytes)) {
            Ok(()) => Ok(frames.len()),
            Err(Down) => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Evented for Stream {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inbox.register(poll, token, interest, opts)?;
        // When the socket has room again for what stalled, amiquip's thread is told to read, and
        // `read` writes the rest.
        EventedFd(&self.outbox.watch()).register(poll, token, Ready::readable(), opts)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        opts: PollOpt,
    ) -> io::Result<()> {
        self.inbox.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.outbox.watch()).deregister(poll)?;
        self.inbox.deregister(poll)
    }
}

impl amiquip::IoStream for Stream {}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::amqp::backlog::Backlog;
    use crate::amqp::frame::{BODY, Content, END, HEADER, Properties, Publish};
    use crate::amqp::incoming::Incoming;
    use crate::amqp::outbox::NotSent;
    use mio::{Events, Token};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::Instant;

    /// Our end of a connection, and the far end as a plain socket.
    fn pair() -> (Opened, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let (sink, _) = crossbeam_channel::unbounded::<Incoming>();
        let sink = Box::new(sink);
        (
            share(Transport::Plain(Arc::new(near)), None, sink).unwrap(),
            far,
        )
    }

    /// The I/O thread's part: polls, and reads when told to, until the connection ends.
    fn start_io(stream: Stream) -> thread::JoinHandle<()> {
        let poll = Poll::new().unwrap();
        poll.register(&stream, Token(9), Ready::readable(), PollOpt::edge())
            .unwrap();
        thread::spawn(move || {
            let mut stream = stream;
            let mut events = Events::with_capacity(8);
            loop {
                poll.poll(&mut events, Some(Duration::from_secs(20)))
                    .unwrap();
                match stream.read(&mut [0; 16]) {
                    Ok(0) => return,
                    Ok(_) => panic!("the far end sends nothing"),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
        })
    }

    /// Puts a message with that body.
    fn publish(out: &mut Backlog, body: Vec<u8>) {
        let content: Arc<dyn Content> = Arc::new(body);
        let message = Publish {
            routing_key: b"queue",
            mandatory: false,
            properties: Properties::default(),
            content: &content,
        };
        out.publish(1, &message);
    }

    fn octet(out: &mut Backlog, octet: u8) {
        out.append(|out| out.push(octet));
    }

    /// The body of the message that the far end reads next.
    fn read_message(far: &mut TcpStream) -> Vec<u8> {
        let mut body = Vec::new();
        let mut body_len = None;
        while body_len != Some(body.len() as u64) {
            let mut prefix = [0; PREFIX_LEN];
            far.read_exact(&mut prefix).unwrap();
            let [kind, _, _, len @ ..] = prefix;
            let mut payload = vec![0; u32::from_be_bytes(len) as usize + 1];
            far.read_exact(&mut payload).unwrap();
            assert_eq!(payload.pop(), Some(END));
            match kind {
                HEADER => body_len = payload[4..12].try_into().ok().map(u64::from_be_bytes),
                BODY => body.extend(payload),
                _ => {}
            }
        }
        body
    }

    fn read_octet(far: &mut TcpStream) -> u8 {
        let mut octet = [0];
        far.read_exact(&mut octet).unwrap();
        octet[0]
    }

    #[test]
    fn what_a_full_socket_holds_back_follows_in_order_when_the_far_end_reads() {
        let (opened, mut far) = pair();
        let Opened {
            stream,
            outbox,
            down,
            ..
        } = opened;
        let io = start_io(stream);
        let mut sent = 0_u32;
        // Until there is no room for 20 ms: the kernel, too, has taken all that it will.
        let refused = loop {
            let soon = Some(Instant::now() + Duration::from_millis(20));
            let next = outbox.send(soon, |out| {
                out.append(|out| out.extend((sent..sent + 1000).flat_map(u32::to_be_bytes)));
            });
            match next {
                Ok(()) => sent += 1000,
                Err(refused) => break refused,
            }
        };
        assert_eq!(refused, NotSent::Full);
        assert_eq!(
            outbox.try_send(|_| panic!("not called when full")),
            Err(NotSent::Full)
        );

        let waiting = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || outbox.send(None, |out| out.append(|out| out.extend(sent.to_be_bytes())))
        });
        for expected in 0..=sent {
            let mut number = [0; 4];
            far.read_exact(&mut number).unwrap();
            assert_eq!(u32::from_be_bytes(number), expected);
        }
        assert_eq!(waiting.join().unwrap(), Ok(()));
        drop(far);
        io.join().unwrap();
        assert!(down.recv().is_err());
    }

    #[test]
    fn messages_leave_whole_in_order_and_once_however_senders_and_a_slow_reader_meet() {
        const SENDERS: u8 = 4;
        const MESSAGES: u32 = 150;
        // Who, which, and as many octets that differ from message to message.
        fn body(sender: u8, number: u32, len: usize) -> Vec<u8> {
            let mut body = vec![sender];
            body.extend(number.to_be_bytes());
            body.resize(body.len() + len, number as u8 ^ sender);
            body
        }
        let (opened, mut far) = pair();
        far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let Opened { stream, outbox, .. } = opened;
        let io = start_io(stream);
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let outbox = Arc::clone(&outbox);
                thread::spawn(move || {
                    let mut rng = StdRng::seed_from_u64(u64::from(sender));
                    for number in 0..MESSAGES {
                        let len = match rng.random_range(0..10) {
                            0..6 => rng.random_range(0..300),
                            6..9 => rng.random_range(0..200_000),
                            _ => rng.random_range(0..3_000_000),
                        };
                        let encode = |out: &mut Backlog| publish(out, body(sender, number, len));
                        let sent = match rng.random_range(0..3) {
                            0 => outbox.send(None, encode),
                            1 => loop {
                                match outbox.try_send(encode) {
                                    Err(NotSent::Full) => outbox.wait_for_room(None).unwrap(),
                                    done => break done,
                                }
                            },
                            _ => loop {
                                match outbox.try_append(encode) {
                                    Err(NotSent::Full) => outbox.wait_for_room(None).unwrap(),
                                    done => {
                                        outbox.flush();
                                        break done.map(drop);
                                    }
                                }
                            },
                        };
                        sent.unwrap();
                    }
                })
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(99);
        let mut next = [0; SENDERS as usize];
        for _ in 0..u32::from(SENDERS) * MESSAGES {
            if rng.random_bool(0.05) {
                thread::sleep(Duration::from_millis(rng.random_range(0..40)));
            }
            let body = read_message(&mut far);
            let sender = body[0];
            let number = u32::from_be_bytes(body[1..5].try_into().unwrap());
            assert_eq!(number, next[usize::from(sender)]);
            next[usize::from(sender)] += 1;
            assert!(
                body[5..]
                    .iter()
                    .all(|octet| *octet == number as u8 ^ sender)
            );
        }
        for sender in senders {
            sender.join().unwrap();
        }
        drop(far);
        io.join().unwrap();
    }

    #[test]
    fn a_large_message_holds_its_sender_for_a_turn_only() {
        let (opened, mut far) = pair();
        let Opened { stream, outbox, .. } = opened;
        let io = start_io(stream);
        outbox.try_send(|out| octet(out, 0)).unwrap();
        // Nobody reads: it returns all the same, and so does who comes after it.
        let large = vec![1; 64 << 20];
        outbox.try_send(|out| publish(out, large.clone())).unwrap();
        outbox.send(None, |out| octet(out, 2)).unwrap();
        assert_eq!(outbox.try_send(|_| {}), Err(NotSent::Full));
        // A second one waits for room behind that, and gets it before the first has left.
        outbox
            .send(None, |out| publish(out, vec![3; 2 << 20]))
            .unwrap();
        let waiting = thread::spawn({
            let outbox = Arc::clone(&outbox);
            move || outbox.send(None, |out| octet(out, 4)).unwrap()
        });
        assert_eq!(read_octet(&mut far), 0);
        assert!(read_message(&mut far) == large);
        assert_eq!(read_octet(&mut far), 2);
        // The second has begun to leave, so that there is room behind it.
        waiting.join().unwrap();
        assert!(read_message(&mut far) == vec![3; 2 << 20]);
        assert_eq!(read_octet(&mut far), 4);
        drop(far);
        io.join().unwrap();
    }

    #[test]
    fn the_password_takes_the_place_of_the_placeholder_and_the_lengths_are_right() {
        let start_ok = |password: &str| {
            let response = format!("\0ada\0{password}");
            let mut payload = vec![0, 10, 0, 11, 0, 0, 0, 0]; // no properties of ours
            payload.extend(b"\x05PLAIN");
            payload.extend((response.len() as u32).to_be_bytes());
            payload.extend(response.as_bytes());
            payload.extend(b"\x05en_US");
            let len = (payload.len() as u32).to_be_bytes();
            [&[1, 0, 0], &len[..], &payload, &[0xCE]].concat()
        };
        for password in ["", "short", &"long".repeat(100), "pässwort"] {
            let credentials = Credentials {
                user: "ada".to_owned(),
                password: password.to_owned(),
            };
            let filled = credentials.put_into(&start_ok(Credentials::PLACEHOLDER));
            assert_eq!(filled, Some(start_ok(password)), "{password}");
            assert_eq!(credentials.put_into(b"AMQP\0\0\x09\x01"), None);
        }
    }

    #[test]
    fn a_watchdog_ends_the_connection_and_wakes_who_waits_for_room() {
        let (opened, _far) = pair();
        let outbox = Arc::clone(&opened.outbox);
        // Until there is no room for who may stand behind what has begun to leave, either.
        while outbox
            .send(Some(Instant::now()), |out| {
                out.append(|out| out.extend([0; 4096]));
            })
            .is_ok()
        {}
        let _watchdog = outbox.abort_after(Duration::from_millis(50));
        assert_eq!(outbox.send(None, |_| {}), Err(NotSent::Down));
        assert_eq!(outbox.try_send(|_| {}), Err(NotSent::Down));
    }

    #[test]
    fn a_dropped_watchdog_does_nothing() {
        let (opened, _far) = pair();
        drop(opened.outbox.abort_after(Duration::from_millis(20)));
        thread::sleep(Duration::from_millis(60));
        assert_eq!(opened.outbox.try_send(|out| octet(out, 0)), Ok(()));
    }
}
