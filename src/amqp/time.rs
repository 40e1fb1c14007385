//! Deadlines, and the waits between attempts to connect.

use crate::amqp::sync::{Instant, SysRng};
use rand::TryRng;
use std::time::Duration;

/// A time that does not come, and that can be added to any other.
pub(crate) const FAR_FUTURE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The time `time` after `start`; no `time` is too long.
pub(crate) fn after(start: Instant, time: Duration) -> Instant {
    start + time.min(FAR_FUTURE)
}

/// The time until a deadline; never zero, which some system calls take for "no limit".
pub(crate) fn time_left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

/// A deadline after one of `parts` equal parts of the time until `deadline`.
pub(crate) fn share_of(deadline: Instant, parts: usize) -> Instant {
    Instant::now() + time_left(deadline) / u32::try_from(parts).unwrap_or(u32::MAX)
}

/// A random number from the operating system.
///
/// # Panics
///
/// The operating system has none, which Linux says of itself only while it boots.
pub(crate) fn random() -> u64 {
    SysRng
        .try_next_u64()
        .unwrap_or_else(|error| panic!("the operating system has no random numbers: {error}"))
}

/// Waits between attempts to connect: 0.1 s doubling to 5 s, each shortened by chance to
/// somewhere between half and whole, so that a thousand clients do not come back at once.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
    latest: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);

    /// How long to wait before the next attempt.
    pub fn next(&mut self) -> Duration {
        let whole = Self::FIRST
            .saturating_mul(1 << self.attempts.min(10))
            .min(Self::LONGEST);
        self.attempts += 1;
        let chance = random() as f64 / u64::MAX as f64;
        self.latest = whole.mul_f64(0.5 + chance / 2.0);
        self.latest
    }

    /// Starts over if the latest attempt led to something that held for longer than the wait
    /// before it. A connection that is lost as soon as it is made, again and again, does not.
    pub fn held_for(&mut self, time: Duration) {
        if time > self.latest {
            self.attempts = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_with_jitter_to_five_seconds() {
        let mut backoff = Backoff::default();
        let mut whole = Duration::from_millis(100);
        for _ in 0..20 {
            let wait = backoff.next();
            assert!(wait <= whole && wait >= whole / 2, "{wait:?} of {whole:?}");
            whole = (whole * 2).min(Duration::from_secs(5));
        }
    }

    #[test]
    fn backoff_starts_over_after_what_held_for_longer_than_the_wait() {
        let mut backoff = Backoff::default();
        let third = (0..3).map(|_| backoff.next()).last().unwrap();
        backoff.held_for(third / 2);
        assert!(backoff.next() > Backoff::FIRST);
        backoff.held_for(Backoff::LONGEST);
        assert!(backoff.next() <= Backoff::FIRST);
    }
}
