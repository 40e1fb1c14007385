//! The wire contract: message bodies and properties to requests, replies and remote errors,
//! and back. Pure; no I/O.
//!
//! Anything may arrive on a queue. Nothing in here panics on what a peer sent.

use crate::arrival::{HeaderValue, Received};
use crate::frame::Properties;
use std::fmt;
use std::str;

/// The media type of a decimal number, on requests and replies alike.
pub(crate) const TEXT_PLAIN: &[u8] = b"text/plain";

/// The pseudo-queue of RabbitMQ's direct reply-to. Consumed and named as `reply_to`, it saves
/// the callback queue. Source: <https://www.rabbitmq.com/docs/direct-reply-to>.
pub(crate) const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

/// The header that marks a reply as an error. A client that does not know it prints the
/// reply's body, which is a sentence.
const ERROR_KIND_HEADER: &str = "x-error-kind";

/// The longest request body read as a number, in bytes. The longest number that any server
/// answers has three digits; this leaves room for zeros, and none for megabytes.
const NUMBER_BODY_MAX: usize = 64;

/// What a server says instead of a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteError {
    /// The class of the error.
    pub kind: RemoteErrorKind,
    /// One readable sentence.
    pub message: String,
}

/// The class of a [`RemoteError`], as in the header `x-error-kind`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RemoteErrorKind {
    /// The request does not say what the handler needs, such as a body that is not a decimal
    /// integer.
    InvalidArgument,
    /// The request is well-formed, and the server refuses it: n is too large, or negative.
    OutOfRange,
    /// The handler failed: it panicked.
    Internal,
    /// A kind that this version does not know, or an empty reply, which is how the tutorial's
    /// Java and .NET servers say that they failed.
    Other(String),
}

impl RemoteErrorKind {
    /// The kind as it stands in the header.
    pub fn as_str(&self) -> &str {
        match self {
            RemoteErrorKind::InvalidArgument => "invalid-argument",
            RemoteErrorKind::OutOfRange => "out-of-range",
            RemoteErrorKind::Internal => "internal",
            RemoteErrorKind::Other(kind) => kind,
        }
    }

    fn from_header(kind: &str) -> RemoteErrorKind {
        match kind {
            "invalid-argument" => RemoteErrorKind::InvalidArgument,
            "out-of-range" => RemoteErrorKind::OutOfRange,
            "internal" => RemoteErrorKind::Internal,
            other => RemoteErrorKind::Other(other.to_owned()),
        }
    }
}

impl RemoteError {
    /// The request does not say what the handler needs.
    pub fn invalid_argument(message: impl Into<String>) -> RemoteError {
        RemoteError {
            kind: RemoteErrorKind::InvalidArgument,
            message: message.into(),
        }
    }

    /// The request is well-formed, and refused.
    pub fn out_of_range(message: impl Into<String>) -> RemoteError {
        RemoteError {
            kind: RemoteErrorKind::OutOfRange,
            message: message.into(),
        }
    }

    /// The handler failed.
    pub fn internal(message: impl Into<String>) -> RemoteError {
        RemoteError {
            kind: RemoteErrorKind::Internal,
            message: message.into(),
        }
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the server answered with an error ({}): {}",
            self.kind.as_str(),
            self.message
        )
    }
}

impl std::error::Error for RemoteError {}

/// Reads a request's body: a decimal integer, and at most `n_max`.
///
/// # Errors
///
/// `invalid-argument` for what is not a decimal integer (ASCII digits, one sign at most) or is
/// longer than 64 bytes; `out-of-range` for an integer below 0 or above `n_max`.
pub fn parse_n(body: &[u8], n_max: u32) -> Result<u32, RemoteError> {
    let text = match str::from_utf8(body) {
        Ok(text) if text.len() <= NUMBER_BODY_MAX => text,
        _ => return Err(not_a_number(body)),
    };
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(not_a_number(body));
    }
    // All digits, so the only way left to fail is a number that does not fit.
    match text.parse::<i128>().map(u32::try_from) {
        Ok(Ok(n)) if n <= n_max => Ok(n),
        _ => Err(RemoteError::out_of_range(format!(
            "n = {text} is out of range: this server computes fib(0) to fib({n_max})"
        ))),
    }
}

fn not_a_number(body: &[u8]) -> RemoteError {
    /// How much of a stranger's body an error message repeats, in bytes.
    const SHOWN_MAX: usize = 32;
    let shown = body[..body.len().min(SHOWN_MAX)].escape_ascii();
    let ellipsis = if body.len() > SHOWN_MAX { "..." } else { "" };
    RemoteError::invalid_argument(format!(
        "the request must be a decimal integer of at most {NUMBER_BODY_MAX} bytes, \
         not \"{shown}{ellipsis}\" ({} bytes)",
        body.len()
    ))
}

/// Where a reply goes and how its receiver recognizes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ReturnAddress<'a> {
    /// The routing key of the reply, verbatim.
    pub reply_to: &'a [u8],
    /// The request's correlation id, or else its message id, verbatim.
    pub correlation_id: Option<&'a [u8]>,
}

/// The return address of a request; `None` if it has no `reply_to`, so that nobody waits.
pub(crate) fn return_address<'a>(properties: &Received<'a>) -> Option<ReturnAddress<'a>> {
    let reply_to = properties.reply_to.filter(|name| !name.is_empty())?;
    Some(ReturnAddress {
        reply_to,
        correlation_id: properties.correlation_id.or(properties.message_id),
    })
}

/// The properties of a reply to `address`, and its body.
pub(crate) fn encode_reply<'a>(
    address: &ReturnAddress<'a>,
    outcome: &'a Result<Vec<u8>, RemoteError>,
) -> (Properties<'a>, &'a [u8]) {
    let mut properties = Properties {
        content_type: Some(TEXT_PLAIN),
        correlation_id: address.correlation_id,
        ..Properties::default()
    };
    match outcome {
        Ok(body) => (properties, body),
        Err(error) => {
            properties.header =
                Some((ERROR_KIND_HEADER.as_bytes(), error.kind.as_str().as_bytes()));
            (properties, error.message.as_bytes())
        }
    }
}

/// The longest message, in bytes: RabbitMQ's own limit (`max_message_size`) unless configured
/// otherwise. Above it, the broker closes the channel.
pub(crate) const MESSAGE_MAX: usize = 128 << 20;

/// Passes on a handler's result, if it can travel as one.
pub(crate) fn check_result(result: Vec<u8>) -> Result<Vec<u8>, RemoteError> {
    match result.len() {
        // To callers, an empty reply means that the server failed.
        0 => Err(RemoteError::internal("the handler's result is empty")),
        1..=MESSAGE_MAX => Ok(result),
        len => Err(RemoteError::internal(format!(
            "the handler's result has {len} bytes, and the broker takes {MESSAGE_MAX}"
        ))),
    }
}

/// What a reply says. An empty body is an error, never a result.
pub(crate) fn decode_reply(
    properties: &Received<'_>,
    body: Vec<u8>,
) -> Result<Vec<u8>, RemoteError> {
    match properties.header(ERROR_KIND_HEADER) {
        Some(HeaderValue::LongString(kind)) => Err(RemoteError {
            kind: RemoteErrorKind::from_header(&String::from_utf8_lossy(kind)),
            message: String::from_utf8_lossy(&body).into_owned(),
        }),
        Some(HeaderValue::Other) => Err(RemoteError {
            kind: RemoteErrorKind::Other("unknown".to_owned()),
            message: String::from_utf8_lossy(&body).into_owned(),
        }),
        None if body.is_empty() => Err(RemoteError {
            kind: RemoteErrorKind::Other("unspecified".to_owned()),
            message: "the reply is empty, which is how some servers say that they failed"
                .to_owned(),
        }),
        None => Ok(body),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind_of(body: &[u8]) -> Result<u32, RemoteErrorKind> {
        parse_n(body, 186).map_err(|error| error.kind)
    }

    #[test]
    fn a_decimal_integer_in_range_is_accepted() {
        assert_eq!(kind_of(b"0"), Ok(0));
        assert_eq!(kind_of(b"186"), Ok(186));
        assert_eq!(kind_of(b"+30"), Ok(30));
        assert_eq!(kind_of(b"00030"), Ok(30));
        assert_eq!(kind_of(b"-0"), Ok(0));
    }

    #[test]
    fn what_is_not_a_decimal_integer_is_an_invalid_argument() {
        for body in [
            &b""[..],
            b"-",
            b"+",
            b"abc",
            b"30 ",
            b" 30",
            b"3.0",
            b"1e3",
            b"0x1e",
            b"--3",
        ] {
            assert_eq!(
                kind_of(body),
                Err(RemoteErrorKind::InvalidArgument),
                "{body:?}"
            );
        }
        assert_eq!(
            kind_of("３０".as_bytes()),
            Err(RemoteErrorKind::InvalidArgument)
        );
        assert_eq!(
            kind_of(&[0xff, 0xfe]),
            Err(RemoteErrorKind::InvalidArgument)
        );
        assert_eq!(kind_of(&[b'1'; 65]), Err(RemoteErrorKind::InvalidArgument));
    }

    #[test]
    fn an_integer_that_the_server_refuses_is_out_of_range() {
        for body in [&b"-1"[..], b"187", b"4294967296", &[b'9'; 64]] {
            assert_eq!(kind_of(body), Err(RemoteErrorKind::OutOfRange), "{body:?}");
        }
    }

    #[test]
    fn an_error_message_repeats_little_of_a_huge_body() {
        let error = parse_n(&[0; 1 << 20], 45).unwrap_err();
        assert!(error.message.len() < 300, "{}", error.message.len());
        assert!(error.message.contains("1048576 bytes"), "{}", error.message);
    }

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
        assert_eq!(
            return_address(&received),
            Some(ReturnAddress {
                reply_to: b"q",
                correlation_id: Some(b"m")
            })
        );
        let received = Received {
            correlation_id: Some(b"c"),
            ..received
        };
        assert_eq!(
            return_address(&received).unwrap().correlation_id,
            Some(&b"c"[..])
        );
    }

    #[test]
    fn an_empty_reply_is_a_remote_error() {
        assert!(decode_reply(&Received::default(), Vec::new()).is_err());
    }

    proptest! {
        #[test]
        fn every_number_in_range_reads_back(n in 0..=186_u32) {
            prop_assert_eq!(kind_of(n.to_string().as_bytes()), Ok(n));
        }

        #[test]
        fn no_body_makes_the_parser_panic(body: Vec<u8>) {
            let _ = parse_n(&body, 186);
        }
    }
}
