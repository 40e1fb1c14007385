//! A server that calls another, with what is left of its caller's time, and hands the trace on.
//!
//! ```text
//! scripts/broker with-broker cargo run --example relay
//! ```

use fibrpc::{Client, HandlerError, RemoteError, Reply, Request, Response, Server};
use std::time::Duration;

/// Headers of W3C's trace context. Source: <https://www.w3.org/TR/trace-context/>.
const TRACE_HEADERS: [&str; 2] = ["traceparent", "tracestate"];

/// What is left for the way back, once the other server has answered.
const WAY_BACK: Duration = Duration::from_millis(50);

/// Asks the server behind us on behalf of our caller.
fn relay(client: &Client, request: &Request) -> Result<Reply, HandlerError> {
    let mut onward = client.request("greet");
    for name in TRACE_HEADERS {
        if let Some(value) = request.header(name) {
            onward = onward.header(name, value);
        }
    }
    // A caller that has not said how long it waits gets the client's own timeout.
    if let Some(time) = request.time_left() {
        let time = time.checked_sub(WAY_BACK).filter(|time| !time.is_zero());
        onward = onward.timeout(time.ok_or("there is no time left to ask")?);
    }
    // An error of the server behind us is passed on as it is, and no answer as a kind of its own.
    match onward.send(request.body()) {
        Ok(reply) => Ok(reply),
        Err(fibrpc::Error::Remote(error)) => Err(error.into()),
        Err(other) => Err(RemoteError::new("no-answer", other.to_string()).into()),
    }
}

fn greet(request: &Request) -> Result<Response, HandlerError> {
    let name = str::from_utf8(request.body())?;
    println!(
        "greet has {} and {}",
        request.header("traceparent").unwrap_or("no trace"),
        match request.time_left() {
            Some(time) if time < Duration::from_secs(2) => "less than 2 s",
            _ => "more",
        }
    );
    Ok(Response::new(format!("hello, {name}")).with_header("x-served-by", "greet"))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = std::env::var("AMQP_URL").unwrap_or("amqp://localhost".to_owned());
    let greeting = Server::new(&broker)?.queue("greet").start(greet)?;
    let behind = Client::new(&broker)?;
    let relaying = Server::new(&broker)?
        .queue("relay")
        .start(move |request: &Request| relay(&behind, request))?;

    let reply = Client::new(&broker)?
        .request("relay")
        .header(
            "traceparent",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        )
        .timeout(Duration::from_secs(2))
        .send("ada")?;
    println!(
        "{} (by {})",
        String::from_utf8_lossy(&reply.body),
        reply.header("x-served-by").unwrap_or("nobody")
    );

    relaying.stop()?;
    greeting.stop()?;
    Ok(())
}
