//! One page over HTTP, in one thread.
//!
//! A scraper that sends its request slowly, or never, holds up no other: the thread polls all
//! connections, and writes no more than the socket takes at once. Each connection is closed when
//! its page has been read, or its time is up, or too many others have come since.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

/// How long a connection may take, from its first byte to its end.
const EXCHANGE_TIME: Duration = Duration::from_secs(5);

/// How many connections may be open: more than anybody has scrapers.
const OPEN_MAX: usize = 16;

/// The longest request, in bytes.
const REQUEST_MAX: usize = 8 << 10;

/// How many headers a request may have; Prometheus sends six.
const HEADERS_MAX: usize = 64;

/// How long to wait when the process has no descriptor left for another connection.
const PAUSE: Duration = Duration::from_secs(1);

/// A page and where it is.
pub struct Page<F> {
    pub path: &'static str,
    pub content_type: &'static str,
    /// Its text, made for each request.
    pub text: F,
}

impl<F: Fn() -> String + Send + 'static> Page<F> {
    /// Starts the thread that serves it. Nobody joins it; it ends with the process.
    pub fn serve(self, name: &str, listener: TcpListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || self.serve_for_ever(&listener))
            .map(drop)
    }

    fn serve_for_ever(&self, listener: &TcpListener) {
        // The oldest first.
        let mut open: Vec<Exchange> = Vec::new();
        loop {
            wait(listener, &open);
            open.retain_mut(|exchange| self.go_on(exchange).unwrap_or(false));
            match listener.accept() {
                Ok((stream, _)) => {
                    if open.len() == OPEN_MAX {
                        open.remove(0);
                    }
                    open.extend(Exchange::new(stream));
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::Interrupted => {}
                    ErrorKind::ConnectionAborted => {}
                    _ => {
                        log::warn!("cannot take a connection for the metrics: {error}");
                        thread::sleep(PAUSE);
                    }
                },
            }
        }
    }

    /// Reads what is there and answers what is whole; whether there is more to do.
    fn go_on(&self, exchange: &mut Exchange) -> io::Result<bool> {
        if Instant::now() >= exchange.deadline {
            return Ok(false);
        }
        // No more in a turn: who never stops sending holds up no other.
        let mut piece = [0; 1 << 10];
        let len = match exchange.stream.read(&mut piece) {
            Ok(0) => return Ok(false),
            Ok(len) => len,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => return Ok(true),
                _ => return Err(error),
            },
        };
        // What comes after it is read all the same: to close with something unread would take the
        // answer away from who reads it.
        if !exchange.answered {
            exchange.request.extend_from_slice(&piece[..len]);
            if let Some(answer) = self.answer(&exchange.request) {
                // A new connection has room for it. One that has not is given up.
                exchange.stream.write_all(answer.as_bytes())?;
                exchange.stream.shutdown(Shutdown::Write)?;
                exchange.answered = true;
            }
        }
        Ok(true)
    }

    /// The answer to a request; `None` if that is not whole yet.
    fn answer(&self, request: &[u8]) -> Option<String> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(request) {
            Ok(httparse::Status::Complete(_)) => {}
            Ok(httparse::Status::Partial) if request.len() < REQUEST_MAX => return None,
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return Some(plain("431 Request Header Fields Too Large", ""));
            }
            Err(_) => return Some(plain("400 Bad Request", "")),
        }
        let method = parsed.method.unwrap_or_default();
        let path = parsed.path.unwrap_or_default().split('?').next();
        let mut answer = match method {
            _ if path != Some(self.path) => plain("404 Not Found", ""),
            "GET" | "HEAD" => response("200 OK", "", self.content_type, &(self.text)()),
            _ => plain("405 Method Not Allowed", "Allow: GET, HEAD\r\n"),
        };
        if method == "HEAD"
            && let Some(end) = answer.find("\r\n\r\n")
        {
            answer.truncate(end + 4);
        }
        Some(answer)
    }
}

/// A connection, and how far it has come.
struct Exchange {
    stream: TcpStream,
    deadline: Instant,
    request: Vec<u8>,
    answered: bool,
}

impl Exchange {
    fn new(stream: TcpStream) -> io::Result<Exchange> {
        stream.set_nonblocking(true)?;
        Ok(Exchange {
            stream,
            deadline: Instant::now() + EXCHANGE_TIME,
            request: Vec::new(),
            answered: false,
        })
    }
}

/// Waits for a new connection, for something on those that are open, or for a deadline.
fn wait(listener: &TcpListener, open: &[Exchange]) {
    let mut polled = vec![PollFd::new(listener, PollFlags::IN)];
    let streams = open.iter().map(|exchange| &exchange.stream);
    polled.extend(streams.map(|stream| PollFd::new(stream, PollFlags::IN)));
    let first = open.iter().map(|exchange| exchange.deadline).min();
    let left = first.map(|at| at.saturating_duration_since(Instant::now()));
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    // That it fails, interrupted by a signal, is as good as an event.
    let _ = poll(&mut polled, left.as_ref());
}

/// An answer that says its status, and no more.
fn plain(status: &str, header: &str) -> String {
    response(status, header, "text/plain", &format!("{status}\n"))
}

fn response(status: &str, header: &str, content_type: &str, body: &str) -> String {
    let mut response = format!("HTTP/1.1 {status}\r\n{header}");
    let _ = write!(
        response,
        "Content-Type: {content_type}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    response
}
