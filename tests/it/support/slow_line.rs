//! A slow line to the broker.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// A proxy in front of a broker that passes on so many bytes a second to the broker, for each
/// connection; and everything at once the other way.
pub struct SlowLine {
    /// The broker's URL, by way of this line.
    pub url: String,
}

impl SlowLine {
    pub fn start(url: &str, bytes_per_second: usize) -> SlowLine {
        let mut url = url::Url::parse(url).unwrap();
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.unwrap_or("localhost").to_owned();
        let broker = (host, url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        // Its threads end with the connections, and with the test.
        thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), TcpStream::connect(broker.clone()).unwrap());
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                thread::spawn(move || pass_on(&near, &far, Some(bytes_per_second)));
                thread::spawn(move || pass_on(&back.0, &back.1, None));
            }
        });
        SlowLine { url: url.into() }
    }
}

/// Passes on what is read, until one side has closed the connection.
fn pass_on(mut from: &TcpStream, mut to: &TcpStream, bytes_per_second: Option<usize>) {
    to.set_nodelay(true).unwrap();
    // A hundredth of a second's.
    let mut bytes = vec![0; bytes_per_second.map_or(64 << 10, |rate| rate / 100)];
    let mut ready_at = Instant::now();
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        if let Some(rate) = bytes_per_second {
            let now = Instant::now();
            ready_at = ready_at.max(now) + Duration::from_secs_f64(len as f64 / rate as f64);
            thread::sleep(ready_at - now);
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
