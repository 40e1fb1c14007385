//! Headers: names and values that travel beside a body.

use crate::amqp::frame::SHORT_STRING_MAX;
use crate::amqp::incoming::{FieldValue, Table};
use std::fmt;

/// How long the headers of a message may be on the wire, in bytes. They travel in one frame,
/// and RabbitMQ's frames have 128 KiB unless configured otherwise.
pub(crate) const HEADERS_MAX: usize = 64 << 10;

/// What a field takes on the wire beside its name and value, in bytes: their lengths, one and four,
/// and the type.
const FIELD_OVERHEAD: usize = 6;

/// The header that marks a reply as an error. A client that does not know it prints the reply's
/// body, which is a sentence.
pub(crate) const ERROR_KIND: &str = "x-error-kind";

/// Headers that are not for the user: ours, and two that have RabbitMQ send copies elsewhere.
/// Source: <https://www.rabbitmq.com/docs/sender-selected>.
const RESERVED: [&str; 3] = [ERROR_KIND, "CC", "BCC"];

/// Names and values that travel beside the body of a request or a reply, in their order.
///
/// What we send are strings. Of what another library has sent, strings, numbers and booleans are
/// shown here as text; times, bytes, tables and arrays are not.
///
/// They are made from pairs, too: `[("a", "1"), ("b", "2")].into_iter().collect()`.
///
/// ```
/// let mut headers = fibrpc::Headers::new();
/// headers.insert("traceparent", "00-1-2-01");
/// assert_eq!(headers.get("traceparent"), Some("00-1-2-01"));
/// assert_eq!(headers.get("other"), None);
/// assert_eq!(headers.iter().collect::<Vec<_>>(), [("traceparent", "00-1-2-01")]);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// No headers yet.
    pub fn new() -> Headers {
        Headers::default()
    }

    /// The value under a name, which is case-sensitive; the first, if a peer has sent several.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    /// Sets the value under a name; one that is there already is replaced. A name has 1 to 255
    /// bytes; `x-error-kind` is reserved, and so are `CC` and `BCC`, by which RabbitMQ sends copies
    /// to other queues; all names and values, and 6 bytes more for each, have at most 64 KiB together.
    ///
    /// That is checked when the headers are sent: a request then ends with
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument), a response becomes an error of
    /// kind `internal`. Source: <https://www.rabbitmq.com/docs/sender-selected>.
    ///
    /// ```
    /// let mut headers = fibrpc::Headers::new();
    /// headers.insert("x-version", "2");
    /// headers.insert("x-version", "3");
    /// assert_eq!((headers.get("x-version"), headers.len()), (Some("3"), 1));
    /// assert_eq!(headers.get("X-Version"), None);
    /// ```
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        match self.0.iter_mut().find(|(key, _)| *key == name) {
            Some(field) => field.1 = value,
            None => self.0.push((name, value)),
        }
    }

    /// All names and values, in their order: as set, or as received.
    ///
    /// ```
    /// let headers: fibrpc::Headers = [("b", "1"), ("a", "2")].into_iter().collect();
    /// let names: Vec<_> = headers.iter().map(|(name, _)| name).collect();
    /// assert_eq!(names, ["b", "a"]);
    /// ```
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What can be shown of a field table.
    pub(crate) fn read(table: Table<'_>) -> Headers {
        Headers(
            table
                .filter_map(|(name, value)| {
                    let value = match value {
                        FieldValue::Text(text) => String::from_utf8_lossy(text).into_owned(),
                        FieldValue::Integer(number) => number.to_string(),
                        FieldValue::Float(number) => number.to_string(),
                        FieldValue::Boolean(boolean) => boolean.to_string(),
                        FieldValue::Other => return None,
                    };
                    Some((String::from_utf8_lossy(name).into_owned(), value))
                })
                .collect(),
        )
    }

    /// Those whose names can be sent, as they came.
    pub(crate) fn sendable(&self) -> Headers {
        let fields = self.0.iter().filter(|(name, _)| check_name(name).is_ok());
        Headers(fields.cloned().collect())
    }

    /// Headers as they lie on the wire.
    pub(crate) fn fields(&self) -> &[(String, String)] {
        &self.0
    }

    /// Whether they can be sent; if not, why.
    pub(crate) fn check(&self) -> Result<(), InvalidHeaders> {
        let mut total = 0;
        for (name, value) in self.iter() {
            total += name.len() + value.len() + FIELD_OVERHEAD;
            check_name(name)?;
        }
        match total {
            0..=HEADERS_MAX => Ok(()),
            _ => Err(InvalidHeaders(format!(
                "the headers have {total} bytes; at most {HEADERS_MAX} can be sent, so put the \
                 rest into the body"
            ))),
        }
    }
}

/// Whether a header of that name can be sent; if not, why.
fn check_name(name: &str) -> Result<(), InvalidHeaders> {
    if name.is_empty() {
        Err(InvalidHeaders("a header's name is empty".to_owned()))
    } else if name.len() > SHORT_STRING_MAX {
        Err(InvalidHeaders(format!(
            "the header '{}...' has a name of {} bytes; AMQP allows {SHORT_STRING_MAX}",
            name.chars().take(20).collect::<String>(),
            name.len()
        )))
    } else if RESERVED.contains(&name) {
        Err(InvalidHeaders(format!(
            "the header '{name}' is reserved; choose another name"
        )))
    } else {
        Ok(())
    }
}

/// As by [`Headers::insert`] one after the other: of a name that comes twice, the last value
/// counts.
impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(fields: I) -> Headers {
        let mut headers = Headers::new();
        for (name, value) in fields {
            headers.insert(name, value);
        }
        headers
    }
}

/// Why headers cannot be sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InvalidHeaders(String);

impl fmt::Display for InvalidHeaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_set_once() {
        let headers: Headers = [("a", "1"), ("b", "2"), ("a", "3")].into_iter().collect();
        assert_eq!(headers.iter().collect::<Vec<_>>(), [("a", "3"), ("b", "2")]);
    }

    #[test]
    fn what_cannot_be_sent_is_named() {
        for (name, value, expected) in [
            ("", "1", "empty"),
            (&*"n".repeat(256), "1", "256 bytes"),
            (ERROR_KIND, "internal", "x-error-kind"),
            ("CC", "elsewhere", "'CC' is reserved"),
            ("n", &*"v".repeat(HEADERS_MAX), "65543 bytes"),
        ] {
            let headers: Headers = [(name, value)].into_iter().collect();
            let said = headers.check().unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
        let longest = "v".repeat(HEADERS_MAX - 255 - FIELD_OVERHEAD);
        let headers: Headers = [("n".repeat(255), longest)].into_iter().collect();
        assert_eq!(headers.check(), Ok(()));
        // Many short ones are long together.
        let short = (0..16_000).map(|number| (format!("{number:x}"), ""));
        assert!(short.collect::<Headers>().check().is_err());
    }
}
