//! How to wait for the socket: asleep, or by asking again and again for a moment.
//!
//! To wake a sleeping thread, and the core that has fallen asleep with it, takes longer than the
//! rest of a short call. But to spin takes a core from others, and pays only if answers come soon
//! and the core has little else to do. So whoever spins lets others run before it asks again, and
//! measures how long they do. Where it is in vain, it is given up: for one short wait, then for
//! three, seven, and so on.

use crate::amqp::sync::net::{RecvAncillaryBuffer, RecvFlags, TcpStream, recv, recvmsg};
use crate::amqp::sync::{Instant, thread};
use std::io::{self, IoSliceMut, Read};
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

    /// Reads into several parts, one after the other.
    pub fn read_parts(
        self,
        mut socket: &TcpStream,
        parts: &mut [IoSliceMut<'_>],
    ) -> io::Result<usize> {
        match self {
            Wait::AsSet => socket.read_vectored(parts),
            Wait::Not => {
                let mut nothing = RecvAncillaryBuffer::default();
                Ok(recvmsg(socket, parts, &mut nothing, RecvFlags::DONTWAIT)?.bytes)
            }
        }
    }
}

/// How long others may run on the core of a thread that spins, before it counts that they have more
/// than half of it. With one call in flight on two cores, server and broker need a fifth.
const BUSY_TIME: Duration = Duration::from_micros(75);

/// What takes longer between two questions is others' time.
const TURN_TIME: Duration = Duration::from_micros(10);

/// After so many short waits it is tried again, at the latest.
const PAUSE_MAX: u32 = 1023;

/// Whether a core has too much else to do, of which others had that much while one thread spun.
fn is_needed_elsewhere(others: Duration, spun: Duration) -> bool {
    others > BUSY_TIME && others > spun / 2
}

/// Whether to spin, from what is known of the latest waits.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spin {
    /// How many short waits go by before it is tried again.
    paused: u32,
    /// How many that were the last time.
    pause: u32,
}

impl Spin {
    /// Asks again and again, for up to `most`, if that is likely to pay. `None` if it does not, or
    /// there was no answer: then it is time to sleep.
    pub fn ask<T>(&mut self, most: Duration, mut question: impl FnMut() -> Option<T>) -> Option<T> {
        if self.paused > 0 || most.is_zero() {
            return None;
        }
        // What is there already says nothing.
        if let Some(answer) = question() {
            return Some(answer);
        }
        let began = Instant::now();
        let mut asked = began;
        let mut others = Duration::ZERO;
        loop {
            thread::yield_now();
            let now = Instant::now();
            let turn = now - asked;
            if turn > TURN_TIME {
                others += turn;
            }
            let spun = now - began;
            if is_needed_elsewhere(others, spun) || spun >= most {
                self.pause = (2 * self.pause + 1).min(PAUSE_MAX);
                self.paused = self.pause;
                return None;
            }
            if let Some(answer) = question() {
                // Slowly: to give way once, to a thread that takes its whole turn, costs as much as
                // many short waits gain.
                self.pause = self.pause.saturating_sub(1 + self.pause / 32);
                return Some(answer);
            }
            asked = now;
        }
    }

    /// A wait asleep has ended. Was it so short that it could have been spent spinning?
    pub fn slept(&mut self, was_short: bool) {
        if was_short {
            self.paused = self.paused.saturating_sub(1);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_nanos(1);

    #[test]
    fn what_is_in_vain_is_tried_less_and_less_often_and_what_pays_always() {
        let mut spin = Spin::default();
        let mut tries = 0;
        for _ in 0..100_000 {
            let answer = spin.ask(SHORT, || {
                tries += 1;
                None::<()>
            });
            assert_eq!(answer, None);
            spin.slept(true);
        }
        assert!((100..200).contains(&tries), "{tries}");
        // Now answers come soon.
        let tries = (0..).take_while(|_| {
            spin.slept(true);
            spin.ask(SHORT, || Some(())).is_none()
        });
        assert!(tries.count() <= PAUSE_MAX as usize);
        // One that does not is no reason to give up.
        spin = Spin::default();
        assert_eq!(spin.ask(SHORT, || None::<()>), None);
        spin.slept(true);
        assert_eq!(spin.ask(SHORT, || Some(2)), Some(2));
    }

    #[test]
    fn while_waits_are_long_it_is_not_tried_at_all() {
        let mut spin = Spin::default();
        assert_eq!(spin.ask(SHORT, || None::<()>), None);
        for _ in 0..1000 {
            let mut asked = false;
            spin.ask(LONG, || {
                asked = true;
                Some(())
            });
            assert!(!asked);
            spin.slept(false);
        }
        let off = Spin::default().ask(Duration::ZERO, || Some(()));
        assert_eq!(off, None, "turned off");
    }

    #[test]
    fn it_gives_way_to_others_that_need_the_core() {
        let mut count = 0;
        let answer = Spin::default().ask(LONG, || {
            // As long as somebody else has the core.
            thread::sleep(BUSY_TIME / 2);
            count += 1;
            // Whoever does not give way is not to do so for an hour.
            (count > 100).then_some(())
        });
        assert_eq!(answer, None);
        assert!(count <= 3, "{count}");
    }

    #[test]
    fn it_is_needed_elsewhere_if_others_have_more_than_half_and_not_just_for_a_moment() {
        let needed = |others, spun| is_needed_elsewhere(others * BUSY_TIME, spun * BUSY_TIME);
        assert!(!needed(1, 1));
        assert!(needed(2, 2));
        assert!(needed(2, 3));
        assert!(!needed(2, 4));
        assert!(!needed(3, 6));
    }

    #[test]
    fn an_answer_that_comes_while_it_spins_is_found() {
        let mut count = 0;
        let answer = Spin::default().ask(LONG, || {
            count += 1;
            (count == 3).then_some(count)
        });
        // Unless others had the core, it does not give up before.
        assert!(answer == Some(3) || count < 3);
    }
}
