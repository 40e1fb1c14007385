//! Brokers: their URLs, opening and closing a connection, the request queue.
//!
//! Everything here that talks to a broker has a deadline. amiquip's round trips have none, so a
//! [`Fuse`](crate::socket::Fuse) is lit before each: when it burns down, the socket is shut, and
//! the round trip returns with an error.

use crate::arrival::Goodbye;
use crate::error::{Error, QueueStatus};
use crate::inbox::{Inbox, Nowhere, Sink};
use crate::socket::{self, Never, Opened, Outbox, Transport};
#[cfg(feature = "tls")]
use crate::tls::{TlsOptions, TlsStream};
use amiquip::{
    AmqpValue, Auth, Channel, ConnectionBlockedNotification, ConnectionOptions, ConnectionTuning,
    FieldTable, QueueDeclareOptions,
};
use crossbeam_channel::{Receiver, bounded};
use rand::TryRng;
use rand::rngs::SysRng;
use std::fmt;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, process, thread};
use url::{Host, Url};

/// Seconds between heartbeats, unless the URL or the broker asks for fewer. A broker that falls
/// silent is given up after twice that.
const HEARTBEAT_SECONDS: u16 = 10;

/// How long an orderly close may take. It is a courtesy: the broker notices a closed socket, too.
const CLOSE_TIME: Duration = Duration::from_millis(150);

/// How long a channel, queue or consumer may take to be set up on a live connection. Longer than
/// two heartbeats, so that a dead broker is found out as that.
pub(crate) const SETUP_TIME: Duration = Duration::from_secs(30);

/// AMQP reply codes, as RabbitMQ uses them.
/// Source: <https://www.rabbitmq.com/amqp-0-9-1-reference#constants>.
mod reply_code {
    pub const ACCESS_REFUSED: u16 = 403;
    pub const NOT_FOUND: u16 = 404;
    pub const RESOURCE_LOCKED: u16 = 405;
    pub const PRECONDITION_FAILED: u16 = 406;
    pub const NOT_ALLOWED: u16 = 530;
    pub const INTERNAL_ERROR: u16 = 541;
}

/// One or more brokers of the same cluster, tried in turn: `amqp://user:password@host:port/vhost`,
/// several separated by commas.
///
/// Everything but the scheme may be left out: the user and password are `guest`, the host
/// `localhost`, the port 5672, the virtual host `/`. In a user, password or virtual host, write
/// `/` as `%2f` and so on. There are two parameters: `heartbeat`, in seconds, and
/// `auth_mechanism`, `plain` or `external`. `amqps://` is TLS, by default on port 5671.
/// Source: <https://www.rabbitmq.com/docs/uri-spec>.
///
/// Printed, it shows no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoints {
    list: Vec<Endpoint>,
    #[cfg(feature = "tls")]
    tls: TlsOptions,
}

#[derive(Clone, PartialEq, Eq)]
struct Endpoint {
    tls: bool,
    host: Host<String>,
    port: u16,
    vhost: String,
    user: String,
    password: String,
    /// Whether the broker is to know us by our certificate, and not by user and password.
    external: bool,
    heartbeat_seconds: u16,
}

impl Default for Endpoints {
    fn default() -> Endpoints {
        Endpoints::new(vec![Endpoint::default()])
    }
}

impl Endpoints {
    fn new(list: Vec<Endpoint>) -> Endpoints {
        Endpoints {
            list,
            #[cfg(feature = "tls")]
            tls: TlsOptions::default(),
        }
    }

    /// Says how brokers at `amqps://` are trusted, and how they are to trust us.
    #[cfg(feature = "tls")]
    pub fn with_tls(self, tls: TlsOptions) -> Endpoints {
        Endpoints { tls, ..self }
    }
}

impl Default for Endpoint {
    fn default() -> Endpoint {
        Endpoint {
            tls: false,
            host: Host::Domain("localhost".to_owned()),
            port: 5672,
            vhost: "/".to_owned(),
            user: "guest".to_owned(),
            password: "guest".to_owned(),
            external: false,
            heartbeat_seconds: HEARTBEAT_SECONDS,
        }
    }
}

impl FromStr for Endpoints {
    type Err = Error;

    fn from_str(urls: &str) -> Result<Endpoints, Error> {
        let endpoints: Result<Vec<_>, _> =
            urls.split(',').map(|url| parse_url(url.trim())).collect();
        endpoints.map(Endpoints::new).map_err(Error::InvalidUrl)
    }
}

/// Parses one URL. No message repeats the URL, which may hold a password.
fn parse_url(text: &str) -> Result<Endpoint, String> {
    const EXAMPLE: &str = "expected something like amqp://user:password@host:5672/vhost";
    if text.is_empty() {
        return Err(format!("it is empty; {EXAMPLE}"));
    }
    let url = Url::parse(text).map_err(|error| format!("{error}; {EXAMPLE}"))?;
    let mut endpoint = Endpoint::default();
    match url.scheme() {
        "amqp" => {}
        "amqps" if cfg!(feature = "tls") => {
            endpoint.tls = true;
            endpoint.port = 5671;
        }
        "amqps" => return Err("amqps:// needs TLS, which this build does not have".to_owned()),
        other => {
            return Err(format!(
                "the scheme is '{other}', not 'amqp' or 'amqps'; {EXAMPLE}"
            ));
        }
    }
    // For a scheme it does not know, the parser leaves host names as they are, IP addresses
    // included.
    if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
        endpoint.host = Host::parse(host).map_err(|error| format!("the host '{host}': {error}"))?;
    }
    if let Some(port) = url.port() {
        endpoint.port = port;
    }
    if !url.username().is_empty() {
        endpoint.user = percent_decode("user", url.username())?;
    }
    if let Some(password) = url.password() {
        endpoint.password = percent_decode("password", password)?;
    }
    match url.path() {
        "" | "/" => {}
        path => {
            let vhost = &path[1..];
            if vhost.contains('/') {
                return Err(format!(
                    "the virtual host '{vhost}' contains a '/', which is written %2f in a URL"
                ));
            }
            endpoint.vhost = percent_decode("virtual host", vhost)?;
        }
    }
    for (name, value) in url.query_pairs() {
        match &*name {
            "heartbeat" => {
                endpoint.heartbeat_seconds = match value.parse() {
                    // Without heartbeats, a broker that falls silent would never be found out.
                    Ok(seconds) if seconds > 0 => seconds,
                    _ => return Err(format!("heartbeat={value}: expected 1 to 65535 seconds")),
                };
            }
            "auth_mechanism" => match &*value {
                "plain" => endpoint.external = false,
                "external" => endpoint.external = true,
                other => {
                    return Err(format!(
                        "auth_mechanism={other}: expected plain or external"
                    ));
                }
            },
            other => {
                return Err(format!(
                    "the parameter '{other}' is not supported (heartbeat and auth_mechanism are)"
                ));
            }
        }
    }
    Ok(endpoint)
}

fn percent_decode(part: &str, encoded: &str) -> Result<String, String> {
    // `url` has no such function, but decodes a query this way once '+' is out of the way.
    let query = format!("v={}", encoded.replace('+', "%2B").replace('&', "%26"));
    let decoded = url::form_urlencoded::parse(query.as_bytes()).next();
    match decoded {
        Some((_, text)) if !text.contains(char::REPLACEMENT_CHARACTER) => Ok(text.into_owned()),
        _ => Err(format!("the {part} is not UTF-8 once decoded")),
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = url::form_urlencoded::byte_serialize(self.user.as_bytes()).collect::<String>();
        let vhost = url::form_urlencoded::byte_serialize(self.vhost.as_bytes()).collect::<String>();
        let scheme = if self.tls { "amqps" } else { "amqp" };
        write!(f, "{scheme}://{user}@{}:{}/{vhost}", self.host, self.port)
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, endpoint) in self.list.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{endpoint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoints({self})")
    }
}

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
    /// The broker's notices that it has blocked publishers, or not any more.
    pub blocked: Receiver<ConnectionBlockedNotification>,
    /// The two addresses, which is the connection's name in the broker's own lists.
    pub name: String,
}

impl Connection {
    /// Connects to the first of the brokers that answers. Each gets an equal share of the time.
    ///
    /// `purpose` says in the broker's list of connections what this one is for. `sink` makes what
    /// takes the arrivals that no thread of ours reads.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`], with what happened at each of them.
    pub fn open(
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: &dyn Fn() -> Box<dyn Sink>,
    ) -> Result<Connection, Error> {
        let mut failures = Vec::new();
        for (index, endpoint) in endpoints.list.iter().enumerate() {
            let deadline = share_of(deadline, endpoints.list.len() - index);
            match endpoint.open(endpoints, purpose, deadline, sink) {
                Ok(connection) => {
                    log::info!("connected to {endpoint} as {}", connection.name);
                    return Ok(connection);
                }
                Err(failure) => failures.push((endpoint, failure)),
            }
        }
        let reason = match &failures[..] {
            [(_, only)] => only.reason.clone(),
            all => all
                .iter()
                .map(|(endpoint, failure)| format!("{endpoint}: {}", failure.reason))
                .collect::<Vec<_>>()
                .join("; "),
        };
        let source = failures
            .into_iter()
            .next()
            .and_then(|(_, failure)| failure.source);
        Err(Error::Unreachable {
            endpoint: endpoints.to_string(),
            reason,
            source: source.map(|error| Arc::new(error) as _),
        })
    }

    /// Opens a channel.
    ///
    /// # Errors
    ///
    /// The connection died or the broker did not answer in time.
    pub fn open_channel(&mut self) -> Result<Channel, amiquip::Error> {
        let _fuse = self.outbox.fuse(SETUP_TIME);
        match &mut self.inner {
            Some(inner) => inner.open_channel(None),
            None => Err(amiquip::Error::ClientClosedConnection),
        }
    }

    /// Closes in good order, or after [`CLOSE_TIME`] without; closed already, does nothing.
    ///
    /// # Errors
    ///
    /// Why the connection had died, if it had: amiquip often tells only here.
    pub fn close(&mut self) -> Result<(), amiquip::Error> {
        match self.inner.take() {
            Some(inner) => {
                let _fuse = self.outbox.fuse(CLOSE_TIME);
                let closed = inner.close();
                // Its last word tells more than how the socket ended.
                match self.inbox.goodbye() {
                    Some(Goodbye { code, text }) => Err(amiquip::Error::ServerClosedConnection {
                        code: *code,
                        message: text.clone(),
                    }),
                    None => closed,
                }
            }
            None => Ok(()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::debug!("closing {}: {}", self.name, describe(&error));
        }
    }
}

/// Why a broker could not be reached.
struct Failure {
    reason: String,
    source: Option<io::Error>,
}

impl Failure {
    fn new(reason: impl Into<String>) -> Failure {
        Failure {
            reason: reason.into(),
            source: None,
        }
    }

    fn io(what: &str, error: io::Error) -> Failure {
        Failure {
            reason: format!("{what}: {error}"),
            source: Some(error),
        }
    }
}

impl Endpoint {
    fn open(
        &self,
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: &dyn Fn() -> Box<dyn Sink>,
    ) -> Result<Connection, Failure> {
        let addresses = self.resolve(deadline)?;
        let mut last = Failure::new("the name has no address");
        // `localhost` is two addresses, and most brokers listen on one of them.
        for (index, address) in addresses.iter().enumerate() {
            let deadline = share_of(deadline, addresses.len() - index);
            match TcpStream::connect_timeout(address, time_left(deadline)) {
                Ok(socket) => {
                    return self.shake_hands(socket, endpoints, purpose, deadline, sink());
                }
                Err(error) => last = Failure::io(&format!("connecting to {address}"), error),
            }
        }
        Err(last)
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
        TlsStream::connect(socket, &self.host, &endpoints.tls, deadline)
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

    fn shake_hands(
        &self,
        socket: TcpStream,
        endpoints: &Endpoints,
        purpose: &str,
        deadline: Instant,
        sink: Box<dyn Sink>,
    ) -> Result<Connection, Failure> {
        let name = match (socket.local_addr(), socket.peer_addr()) {
            (Ok(local), Ok(peer)) => format!("{local} -> {peer}"),
            _ => "a connection already lost".to_owned(),
        };
        let transport = self.transport(socket, endpoints, deadline)?;
        let Opened {
            stream,
            inbox,
            outbox,
            down,
        } = socket::share(transport, sink)
            .map_err(|error| Failure::io("setting up the socket", error))?;
        let options = ConnectionOptions::default()
            .auth(match self.external {
                true => Auth::External,
                false => Auth::Plain {
                    username: self.user.clone(),
                    password: self.password.clone(),
                },
            })
            .virtual_host(&self.vhost)
            .heartbeat(self.heartbeat_seconds)
            .information(Some(format!("fibrpc {purpose}, pid {}", process::id())));
        let _fuse = outbox.fuse(time_left(deadline));
        let opened =
            amiquip::Connection::insecure_open_stream(stream, options, ConnectionTuning::default())
                .and_then(|mut inner| Ok((inner.listen_for_connection_blocked()?, inner)));
        match opened {
            Ok((blocked, inner)) => Ok(Connection {
                inner: Some(inner),
                inbox,
                outbox,
                down,
                blocked,
                name,
            }),
            Err(_) if Instant::now() >= deadline => {
                Err(Failure::new("AMQP handshake: no answer in time"))
            }
            // RabbitMQ closes the socket without a word on wrong credentials, and also while it
            // is still booting.
            Err(amiquip::Error::InvalidCredentials) if self.external => Err(Failure::new(
                "it refused our certificate as a user (wrong name in it? or still starting?)",
            )),
            Err(amiquip::Error::InvalidCredentials) => Err(Failure::new(format!(
                "it refused the user '{}' (wrong password? or still starting?)",
                self.user
            ))),
            Err(error) if code(&error) == Some(reply_code::NOT_ALLOWED) => {
                Err(Failure::new(format!(
                    "{}; `rabbitmqctl add_vhost` and `set_permissions` change that, or name another \
                     virtual host at the end of the URL",
                    describe(&error)
                )))
            }
            Err(error) => Err(Failure::new(format!(
                "AMQP handshake: {}",
                describe(&error)
            ))),
        }
    }
}

/// A time that does not come, and that can be added to any other.
pub(crate) const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// So long after that; no time is too long.
pub(crate) fn after(start: Instant, time: Duration) -> Instant {
    start + time.min(FAR_FUTURE)
}

/// The time until a deadline; never zero, which some system calls take for "no limit".
fn time_left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

/// A deadline after one of `parts` equal parts of the time until `deadline`.
fn share_of(deadline: Instant, parts: usize) -> Instant {
    Instant::now() + time_left(deadline) / u32::try_from(parts).unwrap_or(u32::MAX)
}

/// What an amiquip error means, in our words where its own mislead.
pub(crate) fn describe(error: &amiquip::Error) -> String {
    match error {
        amiquip::Error::ServerClosedConnection { code, message }
        | amiquip::Error::ServerClosedChannel { code, message, .. } => {
            let (code, text) = (*code, message.clone());
            Goodbye { code, text }.to_string()
        }
        amiquip::Error::IoErrorReadingSocket { source }
        | amiquip::Error::IoErrorWritingSocket { source } => source.to_string(),
        amiquip::Error::UnexpectedSocketClose => "the broker closed the connection".to_owned(),
        amiquip::Error::MissedServerHeartbeats => "the broker has fallen silent".to_owned(),
        amiquip::Error::EventLoopDropped => "the connection is gone".to_owned(),
        // None of the rest is made with a URL here: we open sockets ourselves.
        other => other.to_string(),
    }
}

/// Which queue a server declares when there is none yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum QueueType {
    /// Not durable, as in the tutorial: gone when the broker restarts.
    #[default]
    Transient,
    /// A durable classic queue.
    Classic,
    /// A replicated queue, which survives the loss of a broker.
    Quorum,
}

impl QueueType {
    fn declaration(self) -> QueueDeclareOptions {
        let mut arguments = FieldTable::new();
        if self == QueueType::Quorum {
            arguments.insert(
                "x-queue-type".to_owned(),
                AmqpValue::LongString("quorum".to_owned()),
            );
        }
        QueueDeclareOptions {
            durable: self != QueueType::Transient,
            arguments,
            ..QueueDeclareOptions::default()
        }
    }
}

/// Makes sure that the request queue exists. One that does is used as it is, whatever its type.
///
/// # Errors
///
/// [`Error::QueueRefused`] if the broker does not let us have it; [`Error::ConnectionLost`].
pub(crate) fn declare_request_queue(
    connection: &mut Connection,
    queue: &str,
    queue_type: QueueType,
) -> Result<(), Error> {
    /// Between our look and our declaration, another server may declare it otherwise: then look
    /// again. It takes somebody to delete it at that very moment, too, to need a third round.
    const ROUNDS: usize = 3;
    let mut refusal = None;
    for _ in 0..ROUNDS {
        if queue_status(connection, queue)?.is_some() {
            return Ok(());
        }
        let _fuse = connection.outbox.fuse(SETUP_TIME); // outlives the channel
        let channel = connection
            .open_channel()
            .map_err(|error| on_queue(queue, &error))?;
        match channel.queue_declare(queue, queue_type.declaration()) {
            Ok(_) => return Ok(()),
            Err(error) if code(&error) == Some(reply_code::PRECONDITION_FAILED) => {
                refusal = Some(on_queue(queue, &error));
            }
            Err(error) => return Err(on_queue(queue, &error)),
        }
    }
    Err(refusal.unwrap_or_else(|| unreachable!("each round ends with a refusal or returns")))
}

/// Declares the request queue again on a channel whose consumer was cancelled.
///
/// # Errors
///
/// amiquip's; the channel is then closed.
pub(crate) fn redeclare_request_queue(
    channel: &Channel,
    queue: &str,
    queue_type: QueueType,
) -> Result<(), amiquip::Error> {
    channel
        .queue_declare(queue, queue_type.declaration())
        .map(drop)
}

/// Asks the broker about a queue; `None` if it does not exist.
///
/// # Errors
///
/// [`Error::QueueRefused`] if we may not know; [`Error::ConnectionLost`].
pub(crate) fn queue_status(
    connection: &mut Connection,
    queue: &str,
) -> Result<Option<QueueStatus>, Error> {
    let _fuse = connection.outbox.fuse(SETUP_TIME); // outlives the channel
    // Its own channel, which the broker closes if the queue does not exist.
    let channel = connection
        .open_channel()
        .map_err(|error| on_queue(queue, &error))?;
    match channel.queue_declare_passive(queue) {
        Ok(found) => Ok(Some(QueueStatus {
            consumers: found.declared_consumer_count().unwrap_or(0),
            ready: found.declared_message_count().unwrap_or(0),
        })),
        Err(error) if code(&error) == Some(reply_code::NOT_FOUND) => Ok(None),
        Err(error) => Err(on_queue(queue, &error)),
    }
}

/// What a broker says of itself and of a request queue.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Status {
    /// The product and its version, such as `RabbitMQ 3.10.8`.
    pub broker: String,
    /// The name of the cluster, which unless configured is that of its first node.
    pub node: String,
    /// The connection's name in the broker's own list: our address, and its.
    pub connection: String,
    /// The request queue; `None` if it does not exist.
    pub queue: Option<QueueStatus>,
    /// How long the broker takes to answer.
    pub round_trip: Duration,
}

impl Status {
    /// Asks the first of the brokers that answers.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] if none does within `timeout`; [`Error::QueueRefused`] if we may not
    /// know of the queue; [`Error::ConnectionLost`].
    pub fn of(endpoints: &Endpoints, queue: &str, timeout: Duration) -> Result<Status, Error> {
        let deadline = after(Instant::now(), timeout);
        let mut connection =
            Connection::open(endpoints, "status", deadline, &|| Box::new(Nowhere))?;
        let _fuse = connection.outbox.fuse(time_left(deadline));
        let began = Instant::now();
        let channel = connection
            .open_channel()
            .map_err(|error| on_queue(queue, &error))?;
        let round_trip = began.elapsed();
        let status = queue_status(&mut connection, queue)?;
        drop(channel);
        let properties = connection
            .inner
            .as_ref()
            .map(|inner| inner.server_properties());
        let property = |name: &str| match properties.and_then(|all| all.get(name)) {
            Some(AmqpValue::LongString(value)) => value.clone(),
            _ => "unknown".to_owned(),
        };
        Ok(Status {
            broker: format!("{} {}", property("product"), property("version")),
            node: property("cluster_name"),
            connection: connection.name.clone(),
            queue: status,
            round_trip,
        })
    }
}

fn code(error: &amiquip::Error) -> Option<u16> {
    match error {
        amiquip::Error::ServerClosedConnection { code, .. }
        | amiquip::Error::ServerClosedChannel { code, .. } => Some(*code),
        _ => None,
    }
}

fn on_queue(queue: &str, error: &amiquip::Error) -> Error {
    let said = describe(error);
    code(error)
        .and_then(|code| refusal(queue, code, &said))
        .unwrap_or(Error::ConnectionLost { reason: said })
}

/// What it means for a queue that the broker says no; `None` if it is not about the queue.
pub(crate) fn refusal(queue: &str, code: u16, said: &str) -> Option<Error> {
    let way_out = match code {
        reply_code::ACCESS_REFUSED => {
            "a server needs the permissions configure, write and read, a client configure and read \
             for amq.gen-*, write for amq.default (rabbitmqctl set_permissions)"
        }
        reply_code::RESOURCE_LOCKED => {
            "another connection has declared it for itself alone; choose another name"
        }
        reply_code::PRECONDITION_FAILED => {
            "somebody declares it otherwise at this very moment; try again"
        }
        // What RabbitMQ says, from 4.3, when it is configured to refuse transient queues.
        reply_code::INTERNAL_ERROR => {
            "if it refuses transient queues, declare another type (--queue-type classic or quorum)"
        }
        _ => return None,
    };
    Some(Error::QueueRefused {
        queue: queue.to_owned(),
        reason: format!("{said}; {way_out}"),
    })
}

/// A random number from the operating system.
pub(crate) fn random() -> u64 {
    SysRng
        .try_next_u64()
        .unwrap_or_else(|error| panic!("the operating system has no random numbers: {error}"))
}

/// Waits between attempts to connect: 0.1 s doubling to 5 s, each shortened by chance to
/// somewhere between half and whole, so that a thousand clients do not come back at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
    latest: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    /// How long to wait before the next attempt.
    pub fn next(&mut self) -> Duration {
        let whole = Self::FIRST
            .saturating_mul(1 << self.attempts.min(10))
            .min(Self::LONGEST);
        self.attempts += 1;
        let chance = random() as f64 / u64::MAX as f64;
        self.latest = whole.mul_f64(0.5 + chance / 2.0);
        self.latest
    }

    /// Starts over if the latest attempt led to something that held for longer than the wait
    /// before it. A connection that is lost as soon as it is made, again and again, does not.
    pub fn held_for(&mut self, time: Duration) {
        if time > self.latest {
            self.attempts = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(url: &str) -> Endpoint {
        let Endpoints {
            list: mut endpoints,
            ..
        } = url.parse().unwrap_or_else(|e| panic!("{url}: {e}"));
        assert_eq!(endpoints.len(), 1);
        endpoints.remove(0)
    }

    #[test]
    fn what_a_url_leaves_out_has_defaults() {
        let defaults = Endpoints::default().list;
        for url in [
            "amqp://",
            "amqp:///",
            "amqp://localhost",
            "amqp://localhost:5672/",
            "amqp:///%2f",
        ] {
            assert!(one(url) == defaults[0], "{url}: {}", one(url));
        }
    }

    #[test]
    fn every_part_of_a_url_is_read_and_decoded() {
        let endpoint = one("amqp://us%40er:p%2Fa+s%26s%25@broker.example:1234/a%2fb?heartbeat=5");
        assert_eq!(endpoint.user, "us@er");
        assert_eq!(endpoint.password, "p/a+s&s%");
        assert_eq!(endpoint.host.to_string(), "broker.example");
        assert_eq!(endpoint.port, 1234);
        assert_eq!(endpoint.vhost, "a/b");
        assert_eq!(endpoint.heartbeat_seconds, 5);
    }

    #[test]
    fn ip_addresses_are_addresses() {
        assert!(matches!(one("amqp://127.0.0.1").host, Host::Ipv4(_)));
        assert!(matches!(one("amqp://[::1]:5673/").host, Host::Ipv6(_)));
    }

    #[test]
    fn several_urls_are_separated_by_commas() {
        let endpoints: Endpoints = "amqp://a, amqp://b:1,amqp://c/v".parse().unwrap();
        assert_eq!(
            endpoints.to_string(),
            "amqp://guest@a:5672/%2F,amqp://guest@b:1/%2F,amqp://guest@c:5672/v"
        );
    }

    #[test]
    fn no_rendering_shows_a_password() {
        let endpoints: Endpoints = "amqp://u:secret@h/v".parse().unwrap();
        assert!(!format!("{endpoints} {endpoints:?}").contains("secret"));
    }

    #[test]
    fn an_error_names_the_part_and_never_the_password() {
        for (url, part) in [
            ("", "empty"),
            ("localhost", "relative URL"),
            ("http://u:hunter2@h/", "scheme is 'http'"),
            ("amqp://u:hunter2@h:99999/", "port"),
            ("amqp://u:hunter2@h/a/b", "virtual host 'a/b'"),
            ("amqp://u:hunter2@h/%ff", "virtual host"),
            ("amqp://u:hunter2@h/?heartbeat=0", "heartbeat=0"),
            ("amqp://u:hunter2@h/?frame_max=1", "'frame_max'"),
            ("amqp://u:hunt%ffer2@h/", "password"),
            ("amqp://a,", "empty"),
        ] {
            let error = url.parse::<Endpoints>().unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
            assert!(!error.contains("hunt"), "{url}: {error}");
        }
    }

    #[test]
    fn backoff_doubles_with_jitter_to_five_seconds() {
        let mut backoff = Backoff::default();
        let mut whole = Duration::from_millis(100);
        for _ in 0..20 {
            let wait = backoff.next();
            assert!(wait <= whole && wait >= whole / 2, "{wait:?} of {whole:?}");
            whole = (whole * 2).min(Duration::from_secs(5));
        }
    }

    #[test]
    fn backoff_starts_over_after_what_held_for_longer_than_the_wait() {
        let mut backoff = Backoff::default();
        let third = (0..3).map(|_| backoff.next()).last().unwrap();
        backoff.held_for(third / 2);
        assert!(backoff.next() > Backoff::FIRST);
        backoff.held_for(Backoff::LONGEST);
        assert!(backoff.next() <= Backoff::FIRST);
    }

    #[test]
    fn a_name_that_does_not_resolve_is_unreachable_and_says_so() {
        let endpoints: Endpoints = "amqp://no-such-host.invalid".parse().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = Connection::open(&endpoints, "test", deadline, &|| Box::new(Nowhere))
            .map(drop)
            .unwrap_err();
        assert!(
            error.to_string().contains("no-such-host.invalid"),
            "{error}"
        );
    }
}
