//! How to wait for the socket: asleep, or by asking again and again for a moment.
//!
//! To wake a sleeping thread, and the core that has fallen asleep with it, takes longer than a
//! short call does otherwise. But who spins takes a core from others, and that pays only if answers
//! come soon, and the core has nothing else to do. So it is tried, and given up for as long as it
//! is in vain: for one short wait, then three, seven, and so on.

use rustix::net::{RecvFlags, recv};
use std::io::{self, Read};
use std::net::TcpStream;
use std::time::Duration;

/// Whether a read waits for something to arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// For as long as the socket is set to.
    AsSet,
    Not,
}

impl Wait {
    pub fn read(self, mut socket: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Wait::AsSet => socket.read(out),
            Wait::Not => Ok(recv(socket, out, RecvFlags::DONTWAIT)?.0),
        }
    }
}

/// If one turn of a spinning thread takes longer, others have run on its core meanwhile.
pub(crate) const BUSY_TIME: Duration = Duration::from_micros(20);

/// After so many short waits it is tried again, at the latest.
const PAUSE_MAX: u32 = 1023;

/// What is known of the latest waits.
#[derive(Debug, Default)]
pub(crate) struct Spin {
    /// How many short waits go by before it is tried again.
    paused: u32,
    /// How many that were the last time.
    pause: u32,
}

impl Spin {
    /// Whether to spin in the wait that begins, for as long as this.
    pub fn pays(&self, time: Duration) -> bool {
        self.paused == 0 && !time.is_zero()
    }

    /// Something has come.
    pub fn paid(&mut self) {
        self.pause /= 2;
    }

    /// Nothing has come, or others need the core.
    pub fn was_in_vain(&mut self) {
        self.pause = (2 * self.pause + 1).min(PAUSE_MAX);
        self.paused = self.pause;
    }

    /// A wait without has ended; was it short?
    pub fn slept(&mut self, was_short: bool) {
        if was_short {
            self.paused = self.paused.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_micros(300);

    #[test]
    fn what_is_in_vain_is_tried_less_and_less_often_and_what_pays_always() {
        let mut spin = Spin::default();
        let mut tries = 0;
        for _ in 0..100_000 {
            if spin.pays(TIME) {
                tries += 1;
                spin.was_in_vain();
            }
            spin.slept(true);
        }
        assert!((100..200).contains(&tries), "{tries}");
        // Now answers come at once.
        while !spin.pays(TIME) {
            spin.slept(true);
        }
        for _ in 0..20 {
            assert!(spin.pays(TIME));
            spin.paid();
        }
        // One that does not is no reason to give up.
        spin.was_in_vain();
        spin.slept(true);
        assert!(spin.pays(TIME));
    }

    #[test]
    fn while_all_waits_are_long_it_is_not_tried_at_all() {
        let mut spin = Spin::default();
        spin.was_in_vain();
        for _ in 0..1000 {
            assert!(!spin.pays(TIME));
            spin.slept(false);
        }
        assert!(!Spin::default().pays(Duration::ZERO), "turned off");
    }
}
