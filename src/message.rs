//! Requests and replies as messages: what travels beside a body, what an error looks like, and
//! back. Pure; no I/O.
//!
//! Anything may arrive on a queue. Nothing in here panics on what a peer sent.

pub(crate) mod headers;

use crate::amqp::body::Body;
use crate::amqp::frame::{Properties, SHORT_STRING_MAX};
use crate::amqp::incoming::Received;
use headers::{ERROR_KIND, Headers};
use std::error::Error as StdError;
use std::fmt;

/// The media type of a body, unless the user says otherwise: the tutorial's.
pub(crate) const TEXT_PLAIN: &str = "text/plain";

/// The pseudo-queue of RabbitMQ's direct reply-to. Consumed and named as `reply_to`, it saves
/// the callback queue. Source: <https://www.rabbitmq.com/docs/direct-reply-to>.
pub(crate) const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// The longest message, in bytes: the limit of RabbitMQ 3 (`max_message_size`) unless configured
/// otherwise. Above it, the broker closes the channel.
pub(crate) const MESSAGE_MAX: usize = 128 << 20;

/// The longest kind of an error, in bytes.
const KIND_MAX: usize = 64;

/// The longest text of an error that is sent, in bytes. It is to be a sentence, and what is longer
/// than the broker takes would not arrive at all.
const ERROR_TEXT_MAX: usize = 64 << 10;

/// What a handler answers, as the message that it becomes.
///
/// Bytes and texts are responses by themselves: `Ok(bytes)` is `Ok(Response::new(bytes))`. So are
/// `()`, the empty response, and a [`Reply`] that is passed on. A request is sent back by
/// `Ok(Response::from(request))`. An empty response is one like any other.
///
/// One that cannot be sent reaches the caller as an error of kind `internal` that says why: a
/// header not within the limits of [`Headers::insert`], a content type over 255 bytes, a body over
/// the broker's limit (RabbitMQ 4: 16 MiB, RabbitMQ 3: 128 MiB, unless configured otherwise).
/// Source: `max_message_size` in <https://www.rabbitmq.com/docs/configure>.
///
/// ```
/// use fibrpc::Response;
///
/// let response = Response::new(r#"{"ok":true}"#)
///     .with_content_type("application/json")
///     .with_header("x-version", "3");
/// assert_eq!(response.body(), br#"{"ok":true}"#);
/// assert_eq!(response.content_type(), "application/json");
/// assert_eq!(response.header("x-version"), Some("3"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Response {
    body: Body,
    content_type: Option<String>,
    headers: Headers,
}

impl Response {
    /// The longest body that any broker takes unless configured otherwise, in bytes: the limit of
    /// RabbitMQ 3. Who makes a body of what others send may stop there.
    /// Source: `max_message_size` in <https://www.rabbitmq.com/docs/configure>.
    ///
    /// ```
    /// use fibrpc::Response;
    /// use std::io::{self, Read};
    ///
    /// fn respond(output: impl Read) -> io::Result<Response> {
    ///     let mut body = Vec::new();
    ///     output.take(Response::BODY_MAX as u64 + 1).read_to_end(&mut body)?;
    ///     match body.len() {
    ///         0..=Response::BODY_MAX => Ok(Response::new(body)),
    ///         _ => Err(io::Error::other("the output is too long")),
    ///     }
    /// }
    /// # assert_eq!(respond(&b"short"[..]).unwrap(), Response::new("short"));
    /// ```
    pub const BODY_MAX: usize = MESSAGE_MAX;

    /// A response of content type `text/plain`, without headers.
    pub fn new(body: impl Into<Vec<u8>>) -> Response {
        Response::from_parts(Body::from(body.into()), None, Headers::default())
    }

    pub(crate) fn from_parts(
        body: Body,
        content_type: Option<String>,
        headers: Headers,
    ) -> Response {
        Response {
            body,
            content_type,
            headers,
        }
    }

    /// Says what the body is: a media type of at most 255 bytes, which is checked when it is sent.
    /// Default: `text/plain`.
    pub fn with_content_type(mut self, content_type: impl Into<String>) -> Response {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets a header, within the limits of [`Headers::insert`]; the same name again replaces the
    /// value. Default: none.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Response {
        self.headers.insert(name, value);
        self
    }

    /// The body.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// The content type; `text/plain` if none was set.
    pub fn content_type(&self) -> &str {
        self.content_type.as_deref().unwrap_or(TEXT_PLAIN)
    }

    /// All headers that were set.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The value of a header, whose name is case-sensitive.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// The properties of the message that it becomes.
    pub(crate) fn properties<'a>(&'a self, correlation_id: Option<&'a [u8]>) -> Properties<'a> {
        Properties {
            content_type: Some(self.content_type().as_bytes()),
            headers: self.headers.fields(),
            correlation_id,
            ..Properties::default()
        }
    }

    /// Passes on what AMQP can carry.
    ///
    /// # Errors
    ///
    /// Of kind `internal`: what is wrong with it.
    pub(crate) fn checked(self) -> Result<Response, RemoteError> {
        if let Err(error) = self.headers.check() {
            Err(RemoteError::unsendable(&error.to_string()))
        } else if let Err(error) = check_content_type(self.content_type()) {
            Err(RemoteError::unsendable(&error))
        } else {
            Ok(self)
        }
    }

    /// Passes on what a broker takes that takes `max` bytes.
    ///
    /// # Errors
    ///
    /// Of kind `internal`: it is longer.
    pub(crate) fn fitting(self, max: usize) -> Result<Response, RemoteError> {
        match self.body.len() {
            len if len > max => Err(RemoteError::unsendable(&format!(
                "the body has {len} bytes, and the broker takes {max} (max_message_size)"
            ))),
            _ => Ok(self),
        }
    }
}

/// A content type travels as an AMQP short string.
pub(crate) fn check_content_type(content_type: &str) -> Result<(), String> {
    match content_type.len() {
        0..=SHORT_STRING_MAX => Ok(()),
        len => Err(format!(
            "the content type has {len} bytes; AMQP allows {SHORT_STRING_MAX}"
        )),
    }
}

macro_rules! response_from {
    ($($body:ty),*) => {
        $(impl From<$body> for Response {
            fn from(body: $body) -> Response {
                Response::new(body)
            }
        })*
    };
}
response_from!(Vec<u8>, &[u8], String, &str, Box<[u8]>);

impl<const N: usize> From<&[u8; N]> for Response {
    fn from(body: &[u8; N]) -> Response {
        Response::new(body)
    }
}

/// The empty response.
impl From<()> for Response {
    fn from((): ()) -> Response {
        Response::default()
    }
}

/// A reply passed on, with its content type and headers.
impl From<Reply> for Response {
    fn from(reply: Reply) -> Response {
        Response::from_parts(Body::from(reply.body), reply.content_type, reply.headers)
    }
}

/// What a call is answered with, from whatever server there is: nothing in it is checked. With the
/// feature `json`, it has a method that reads its body.
///
/// ```no_run
/// let client = fibrpc::Client::new("amqp://localhost")?;
/// let reply = client.call("shout", "hello")?;
/// println!("{} bytes of {:?}", reply.body.len(), reply.content_type);
/// println!("version {:?}", reply.header("x-version"));
/// # Ok::<(), fibrpc::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Reply {
    /// The body: any bytes; it may be empty.
    pub body: Vec<u8>,
    /// What the body is, if the server has said so. A fibrpc server says `text/plain` unless its
    /// handler says otherwise.
    pub content_type: Option<String>,
    /// What else the server has said, as far as it can be shown as text.
    pub headers: Headers,
}

impl Reply {
    /// The value of a header, whose name is case-sensitive.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// Reads a reply.
    ///
    /// # Errors
    ///
    /// It says that the server failed.
    pub(crate) fn read(properties: &Received<'_>, mut body: Vec<u8>) -> Result<Reply, RemoteError> {
        let headers = Headers::read(properties.headers);
        if properties.headers.get(ERROR_KIND).is_some() {
            let kind = headers.get(ERROR_KIND).unwrap_or("unknown");
            return Err(RemoteError::new(kind, String::from_utf8_lossy(&body)));
        }
        let content_type = properties
            .content_type
            .map(|text| String::from_utf8_lossy(text).into_owned());
        // Its memory may have been a longer one's, and its caller may keep many.
        body.shrink_to_fit();
        Ok(Reply {
            body,
            content_type,
            headers,
        })
    }
}

/// An error that a handler answers with, and that its caller gets as [`Error::Remote`].
///
/// Its kind is for programs, its message for people. A kind is lower-case words with hyphens, such
/// as `no-such-user`: up to 64 of `a` to `z`, `0` to `9` and `-`. Three kinds have a meaning here:
/// [`INVALID_ARGUMENT`](RemoteError::INVALID_ARGUMENT), [`INTERNAL`](RemoteError::INTERNAL), and
/// `unknown` for what is no text.
///
/// It travels as a reply with the header `x-error-kind` and the message as its body, so a client in
/// another language can send and read one; what such a server has sent is shown as it is.
///
/// ```
/// use fibrpc::{HandlerError, RemoteError, Request};
///
/// fn greet(request: &Request) -> Result<String, HandlerError> {
///     let name = std::str::from_utf8(request.body())?; // any error: kind `internal`
///     if name.is_empty() {
///         Err(RemoteError::new("no-such-user", "the user has no name"))?;
///     }
///     Ok(format!("hello, {name}"))
/// }
///
/// let error = greet(&Request::new("")).unwrap_err();
/// let error = error.downcast_ref::<RemoteError>().unwrap();
/// assert_eq!(error.kind(), "no-such-user");
/// ```
///
/// [`Error::Remote`]: crate::Error::Remote
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteError {
    kind: String,
    message: String,
}

impl RemoteError {
    /// The kind of a request that does not say what the handler needs, such as one that cannot be
    /// read.
    pub const INVALID_ARGUMENT: &'static str = "invalid-argument";

    /// The kind of every other failure: the handler panicked, or returned an error that is not a
    /// [`RemoteError`].
    pub const INTERNAL: &'static str = "internal";

    /// An error of a kind of your own. A kind that is not one (see [`RemoteError`]) is sent as
    /// `internal`, and the server's log says so; of a message over 64 KiB, the beginning is sent.
    /// Both are kept as they are until then.
    pub fn new(kind: impl Into<String>, message: impl Into<String>) -> RemoteError {
        RemoteError {
            kind: kind.into(),
            message: message.into(),
        }
    }

    /// The request does not say what the handler needs: kind `invalid-argument`.
    ///
    /// ```
    /// use fibrpc::{HandlerError, RemoteError, Request};
    ///
    /// fn double(request: &Request) -> Result<String, HandlerError> {
    ///     let text = str::from_utf8(request.body())?;
    ///     let number: u32 = text
    ///         .parse()
    ///         .map_err(|_| RemoteError::invalid_argument(format!("'{text}' is not a number")))?;
    ///     Ok((2 * u64::from(number)).to_string())
    /// }
    ///
    /// assert_eq!(double(&Request::new("21")).unwrap(), "42");
    /// assert!(double(&Request::new("many")).unwrap_err().is::<RemoteError>());
    /// ```
    pub fn invalid_argument(message: impl Into<String>) -> RemoteError {
        RemoteError::new(RemoteError::INVALID_ARGUMENT, message)
    }

    /// The handler failed: kind `internal`, which every error has that is no [`RemoteError`].
    pub fn internal(message: impl Into<String>) -> RemoteError {
        RemoteError::new(RemoteError::INTERNAL, message)
    }

    /// What a handler answers cannot be sent.
    pub(crate) fn unsendable(reason: &str) -> RemoteError {
        RemoteError::internal(format!("the handler's response cannot be sent: {reason}"))
    }

    /// The kind, as in the header `x-error-kind`. From a server that is not ours it may be any
    /// text.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// One readable sentence, without the kind; [`Display`](fmt::Display) gives both.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether its kind can be sent.
    pub(crate) fn has_valid_kind(&self) -> bool {
        let word = |word: &str| {
            !word.is_empty()
                && word
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        self.kind.len() <= KIND_MAX && self.kind.split('-').all(word)
    }

    /// The kind that its caller sees.
    pub(crate) fn kind_sent(&self) -> &str {
        match self.has_valid_kind() {
            true => &self.kind,
            false => RemoteError::INTERNAL,
        }
    }

    /// The message that it becomes.
    pub(crate) fn into_response(mut self) -> Response {
        if self.message.len() > ERROR_TEXT_MAX {
            let end = self.message.floor_char_boundary(ERROR_TEXT_MAX);
            self.message.truncate(end);
            self.message.push_str("...");
        }
        let kind = self.kind_sent().to_owned();
        Response::new(self.message).with_header(ERROR_KIND, kind)
    }

    /// What a handler's error is to its caller: itself, if it is a [`RemoteError`], and otherwise
    /// an `internal` one that tells it with all its causes.
    pub(crate) fn of(error: HandlerError) -> RemoteError {
        error.downcast().map_or_else(
            |other| RemoteError::internal(with_causes(&*other)),
            |remote| *remote,
        )
    }
}

/// What an error says, and each cause that it does not tell itself.
fn with_causes(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the server answered with an error ({}): {}",
            self.kind, self.message
        )
    }
}

impl StdError for RemoteError {}

/// The error that a handler returns: any error, by `?`. Its caller gets a [`RemoteError`] as it is,
/// and any other as one of kind `internal`, whose message is what the error and its causes say. So
/// what is not for the caller's eyes does not belong into an error's text.
///
/// An [`Error`](crate::Error) of a call to another server is one of the others, even if it is
/// [`Error::Remote`](crate::Error::Remote): to pass that on as it is, return what is in it.
///
/// ```no_run
/// use fibrpc::{Client, Error, HandlerError, RemoteError, Reply, Request};
///
/// fn ask_behind(client: &Client, request: &Request) -> Result<Reply, HandlerError> {
///     match client.call("behind", request.body()) {
///         Ok(reply) => Ok(reply),
///         Err(Error::Remote(error)) => Err(error.into()), // of the same kind
///         Err(Error::Timeout { .. }) => Err(RemoteError::new("too-late", "nobody behind").into()),
///         Err(other) => Err(other.into()), // `internal`
///     }
/// }
/// ```
pub type HandlerError = Box<dyn StdError + Send + Sync>;

/// Where a reply goes and how its receiver recognizes it: the routing key, and the request's
/// correlation id or else its message id, all verbatim. `None` if there is no `reply_to`, so that
/// nobody waits.
pub(crate) fn return_address<'a>(
    properties: &Received<'a>,
) -> Option<(&'a [u8], Option<&'a [u8]>)> {
    let reply_to = properties.reply_to.filter(|name| !name.is_empty())?;
    Some((
        reply_to,
        properties.correlation_id.or(properties.message_id),
    ))
}

/// A queue's name travels as an AMQP short string.
pub(crate) fn check_queue_name(queue: &str) -> Result<(), String> {
    match queue.len() {
        0 => Err("the queue's name is empty".to_owned()),
        _ if queue.starts_with(DIRECT_REPLY_TO) => Err(format!(
            "'{queue}' is where RabbitMQ sends replies, and no request queue"
        )),
        1..=SHORT_STRING_MAX => Ok(()),
        len => Err(format!(
            "the queue's name has {len} bytes; AMQP allows {SHORT_STRING_MAX}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_request_without_reply_to_has_no_return_address() {
        let none = Received {
            correlation_id: Some(b"1"),
            ..Received::default()
        };
        assert_eq!(return_address(&none), None);
        let empty = Received {
            reply_to: Some(b""),
            ..none
        };
        assert_eq!(return_address(&empty), None);
    }

    #[test]
    fn the_message_id_stands_in_for_a_missing_correlation_id() {
        let received = Received {
            reply_to: Some(b"q"),
            message_id: Some(b"m"),
            ..Received::default()
        };
        let address = |id| Some((&b"q"[..], Some(id)));
        assert_eq!(return_address(&received), address(&b"m"[..]));
        let received = Received {
            correlation_id: Some(b"c"),
            ..received
        };
        assert_eq!(return_address(&received), address(b"c"));
    }

    #[test]
    fn an_empty_reply_is_a_reply() {
        assert_eq!(
            Reply::read(&Received::default(), Vec::new()),
            Ok(Reply::default())
        );
    }

    #[test]
    fn a_queue_name_must_fit_a_short_string() {
        assert_eq!(check_queue_name(&"q".repeat(255)), Ok(()));
        assert!(
            check_queue_name(&"q".repeat(256))
                .unwrap_err()
                .contains("256 bytes")
        );
        assert!(check_queue_name("").is_err());
    }

    #[test]
    fn a_handlers_error_is_internal_and_told_with_its_causes_or_a_remote_error_as_it_is() {
        #[derive(Debug)]
        struct Reading(io::Error);
        impl fmt::Display for Reading {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("cannot read the table")
            }
        }
        impl StdError for Reading {
            fn source(&self) -> Option<&(dyn StdError + 'static)> {
                Some(&self.0)
            }
        }
        let error = RemoteError::of(Reading(io::Error::other("disk on fire")).into());
        assert_eq!(error.kind(), RemoteError::INTERNAL);
        assert_eq!(error.message(), "cannot read the table: disk on fire");
        let own = RemoteError::new("no-such-user", "nobody");
        assert_eq!(RemoteError::of(own.clone().into()), own);
    }

    #[test]
    fn a_kind_is_lower_case_words_with_hyphens() {
        let sent = |kind: &str| {
            let response = RemoteError::new(kind, "why").into_response();
            response.header(ERROR_KIND).unwrap().to_owned()
        };
        for good in ["internal", "no-such-user", "http-404", &"k".repeat(64)] {
            assert_eq!(sent(good), good);
        }
        for bad in ["", "No", "a b", "-a", "a--b", "ü", &"k".repeat(65)] {
            assert_eq!(sent(bad), "internal", "{bad}");
        }
    }

    #[test]
    fn a_reply_holds_no_more_memory_than_it_needs() {
        let mut body = vec![1; 100_000];
        body.truncate(60_000);
        let reply = Reply::read(&Received::default(), body).unwrap();
        assert_eq!((reply.body.len(), reply.body.capacity()), (60_000, 60_000));
    }

    #[test]
    fn a_response_that_cannot_be_sent_is_an_internal_error() {
        for (response, words) in [
            (
                Response::new("").with_header(ERROR_KIND, "mine"),
                "reserved",
            ),
            (
                Response::new("").with_content_type("t".repeat(256)),
                "256 bytes",
            ),
            (Response::new(vec![0; MESSAGE_MAX + 1]), "the broker takes"),
        ] {
            let sendable = response.checked().and_then(|one| one.fitting(MESSAGE_MAX));
            let error = sendable.unwrap_err();
            assert_eq!(error.kind(), "internal");
            assert!(error.message().contains(words), "{error}");
        }
    }
}
