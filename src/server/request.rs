//! A request, as a handler sees it.

use crate::amqp::body::Body;
use crate::amqp::incoming::Received;
use crate::amqp::sync::Instant;
use crate::message::headers::Headers;
use crate::message::{Response, return_address};
use std::time::Duration;

/// A request, as a handler sees it: whatever somebody has sent, with nothing checked.
///
/// It can be made without a broker, to test a handler:
///
/// ```
/// use fibrpc::{HandlerError, Request};
/// use std::time::Duration;
///
/// fn shout(request: &Request) -> Result<Vec<u8>, HandlerError> {
///     Ok(request.body().to_ascii_uppercase())
/// }
///
/// let request = Request::new("hello")
///     .with_header("traceparent", "00-1-2-01")
///     .with_time_left(Duration::from_secs(2));
/// assert_eq!(shout(&request).unwrap(), b"HELLO");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    body: Body,
    content_type: Option<String>,
    headers: Headers,
    correlation_id: Option<Vec<u8>>,
    redelivered: bool,
    deadline: Option<Instant>,
}

impl Request {
    /// A request that has this body and says nothing else, to test a handler with. Clients send by
    /// [`Client::request`](crate::Client::request).
    pub fn new(body: impl Into<Vec<u8>>) -> Request {
        Request {
            body: Body::from(body.into()),
            content_type: None,
            headers: Headers::default(),
            correlation_id: None,
            redelivered: false,
            deadline: None,
        }
    }

    /// Says what the body is. Default: nothing.
    pub fn with_content_type(mut self, content_type: impl Into<String>) -> Request {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets a header, without a limit. Default: none.
    pub fn with_header(mut self, name: impl Into<String>, value: impl Into<String>) -> Request {
        self.headers.insert(name, value);
        self
    }

    /// Gives it a correlation id. Default: none.
    pub fn with_correlation_id(mut self, id: impl Into<Vec<u8>>) -> Request {
        self.correlation_id = Some(id.into());
        self
    }

    /// Says whether the broker has delivered it before. Default: `false`.
    pub fn with_redelivered(mut self, redelivered: bool) -> Request {
        self.redelivered = redelivered;
        self
    }

    /// Says how much longer its caller waits, from now. Default: nobody knows.
    pub fn with_time_left(mut self, time: Duration) -> Request {
        self.deadline = Some(crate::amqp::time::after(Instant::now(), time));
        self
    }

    /// Reads a request that has arrived at a certain time.
    pub(crate) fn read(
        properties: &Received<'_>,
        body: Vec<u8>,
        redelivered: bool,
        arrived: Instant,
    ) -> Request {
        // 0 asks for a consumer that is waiting, which there was; it is no time that anybody waits.
        let milliseconds = properties
            .expiration
            .and_then(|text| str::from_utf8(text).ok()?.parse().ok())
            .filter(|&time| time > 0);
        Request {
            body: Body::from(body),
            content_type: properties
                .content_type
                .map(|text| String::from_utf8_lossy(text).into_owned()),
            headers: Headers::read(properties.headers),
            correlation_id: return_address(properties)
                .and_then(|(_, id)| id)
                .map(<[u8]>::to_vec),
            redelivered,
            deadline: milliseconds
                .map(|time| crate::amqp::time::after(arrived, Duration::from_millis(time))),
        }
    }

    /// The body: any bytes; it may be empty.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// What the body is, if the caller has said so: its word, which may be wrong. A fibrpc client
    /// says `text/plain` unless told otherwise.
    pub fn content_type(&self) -> Option<&str> {
        self.content_type.as_deref()
    }

    /// What else the caller has said, as far as it can be shown as text.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// The value of a header, whose name is case-sensitive.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)
    }

    /// What tells the reply from others at the caller: any bytes that it chose, or else its message
    /// id; `None` if it sent neither.
    ///
    /// It is the same for every delivery of the same request, and when a fibrpc client sends it
    /// again, so a handler can know what it has done already ([`Server::start`] shows how). Those
    /// of fibrpc clients are 32 hexadecimal digits that no other client has; other libraries may
    /// count from 1, and then two callers can have the same.
    ///
    /// [`Server::start`]: crate::Server::start
    pub fn correlation_id(&self) -> Option<&[u8]> {
        self.correlation_id.as_deref()
    }

    /// Whether the broker has delivered it before: somebody may have executed it already. `false`
    /// does not say that nobody has, for a client that sends again sends a new message.
    /// Source: <https://www.rabbitmq.com/docs/confirms#automatic-requeueing>.
    pub fn redelivered(&self) -> bool {
        self.redelivered
    }

    /// How much longer the caller waits, at most; `None` if it has not said. Zero once the time is
    /// up.
    ///
    /// It is an upper bound: the message's `expiration`, in milliseconds, counted from when the
    /// request arrived here, since the broker does not say how long it was in the queue before. So
    /// a caller that waits for 10 s, and whose request was in the queue for 9 s, seems to wait for
    /// 10 s more. Source: <https://www.rabbitmq.com/docs/ttl>.
    ///
    /// ```
    /// use fibrpc::Request;
    /// use std::time::Duration;
    ///
    /// let request = Request::new("hello").with_time_left(Duration::from_secs(2));
    /// assert!(request.time_left().is_some_and(|time| time <= Duration::from_secs(2)));
    /// assert_eq!(Request::new("hello").time_left(), None);
    /// ```
    pub fn time_left(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }
}

/// A request sent back, with its body, which is not copied, its content type (`text/plain` if it has
/// none), and those of its headers that are shown here and whose names are not reserved
/// ([`Headers::insert`]).
///
/// ```
/// use fibrpc::{Request, Response};
///
/// let request = Request::new("hello").with_header("x-error-kind", "internal");
/// assert_eq!(Response::from(&request), Response::new("hello"));
/// ```
impl From<&Request> for Response {
    fn from(request: &Request) -> Response {
        Response::from_parts(
            request.body.clone(),
            request.content_type.clone(),
            request.headers.sendable(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_back_has_the_body_itself_the_content_type_and_the_headers_that_it_can_have() {
        let request = Request::new("hello")
            .with_content_type("application/json")
            .with_header("traceparent", "00-1-2-01")
            .with_header("CC", "elsewhere")
            .with_header("", "of no name")
            .with_header("x-error-kind", "internal");
        let response = Response::from(&request);
        let expected = Response::new("hello")
            .with_content_type("application/json")
            .with_header("traceparent", "00-1-2-01");
        assert_eq!(response, expected);
        assert_eq!(response.body().as_ptr(), request.body().as_ptr());
        assert_eq!(Response::from(&Request::new("")), Response::new(""));
    }

    #[test]
    fn the_time_left_counts_from_the_arrival() {
        let properties = Received {
            expiration: Some(b"60000"),
            ..Received::default()
        };
        let now = Instant::now();
        let Some(long_ago) = now.checked_sub(Duration::from_secs(50)) else {
            return; // a machine that has just booted
        };
        let left = |arrived| Request::read(&properties, Vec::new(), false, arrived).time_left();
        assert!(left(now).unwrap() > Duration::from_secs(10));
        assert!(left(long_ago).unwrap() <= Duration::from_secs(10));
    }

    #[test]
    fn an_expiration_that_is_no_time_is_none() {
        for expiration in [
            &b""[..],
            b"0",
            b"soon",
            b"-1",
            b"\xff",
            b"99999999999999999999999",
        ] {
            let properties = Received {
                expiration: Some(expiration),
                ..Received::default()
            };
            let request = Request::read(&properties, Vec::new(), false, Instant::now());
            assert_eq!(request.time_left(), None);
        }
    }
}
