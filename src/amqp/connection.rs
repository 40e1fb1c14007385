//! Opening a connection to a broker, and closing it.
//!
//! Everything here that talks to a broker has a deadline. amiquip's round trips have none, so a
//! [`Watchdog`](super::sync::Watchdog) is started before each: when its time is up, the socket is
//! shut, and the round trip returns with an error.

use crate::amqp::channel::Channel;
use crate::amqp::endpoint::{Endpoint, Endpoints};
use crate::amqp::error::{Error, describe, with_way_out};
use crate::amqp::frame::reply_code::ACCESS_REFUSED;
use crate::amqp::frame::{FRAME_MAX, FRAME_MIN, put_open};
use crate::amqp::inbox::{Inbox, Sink};
use crate::amqp::incoming::{ChannelEvent, Incoming, Tune};
use crate::amqp::outbox::Outbox;
use crate::amqp::stream::{self, Credentials, Opened};
use crate::amqp::sync::amiquip::{self, AmqpValue, Auth, ConnectionOptions, ConnectionTuning};
use crate::amqp::sync::channel::{Receiver, bounded};
use crate::amqp::sync::net::TcpStream;
use crate::amqp::sync::{Instant, Never, thread};
use crate::amqp::time::{share_of, time_left};
#[cfg(feature = "tls")]
use crate::amqp::tls::TlsStream;
use crate::amqp::transport::Transport;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;
use std::{io, process};
use url::Host;

/// How long an orderly close may take. It is a courtesy: the broker notices a closed socket, too.
const CLOSE_TIME: Duration = Duration::from_millis(150);

/// A connection to a broker.
///
/// Dropped, it closes itself.
pub(crate) struct Connection {
    /// `None` once closed.
    inner: Option<amiquip::Connection>,
    /// The way in and the way out, for the class `basic`.
    pub inbox: Arc<Inbox>,
    pub outbox: Arc<Outbox>,
    /// Disconnected when the connection is dead.
    pub down: Receiver<Never>,
    /// The two addresses, which is the connection's name in the broker's own lists.
    pub name: String,
    /// The channels that are not closed, by their numbers.
    channels: HashMap<u16, Arc<Channel>>,
    /// The number of the channel that was opened last.
    latest_channel: u16,
}

impl Connection {
    /// Begins a channel. More can be said on it at once: what the broker answers, to this and to
    /// that, comes in as events, which [`Connection::note`] has to see.
    ///
    /// # Errors
    ///
    /// The broker allows no more of them.
    pub fn open_channel(&mut self) -> Result<Arc<Channel>, Error> {
        let max = self.channel_max();
        // Not the one that was closed last: so whatever is late is taken for what it is.
        let next = |id: u16| if id < max { id + 1 } else { 1 };
        let mut id = next(self.latest_channel);
        while self.channels.contains_key(&id) {
            if id == self.latest_channel {
                return Err(Error::Lost {
                    reason: format!("the broker allows {max} channels on a connection"),
                });
            }
            id = next(id);
        }
        self.latest_channel = id;
        let channel = Arc::new(Channel::new(id, Arc::clone(&self.outbox)));
        self.channels.insert(id, Arc::clone(&channel));
        channel.say(put_open);
        Ok(channel)
    }

    /// How many channels the broker allows on a connection.
    pub fn channel_max(&self) -> u16 {
        self.inbox.tune().map_or(u16::MAX, |tune| tune.channel_max)
    }

    /// Sees what has come in, and answers the broker if it has closed a channel.
    pub fn note(&mut self, incoming: &Incoming) {
        match incoming {
            Incoming::Channel(id, ChannelEvent::Closed(_)) => {
                let was_open = self.channels.get(id).is_some_and(|one| one.answer_close());
                // Otherwise the answer to our own `channel.close` is still to come.
                if was_open {
                    self.channels.remove(id);
                }
            }
            Incoming::Channel(id, ChannelEvent::ClosedAsAsked) => {
                self.channels.remove(id);
            }
            _ => {}
        }
    }

    /// What the broker says of itself under this name, if that is a text.
    pub fn server_property(&self, name: &str) -> Option<String> {
        match self.inner.as_ref()?.server_properties().get(name) {
            Some(AmqpValue::LongString(value)) => Some(value.clone()),
            _ => None,
        }
    }

    /// Closes in good order, or after [`CLOSE_TIME`] without; closed already, does nothing.
    ///
    /// # Errors
    ///
    /// Why the connection had died, if it had: amiquip often tells only here.
    pub fn close(&mut self) -> Result<(), String> {
        let Some(inner) = self.inner.take() else {
            return Ok(());
        };
        let _watchdog = self.outbox.abort_after(CLOSE_TIME);
        let closed = inner.close();
        // The broker's last word tells more than how the socket ended.
        match self.inbox.close_reason() {
            Some(reason) => Err(with_way_out(reason)),
            None => closed.map_err(|error| describe(&error)),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::debug!("closing {}: {error}", self.name);
        }
    }
}

/// Why a broker could not be reached.
pub(super) struct Failure {
    pub reason: String,
    pub source: Option<io::Error>,
    /// How far we got.
    stage: Stage,
}

/// How far an attempt got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Nobody was reached.
    Connecting,
    /// Somebody was: a broker that is starting, or a proxy in front of none.
    Connected,
    /// A broker was, and it refuses us; it would at its other addresses, too.
    Refused,
}

impl Failure {
    fn new(reason: impl Into<String>) -> Failure {
        Failure {
            reason: reason.into(),
            source: None,
            stage: Stage::Connecting,
        }
    }

    fn io(what: &str, error: io::Error) -> Failure {
        Failure {
            reason: format!("{what}: {error}"),
            source: Some(error),
            stage: Stage::Connecting,
        }
    }

    fn refused(reason: impl Into<String>) -> Failure {
        Failure {
            stage: Stage::Refused,
            ..Failure::new(reason)
        }
    }
}

impl Endpoint {
    /// Opens a connection, by the first of the host's addresses that leads to a broker.
    pub(super) fn open(
        &self,
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: &dyn Fn() -> Box<dyn Sink>,
    ) -> Result<Connection, Failure> {
        let addresses = self.resolve(deadline)?;
        self.open_first(&addresses, endpoints, purpose, deadline, sink)
    }

    fn open_first(
        &self,
        addresses: &[SocketAddr],
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: &dyn Fn() -> Box<dyn Sink>,
    ) -> Result<Connection, Failure> {
        let mut told = Failure::new("the name has no address");
        // `localhost` is two addresses, and most brokers listen on one of them. On the other may be
        // a proxy that accepts, and closes at once.
        for (index, address) in addresses.iter().enumerate() {
            let deadline = share_of(deadline, addresses.len() - index);
            let opened = TcpStream::connect_timeout(address, time_left(deadline))
                .map_err(|error| Failure::io(&format!("connecting to {address}"), error))
                .and_then(|socket| {
                    self.shake_hands(socket, endpoints, purpose, deadline, sink())
                        .map_err(|failure| Failure {
                            stage: failure.stage.max(Stage::Connected),
                            ..failure
                        })
                });
            match opened {
                Ok(connection) => return Ok(connection),
                // Who got further has more to tell.
                Err(failure) if failure.stage >= told.stage => told = failure,
                Err(_) => {}
            }
            if told.stage == Stage::Refused {
                break;
            }
        }
        Err(told)
    }

    /// The addresses of the host. The system's resolver cannot be interrupted, so it runs in a
    /// thread that is left behind if it does not answer.
    fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, Failure> {
        let name = match &self.host {
            Host::Ipv4(ip) => return Ok(vec![SocketAddr::new(IpAddr::V4(*ip), self.port)]),
            Host::Ipv6(ip) => return Ok(vec![SocketAddr::new(IpAddr::V6(*ip), self.port)]),
            Host::Domain(name) => name.clone(),
        };
        let what = format!("resolving the name '{name}'");
        let (answer, answered) = bounded(1);
        let port = self.port;
        let resolve = move || {
            // Nobody may be waiting any more.
            let _ = answer.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter));
        };
        thread::Builder::new()
            .name("fibrpc-resolve".to_owned())
            .spawn(resolve)
            .map_err(|error| Failure::io("starting a thread", error))?;
        match answered.recv_deadline(deadline) {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(error)) => Err(Failure::io(&what, error)),
            Err(_) => Err(Failure::new(format!("{what}: no answer in time"))),
        }
    }

    #[cfg(feature = "tls")]
    fn transport(
        &self,
        socket: TcpStream,
        endpoints: &Endpoints,
        deadline: Instant,
    ) -> Result<Transport, Failure> {
        if !self.tls {
            return Ok(Transport::Plain(Arc::new(socket)));
        }
        let options = self.files.or(&endpoints.tls);
        TlsStream::connect(socket, &self.host, &options, deadline)
            .map(|stream| Transport::Tls(Arc::new(stream)))
            .map_err(|reason| Failure::new(format!("TLS handshake: {reason}")))
    }

    #[cfg(not(feature = "tls"))]
    fn transport(
        &self,
        socket: TcpStream,
        _: &Endpoints,
        _: Instant,
    ) -> Result<Transport, Failure> {
        Ok(Transport::Plain(Arc::new(socket)))
    }

    /// What the handshake needs and amiquip is not to know.
    fn credentials(&self) -> Option<Credentials> {
        (!self.external).then(|| Credentials {
            user: self.user.clone(),
            password: self.password.clone(),
        })
    }

    fn shake_hands(
        &self,
        socket: TcpStream,
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: Box<dyn Sink>,
    ) -> Result<Connection, Failure> {
        let peer = socket.peer_addr();
        let name = match (socket.local_addr(), &peer) {
            (Ok(local), Ok(peer)) => format!("{local} -> {peer}"),
            _ => "a connection already lost".to_owned(),
        };
        let transport = self.transport(socket, endpoints, deadline)?;
        let Opened {
            stream,
            inbox,
            outbox,
            down,
        } = stream::share(transport, self.credentials(), sink)
            .map_err(|error| Failure::io("setting up the socket", error))?;
        let options = ConnectionOptions::default()
            .auth(match self.external {
                true => Auth::External,
                false => Auth::Plain {
                    username: self.user.clone(),
                    password: Credentials::PLACEHOLDER.to_owned(),
                },
            })
            .virtual_host(&self.vhost)
            .frame_max(FRAME_MAX as u32)
            .heartbeat(self.heartbeat_seconds)
            .information(Some(format!("fibrpc {purpose}, pid {}", process::id())));
        let _watchdog = outbox.abort_after(time_left(deadline));
        let opened =
            amiquip::Connection::insecure_open_stream(stream, options, ConnectionTuning::default());
        // The broker's own words tell more than what amiquip makes of them.
        if let (Err(_), Some(reason)) = (&opened, inbox.close_reason()) {
            return Err(Failure::refused(match reason.code {
                ACCESS_REFUSED if !self.external => refused_user(&self.user, peer.ok()),
                _ => with_way_out(reason),
            }));
        }
        match opened {
            Ok(inner) => {
                outbox.set_frame_max(frame_max(inbox.tune()));
                Ok(Connection {
                    inner: Some(inner),
                    inbox,
                    outbox,
                    down,
                    name,
                    channels: HashMap::new(),
                    latest_channel: 0,
                })
            }
            Err(_) if Instant::now() >= deadline => {
                Err(Failure::new("AMQP handshake: no answer in time"))
            }
            // RabbitMQ closes the socket without a word on wrong credentials, and also while it
            // is still booting.
            Err(amiquip::Error::InvalidCredentials) if self.external => Err(Failure::refused(
                "it refused our certificate as a user (wrong name in it? or still starting?)",
            )),
            Err(amiquip::Error::InvalidCredentials) => {
                Err(Failure::refused(refused_user(&self.user, peer.ok())))
            }
            Err(error) => {
                const PORT: &str = "is this its port for amqp://? 5672 is the usual one; to 5671 \
                                    it is amqps://, and 15672 is for browsers";
                let hint = match &error {
                    amiquip::Error::IoErrorReadingSocket { source }
                        if !self.tls && source.kind() == io::ErrorKind::InvalidData =>
                    {
                        format!(" ({PORT})")
                    }
                    amiquip::Error::IoErrorReadingSocket { .. }
                    | amiquip::Error::IoErrorWritingSocket { .. }
                    | amiquip::Error::UnexpectedSocketClose
                        if !self.tls =>
                    {
                        format!(" ({PORT}; or is it still starting?)")
                    }
                    _ => String::new(),
                };
                let reason = describe(&error);
                Err(Failure::new(format!("AMQP handshake: {reason}{hint}")))
            }
        }
    }
}

/// The longest frame that both sides accept, in octets, as amiquip has agreed on it.
fn frame_max(tune: Option<&Tune>) -> usize {
    match tune.map_or(FRAME_MIN, |tune| tune.frame_max) {
        0 => FRAME_MAX,
        max => max.clamp(FRAME_MIN, FRAME_MAX),
    }
}

/// What to say when the broker refuses a user, of whom it does not tell why.
fn refused_user(user: &str, peer: Option<SocketAddr>) -> String {
    // Source: <https://www.rabbitmq.com/docs/access-control#loopback-users>.
    match peer {
        Some(peer) if user == "guest" && !peer.ip().to_canonical().is_loopback() => format!(
            "it refused the user 'guest', which RabbitMQ lets in only from its own machine, and \
             {} is another address; make another user (`rabbitmqctl add_user`, \
             `set_permissions`) and name it in the URL",
            peer.ip()
        ),
        _ => format!("it refused the user '{user}' (wrong password?)"),
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;
    use crate::amqp::sync::channel::unbounded;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn an_address_that_accepts_and_fails_does_not_hide_the_next_one_of_the_name() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = listen().local_addr().unwrap();
        // As a proxy for a container does: it accepts, finds nobody behind, and closes.
        let proxy = listen();
        let next = listen();
        let addresses = [&proxy, &next].map(|listener| listener.local_addr().unwrap());
        let addresses = [addresses[0], closed, addresses[1]];
        let endpoints = Endpoints::default();
        let attempt = thread::spawn(move || {
            let (events, _told) = unbounded();
            let deadline = Instant::now() + Duration::from_secs(20);
            let sink = || -> Box<dyn Sink> { Box::new(events.clone()) };
            endpoints.list[0]
                .open_first(&addresses, &endpoints, "test", deadline, &sink)
                .map(drop)
                .map_err(|failure| failure.reason)
        });
        drop(proxy.accept().unwrap());
        // It says that it speaks another version of AMQP.
        let (mut socket, _) = next.accept().unwrap();
        socket.write_all(b"AMQP\0\0\x09\x09").unwrap();
        let reason = attempt.join().unwrap().unwrap_err();
        assert!(
            !reason.contains("refused"),
            "who got further tells: {reason}"
        );
    }

    #[test]
    fn guest_is_let_in_only_from_the_brokers_own_machine() {
        for (user, peer, is_told) in [
            ("guest", "192.0.2.1:5672", true),
            ("guest", "[2001:db8::1]:5672", true),
            ("guest", "127.0.0.1:5672", false),
            ("guest", "[::1]:5672", false),
            ("guest", "[::ffff:127.0.0.1]:5672", false),
            ("app", "192.0.2.1:5672", false),
        ] {
            let reason = refused_user(user, Some(peer.parse().unwrap()));
            let told = reason.contains("only from its own machine");
            assert_eq!(told, is_told, "{user} {peer}: {reason}");
        }
    }
}
