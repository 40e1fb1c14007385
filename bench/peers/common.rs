//! What the Rust peers and our own measuring programs share: the command line, the tutorial's Fibonacci,
//! bodies, and a client's books. Nothing here knows of AMQP.

use std::process::exit;
use std::time::{Duration, Instant};

/// A reply that takes longer will not come.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

pub const CONTENT_TYPE: &str = "text/plain";

#[derive(Clone, Default)]
pub struct Options {
    pub url: String,
    pub queue: String,
    pub workers: u16,
    pub prefetch: u16,
    pub requests: usize,
    pub warmup: usize,
    pub concurrency: usize,
    pub argument: u32,
    /// Whether the server replies with the request's body.
    pub echo: bool,
    /// Whether the client sends a body of so many octets, and not the argument.
    pub size: Option<usize>,
    /// Who may have signed the broker's certificate, at `amqps://`.
    pub ca: Option<String>,
    /// How long the server waits before it answers.
    pub delay: Duration,
    /// How many threads share the client.
    pub threads: usize,
}

impl Options {
    /// The body of a request.
    pub fn body(&self) -> Vec<u8> {
        match self.size {
            Some(size) => octets(size),
            None => self.argument.to_string().into_bytes(),
        }
    }

    /// The body of the right reply to it.
    pub fn expected(&self) -> Vec<u8> {
        match self.size {
            Some(size) => octets(size),
            None => fib(self.argument).to_string().into_bytes(),
        }
    }

    /// The answer to a request's body.
    pub fn answer(&self, request: Vec<u8>) -> Vec<u8> {
        if self.echo {
            return request;
        }
        let n = str::from_utf8(&request).ok().and_then(|n| n.parse().ok());
        let n = n.unwrap_or_else(|| die("request", "not a number"));
        fib(n).to_string().into_bytes()
    }
}

/// A body in which no octet is like its neighbour, and no frame like the next.
fn octets(size: usize) -> Vec<u8> {
    (0..=250).cycle().take(size).collect()
}

/// The role, `server` or `client`, and its options.
pub fn arguments() -> (String, Options) {
    let mut words = std::env::args().skip(1);
    let role = words.next().unwrap_or_default();
    (role, options(words))
}

/// The options alone.
pub fn options(mut words: impl Iterator<Item = String>) -> Options {
    let mut options = Options::default();
    while let Some(name) = words.next() {
        let value = words.next().unwrap_or_default();
        let number = || value.parse().unwrap_or_else(|_| die(&name, "not a number"));
        match name.as_str() {
            "--url" => options.url = value,
            "--queue" => options.queue = value,
            "--workers" => options.workers = number() as u16,
            "--prefetch" => options.prefetch = number() as u16,
            "--requests" => options.requests = number(),
            "--warmup" => options.warmup = number(),
            "--concurrency" => options.concurrency = number(),
            "--argument" => options.argument = number() as u32,
            "--echo" => options.echo = number() != 0,
            "--size" => options.size = Some(number()),
            "--ca" => options.ca = Some(value),
            "--delay-ms" => options.delay = Duration::from_millis(number() as u64),
            "--threads" => options.threads = number(),
            _ => die(&name, "no such option"),
        }
    }
    options
}

pub fn die(what: &str, why: &str) -> ! {
    eprintln!("peer: {what}: {why}");
    exit(1)
}

/// The tutorial's recursion, slow on purpose.
pub fn fib(n: u32) -> u64 {
    if n < 2 {
        n.into()
    } else {
        fib(n - 1) + fib(n - 2)
    }
}

/// A run of calls. A correlation id is the call's number in decimal, counted over all runs.
pub struct Run {
    first_id: usize,
    count: usize,
    concurrency: usize,
    expected: Vec<u8>,
    /// When each was sent; `None` once it is answered.
    sent: Vec<Option<Instant>>,
    latencies: Vec<Duration>,
    ok: usize,
    began: Instant,
    ended: Instant,
}

impl Run {
    pub fn start(first_id: usize, count: usize, options: &Options) -> Run {
        let now = Instant::now();
        Run {
            first_id,
            count,
            concurrency: options.concurrency,
            expected: options.expected(),
            sent: Vec::with_capacity(count),
            latencies: Vec::with_capacity(count),
            ok: 0,
            began: now,
            ended: now,
        }
    }

    pub fn is_done(&self) -> bool {
        self.latencies.len() == self.count
    }

    /// The correlation id of the next call, if one is due.
    pub fn next_id(&mut self) -> Option<String> {
        let in_flight = self.sent.len() - self.latencies.len();
        if in_flight == self.concurrency || self.sent.len() == self.count {
            return None;
        }
        let id = self.first_id + self.sent.len();
        self.sent.push(Some(Instant::now()));
        Some(id.to_string())
    }

    /// Books a reply. One that is nobody's, or a call's second, is not counted.
    pub fn take(&mut self, correlation_id: Option<&str>, body: &[u8]) {
        let id = correlation_id.and_then(|id| id.parse::<usize>().ok());
        let call = id.and_then(|id| self.sent.get_mut(id.checked_sub(self.first_id)?));
        if let Some(sent) = call.and_then(Option::take) {
            self.ended = Instant::now();
            self.latencies.push(self.ended - sent);
            self.ok += usize::from(body == self.expected);
        }
    }

    /// Prints the line of JSON; the exit code says whether all answers were right.
    pub fn report(self) -> i32 {
        report(self.ok, self.ended - self.began, self.latencies)
    }
}

/// Prints the line of JSON on as many calls as there are latencies; the exit code says whether all
/// answers were right.
pub fn report(ok: usize, time: Duration, mut latencies: Vec<Duration>) -> i32 {
    latencies.sort_unstable();
    let count = latencies.len();
    let quantile = |percent: usize| {
        let at = (count * percent / 100).min(count.saturating_sub(1));
        latencies.get(at).map_or(0.0, |l| l.as_secs_f64() * 1e3)
    };
    let seconds = time.as_secs_f64();
    println!(
        "{{\"requests\":{count},\"ok\":{ok},\"wrong\":{},\"seconds\":{seconds:.6},\"rate\":{:.1},\
         \"latency_ms\":{{\"p50\":{:.4},\"p99\":{:.4}}}}}",
        count - ok,
        count as f64 / seconds,
        quantile(50),
        quantile(99),
    );
    i32::from(ok != count)
}
