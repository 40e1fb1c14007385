//! Typed requests and replies: a function from one type to another, served and called as JSON.
//!
//! ```text
//! scripts/broker with-broker cargo run --features json --example json
//! ```

use fibrpc::{Client, RemoteError, Server, json};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Order {
    item: String,
    count: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Price {
    cents: u64,
}

fn price(order: Order) -> Result<Price, RemoteError> {
    match order.item.as_str() {
        "tea" => Ok(Price {
            cents: 250 * u64::from(order.count),
        }),
        item => Err(RemoteError::new(
            "no-such-item",
            format!("there is no '{item}'"),
        )),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let broker = std::env::var("AMQP_URL").unwrap_or("amqp://localhost".to_owned());
    let serving = Server::new(&broker)?
        .queue("price")
        .start(json::handler(price))?;

    let client = Client::new(&broker)?;
    let order = Order {
        item: "tea".to_owned(),
        count: 3,
    };
    let price: Price = client.request("price").send_json(&order)?.json()?;
    println!("{price:?}");

    // What cannot be read is the caller's error, and says which field it is.
    match client.call("price", r#"{"item": "tea", "count": "three"}"#) {
        Err(error) => println!("{error}"),
        Ok(reply) => println!("unexpected: {reply:?}"),
    }

    serving.stop()?;
    Ok(())
}
