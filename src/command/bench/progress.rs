//! The progress bar of a load, for all of its connections.

use crate::command::bench::load::Length;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub struct Progress {
    bar: ProgressBar,
    length: Length,
    answered: AtomicU64,
}

impl Progress {
    /// Shows itself only on a terminal, and only if it is to.
    pub fn new(length: Length, shown: bool) -> Progress {
        let steps = match length {
            Length::Requests(requests) => requests,
            Length::Time(time) => time.as_millis() as u64,
        };
        let style = ProgressStyle::with_template("{wide_bar} {percent:>3} %  {msg}");
        let bar = match shown {
            true => ProgressBar::new(steps),
            false => ProgressBar::hidden(),
        };
        Progress {
            bar: bar.with_style(style.expect("a template that is constant")),
            length,
            answered: AtomicU64::new(0),
        }
    }

    /// So many more answers have come, by that time. Takes a lock: to be called now and then.
    pub fn add(&self, answers: u64, elapsed: Duration) {
        let answered = self.answered.fetch_add(answers, Ordering::Relaxed) + answers;
        self.bar.set_position(match self.length {
            Length::Requests(_) => answered,
            Length::Time(_) => elapsed.as_millis() as u64,
        });
        let rate = answered as f64 / elapsed.as_secs_f64();
        self.bar.set_message(format!("{rate:.0}/s"));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
