//! Requests and replies as JSON: values that [serde](https://serde.rs) reads and writes. With the
//! feature `json`.
//!
//! [`handler`] makes a handler of a function from one type to another. A handler that needs headers
//! or the time left as well is an ordinary one, and reads its body by [`Request::json`]. A client
//! sends by [`RequestBuilder::send_json`] and reads by [`Reply::json`]; [`Calls`](crate::Calls)
//! take `client.request(queue).content_type("application/json").body(serde_json::to_vec(&value)?)`.
//!
//! A server around a function from one type to another, and a call of it:
//!
//! ```no_run
//! use fibrpc::{Client, RemoteError, Server, json};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Division {
//!     dividend: i64,
//!     divisor: i64,
//! }
//!
//! fn divide(division: Division) -> Result<i64, RemoteError> {
//!     division
//!         .dividend
//!         .checked_div(division.divisor)
//!         .ok_or_else(|| RemoteError::new("no-quotient", "the quotient is not an integer"))
//! }
//!
//! let serving = Server::new("amqp://localhost")?
//!     .queue("divide")
//!     .start(json::handler(divide))?;
//!
//! let client = Client::new("amqp://localhost")?;
//! let division = Division { dividend: 42, divisor: 6 };
//! let quotient: i64 = client.request("divide").send_json(&division)?.json()?;
//! assert_eq!(quotient, 7);
//! # Ok::<(), fibrpc::Error>(())
//! ```

use crate::client::calls::RequestBuilder;
use crate::error::Error;
use crate::message::{HandlerError, RemoteError, Reply, Response};
use crate::server::request::Request;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The media type of JSON. Source: RFC 8259, section 11.
const APPLICATION_JSON: &str = "application/json";

/// Makes a handler, for [`Server::start`](crate::Server::start), of a function from one type to
/// another.
///
/// A body that cannot be read as a `T` is answered with an error of kind `invalid-argument` that
/// names the field; what the request says of its content type does not matter. The reply's content
/// type is `application/json`. The function's error is answered like that of any handler: a
/// [`RemoteError`] as it is, any other as `internal`, as is a result that cannot be written as
/// JSON.
///
/// The function runs in several threads at once and must be idempotent, as
/// [`Server::start`](crate::Server::start) says.
///
/// A closure has to say what its error is, since nothing else does:
///
/// ```
/// use fibrpc::{HandlerError, Request, json};
///
/// let handler = json::handler(|words: Vec<String>| Ok::<_, HandlerError>(words.concat()));
/// let response = handler(&Request::new(r#"["a","b"]"#)).unwrap();
/// assert_eq!(response.body(), br#""ab""#);
///
/// let error = handler(&Request::new(r#"["a",2]"#)).unwrap_err();
/// assert!(error.to_string().contains("at [1]"), "{error}");
/// ```
pub fn handler<T, U, E>(
    function: impl Fn(T) -> Result<U, E> + Send + Sync + 'static,
) -> impl Fn(&Request) -> Result<Response, HandlerError> + Send + Sync + 'static
where
    T: DeserializeOwned,
    U: Serialize,
    E: Into<HandlerError>,
{
    move |request| {
        let argument = request.json()?;
        let result = function(argument).map_err(Into::into)?;
        Ok(Response::json(&result)?)
    }
}

impl Request {
    /// Reads the body as JSON, whatever its content type. With the feature `json`.
    ///
    /// # Errors
    ///
    /// Of kind `invalid-argument`: which field cannot be read, and why. A handler passes it on by
    /// `?`.
    ///
    /// ```
    /// use fibrpc::Request;
    /// use serde::Deserialize;
    ///
    /// #[derive(Debug, Deserialize)]
    /// struct Order {
    ///     item: Item,
    /// }
    /// #[derive(Debug, Deserialize)]
    /// struct Item {
    ///     count: u32,
    /// }
    ///
    /// let order: Order = Request::new(r#"{"item":{"count":3}}"#).json()?;
    /// assert_eq!(order.item.count, 3);
    ///
    /// let error = Request::new(r#"{"item":{"count":"3"}}"#).json::<Order>().unwrap_err();
    /// assert_eq!(error.kind(), "invalid-argument");
    /// assert!(error.message().contains("item.count"), "{error}");
    /// # Ok::<(), fibrpc::RemoteError>(())
    /// ```
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, RemoteError> {
        read(self.body()).map_err(|reason| {
            RemoteError::invalid_argument(format!("the request cannot be read as JSON: {reason}"))
        })
    }
}

impl Response {
    /// A response that holds a value as JSON, of content type `application/json`: for a handler
    /// that also wants to see the headers, or to set some. With the feature `json`.
    ///
    /// # Errors
    ///
    /// Of kind `internal`: the value cannot be written as JSON.
    ///
    /// ```
    /// use fibrpc::{HandlerError, Request, Response};
    ///
    /// fn double(request: &Request) -> Result<Response, HandlerError> {
    ///     let number: i64 = request.json()?;
    ///     Ok(Response::json(&(2 * number))?.with_header("x-version", "3"))
    /// }
    ///
    /// assert_eq!(double(&Request::new("21")).unwrap().body(), b"42");
    /// ```
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<Response, RemoteError> {
        let body = serde_json::to_vec(value).map_err(|error| {
            RemoteError::internal(format!("the response cannot be written as JSON: {error}"))
        })?;
        Ok(Response::new(body).with_content_type(APPLICATION_JSON))
    }
}

impl RequestBuilder<'_> {
    /// Sets the body to a value as JSON, and the content type to `application/json` unless one was
    /// set: for [`Calls`](crate::Calls) and [`Client::call_many`](crate::Client::call_many). With
    /// the feature `json`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidArgument`]: the value cannot be written as JSON.
    ///
    /// ```no_run
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let mut calls = client.calls();
    /// for number in [1, 2, 3] {
    ///     calls.submit(number, client.request("double").json_body(&number)?);
    /// }
    /// for answer in calls {
    ///     println!("{} doubled is {}", answer.key, answer.result?.json::<i64>()?);
    /// }
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn json_body<T: Serialize + ?Sized>(self, value: &T) -> Result<Self, Error> {
        let body = serde_json::to_vec(value).map_err(|error| {
            Error::InvalidArgument(format!("the request cannot be written as JSON: {error}"))
        })?;
        Ok(self.content_type_unless_set(APPLICATION_JSON).body(body))
    }

    /// Sends the request with a value as its body, of content type `application/json` unless it
    /// says otherwise, and waits for the reply. Blocks for at most the timeout. With the feature
    /// `json`.
    ///
    /// # Errors
    ///
    /// As of [`RequestBuilder::send`]; and [`Error::InvalidArgument`] also if the value cannot be
    /// written as JSON.
    ///
    /// ```no_run
    /// let client = fibrpc::Client::new("amqp://localhost")?;
    /// let reply = client.request("join").send_json(&["a", "b"])?;
    /// assert_eq!(reply.json::<String>()?, "ab");
    /// # Ok::<(), fibrpc::Error>(())
    /// ```
    pub fn send_json<T: Serialize + ?Sized>(self, value: &T) -> Result<Reply, Error> {
        self.json_body(value)?.wait()
    }
}

impl Reply {
    /// Reads the body as JSON, whatever its content type. With the feature `json`.
    ///
    /// # Errors
    ///
    /// [`Error::UnreadableReply`]: which field cannot be read, and why.
    ///
    /// ```
    /// use fibrpc::{Error, Reply};
    ///
    /// let mut reply = Reply::default();
    /// reply.body = b"[1,2]".to_vec();
    /// assert_eq!(reply.json::<Vec<u32>>()?, [1, 2]);
    /// assert!(matches!(reply.json::<String>(), Err(Error::UnreadableReply { .. })));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Error> {
        read(&self.body).map_err(|reason| Error::UnreadableReply {
            reason: format!("it is not the JSON that was expected: {reason}"),
        })
    }
}

/// Reads JSON; says where it is wrong.
fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            // The value as a whole, or its text.
            "." => error.inner().to_string(),
            path => format!("at {path}: {}", error.inner()),
        }
    })?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}
