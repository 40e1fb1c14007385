//! Brokers' URLs.

#[cfg(feature = "tls")]
use crate::amqp::tls::TlsOptions;
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::str::FromStr;
use url::{Host, Url};

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
///
/// The scheme `amqps` is TLS, and needs the feature `tls`.
///
/// In a user, password or virtual host, `/ ? # ,` are written `%2f %3f %23 %2c`, or the URL is
/// refused. `%` is written `%25`; in a user, `:` is `%3a`; in a virtual host, `@` is `%40`.
/// Sources: <https://www.rabbitmq.com/docs/uri-spec>, <https://www.rabbitmq.com/docs/heartbeats>.
///
/// The brokers are tried from the first on at each attempt to connect; each gets an equal share of
/// the time. Printed, they show no password.
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
///     "invalid broker URL: heartbeat=0: expected 1 to 65535 seconds"
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidUrl(String);

impl fmt::Display for InvalidUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid broker URL: {}", self.0)
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
            #[cfg(feature = "tls")]
            tls: TlsOptions::default(),
        }
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
        let endpoints: Result<Vec<_>, _> = urls
            .split(',')
            .enumerate()
            .map(|(index, url)| {
                parse_url(url.trim()).map_err(|error| match index {
                    0 => error,
                    _ => format!("{error} ({COMMA})"),
                })
            })
            .collect();
        endpoints.map(Endpoints::new).map_err(InvalidUrl)
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

/// What may be wrong with a URL behind a comma.
const COMMA: &str = "it stands behind a ','; one that belongs to a password is written %2c";

/// Parses one URL. No message repeats what may be a password, or a part of one that is not encoded
/// as it should be.
fn parse_url(text: &str) -> Result<Endpoint, String> {
    const EXAMPLE: &str = "expected something like amqp://user:password@host:5672/vhost";
    if text.is_empty() {
        return Err(format!("it is empty; {EXAMPLE}"));
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
    let url = Url::parse(text).map_err(|error| format!("{error}; {EXAMPLE}"))?;
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
            ("amqp://u:hunt%ffer2@h/", "password"),
            ("amqp://a,", "empty"),
        ] {
            let error = url.parse::<Endpoints>().unwrap_err().to_string();
            assert!(error.contains(part), "{url}: {error}");
            assert!(!error.contains("hunt"), "{url}: {error}");
        }
    }
}
