//! What the tutorial's server and client share: the way to the broker, and the name of the queue.

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use percent_encoding::percent_decode_str;
use std::env;
use std::error::Error;
use url::Url;

/// Where requests wait for a server.
pub fn queue() -> String {
    env::var("FIBRPC_QUEUE").unwrap_or("rpc_queue".to_owned())
}

/// A connection to the broker that `AMQP_URL` names, or else to the one on this machine.
pub fn connect() -> Result<Connection, Box<dyn Error>> {
    let url = env::var("AMQP_URL").unwrap_or("amqp://guest:guest@localhost:5672/".to_owned());
    let url = Url::parse(&url)?;

    let socket = std::net::TcpStream::connect(&*url.socket_addrs(|| Some(5672))?)?;
    // A message may leave in two small packets. Without this, the kernel then keeps the second one
    // until the broker's kernel has confirmed the first, and that one takes its time: the call takes
    // 44 ms instead of 1.
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?; // amiquip waits for it in a thread of its own

    let decode = |part| percent_decode_str(part).decode_utf8_lossy().into_owned();
    let auth = match url.password() {
        Some(password) => Auth::Plain {
            username: decode(url.username()),
            password: decode(password),
        },
        None => Auth::default(), // guest
    };
    let vhost = match url.path() {
        "" | "/" => "/".to_owned(),
        path => decode(&path[1..]),
    };
    Ok(Connection::insecure_open_stream(
        mio::net::TcpStream::from_stream(socket)?,
        ConnectionOptions::default().auth(auth).virtual_host(vhost),
        ConnectionTuning::default(),
    )?)
}
