//! What came of each interval while a load runs (`--every`).
//!
//! Each connection counts by itself, and sends what it has counted when an interval ends. A thread
//! puts them together and tells. So nothing is shared while counting, and whoever reads the lines
//! slowly does not slow the load.

use crate::command::bench::tally::Tally;
use crossbeam_channel::{Receiver, Sender};
use std::collections::VecDeque;
use std::mem;
use std::time::{Duration, Instant};

/// A time that does not come.
const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Who is told of each interval.
pub struct Every<'a> {
    pub length: Duration,
    pub tell: &'a (dyn Fn(&Interval) -> anyhow::Result<()> + Sync),
}

/// What came of an interval, on all connections.
pub struct Interval {
    /// When it ended, since the load began.
    pub end: Duration,
    /// The last one may be shorter.
    pub length: Duration,
    pub tally: Tally,
}

/// What one connection has counted in an interval: it sends one for each, in order.
pub struct Part {
    tally: Tally,
    connection: usize,
    /// If it is this connection's last: when its load ended, since it began.
    ended: Option<Duration>,
}

/// Counts one connection's answers, interval by interval.
pub struct Recorder {
    connection: usize,
    /// Of the interval that goes on; without intervals, of everything.
    current: Tally,
    /// Of the intervals before.
    before: Tally,
    /// When the interval ends.
    end: Instant,
    parts: Option<(Duration, Sender<Part>)>,
}

impl Recorder {
    /// Counts for intervals of a length, and sends each; without them, counts.
    pub fn new(
        connection: usize,
        began: Instant,
        parts: Option<(Duration, Sender<Part>)>,
    ) -> Recorder {
        let length = parts.as_ref().map_or(FAR_FUTURE, |(length, _)| *length);
        Recorder {
            connection,
            current: Tally::new(),
            before: Tally::new(),
            end: began + length.min(FAR_FUTURE),
            parts,
        }
    }

    /// When there is an interval to end, even if no answer comes.
    pub fn end(&self) -> Instant {
        self.end
    }

    /// Where to count what happens now.
    pub fn at(&mut self, now: Instant) -> &mut Tally {
        while now >= self.end
            && let Some((length, parts)) = &self.parts
        {
            let tally = mem::replace(&mut self.current, Tally::new());
            self.before.add(&tally);
            // Nobody listens any more if it could not be printed.
            let _ = parts.send(Part {
                tally,
                connection: self.connection,
                ended: None,
            });
            self.end += (*length).min(FAR_FUTURE);
        }
        &mut self.current
    }

    /// Everything that was counted, at the end of the load.
    pub fn finish(mut self, elapsed: Duration) -> Tally {
        self.before.add(&self.current);
        if let Some((_, parts)) = self.parts {
            let _ = parts.send(Part {
                tally: self.current,
                connection: self.connection,
                ended: Some(elapsed),
            });
        }
        self.before
    }
}

/// Tells of each interval when all connections have sent their part of it, until all have ended.
pub fn collect(told: &Receiver<Part>, connections: usize, every: &Every<'_>) -> anyhow::Result<()> {
    let mut collector = Collector::new(connections, every.length);
    for part in told {
        collector.take(part);
        while let Some(interval) = collector.next() {
            (every.tell)(&interval)?;
        }
    }
    Ok(())
}

struct Collector {
    length: Duration,
    /// How many intervals are complete; for each connection, how many parts it has sent.
    complete: usize,
    sent: Vec<usize>,
    /// The sum of the parts of each interval that is not complete, the earliest first.
    open: VecDeque<Tally>,
    /// When those connections ended that have; the last of them.
    ended: Duration,
}

/// How many parts a connection has sent that will send no more: as good as any number.
const ALL: usize = usize::MAX;

impl Collector {
    fn new(connections: usize, length: Duration) -> Collector {
        Collector {
            length,
            complete: 0,
            sent: vec![0; connections],
            open: VecDeque::new(),
            ended: Duration::ZERO,
        }
    }

    fn take(&mut self, part: Part) {
        let sent = &mut self.sent[part.connection];
        let index = *sent - self.complete;
        *sent += 1;
        if self.open.len() <= index {
            self.open.resize_with(index + 1, Tally::new);
        }
        self.open[index].add(&part.tally);
        if let Some(ended) = part.ended {
            *sent = ALL;
            self.ended = self.ended.max(ended);
        }
    }

    /// The next interval that is complete.
    fn next(&mut self) -> Option<Interval> {
        let everyone = self.sent.iter().copied().min().unwrap_or(ALL);
        if everyone <= self.complete {
            return None;
        }
        let tally = self.open.pop_front()?;
        let begin = times(self.length, self.complete);
        self.complete += 1;
        let is_last = everyone == ALL && self.open.is_empty();
        let end = if is_last {
            self.ended.max(begin)
        } else {
            times(self.length, self.complete)
        };
        let interval = Interval {
            end,
            length: end - begin,
            tally,
        };
        // What is left of the time may hold no answer.
        (!is_last || interval.tally.requests > 0).then_some(interval)
    }
}

fn times(length: Duration, count: usize) -> Duration {
    length.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn part(connection: usize, answers: u32, ended: Option<f64>) -> Part {
        let mut tally = Tally::new();
        for _ in 0..answers {
            tally.answered(Duration::from_millis(1));
        }
        Part {
            tally,
            connection,
            ended: ended.map(Duration::from_secs_f64),
        }
    }

    /// End and answers of each interval that is complete.
    fn complete(collector: &mut Collector) -> Vec<(f64, u64)> {
        let next = || collector.next();
        std::iter::from_fn(next)
            .map(|interval| (interval.end.as_secs_f64(), interval.tally.requests))
            .collect()
    }

    #[test]
    fn an_interval_is_told_when_every_connection_has_sent_its_part() {
        let mut collector = Collector::new(2, SECOND);
        collector.take(part(0, 1, None));
        collector.take(part(0, 2, None));
        assert_eq!(complete(&mut collector), []);
        collector.take(part(1, 10, None));
        assert_eq!(complete(&mut collector), [(1.0, 11)]);
        collector.take(part(1, 20, Some(1.5)));
        assert_eq!(complete(&mut collector), [(2.0, 22)]);
        // The other has ended.
        collector.take(part(0, 3, None));
        assert_eq!(complete(&mut collector), [(3.0, 3)]);
        collector.take(part(0, 4, Some(3.25)));
        assert_eq!(complete(&mut collector), [(3.25, 4)]);
    }

    #[test]
    fn an_interval_without_answers_is_told_unless_it_is_what_is_left() {
        let mut collector = Collector::new(1, SECOND);
        collector.take(part(0, 0, None));
        collector.take(part(0, 0, Some(1.001)));
        assert_eq!(complete(&mut collector), [(1.0, 0)]);
    }

    #[test]
    fn a_recorder_counts_each_answer_once() {
        let (sender, parts) = crossbeam_channel::unbounded();
        let began = Instant::now();
        let mut recorder = Recorder::new(0, began, Some((SECOND, sender)));
        for at in [0.5, 1.0, 3.5] {
            let tally = recorder.at(began + Duration::from_secs_f64(at));
            tally.answered(Duration::from_millis(1));
        }
        assert_eq!(recorder.end(), began + 4 * SECOND);
        assert_eq!(recorder.finish(Duration::from_millis(3600)).requests, 3);
        let counts: Vec<_> = parts.iter().map(|part| part.tally.requests).collect();
        assert_eq!(counts, [1, 1, 0, 1]);
    }
}
