//! Calls, from the user's threads to a broker and back: a whole client, of which only the network,
//! the clock and amiquip are models ([`model`](crate::amqp::model)).
//!
//! - Every call ends once, with its own answer, or by its deadline.
//! - No caller and no connection manager sleeps while there is something for it, and no request is
//!   held back: where time stands still, nothing but a wake-up ends a wait, except a pause between
//!   two attempts to connect.
//! - What was not answered when the connection was lost is sent again, and answered.
//! - A client that is closed ends all calls.

use crate::amqp::frame::{BODY, HEADER, METHOD};
use crate::amqp::model::explore::explore;
use crate::amqp::model::net::{Far, Listener};
use crate::amqp::model::world::Time;
use crate::amqp::schedules::scene::{Frame, Frames, put_deliver, put_frame};
use crate::amqp::sync::channel::{Sender, unbounded};
use crate::amqp::sync::thread;
use crate::client::Client;
use crate::client::options::{Confirms, ReplyTo, SPIN_TIME};
use crate::error::Error;
use crate::message::Reply;
use shuttle::rand::{Rng, thread_rng};
use std::collections::HashMap;

/// How many answers are on their way at a time.
const SERVERS: usize = 2;

/// The callback queue.
const NAME: &[u8] = b"callback";

/// What one of the callers asks at once.
const TOGETHER: [&str; 3] = ["three", "four", "five"];

/// A request, as a server gets it.
struct Request {
    /// Where the answer is consumed.
    channel: u16,
    id: Vec<u8>,
    body: Vec<u8>,
}

/// The correlation id in a content header, if it has one.
fn correlation_id(header: &[u8]) -> Option<Vec<u8>> {
    let flags = u16::from_be_bytes([header[12], header[13]]);
    let mut at = 14;
    if flags & 1 << 15 != 0 {
        at += 1 + usize::from(header[at]);
    }
    if flags & 1 << 13 != 0 {
        let len = header[at..at + 4].try_into().unwrap();
        at += 4 + u32::from_be_bytes(len) as usize;
    }
    let is_there = flags & 1 << 10 != 0;
    is_there.then(|| header[at + 1..at + 1 + usize::from(header[at])].to_vec())
}

/// What a broker does on one connection, until it ends.
struct Broker {
    far: Far,
    /// The way to the servers.
    requests: Sender<Request>,
    /// How many were published on a channel where each is confirmed.
    confirming: HashMap<u16, u64>,
    consuming: u16,
    /// The correlation id of the message that has begun to come on a channel.
    begun: HashMap<u16, Vec<u8>>,
    /// After so many requests, the connection is lost.
    left: Option<u32>,
}

impl Broker {
    fn run(mut self) {
        let mut frames = Frames::default();
        while let Some(frame) = frames.next(&mut self.far) {
            if self.left == Some(0) {
                break;
            }
            self.take(frame);
        }
        self.far.close();
    }

    fn take(&mut self, frame: Frame) {
        let Frame {
            kind,
            channel,
            payload,
        } = frame;
        match (kind, &payload[..4.min(payload.len())]) {
            (HEADER, _) => {
                let is_empty = payload[4..12] == [0; 8];
                match correlation_id(&payload) {
                    Some(id) => drop(self.begun.insert(channel, id)),
                    None => assert!(is_empty, "a message for nobody"),
                }
            }
            (BODY, _) => {
                let id = self
                    .begun
                    .remove(&channel)
                    .expect("a body without a header");
                self.left = self.left.map(|left| left - 1);
                if let Some(count) = self.confirming.get_mut(&channel) {
                    *count += 1;
                    let tag = count.to_be_bytes();
                    self.say(channel, &[&[0, 60, 0, 80], &tag[..], &[0]].concat());
                }
                let channel = self.consuming;
                // The servers outlive us.
                let _ = self.requests.send(Request {
                    channel,
                    id,
                    body: payload,
                });
            }
            (METHOD, [0, 20, 0, 10]) => self.say(channel, &[0, 20, 0, 11, 0, 0, 0, 0]),
            (METHOD, [0, 20, 0, 40]) => self.say(channel, &[0, 20, 0, 41]),
            (METHOD, [0, 20, 0, 41] | [0, 60, 0, 40]) => {}
            (METHOD, [0, 50, 0, 10]) => {
                let name = [&[NAME.len() as u8], NAME].concat();
                self.say(channel, &[&[0, 50, 0, 11], &name[..], &[0; 8]].concat());
            }
            (METHOD, [0, 60, 0, 10]) => self.say(channel, &[0, 60, 0, 11]),
            (METHOD, [0, 60, 0, 20]) => {
                self.consuming = channel;
                self.say(channel, &[0, 60, 0, 21, 1, b'c']);
            }
            (METHOD, [0, 85, 0, 10]) => {
                self.confirming.insert(channel, 0);
                self.say(channel, &[0, 85, 0, 11]);
            }
            other => panic!("{other:?}"),
        }
    }

    fn say(&self, channel: u16, method: &[u8]) {
        let mut bytes = Vec::new();
        put_frame(&mut bytes, METHOD, channel, method);
        self.far.write(&bytes);
    }
}

/// A broker that accepts connections one after the other, with servers that answer each request
/// with its own body. Of the first connection, it takes `left` requests, if that is a number.
fn run_broker(mut left: Option<u32>, arrived: &Sender<()>) {
    while let Some(far) = Listener::accept() {
        let (requests, came) = unbounded::<Request>();
        let serve = |_| {
            let (far, came, arrived) = (far.clone(), came.clone(), arrived.clone());
            thread::spawn(move || {
                while let Ok(Request { channel, id, body }) = came.recv() {
                    if TOGETHER.iter().any(|text| text.as_bytes() == body) {
                        // Who sent it may not want to know.
                        let _ = arrived.send(());
                    }
                    let mut bytes = Vec::new();
                    put_deliver(&mut bytes, channel, 1, &id, &body);
                    far.write(&bytes);
                }
            })
        };
        let servers: Vec<_> = (0..SERVERS).map(serve).collect();
        let broker = Broker {
            far,
            requests,
            confirming: HashMap::new(),
            consuming: 0,
            begun: HashMap::new(),
            left: left.take(),
        };
        broker.run();
        for server in servers {
            server.join().unwrap();
        }
    }
}

/// How a client fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nothing happens. A caller may be away until what it has asked has arrived.
    Quiet,
    /// The first connection is lost, after any number of requests.
    Lost,
    /// It is closed meanwhile.
    Closed,
}

/// Two threads that share a client; `check` sees how each call ended.
fn call(fate: Fate, check: fn(Result<Reply, Error>, &str)) {
    // A few requests at a time.
    let listener = Listener::new(400);
    let left = (fate == Fate::Lost).then(|| thread_rng().gen_range(0..6));
    let (arrived, has_arrived) = unbounded();
    let broker = thread::spawn(move || run_broker(left, &arrived));
    let reply_to = [ReplyTo::Queue, ReplyTo::Direct][thread_rng().gen_range(0..2)];
    let confirms = [Confirms::Never, Confirms::Always][thread_rng().gen_range(0..2)];
    let builder = Client::builder("amqp://127.0.0.1").unwrap();
    let spin = SPIN_TIME * thread_rng().gen_range(0..2);
    let builder = builder.reply_to(reply_to).confirms(confirms).spin(spin);
    let client = builder.wait_for_server(true).build().unwrap();
    let is_away = fate == Fate::Quiet && thread_rng().gen_ratio(1, 2);
    let one_by_one = thread::spawn({
        let client = client.clone();
        move || {
            for text in ["one", "two"] {
                check(client.call("queue", text), text);
            }
        }
    });
    let together = thread::spawn({
        let client = client.clone();
        move || {
            let mut calls = client.calls();
            calls.extend(TOGETHER.map(|text| (text, client.request("queue").body(text))));
            for _ in TOGETHER.iter().filter(|_| is_away) {
                has_arrived.recv().unwrap();
            }
            let mut ended: Vec<_> = calls.map(|one| (one.key, one.result)).collect();
            ended.sort_by_key(|(text, _)| TOGETHER.iter().position(|one| one == text));
            let keys: Vec<_> = ended.iter().map(|(text, _)| *text).collect();
            assert_eq!(keys, TOGETHER, "each ends once");
            for (text, result) in ended {
                check(result, text);
            }
        }
    });
    if fate == Fate::Closed {
        client.close();
    }
    one_by_one.join().unwrap();
    together.join().unwrap();
    drop(client);
    drop(listener);
    broker.join().unwrap();
}

fn is_own(result: Result<Reply, Error>, text: &str) {
    assert_eq!(result.expect(text).body, text.as_bytes());
}

/// Any timed wait may be over at any moment, that of a call among them.
fn is_own_or_late(result: Result<Reply, Error>, text: &str) {
    match result {
        Err(Error::Timeout { .. }) => {}
        other => is_own(other, text),
    }
}

fn is_own_or_late_or_closed(result: Result<Reply, Error>, text: &str) {
    match result {
        Err(Error::Closed) => {}
        other => is_own_or_late(other, text),
    }
}

#[test]
fn every_call_gets_its_own_answer() {
    explore("every_call_gets_its_own_answer", Time::StandsStill, || {
        call(Fate::Quiet, is_own);
    });
}

#[test]
fn every_call_is_answered_though_the_connection_is_lost() {
    explore(
        "every_call_is_answered_though_the_connection_is_lost",
        Time::StandsStill,
        || {
            call(Fate::Lost, is_own);
        },
    );
}

#[test]
fn every_call_ends_though_the_connection_is_lost() {
    explore(
        "every_call_ends_though_the_connection_is_lost",
        Time::Passes,
        || {
            call(Fate::Lost, is_own_or_late);
        },
    );
}

#[test]
fn a_client_that_is_closed_ends_all_calls() {
    explore(
        "a_client_that_is_closed_ends_all_calls",
        Time::Passes,
        || {
            call(Fate::Closed, is_own_or_late_or_closed);
        },
    );
}
