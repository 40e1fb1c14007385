//! Whether a server keeps up with an open loop.

use std::time::{Duration, Instant};

/// By how much the wait for an answer may grow, in seconds for each second of requests. At 1% over
/// what a server can do, each second of requests takes it 1.01 s.
const GROWTH_MAX: f64 = 0.01;

/// How many times larger than its own uncertainty a growth must be to count.
const CERTAINTY: f64 = 3.0;

/// How long requests waited for their answers in the first and in the second half of a load.
///
/// While the server keeps up, those of the second half wait no longer than those of the first.
/// Otherwise requests pile up, and each waits for those before it. The number of answers would tell
/// the same, with less precision: it hangs on the moment at which counting ends.
pub struct Trend {
    middle: Instant,
    /// Between the middles of the halves.
    distance: Duration,
    halves: [Half; 2],
    /// So many requests were unanswered that the load was ended.
    pub gave_up: bool,
}

#[derive(Clone, Copy, Default)]
struct Half {
    count: f64,
    /// Of the waits, in seconds.
    sum: f64,
    sum_of_squares: f64,
}

impl Half {
    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    /// The square of the mean's uncertainty.
    fn variance_of_mean(&self) -> f64 {
        (self.sum_of_squares / self.count - self.mean().powi(2)).max(0.0) / self.count
    }
}

impl Trend {
    pub fn new(began: Instant, length: Duration) -> Trend {
        Trend {
            middle: began + length / 2,
            distance: length / 2,
            halves: [Half::default(); 2],
            gave_up: false,
        }
    }

    /// A request that was due then has waited for so long, for an answer or for nothing.
    pub fn record(&mut self, due: Instant, wait: Duration) {
        let half = &mut self.halves[usize::from(due >= self.middle)];
        let wait = wait.as_secs_f64();
        half.count += 1.0;
        half.sum += wait;
        half.sum_of_squares += wait * wait;
    }

    pub fn add(&mut self, other: &Trend) {
        for (half, other) in self.halves.iter_mut().zip(&other.halves) {
            half.count += other.count;
            half.sum += other.sum;
            half.sum_of_squares += other.sum_of_squares;
        }
        self.gave_up |= other.gave_up;
    }

    pub fn falls_behind(&self) -> bool {
        let [first, second] = &self.halves;
        if self.gave_up || first.count == 0.0 || second.count == 0.0 {
            return self.gave_up;
        }
        let growth = second.mean() - first.mean();
        let uncertainty = (first.variance_of_mean() + second.variance_of_mean()).sqrt();
        growth > GROWTH_MAX * self.distance.as_secs_f64() && growth > CERTAINTY * uncertainty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of requests at a rate, for 3 s, at a server that answers one at a time.
    fn falls_behind(rate: f64, capacity: f64) -> bool {
        const LENGTH: Duration = Duration::from_secs(3);
        let began = Instant::now();
        let mut trend = Trend::new(began, LENGTH);
        let mut free_at = 0.0_f64;
        for sent in 0..(rate * LENGTH.as_secs_f64()) as u32 {
            let due = f64::from(sent) / rate;
            // Each tenth takes longer, and the rest a bit less.
            let time = if sent % 10 == 0 { 1.9 } else { 0.9 } / capacity;
            free_at = free_at.max(due) + time;
            let wait = Duration::from_secs_f64(free_at - due);
            trend.record(began + Duration::from_secs_f64(due), wait);
        }
        trend.falls_behind()
    }

    #[test]
    fn two_percent_too_much_is_found_and_all_below_the_limit_is_fine() {
        for capacity in [100.0, 400.0, 10_000.0] {
            for share in [0.1, 0.5, 0.9, 0.99, 1.0] {
                assert!(!falls_behind(capacity * share, capacity), "{share}");
            }
            for share in [1.02, 1.1, 2.0, 10.0] {
                assert!(falls_behind(capacity * share, capacity), "{share}");
            }
        }
    }
}
