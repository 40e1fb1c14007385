//! A load: a closed or an open loop of calls on one connection or several, every answer checked.
//!
//! Each connection has a client of its own and a thread that calls; the first one's is whoever runs
//! the load. They share nothing while it runs: each has its part of the requests, and counts by
//! itself.

use crate::command::bench::intervals::{self, Every, Part, Recorder};
use crate::command::bench::payload::Payload;
use crate::command::bench::progress::Progress;
use crate::command::bench::tally::{Measured, WRONG};
use crate::command::bench::trend::Trend;
use anyhow::Context;
use crossbeam_channel::{Sender, unbounded};
use fibrpc::{Answer, Calls, Client, RequestBuilder};
use std::io;
use std::panic;
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone, Copy)]
pub enum Length {
    Requests(u64),
    Time(Duration),
}

#[derive(Clone, Copy)]
pub enum Pace {
    /// The next request goes out when an answer comes in.
    Closed { in_flight: usize },
    /// Requests go out when they are due, whatever comes in.
    Open { per_second: u32 },
    /// The same, to find out whether the server keeps up. If half of the requests are unanswered at
    /// one time beyond those that it has at work, it does not, and no more are sent.
    Trial {
        per_second: u32,
        /// How long an answer takes: the requests that wait for so long are no pile.
        latency: Duration,
    },
}

/// In an open loop against a server that does not keep up, calls pile up. Above so many in
/// flight, the next is sent late; its latency counts from when it was due all the same.
const PILE_MAX: usize = 100_000;

/// The same in bytes: each call keeps its body until it is answered.
const PILE_BYTES_MAX: usize = 512 << 20;

/// So many unanswered requests of a trial are no pile.
const PILE_MIN: usize = 16;

/// How often the progress bar moves.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// What is said when the operating system has no thread to spare.
const NO_THREAD: &str = "cannot start a thread; fewer --connections need fewer";

/// Who calls, where, and with what.
pub struct Load<'a> {
    /// One for each connection.
    pub clients: &'a [Client],
    pub queue: &'a str,
    pub payload: &'a Payload,
    /// Whether to show a bar, on a terminal.
    pub bar: bool,
}

impl Load<'_> {
    /// Runs to the end, or until the clients are closed.
    ///
    /// # Errors
    ///
    /// There is no thread to be had, or an interval cannot be printed. The clients are closed then.
    pub fn run(
        &self,
        length: Length,
        pace: Pace,
        every: Option<&Every<'_>>,
    ) -> anyhow::Result<Measured> {
        let progress = Progress::new(length, self.bar);
        let began = Instant::now();
        thread::scope(|scope| {
            // Ends when every run has ended, or cannot print.
            let (parts, collector) = match every {
                None => (None, None),
                Some(every) => {
                    let (parts, told) = unbounded();
                    let collect = move || {
                        intervals::collect(&told, self.clients.len(), every)
                            .inspect_err(|_| self.close())
                    };
                    let collector = thread::Builder::new()
                        .name("fibrpc-intervals".to_owned())
                        .spawn_scoped(scope, collect)
                        .context(NO_THREAD)?;
                    (Some((every.length, parts)), Some(collector))
                }
            };
            let run = |index, parts| {
                let share = Share {
                    index,
                    of: self.clients.len() as u64,
                };
                Run::start(self, share, length, began, parts, &progress).run(pace)
            };
            // Each owns its part of the load, and ends with it.
            let others = (1..self.clients.len() as u64)
                .map(|index| {
                    let parts = parts.clone();
                    thread::Builder::new()
                        .name(format!("fibrpc-bench-{index}"))
                        .spawn_scoped(scope, move || run(index, parts))
                })
                .collect::<io::Result<Vec<_>>>()
                .inspect_err(|_| self.close())
                .context(NO_THREAD)?;
            let mut measured = run(0, parts);
            for other in others {
                let other = other
                    .join()
                    .unwrap_or_else(|panic| panic::resume_unwind(panic));
                measured.add_beside(&other);
            }
            if let Some(collector) = collector {
                collector
                    .join()
                    .unwrap_or_else(|panic| panic::resume_unwind(panic))?;
            }
            Ok(measured)
        })
    }

    pub fn is_closed(&self) -> bool {
        self.clients.iter().any(Client::is_closed)
    }

    fn close(&self) {
        self.clients.iter().for_each(Client::close);
    }
}

/// How many calls with bodies of that length may be in flight in an open loop.
fn pile_max(body_len: usize) -> usize {
    PILE_MAX.min(PILE_BYTES_MAX / body_len.max(1))
}

/// How many unanswered requests of a trial are a pile.
fn trial_pile(requests: f64, per_second: f64, latency: Duration) -> usize {
    let at_work = per_second * latency.as_secs_f64();
    PILE_MIN.max((requests / 2.0 + at_work) as usize)
}

/// Which part of a load is one connection's: of every `of` requests, the one after the first
/// `index`.
#[derive(Clone, Copy)]
struct Share {
    index: u64,
    of: u64,
}

impl Share {
    fn part(self, whole: u64) -> u64 {
        whole / self.of + u64::from(self.index < whole % self.of)
    }

    /// When one of our requests is due in an open loop, after it began.
    fn due(self, sent: u64, per_second: u32) -> Duration {
        Duration::from_secs_f64((sent * self.of + self.index) as f64 / f64::from(per_second))
    }
}

/// One connection's part of a load, in progress.
struct Run<'l> {
    client: &'l Client,
    queue: &'l str,
    payload: &'l Payload,
    /// Each call's key is the time it was due.
    calls: Calls<'l, Instant>,
    share: Share,
    length: Length,
    began: Instant,
    sent: u64,
    recorder: Recorder,
    trend: Option<Trend>,
    progress: &'l Progress,
    progressed: Instant,
    /// Answers that the progress bar does not show yet.
    unshown: u64,
}

impl<'l> Run<'l> {
    fn start(
        load: &Load<'l>,
        share: Share,
        length: Length,
        began: Instant,
        parts: Option<(Duration, Sender<Part>)>,
        progress: &'l Progress,
    ) -> Run<'l> {
        let index = share.index as usize;
        let client = &load.clients[index];
        Run {
            client,
            queue: load.queue,
            payload: load.payload,
            calls: client.calls(),
            share,
            length: match length {
                Length::Requests(requests) => Length::Requests(share.part(requests)),
                time @ Length::Time(_) => time,
            },
            began,
            sent: 0,
            recorder: Recorder::new(index, began, parts),
            trend: None,
            progress,
            progressed: began,
            unshown: 0,
        }
    }

    fn run(mut self, pace: Pace) -> Measured {
        let pile_max = pile_max(self.payload.body.len()).div_ceil(self.share.of as usize);
        match pace {
            Pace::Closed { in_flight } => {
                self.closed(self.share.part(in_flight as u64) as usize);
            }
            Pace::Open { per_second } => self.open(per_second, pile_max),
            Pace::Trial {
                per_second,
                latency,
            } => {
                let ours = f64::from(per_second) / self.share.of as f64;
                let (time, requests) = match self.length {
                    Length::Time(time) => (time, time.as_secs_f64() * ours),
                    Length::Requests(requests) => {
                        let requests = requests as f64;
                        (Duration::from_secs_f64(requests / ours), requests)
                    }
                };
                self.trend = Some(Trend::new(self.began, time));
                let pile = trial_pile(requests, ours, latency);
                self.open(per_second, pile.min(pile_max));
            }
        }
        let elapsed = self.began.elapsed();
        self.progress.add(self.unshown, elapsed);
        Measured {
            tally: self.recorder.finish(elapsed),
            elapsed,
            trend: self.trend,
        }
    }

    fn closed(&mut self, in_flight: usize) {
        let mut now = self.began;
        loop {
            let mut requests = Vec::new();
            while self.calls.len() + requests.len() < in_flight && self.has_more(now) {
                requests.push(self.request(now));
            }
            self.calls.extend(requests);
            if self.calls.is_empty() {
                return;
            }
            now = match self.calls.next_before(self.recorder.end()) {
                Some(answer) => self.take(&answer),
                None => self.now(),
            };
            // What has come in with it.
            while let Some(answer) = self.calls.next_before(now) {
                now = self.take(&answer);
            }
        }
    }

    fn open(&mut self, per_second: u32, pile_max: usize) {
        let (share, began) = (self.share, self.began);
        let due = |sent| began + share.due(sent, per_second);
        loop {
            let mut now = self.now();
            let mut next = due(self.sent);
            let mut requests = Vec::new();
            while next <= now && self.has_more(next) && self.calls.len() + requests.len() < pile_max
            {
                requests.push(self.request(next));
                next = due(self.sent);
            }
            self.calls.extend(requests);
            if let Some(trend) = &mut self.trend
                && self.calls.len() >= pile_max
            {
                trend.gave_up = true;
            }
            if self.calls.is_empty() {
                if !self.has_more(next) {
                    return;
                }
                let wake_at = next.min(self.recorder.end());
                thread::sleep(wake_at.saturating_duration_since(now));
                continue;
            }
            // All that has come in until the next is due; if there is no next, all that comes in.
            let full = self.calls.len() >= pile_max || !self.has_more(next);
            let limit = if full { now + PROGRESS_INTERVAL } else { next };
            let limit = limit.min(self.recorder.end());
            while let Some(answer) = self.calls.next_before(limit) {
                now = self.take(&answer);
                if now >= limit {
                    break;
                }
            }
        }
    }

    /// Whether a request that is due at a time is still to be sent.
    fn has_more(&self, at: Instant) -> bool {
        !self.client.is_closed()
            && self.trend.as_ref().is_none_or(|trend| !trend.gave_up)
            && match self.length {
                Length::Requests(requests) => self.sent < requests,
                Length::Time(time) => at.saturating_duration_since(self.began) < time,
            }
    }

    /// The next request, which is due at that time.
    fn request(&mut self, due: Instant) -> (Instant, RequestBuilder<'l>) {
        self.sent += 1;
        (due, self.payload.request(self.client, self.queue))
    }

    /// The time; ends the intervals that it is after.
    fn now(&mut self) -> Instant {
        let now = Instant::now();
        self.recorder.at(now);
        now
    }

    /// Counts an answer; returns the time.
    fn take(&mut self, answer: &Answer<Instant>) -> Instant {
        let now = Instant::now();
        let wait = now.saturating_duration_since(answer.key);
        let tally = self.recorder.at(now);
        match &answer.result {
            Ok(reply) if self.payload.is_right(&reply.body) => tally.answered(wait),
            Ok(_) => tally.failed(WRONG),
            Err(error) => tally.refused(error),
        }
        if let Some(trend) = &mut self.trend {
            trend.record(answer.key, wait);
        }
        self.unshown += 1;
        if now - self.progressed >= PROGRESS_INTERVAL {
            self.progressed = now;
            self.progress.add(self.unshown, now - self.began);
            self.unshown = 0;
        }
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::bodies::BODY_MAX;

    #[test]
    fn a_pile_is_limited_in_calls_and_in_bytes_and_lets_the_longest_through() {
        assert_eq!(pile_max(0), PILE_MAX);
        assert_eq!(pile_max(100), PILE_MAX);
        assert_eq!(pile_max(1 << 20), 512);
        assert!(pile_max(BODY_MAX as usize) >= 1);
    }

    #[test]
    fn requests_that_a_server_has_at_work_are_no_pile() {
        // For 3 s, 31 a second, and 2 s for each of them.
        let pile = trial_pile(93.0, 31.0, Duration::from_secs(2));
        assert!(pile > 62, "{pile}");
        assert_eq!(trial_pile(3.0, 1.0, Duration::ZERO), PILE_MIN);
    }
}
