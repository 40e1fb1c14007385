//! A slow line to the broker.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A proxy in front of a broker. Of each connection, it passes on so many bytes a second to the
/// broker, and unless told otherwise everything at once the other way. After a pause it takes its
/// time to begin, as a radio does.
pub struct SlowLine {
    /// The broker's URL, by way of this line.
    pub url: String,
    passed: Arc<AtomicUsize>,
}

impl SlowLine {
    pub fn start(url: &str, bytes_per_second: usize, begins_after: Duration) -> SlowLine {
        SlowLine::open(url, (bytes_per_second, begins_after), None)
    }

    /// One that is slow both ways.
    pub fn both_ways(url: &str, bytes_per_second: usize) -> SlowLine {
        let slowly = (bytes_per_second, Duration::ZERO);
        SlowLine::open(url, slowly, Some(slowly))
    }

    fn open(url: &str, there: Slowly, back: Option<Slowly>) -> SlowLine {
        let mut url = url::Url::parse(url).unwrap();
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.unwrap_or("localhost").to_owned();
        let broker = (host, url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let passed = Arc::new(AtomicUsize::new(0));
        let line = Arc::clone(&passed);
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        // Its threads end with the connections, and with the test.
        thread::spawn(move || {
            for near in listener.incoming() {
                // Without a broker, the connection is closed.
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(broker.clone())) else {
                    continue;
                };
                let (from, to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let line = Arc::clone(&line);
                thread::spawn(move || pass_on(&near, &far, Some(there), &line));
                thread::spawn(move || pass_on(&from, &to, back, &AtomicUsize::new(0)));
            }
        });
        let url = url.into();
        SlowLine { url, passed }
    }

    /// How much it has passed on to the broker, in bytes.
    pub fn passed(&self) -> usize {
        self.passed.load(Ordering::Relaxed)
    }
}

/// So many bytes a second, and how long it takes to begin.
type Slowly = (usize, Duration);

/// Passes on what is read, until one side has closed the connection.
fn pass_on(mut from: &TcpStream, mut to: &TcpStream, slowly: Option<Slowly>, passed: &AtomicUsize) {
    let _ = to.set_nodelay(true);
    let mut bytes = vec![0; 16 << 10];
    let mut ready_at = Instant::now();
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        if let Some((rate, begins_after)) = slowly {
            let now = Instant::now();
            if now > ready_at + begins_after {
                ready_at = now + begins_after;
            }
            ready_at += Duration::from_secs_f64(len as f64 / rate as f64);
            thread::sleep(ready_at.saturating_duration_since(now));
            passed.fetch_add(len, Ordering::Relaxed);
        }
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
