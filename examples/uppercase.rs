//! A function of your own over RPC: a server and a client in a page.
//!
//! ```text
//! scripts/broker with-broker cargo run --example uppercase
//! ```

use crossbeam_channel::bounded;
use fibrpc::{Client, ClientConfig, Endpoints, RemoteError, Request, Server, ServerConfig};
use std::error::Error;
use std::{env, str, thread};

/// What the server does. It runs in several threads at once, and may run twice for one request:
/// a server may die after its answer and before its acknowledgement.
fn uppercase(request: Request) -> Result<Vec<u8>, RemoteError> {
    let text = str::from_utf8(&request.body)
        .map_err(|error| RemoteError::invalid_argument(format!("not a text: {error}")))?;
    Ok(text.to_uppercase().into_bytes())
}

fn main() -> Result<(), Box<dyn Error>> {
    let endpoints = match env::var("AMQP_URL") {
        Ok(url) => url.parse()?,
        Err(_) => Endpoints::default(),
    };

    let mut config = ServerConfig::default();
    config.endpoints = endpoints.clone();
    config.queue = "uppercase".to_owned();
    config.workers = 2;
    let server = Server::new(config)?;
    // Dropping `stop` tells the server to stop. It says when it is ready.
    let (stop, stopped) = bounded::<()>(0);
    let (ready, is_ready) = bounded(1);
    let serving = thread::spawn(move || server.run(uppercase, || _ = ready.try_send(()), stopped));
    is_ready.recv()?;

    let mut config = ClientConfig::default();
    config.endpoints = endpoints;
    config.queue = "uppercase".to_owned();
    let client = Client::new(config)?;
    let answer = client.call("grüße".as_bytes())?;
    println!("{}", String::from_utf8(answer)?);
    // An error of the handler is an error of the call.
    match client.call(&[0xff]) {
        Err(error) => println!("{error}"),
        Ok(answer) => println!("unexpected: {answer:?}"),
    }

    drop(stop);
    let stats = serving.join().expect("the server does not panic")?;
    println!("{} answered, {} refused", stats.answered, stats.refused);
    Ok(())
}
