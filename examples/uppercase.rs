//! A function of your own over RPC: a server and a client.
//!
//! ```text
//! scripts/broker with-broker cargo run --example uppercase
//! ```

use fibrpc::{Client, HandlerError, RemoteError, Request, Server};

/// What the server does. It runs in several threads at once, and may run twice for one request.
fn uppercase(request: &Request) -> Result<String, HandlerError> {
    let text = str::from_utf8(request.body())?; // any error: kind `internal`
    if text.is_empty() {
        Err(RemoteError::new("no-text", "there is nothing to do"))?; // a kind of your own
    }
    Ok(text.to_uppercase())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = std::env::var("AMQP_URL").unwrap_or("amqp://localhost".to_owned());

    // The server: back when every worker is ready.
    let serving = Server::new(&broker)?
        .queue("uppercase")
        .workers(2)
        .start(uppercase)?;

    // The client: cheap to clone, shared by threads, for any number of queues.
    let client = Client::new(&broker)?;
    let reply = client.call("uppercase", "grüße")?;
    println!("{}", String::from_utf8(reply.body)?);
    match client.call("uppercase", "") {
        Err(error) => println!("{error}"),
        Ok(reply) => println!("unexpected: {reply:?}"),
    }

    let stats = serving.stop()?; // answers what it has begun; so does dropping it
    println!("{} answered, {} refused", stats.answered, stats.refused);
    Ok(())
}
