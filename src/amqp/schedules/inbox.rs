//! Who reads: a leader, or amiquip's I/O thread while there is none.
//!
//! - What arrives is dealt out whole, in its order, each once, and to whom it is for.
//! - Nobody sleeps while there is something for him, whoever leads, follows, comes or goes. Where
//!   time stands still, nothing but what arrives ends a read.
//! - What is amiquip's gets to amiquip, in its order.
//! - A connection that ends holds nobody.
//!
//! Leaders spin before they block ([`Spin`](crate::amqp::wait::Spin)), or do not, by chance.

use crate::amqp::frame::{METHOD, put_ack};
use crate::amqp::inbox::{Inbox, READ_TIME_MAX, Sink};
use crate::amqp::incoming::{Confirm, Delivery, Incoming};
use crate::amqp::model::explore::explore;
use crate::amqp::model::net::Far;
use crate::amqp::model::world::Time;
use crate::amqp::schedules::scene::{pair, put_deliver, put_frame, start_io};
use crate::amqp::stream::Opened;
use crate::amqp::sync::channel::{Receiver, Sender, select, unbounded};
use crate::amqp::sync::{Never, thread};
use crate::amqp::transport::Down;
use shuttle::rand::{Rng, thread_rng};
use std::sync::Arc;
use std::time::Duration;

/// Each waiter has a channel, from 1, and waits for so many messages on it.
const WAITERS: u16 = 2;
const MESSAGES: u64 = 3;

/// A part of the connection's own talk.
const OPEN_OK: [u8; 5] = [0, 10, 0, 41, 0];

const HEARTBEAT: [u8; 8] = [8, 0, 0, 0, 0, 0, 0, 0xCE];

fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

/// A body of this size is read to where it stays.
const LARGE: usize = 80 << 10;

/// The ways to all waiters.
#[derive(Clone)]
struct Waiters(Vec<Sender<Incoming>>);

fn owner(incoming: &Incoming) -> u16 {
    match incoming {
        Incoming::Delivery(Delivery { channel, .. }) => *channel,
        Incoming::Confirm(Confirm { channel, .. }) => *channel,
        other => panic!("nobody sent {other:?}"),
    }
}

impl Sink for Waiters {
    fn accept(&self, incoming: Incoming) {
        let index = usize::from(owner(&incoming) - 1);
        // It may have ended.
        let _ = self.0[index].send(incoming);
    }

    fn done(&self) {}
}

/// Waits for all messages as a caller waits for answers: reads itself if nobody else does, and is
/// told otherwise. Returns what has come before the end of the connection.
fn wait_for_all(
    me: u16,
    inbox: &Inbox,
    waiters: &Waiters,
    told: &Receiver<Incoming>,
    down: &Receiver<Never>,
) -> Vec<Incoming> {
    let spin = Duration::from_micros(thread_rng().gen_range(0..=1) * 500);
    let mut mine = Vec::new();
    while (mine.len() as u64) < MESSAGES {
        let Some(mut lead) = inbox.try_lead() else {
            select! {
                recv(told) -> incoming => mine.extend(incoming),
                recv(down) -> _ => break,
            }
            continue;
        };
        // From just before we led.
        if let Ok(incoming) = told.try_recv() {
            mine.push(incoming);
            continue;
        }
        let read = lead.read(READ_TIME_MAX, spin, |incoming| {
            match owner(&incoming) == me {
                true => mine.push(incoming),
                false => waiters.accept(incoming),
            }
        });
        if read == Err(Down) {
            break;
        }
    }
    mine
}

/// Sends all that is waited for, and something for amiquip, in pieces; returns the latter.
fn send_all(far: &mut Far) -> Vec<u8> {
    let (mut bytes, mut fed) = (Vec::new(), Vec::new());
    for number in 1..=MESSAGES {
        for channel in 1..=WAITERS {
            match thread_rng().gen_range(0..8) {
                0 => put_deliver(
                    &mut bytes,
                    channel,
                    number,
                    b"id",
                    &vec![channel as u8; LARGE],
                ),
                1 | 2 => put_deliver(&mut bytes, channel, number, b"id", b"hello"),
                _ => put_ack(&mut bytes, channel, number),
            }
        }
        if thread_rng().gen_ratio(1, 3) {
            let before = bytes.len();
            put_frame(&mut bytes, METHOD, 0, &OPEN_OK);
            fed.extend_from_slice(&bytes[before..]);
        }
        // The rest comes along with what follows.
        let len = match number {
            MESSAGES => bytes.len(),
            _ => thread_rng().gen_range(0..=bytes.len()),
        };
        let rest = bytes.split_off(len);
        if !bytes.is_empty() {
            far.write(&bytes);
        }
        bytes = rest;
    }
    fed
}

fn check(me: u16, come: &[Incoming]) {
    for (number, incoming) in (1..).zip(come) {
        assert_eq!(owner(incoming), me, "what is somebody else's");
        let tag = match incoming {
            Incoming::Delivery(delivery) => {
                let body = &delivery.message.body;
                let is_whole = body == b"hello" || *body == vec![me as u8; LARGE];
                assert!(is_whole, "{} bytes", body.len());
                delivery.tag
            }
            Incoming::Confirm(confirm) => confirm.tag,
            other => panic!("nobody sent {other:?}"),
        };
        assert_eq!(tag, number, "out of order, or twice");
    }
}

/// Two callers and the I/O thread; `send` is the broker.
fn wait_while(send: impl FnOnce(&mut Far) -> Vec<u8>) -> Vec<Vec<Incoming>> {
    let (ways, ends): (Vec<_>, Vec<_>) = (0..WAITERS).map(|_| unbounded()).unzip();
    let waiters = Waiters(ways);
    let (opened, mut far) = pair(1 << 10, Box::new(waiters.clone()));
    let Opened {
        stream,
        inbox,
        down,
        ..
    } = opened;
    let io = start_io(stream);
    let spawn = |(me, told)| {
        let (inbox, waiters, down) = (Arc::clone(&inbox), waiters.clone(), down.clone());
        thread::spawn(move || wait_for_all(me, &inbox, &waiters, &told, &down))
    };
    let threads: Vec<_> = (1..).zip(ends).map(spawn).collect();
    let fed = send(&mut far);
    let come: Vec<_> = threads.into_iter().map(|one| one.join().unwrap()).collect();
    far.close();
    let mut taken = io.join();
    // A sign of life, made when nothing else was for amiquip for a second.
    while let Some(at) = find(&taken, &HEARTBEAT) {
        taken.drain(at..at + HEARTBEAT.len());
    }
    assert_eq!(taken, fed, "what amiquip has read");
    for (me, come) in (1..).zip(&come) {
        check(me, come);
    }
    come
}

fn all_come() {
    let come = wait_while(send_all);
    assert!(come.iter().all(|come| come.len() as u64 == MESSAGES));
}

#[test]
fn what_arrives_gets_to_whom_it_is_for() {
    explore(
        "what_arrives_gets_to_whom_it_is_for",
        Time::StandsStill,
        all_come,
    );
}

#[test]
fn leads_that_end_by_their_time_lose_nothing() {
    explore(
        "leads_that_end_by_their_time_lose_nothing",
        Time::Passes,
        all_come,
    );
}

#[test]
fn who_waits_learns_of_the_end() {
    explore("who_waits_learns_of_the_end", Time::StandsStill, || {
        wait_while(|far| {
            let mut bytes = Vec::new();
            put_ack(&mut bytes, thread_rng().gen_range(1..=WAITERS), 1);
            far.write(&bytes);
            far.close();
            Vec::new()
        });
    });
}
