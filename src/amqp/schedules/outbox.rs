//! Who writes.
//!
//! - What is written is whole frames: those of a sender in its order, each once.
//! - Nobody sleeps while there is something for him: what was appended leaves, and who waits for
//!   room is told of it. Time stands still, so nothing but a wake-up ends a wait.
//! - A connection that ends holds nobody.
//! - Who waits until a deadline is refused at that time, and not before; then nothing of it leaves.

use crate::amqp::backlog::Backlog;
use crate::amqp::body::LARGE_MIN;
use crate::amqp::frame::{BODY, Content, HEADER, METHOD, Properties, Publish, put_ack};
use crate::amqp::incoming::Incoming;
use crate::amqp::model::explore::explore;
use crate::amqp::model::net::Far;
use crate::amqp::model::world::Time;
use crate::amqp::outbox::{NotSent, Outbox};
use crate::amqp::schedules::scene::{Frames, pair, start_io};
use crate::amqp::stream::Opened;
use crate::amqp::sync::channel::unbounded;
use crate::amqp::sync::{Instant, thread};
use shuttle::rand::{Rng, thread_rng};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Two of these are more than the backlog takes.
const BODY_LEN: usize = 600 << 10;

/// The longest frame, in octets.
const FRAME_MAX: usize = 128 << 10;

/// Each sender has a channel, from 1, and gives what it sends a number, from 1.
const SENDERS: u16 = 3;

fn new_pair(room: usize) -> (Opened, Far) {
    let (sink, _) = unbounded::<Incoming>();
    let (opened, far) = pair(room, Box::new(sink));
    opened.outbox.set_frame_max(FRAME_MAX);
    (opened, far)
}

/// A frame with a number, on the sender's channel.
fn put_small(out: &mut Backlog, sender: u16, number: u64) {
    out.append(|out| put_ack(out, sender, number));
}

/// A message that has the number as its body's first byte.
fn put_large(out: &mut Backlog, sender: u16, number: u64, len: usize) {
    let mut body = vec![sender as u8; len];
    body[0] = number as u8;
    let content: Arc<dyn Content> = Arc::new(body);
    let message = Publish {
        routing_key: b"queue",
        mandatory: false,
        properties: Properties::default(),
        content: &content,
    };
    out.publish(sender, &message);
}

/// Reads frames until each sender's last number has come, and checks them. Returns the numbers that
/// have come, of each sender.
fn check(
    far: &mut Far,
    is_all: impl Fn(&HashMap<u16, Vec<u64>>) -> bool,
) -> HashMap<u16, Vec<u64>> {
    let (mut frames, mut come) = (Frames::default(), HashMap::<_, Vec<u64>>::new());
    // A message that has begun on the way: its sender, and how much of its body is missing.
    let mut begun: Option<(u16, usize, bool)> = None;
    while !is_all(&come) {
        let Some(frame) = frames.next(far) else { break };
        let numbers = come.entry(frame.channel).or_default();
        match (frame.kind, begun) {
            (METHOD, None) => match frame.payload[..4] {
                [0, 60, 0, 80] => {
                    let tag = frame.payload[4..12].try_into().unwrap();
                    numbers.push(u64::from_be_bytes(tag));
                }
                _ => begun = Some((frame.channel, 0, false)),
            },
            (HEADER, Some((sender, 0, false))) if sender == frame.channel => {
                let len = frame.payload[4..12].try_into().unwrap();
                begun = Some((sender, u64::from_be_bytes(len) as usize, false));
            }
            (BODY, Some((sender, left, is_amid))) if sender == frame.channel => {
                let first = usize::from(!is_amid);
                if !is_amid {
                    numbers.push(u64::from(frame.payload[0]));
                }
                let expected = &vec![sender as u8; FRAME_MAX][..frame.payload.len() - first];
                assert_eq!(&frame.payload[first..], expected);
                let left = left - frame.payload.len();
                begun = (left > 0).then_some((sender, left, true));
            }
            other => panic!("{other:?} amid something else"),
        }
    }
    for numbers in come.values() {
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
    }
    come
}

/// Whether every sender's numbers up to that have come.
fn all_up_to(last: u64) -> impl Fn(&HashMap<u16, Vec<u64>>) -> bool {
    move |come| {
        let is_complete = |sender| {
            let numbers = come.get(&sender);
            numbers.is_some_and(|numbers| numbers.len() as u64 == last)
        };
        (1..=SENDERS).all(is_complete)
    }
}

fn spawn_senders<T: Send + 'static>(
    outbox: &Arc<Outbox>,
    send: fn(&Outbox, u16) -> T,
) -> Vec<thread::JoinHandle<T>> {
    let spawn = |sender| {
        let outbox = Arc::clone(outbox);
        thread::spawn(move || send(&outbox, sender))
    };
    (1..=SENDERS).map(spawn).collect()
}

#[test]
fn frames_leave_whole_in_order_and_once() {
    explore(
        "frames_leave_whole_in_order_and_once",
        Time::StandsStill,
        || {
            // Two frames and a half.
            let (Opened { stream, outbox, .. }, mut far) = new_pair(50);
            let io = start_io(stream);
            let senders = spawn_senders(&outbox, |outbox, sender| {
                for number in 1..=3 {
                    let put = |out: &mut Backlog| put_small(out, sender, number);
                    match thread_rng().gen_range(0..4) {
                        0 => outbox.try_send(put).unwrap(),
                        1 => outbox.send(None, put).unwrap(),
                        2 => outbox
                            .send_anyway(|out| put_ack(out, sender, number))
                            .unwrap(),
                        _ => {
                            outbox.try_append(put).unwrap();
                            outbox.flush();
                        }
                    }
                }
            });
            check(&mut far, all_up_to(3));
            far.close();
            for sender in senders {
                sender.join().unwrap();
            }
            io.join();
        },
    );
}

#[test]
fn who_waits_for_room_is_told_of_it() {
    explore(
        "who_waits_for_room_is_told_of_it",
        Time::StandsStill,
        || {
            let (Opened { stream, outbox, .. }, mut far) = new_pair(400 << 10);
            let io = start_io(stream);
            let senders = spawn_senders(&outbox, |outbox, sender| {
                outbox
                    .send(None, |out| put_large(out, sender, 1, BODY_LEN))
                    .unwrap();
                if sender == 1 {
                    outbox.wait_for_room(None).unwrap();
                }
                outbox.send(None, |out| put_small(out, sender, 2)).unwrap();
            });
            check(&mut far, all_up_to(2));
            far.close();
            for sender in senders {
                sender.join().unwrap();
            }
            io.join();
        },
    );
}

#[test]
fn a_connection_that_ends_holds_nobody() {
    explore(
        "a_connection_that_ends_holds_nobody",
        Time::StandsStill,
        || {
            let (Opened { stream, outbox, .. }, mut far) = new_pair(400 << 10);
            let io = start_io(stream);
            let senders = spawn_senders(&outbox, |outbox, sender| {
                for number in 1..=2 {
                    let sent = outbox.send(None, |out| put_large(out, sender, number, BODY_LEN));
                    if sent.is_err() {
                        assert_eq!(sent, Err(NotSent::Down));
                        return;
                    }
                }
            });
            let aborting = thread::spawn({
                let outbox = Arc::clone(&outbox);
                move || outbox.abort()
            });
            check(&mut far, all_up_to(2));
            for sender in senders {
                sender.join().unwrap();
            }
            aborting.join().unwrap();
            assert_eq!(outbox.wait_for_room(None), Err(NotSent::Down));
            io.join();
        },
    );
}

#[test]
fn a_wait_for_room_ends_by_its_deadline() {
    explore("a_wait_for_room_ends_by_its_deadline", Time::Passes, || {
        let (Opened { stream, outbox, .. }, mut far) = new_pair(LARGE_MIN);
        let io = start_io(stream);
        let senders = spawn_senders(&outbox, |outbox, sender| {
            let deadline = Instant::now() + Duration::from_secs(1);
            let mut taken = 0;
            for number in 1..=3 {
                let put = |out: &mut Backlog| put_large(out, sender, number, BODY_LEN);
                match outbox.send(Some(deadline), put) {
                    Ok(()) => taken += 1,
                    Err(NotSent::Full) => {
                        assert!(Instant::now() >= deadline, "refused before its time");
                        break;
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
            taken
        });
        // The far end reads once all have given up, or been taken.
        let taken: Vec<usize> = senders.into_iter().map(|one| one.join().unwrap()).collect();
        let total: usize = taken.iter().sum();
        assert!(total < 9, "there was no room for all");
        let come = check(&mut far, |come| {
            come.values().map(Vec::len).sum::<usize>() == total
        });
        for (sender, taken) in (1..).zip(taken) {
            assert_eq!(come.get(&sender).map_or(0, Vec::len), taken);
        }
        far.close();
        io.join();
    });
}
