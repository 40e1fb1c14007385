//! Brokers' URLs.

#[cfg(feature = "tls")]
use crate::amqp::tls::TlsOptions;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::fs;
#[cfg(feature = "tls")]
use std::mem::take;
use std::path::PathBuf;
use std::str::FromStr;
use url::{Host, ParseError, Url};

/// Seconds between heartbeats, unless the URL or the broker asks for fewer. A broker that falls
/// silent is given up after twice that.
const HEARTBEAT_SECONDS: u16 = 10;

/// One or more brokers of the same cluster, tried in turn: `amqp://user:password@host:port/vhost`,
/// several separated by commas.
///
/// [`Client::new`](crate::Client::new) and [`Server::new`](crate::Server::new) take a text in its
/// place; it is for options that a URL cannot hold, and for [`Status::of`](crate::Status::of).
///
/// Everything but the scheme may be left out:
///
/// - the user and the password: `guest`, each by itself
/// - the host, a name, an IPv4 address, or an IPv6 address in `[]`: `localhost`
/// - the port: 5672, or 5671 for `amqps`
/// - the virtual host: `/`, also if the URL ends with a `/`
/// - `?heartbeat=`, in seconds, 1 to 65535: 10. The broker may want fewer. One that is silent for
///   twice that is given up.
/// - `&auth_mechanism=`: `plain`; with `external`, the client's certificate is the user, and not
///   user and password
/// - `&cacertfile=`, `&certfile=` and `&keyfile=`, for this broker in place of what
///   [`with_tls`](Endpoints::with_tls) says; without a `keyfile`, the `certfile` holds the key, too
/// - `&verify=verify_peer`, which is what is done anyway
///
/// Other parameters are refused, and the error says what does instead. The scheme `amqps` is TLS,
/// and needs the feature `tls`.
///
/// In a user, password or virtual host, `/ ? # ,` are written `%2f %3f %23 %2c`, or the URL is
/// refused. `%` is written `%25`; in a user, `:` is `%3a`; in a virtual host, `@` is `%40`.
/// Sources: <https://www.rabbitmq.com/docs/uri-spec>,
/// <https://www.rabbitmq.com/docs/uri-query-parameters>,
/// <https://www.rabbitmq.com/docs/heartbeats>.
///
/// The first attempt to connect begins with any of them, later ones with the one that worked last,
/// and the others follow in turn. While there are others, a broker that does not answer gets a share
/// of the time that a caller has, and not more than 2 s; twice as much after each round in vain.
/// Printed, they show no password.
///
/// ```
/// let brokers: fibrpc::Endpoints = "amqp://app:secret@a.example,amqp://app:secret@b.example".parse()?;
/// assert_eq!(
///     brokers.to_string(),
///     "amqp://app@a.example:5672/%2F,amqp://app@b.example:5672/%2F"
/// );
///
/// let brokers: fibrpc::Endpoints = "amqp://ada%2fb:p%3fss%2cword@broker.example/shop".parse()?;
/// assert_eq!(brokers.to_string(), "amqp://ada%2Fb@broker.example:5672/shop");
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoints {
    pub(super) list: Vec<Endpoint>,
    /// Where they are written, to be read again.
    file: Option<PathBuf>,
    #[cfg(feature = "tls")]
    pub(super) tls: TlsOptions,
}

/// One broker.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub tls: bool,
    pub host: Host<String>,
    pub port: u16,
    pub vhost: String,
    pub user: String,
    pub password: String,
    /// Whether the broker is to know us by our certificate, and not by user and password.
    pub external: bool,
    pub heartbeat_seconds: u16,
    /// What its own parameters say.
    #[cfg(feature = "tls")]
    pub files: TlsOptions,
}

/// A broker's URL that cannot be used. The text says which part of it, and what is expected; it
/// holds no password.
///
/// ```
/// use fibrpc::Endpoints;
///
/// let error = "amqp://localhost?heartbeat=0".parse::<Endpoints>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "invalid broker URL: heartbeat=0: expected 1 to 65535 seconds; without it, they are 10"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidUrl(String);

impl fmt::Display for InvalidUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for InvalidUrl {}

/// [`Endpoints`] are endpoints already, which some code has to be told in case of an error.
impl From<Infallible> for InvalidUrl {
    fn from(never: Infallible) -> InvalidUrl {
        match never {}
    }
}

/// `amqp://localhost`: guest, on port 5672, virtual host `/`.
impl Default for Endpoints {
    fn default() -> Endpoints {
        Endpoints::new(vec![Endpoint::default()])
    }
}

impl Endpoints {
    fn new(list: Vec<Endpoint>) -> Endpoints {
        Endpoints {
            list,
            file: None,
            #[cfg(feature = "tls")]
            tls: TlsOptions::default(),
        }
    }

    /// Brokers whose URLs are in a file, as [`Endpoints`] has them, blanks and line ends around them
    /// or not. It is read now, and again at each attempt to connect: so a password that is changed
    /// there needs no restart. What cannot be read or used then makes the attempt fail. A pipe is
    /// read once.
    ///
    /// # Errors
    ///
    /// [`InvalidUrl`]: the file cannot be read, or a URL in it cannot be used.
    ///
    /// ```no_run
    /// use fibrpc::{Client, Endpoints};
    ///
    /// let client = Client::new(Endpoints::from_file("/run/secrets/broker-url")?)?;
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn from_file(file: impl Into<PathBuf>) -> Result<Endpoints, InvalidUrl> {
        let file = file.into();
        let name = file.display();
        let urls = fs::read_to_string(&file)
            .map_err(|error| InvalidUrl(format!("cannot read {name}: {error}")))?;
        let list = parse_urls(&urls)
            .map_err(|error| InvalidUrl(format!("invalid broker URL in {name}: {error}")))?;
        // A pipe can be read once.
        let is_file = fs::metadata(&file).is_ok_and(|file| file.is_file());
        Ok(Endpoints {
            file: is_file.then_some(file),
            ..Endpoints::new(list)
        })
    }

    /// Reads the file again, if they come from one.
    pub(super) fn read_again(&mut self) -> Result<(), InvalidUrl> {
        if let Some(file) = &self.file {
            self.list = Endpoints::from_file(file)?.list;
        }
        Ok(())
    }

    /// How many brokers there are.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// Says how brokers at `amqps://` are trusted, and how they are to trust us; to those at
    /// `amqp://` it means nothing. With the feature `tls`. Default: as [`TlsOptions::new`].
    ///
    /// ```
    /// use fibrpc::{Client, Endpoints, TlsOptions};
    ///
    /// let brokers: Endpoints = "amqps://app:secret@broker.example".parse()?;
    /// let brokers = brokers.with_tls(TlsOptions::new().ca_file("/etc/app/broker-ca.pem"));
    /// let client = Client::new(&brokers)?;
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
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
            #[cfg(feature = "tls")]
            files: TlsOptions::default(),
        }
    }
}

impl FromStr for Endpoints {
    type Err = InvalidUrl;

    /// Reads URLs that commas separate, with blanks around them or not. Resolves no name.
    ///
    /// # Errors
    ///
    /// [`InvalidUrl`]: one of them is empty, is no URL, has another scheme than `amqp` or `amqps`
    /// (without the feature `tls`: than `amqp`), an unknown parameter or value, a `#`, or a part
    /// that cannot be decoded.
    fn from_str(urls: &str) -> Result<Endpoints, InvalidUrl> {
        parse_urls(urls)
            .map(Endpoints::new)
            .map_err(|error| InvalidUrl(format!("invalid broker URL: {error}")))
    }
}

impl TryFrom<&str> for Endpoints {
    type Error = InvalidUrl;

    fn try_from(urls: &str) -> Result<Endpoints, InvalidUrl> {
        urls.parse()
    }
}

impl TryFrom<&String> for Endpoints {
    type Error = InvalidUrl;

    fn try_from(urls: &String) -> Result<Endpoints, InvalidUrl> {
        urls.parse()
    }
}

impl TryFrom<String> for Endpoints {
    type Error = InvalidUrl;

    fn try_from(urls: String) -> Result<Endpoints, InvalidUrl> {
        urls.parse()
    }
}

/// As they are: a clone.
impl From<&Endpoints> for Endpoints {
    fn from(endpoints: &Endpoints) -> Endpoints {
        endpoints.clone()
    }
}

fn parse_urls(urls: &str) -> Result<Vec<Endpoint>, String> {
    // Some editors put a mark in front of a file.
    let urls = urls.trim().trim_start_matches('\u{feff}');
    urls.split(',')
        .enumerate()
        .map(|(index, url)| {
            parse_url(url.trim()).map_err(|error| match index {
                0 => error,
                _ => format!("{error} ({COMMA})"),
            })
        })
        .collect()
}

/// What may be wrong with a URL behind a comma.
const COMMA: &str = "it stands behind a ',', where the next whole URL begins; one that belongs to \
                     a password is written %2c";

/// Parses one URL. No message repeats what may be a password, or a part of one that is not encoded
/// as it should be.
fn parse_url(text: &str) -> Result<Endpoint, String> {
    const EXAMPLE: &str = "expected something like amqp://user:password@host:5672/vhost";
    if text.is_empty() {
        return Err(format!("it is empty; {EXAMPLE}"));
    }
    if text.starts_with(['"', '\'', '`']) {
        return Err(format!(
            "there are quotes around it; leave them out; {EXAMPLE}"
        ));
    }
    let Some((_, rest)) = text.split_once("://") else {
        return Err(format!("it has no '://'; {EXAMPLE}"));
    };
    // To every reader of URLs, the first of these ends the part with the password.
    if let Some(end) = rest.find(['/', '?', '#'])
        && rest[end..].contains('@')
    {
        return Err(
            "there is an '@' behind a '/', '?' or '#'; in a user or password, write '/' as %2f, \
             '?' as %3f and '#' as %23, and elsewhere '@' as %40"
                .to_owned(),
        );
    }
    if rest.contains("://") {
        return Err(
            "there is a second '://' in it; a ',' separates one URL from the next".to_owned(),
        );
    }
    let url = Url::parse(text).map_err(|error| match error {
        ParseError::RelativeUrlWithoutBase => format!("its beginning is no scheme; {EXAMPLE}"),
        ParseError::InvalidPort => format!("the port is none from 1 to 65535; {EXAMPLE}"),
        ParseError::InvalidIpv6Address if text.contains('%') => {
            "the IPv6 address is none, or it has a zone, which is not supported; a name with that \
             address does instead"
                .to_owned()
        }
        ParseError::EmptyHost => {
            format!(
                "there is no host in front of the port (an IPv6 address stands in []); {EXAMPLE}"
            )
        }
        error => format!("{error}; {EXAMPLE}"),
    })?;
    let mut endpoint = Endpoint::default();
    match url.scheme() {
        "amqp" => {}
        "amqps" if cfg!(feature = "tls") => {
            endpoint.tls = true;
            endpoint.port = 5671;
        }
        "amqps" => return Err("amqps:// needs TLS, which this build does not have".to_owned()),
        _ => {
            return Err(format!(
                "the scheme is neither 'amqp' nor 'amqps'; {EXAMPLE}"
            ));
        }
    }
    if url.fragment().is_some() {
        return Err("there is a '#' in it; in a password, it is written %23".to_owned());
    }
    // For a scheme it does not know, the parser leaves host names as they are, IP addresses
    // included.
    if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
        endpoint.host = Host::parse(host).map_err(|error| format!("the host '{host}': {error}"))?;
    }
    match url.port() {
        Some(0) => return Err(format!("the port is none from 1 to 65535; {EXAMPLE}")),
        Some(port) => endpoint.port = port,
        None => {}
    }
    if !url.username().is_empty() {
        endpoint.user = percent_decode("user", url.username())?;
    }
    match url.password() {
        Some(password) => endpoint.password = percent_decode("password", password)?,
        // The parser does not tell an empty one from none.
        None if has_empty_password(rest) => endpoint.password = String::new(),
        None => {}
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
    read_parameters(&url, &mut endpoint)?;
    Ok(endpoint)
}

/// Whether what follows the `://` begins with `user:@`.
fn has_empty_password(rest: &str) -> bool {
    let authority = rest.split(['/', '?', '#']).next();
    let user = authority.and_then(|part| part.rsplit_once('@'));
    user.is_some_and(|(user, _)| user.ends_with(':'))
}

/// Reads what stands behind the `?`. No value that is refused is taken for granted: what a
/// parameter of another client's asks for is done, or it is said what does it here.
fn read_parameters(url: &Url, endpoint: &mut Endpoint) -> Result<(), String> {
    #[cfg(feature = "tls")]
    let (mut certificate, mut key) = (None, None);
    for (name, value) in url.query_pairs() {
        match &*name {
            "heartbeat" => {
                endpoint.heartbeat_seconds = match value.parse() {
                    // Without heartbeats, a broker that falls silent would never be found out.
                    Ok(seconds) if seconds > 0 => seconds,
                    _ => {
                        return Err(format!(
                            "heartbeat={value}: expected 1 to 65535 seconds; without it, they are \
                             {HEARTBEAT_SECONDS}"
                        ));
                    }
                };
            }
            "auth_mechanism" if value.eq_ignore_ascii_case("plain") => endpoint.external = false,
            "auth_mechanism" if value.eq_ignore_ascii_case("external") => endpoint.external = true,
            "auth_mechanism" => {
                return Err(format!(
                    "auth_mechanism={value}: expected plain or external"
                ));
            }
            "cacertfile" | "certfile" | "keyfile" | "verify" if !endpoint.tls => {
                return Err(format!(
                    "the parameter '{name}' is for amqps://, which is TLS"
                ));
            }
            #[cfg(feature = "tls")]
            "cacertfile" => endpoint.files = take(&mut endpoint.files).ca_file(&*value),
            #[cfg(feature = "tls")]
            "certfile" => certificate = Some(value.into_owned()),
            #[cfg(feature = "tls")]
            "keyfile" => key = Some(value.into_owned()),
            "verify" if value == "verify_peer" => {}
            "verify" => {
                return Err(format!(
                    "verify={value}: a broker's certificate is always verified; cacertfile names \
                     one that is trusted"
                ));
            }
            other => {
                return Err(format!(
                    "the parameter '{other}' is not supported; {}",
                    instead_of(other)
                ));
            }
        }
    }
    #[cfg(feature = "tls")]
    match (certificate, key) {
        // As for Erlang's clients, which have these parameters.
        (Some(certificate), key) => {
            let key = key.unwrap_or_else(|| certificate.clone());
            endpoint.files = take(&mut endpoint.files).client_certificate(certificate, key);
        }
        (None, Some(_)) => return Err("a keyfile needs a certfile".to_owned()),
        (None, None) => {}
    }
    Ok(())
}

/// What does here what a parameter does for other clients: pika, Java's, Erlang's.
fn instead_of(parameter: &str) -> &'static str {
    match parameter {
        "connection_attempts" | "retry_delay" => {
            "connecting is tried again without being told to, with growing pauses"
        }
        "socket_timeout"
        | "stack_timeout"
        | "connection_timeout"
        | "blocked_connection_timeout" => {
            "a call's timeout (--timeout) holds for connecting and for a broker that blocks, a \
             server's --connect-timeout for its start"
        }
        "channel_max" => "a server has as many channels as workers (--workers)",
        "frame_max" | "locale" | "tcp_options" | "backpressure_detection" => "leave it out",
        "server_name_indication" | "ssl_options" | "fail_if_no_peer_cert" => {
            "the host of the URL is the name that the certificate must have; cacertfile, certfile \
             and keyfile name files (or --tls-ca, --tls-cert, --tls-key)"
        }
        _ => "heartbeat, auth_mechanism, cacertfile, certfile, keyfile and verify are",
    }
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
        // A blank is a '+' only in a query.
        let encode = |text: &str| {
            let encoded: String = url::form_urlencoded::byte_serialize(text.as_bytes()).collect();
            encoded.replace('+', "%20")
        };
        let (user, vhost) = (encode(&self.user), encode(&self.vhost));
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
    fn what_surrounds_a_url_in_a_file_or_a_variable_does_not_count() {
        for url in [
            "AMQP://app:pw@h",
            " amqp://app:pw@h\n",
            "\u{feff}amqp://app:pw@h\r\n",
            "amqp://app:pw@h/?",
        ] {
            let endpoint = one(url);
            assert_eq!(
                (&*endpoint.user, &*endpoint.password),
                ("app", "pw"),
                "{url}"
            );
            assert_eq!(endpoint.vhost, "/");
        }
    }

    #[test]
    fn a_password_may_be_left_out_or_empty() {
        for (url, user, password) in [
            ("amqp://app@h", "app", "guest"),
            ("amqp://app:@h", "app", ""),
            ("amqp://:pw@h", "guest", "pw"),
            ("amqp://app:a:@h", "app", "a:"),
            ("amqp://h:5672", "guest", "guest"),
            ("amqp://h:", "guest", "guest"),
        ] {
            let endpoint = one(url);
            assert_eq!(
                (&*endpoint.user, &*endpoint.password),
                (user, password),
                "{url}"
            );
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn the_files_of_tls_can_stand_in_the_url() {
        let of_url = one("amqps://h?cacertfile=/a%20ca&certfile=/cert&verify=verify_peer").files;
        let options = TlsOptions::new()
            .ca_file("/a ca")
            .client_certificate("/cert", "/cert");
        assert!(of_url == options);
        let given = TlsOptions::new().ca_file("/other");
        assert!(of_url.or(&given) == options);
        assert!(one("amqps://h").files.or(&given) == given);
        for (url, part) in [
            ("amqps://h?verify=verify_none", "always verified"),
            ("amqps://h?keyfile=/key", "certfile"),
            ("amqps://h?server_name_indication=x", "the host of the URL"),
        ] {
            let error = url.parse::<Endpoints>().unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
        }
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
        let odd: Endpoints = "amqp://a+b%20c@h/d%20e".parse().unwrap();
        assert_eq!(odd.to_string(), "amqp://a%2Bb%20c@h:5672/d%20e");
    }

    #[test]
    fn an_error_names_the_part_and_never_the_password() {
        for (url, part) in [
            ("", "empty"),
            ("localhost", "no '://'"),
            ("amqp:u:hunter2@h", "no '://'"),
            ("amqp:/u:hunter2@h", "no '://'"),
            ("amqp://u:/hunter2@h", "'/' as %2f"),
            ("amqp://u:12/hun/ter2@h", "'/' as %2f"),
            ("amqp://u:12?hunter2@h", "'?' as %3f"),
            ("amqp://u:12#hunter2@h", "'#' as %23"),
            ("amqp://u@h?heartbeat=hunter2@h", "'?' as %3f"),
            ("amqp://h#hunter2", "written %23"),
            ("amqp://u:1,hunter2:x@h", "written %2c"),
            ("amqp://u:1,hunter2://x@h", "written %2c"),
            ("http://u:hunter2@h/", "the scheme is neither"),
            ("amqp://u:hunter2@h:99999/", "port"),
            ("amqp://u:hunter2@h/a/b", "virtual host 'a/b'"),
            ("amqp://u:hunter2@h/%ff", "virtual host"),
            ("amqp://u:hunter2@h/?heartbeat=0", "heartbeat=0"),
            ("amqp://u:hunter2@h/?frame_max=1", "'frame_max'"),
            ("amqp://u:hunter2@h:0", "from 1 to 65535"),
            ("amqp://u:hunter2@h:65536", "from 1 to 65535"),
            ("amqp://u:hunter2@:5672", "no host"),
            ("amqp://::1:5672", "in []"),
            ("amqp://u:hunter2@[fe80::1%eth0]", "a zone"),
            ("amqp://u:hunter2@h;amqp://i", "second '://'"),
            ("amqp://u:hunter2@a:1,b:2", "the next whole URL"),
            ("'amqp://u:hunter2@h'", "quotes"),
            ("\"amqp://u:hunter2@h\"", "quotes"),
            ("AMQP_URL=amqp://u:hunter2@h", "no scheme"),
            ("amqp://u:hunter2@h?verify=verify_peer", "for amqps://"),
            ("amqp://u:hunter2@h?cacertfile=/ca", "for amqps://"),
            ("amqp://h?connection_attempts=3", "tried again"),
            ("amqp://h?socket_timeout=3", "--timeout"),
            ("amqp://h?channel_max=3", "--workers"),
            ("amqp://h?auth_mechanism=amqplain", "plain or external"),
            ("amqp://h?other=2", "auth_mechanism"),
            ("amqp://u:hunt%ffer2@h/", "password"),
            ("amqp://a,", "empty"),
        ] {
            let error = url.parse::<Endpoints>().unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
            assert!(!error.contains("hunt"), "{url}: {error}");
        }
    }
}
