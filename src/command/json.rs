//! What the JSON of several commands has in common.

use crate::command::exit::class;
use fibrpc::Error;
use serde::Serialize;
use std::time::Duration;

/// An error in JSON.
#[derive(Serialize)]
pub struct JsonError {
    kind: &'static str,
    /// The kind that the server gave it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_kind: Option<String>,
    message: String,
}

impl JsonError {
    pub fn usage(reason: &str) -> JsonError {
        JsonError {
            kind: "usage",
            remote_kind: None,
            message: reason.to_owned(),
        }
    }
}

impl From<&Error> for JsonError {
    fn from(error: &Error) -> JsonError {
        JsonError {
            kind: class(error).0,
            remote_kind: match error {
                Error::Remote(remote) => Some(remote.kind().to_owned()),
                _ => None,
            },
            message: error.to_string(),
        }
    }
}

/// A time in JSON.
pub fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1000.0
}
