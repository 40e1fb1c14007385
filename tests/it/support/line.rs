//! A line to the broker, in any weather.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a line that is silent looks whether it still is.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// A proxy in front of a broker. Unless told otherwise, it passes on everything at once.
pub struct Line {
    /// The broker's URL, by way of this line.
    pub url: String,
    to_broker: Arc<Way>,
    from_broker: Arc<Way>,
}

/// What is wrong with one way of a line.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    /// Of each connection, so many bytes a second are passed on.
    pub rate: Option<usize>,
    /// After a pause it takes its time to begin, as a radio does.
    pub begins_after: Duration,
    /// What is read is held for so long before it is passed on.
    pub delay: Duration,
    /// At most so many bytes are passed on in one piece.
    pub piece: Option<usize>,
    /// Nothing is passed on, and nothing read.
    pub silent: bool,
    /// After so many bytes more, the connection that they belong to is cut.
    pub cut_after: Option<usize>,
}

impl Weather {
    pub fn slow(bytes_per_second: usize, begins_after: Duration) -> Weather {
        Weather {
            rate: Some(bytes_per_second),
            begins_after,
            ..Weather::default()
        }
    }
}

/// One way of a line.
#[derive(Default)]
struct Way {
    weather: Mutex<Weather>,
    passed: AtomicUsize,
}

impl Line {
    /// One on which nothing is wrong, yet.
    pub fn open(url: &str) -> Line {
        let mut url = url::Url::parse(url).unwrap();
        let host = url.host_str().filter(|host| !host.is_empty());
        let host = host.unwrap_or("localhost").to_owned();
        let broker = (host, url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        let line = Line {
            url: url.into(),
            to_broker: Arc::default(),
            from_broker: Arc::default(),
        };
        let (there, back) = (Arc::clone(&line.to_broker), Arc::clone(&line.from_broker));
        // Its threads end with the connections, and with the test.
        thread::spawn(move || {
            for near in listener.incoming() {
                // Without a broker, the connection is closed.
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(broker.clone())) else {
                    continue;
                };
                let (from, to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let (there, back) = (Arc::clone(&there), Arc::clone(&back));
                thread::spawn(move || there.pass_on(&near, &far));
                thread::spawn(move || back.pass_on(&from, &to));
            }
        });
        line
    }

    /// One that is slow on the way to the broker.
    pub fn slow(url: &str, bytes_per_second: usize, begins_after: Duration) -> Line {
        let line = Line::open(url);
        line.set_to_broker(Weather::slow(bytes_per_second, begins_after));
        line
    }

    pub fn set_to_broker(&self, weather: Weather) {
        *self.to_broker.weather() = weather;
    }

    pub fn set_from_broker(&self, weather: Weather) {
        *self.from_broker.weather() = weather;
    }

    /// How much it has passed on to the broker, in bytes.
    pub fn passed(&self) -> usize {
        self.to_broker.passed.load(Ordering::Relaxed)
    }
}

impl Way {
    fn weather(&self) -> MutexGuard<'_, Weather> {
        self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what is read, until one side has closed the connection, or it is cut.
    fn pass_on(&self, mut from: &TcpStream, to: &TcpStream) {
        let _ = to.set_nodelay(true);
        let mut bytes = vec![0; 16 << 10];
        let mut ready_at = Instant::now();
        loop {
            self.await_sound();
            let Ok(len @ 1..) = from.read(&mut bytes) else {
                break;
            };
            // It may have fallen silent while there was nothing to read.
            self.await_sound();
            let weather = *self.weather();
            if let Some(rate) = weather.rate {
                let now = Instant::now();
                if now > ready_at + weather.begins_after {
                    ready_at = now + weather.begins_after;
                }
                ready_at += Duration::from_secs_f64(len as f64 / rate as f64);
                thread::sleep(ready_at.saturating_duration_since(now));
            }
            thread::sleep(weather.delay);
            let kept = self.cut(len);
            if !self.write(to, &bytes[..kept], weather.piece) || kept < len {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    fn await_sound(&self) {
        while self.weather().silent {
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// How much of `len` bytes is passed on: less, if the line is cut within them.
    fn cut(&self, len: usize) -> usize {
        let mut weather = self.weather();
        match weather.cut_after {
            Some(left) if left < len => {
                weather.cut_after = None;
                left
            }
            left => {
                weather.cut_after = left.map(|left| left - len);
                len
            }
        }
    }

    /// Writes it, in pieces; whether that could be done.
    fn write(&self, mut to: &TcpStream, bytes: &[u8], piece: Option<usize>) -> bool {
        bytes.chunks(piece.unwrap_or(usize::MAX)).all(|piece| {
            self.passed.fetch_add(piece.len(), Ordering::Relaxed);
            to.write_all(piece).is_ok()
        })
    }
}
