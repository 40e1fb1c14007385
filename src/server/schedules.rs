//! Requests and workers.
//!
//! - Every request that is begun is answered once, and acknowledged once, behind its answer.
//! - No worker sleeps while there is something for one to do, and no answer is held back, however
//!   long another handler takes.
//! - A drain ends: each request is answered and acknowledged, or given back, and not both.
//! - A request that comes back because its channel is closed, while it is executed, is not begun a
//!   second time, also if we are told of its channel afterwards.

use crate::amqp::channel::Channel;
use crate::amqp::frame::{BODY, Content, HEADER, METHOD, Properties, Publish, put_requeue};
use crate::amqp::incoming::{ChannelEvent, Incoming};
use crate::amqp::model::explore::explore;
use crate::amqp::model::net::Far;
use crate::amqp::model::world::Time;
use crate::amqp::outbox::Outbox;
use crate::amqp::schedules::scene::{
    Frames, channel, pair, put_deliver, put_delivery, put_frame, start_io,
};
use crate::amqp::stream::Opened;
use crate::amqp::sync::channel::{Receiver, Sender, unbounded};
use crate::amqp::sync::thread;
use crate::server::work_queue::{Event, RequestSink, Session, WorkQueue};
use shuttle::rand::{Rng, thread_rng};
use std::collections::HashMap;
use std::sync::Arc;

const WORKERS: usize = 2;

/// Each worker has a channel, from 1, and this is how many requests come on it.
const REQUESTS: u64 = 3;

/// How many requests a channel has at a time that are not acknowledged.
const PREFETCH: u16 = 2;

/// A server that consumes on one connection, and its broker.
struct Scene {
    queue: Arc<WorkQueue>,
    channels: Vec<Arc<Channel>>,
    events: Receiver<Event>,
    go_on: Sender<()>,
    begun: Receiver<()>,
    threads: Vec<thread::JoinHandle<()>>,
    far: Far,
    outbox: Arc<Outbox>,
}

/// The last request on each channel has a handler that waits until all others are answered.
const SLOW: u64 = REQUESTS;

/// What the broker has seen of a request.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    answers: u64,
    acknowledged: u64,
    given_back: u64,
}

fn begin() -> Scene {
    let (events, told) = unbounded();
    let (go_on, gate) = unbounded();
    let (has_begun, begun) = unbounded();
    let queue = Arc::new(WorkQueue::new(events, WORKERS, PREFETCH));
    let sink = RequestSink {
        queue: Arc::clone(&queue),
        number: 1,
    };
    // A few replies.
    let (opened, far) = pair(300, Box::new(sink));
    let Opened {
        stream,
        inbox,
        outbox,
        ..
    } = opened;
    let io = start_io(stream);
    let mut threads = vec![thread::spawn(move || drop(io.join()))];
    for number in 0..WORKERS {
        let (queue, gate, has_begun) = (Arc::clone(&queue), gate.clone(), has_begun.clone());
        threads.push(thread::spawn(move || {
            work(&queue, number, &gate, &has_begun)
        }));
    }
    queue.begin_session(1);
    let channels = (1..).take(WORKERS).map(|id| channel(id, &outbox));
    let channels: Vec<_> = channels.collect();
    for channel in &channels {
        queue.add_channel(channel);
    }
    let outbox_too = Arc::clone(&outbox);
    queue.open_session(Session {
        number: 1,
        inbox,
        outbox,
    });
    Scene {
        queue,
        channels,
        events: told,
        go_on,
        begun,
        threads,
        far,
        outbox: outbox_too,
    }
}

fn end(outbox: &Outbox, queue: &WorkQueue, threads: Vec<thread::JoinHandle<()>>) {
    outbox.abort();
    queue.close();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// A worker, whose handler takes as long as it takes, and with the body "both" says that it has begun.
fn work(queue: &WorkQueue, number: usize, gate: &Receiver<()>, begun: &Sender<()>) {
    while let Some(job) = queue.next(number) {
        let properties = job.delivery.message.head.properties();
        let id = properties.reply_to.unwrap().to_vec();
        if job.delivery.message.body == b"both" {
            let _ = begun.send(());
            let _ = gate.recv();
        }
        if job.delivery.message.body == b"slow" {
            gate.recv().unwrap();
        }
        let content: Arc<dyn Content> = Arc::new(id.clone());
        let reply = Publish {
            routing_key: &id,
            mandatory: false,
            properties: Properties::default(),
            content: &content,
        };
        queue.finish(number, Some(&reply));
    }
}

fn send_request(far: &Far, (channel, tag): (u16, u64), body: &[u8]) {
    let mut bytes = Vec::new();
    let id = [channel as u8, tag as u8];
    put_deliver(&mut bytes, channel, tag, &id, body);
    far.write(&bytes);
}

/// The broker closes channel 1, whose first request it gives to channel 2. Each of its channels writes
/// for itself, and here the second does so first.
fn give_back(far: &Far, body: &[u8]) {
    let mut bytes = Vec::new();
    put_delivery(&mut bytes, (2, 1), true, &[1, 1], body);
    let close = [0, 20, 0, 40, 1, 150, 0, 0, 0, 0, 0];
    put_frame(&mut bytes, METHOD, 1, &close);
    far.write(&bytes);
}

/// The broker answers `basic.qos`.
fn say_limited(far: &Far, channel: u16) {
    let mut bytes = Vec::new();
    put_frame(&mut bytes, METHOD, channel, &[0, 60, 0, 11]);
    far.write(&bytes);
}

/// The broker reads until all is said or our end is shut. `acknowledged` is told the channel of
/// each acknowledgement.
fn read(
    far: &mut Far,
    frames: &mut Frames,
    seen: &mut HashMap<(u16, u64), Seen>,
) -> Option<(u16, bool)> {
    loop {
        let frame = frames.next(far)?;
        let method = (frame.kind == METHOD).then(|| &frame.payload[..4]);
        let tag = || u64::from_be_bytes(frame.payload[4..12].try_into().unwrap());
        match method {
            None if frame.kind == BODY => {
                let id = (u16::from(frame.payload[0]), u64::from(frame.payload[1]));
                let seen = seen.entry(id).or_default();
                seen.answers += 1;
                assert_eq!(seen.acknowledged, 0, "behind its acknowledgement");
            }
            None => assert_eq!(frame.kind, HEADER),
            Some([0, 60, 0, 40]) => {}
            Some([0, 60, 0, 10]) => {
                say_limited(far, frame.channel);
            }
            Some([0, 60, 0, 80]) => {
                seen.entry((frame.channel, tag())).or_default().acknowledged += 1;
                return Some((frame.channel, true));
            }
            Some([0, 60, 0, 120]) => {
                seen.entry((frame.channel, tag())).or_default().given_back += 1;
                return Some((frame.channel, false));
            }
            Some(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_request_that_comes_back_while_it_is_executed_is_answered_there_once() {
    let name = "a_request_that_comes_back_while_it_is_executed_is_answered_there_once";
    explore(name, Time::StandsStill, || {
        let mut scene = begin();
        let far = &mut scene.far;
        send_request(far, (1, 1), b"slow");
        give_back(far, b"slow");
        let told = scene.events.recv().expect("the queue has the sender");
        let closed = matches!(
            told,
            Event::Incoming(_, Incoming::Channel(1, ChannelEvent::Closed(_)))
        );
        assert!(closed);
        // It is executed once, so it is over once.
        scene.go_on.send(()).unwrap();
        let (mut frames, mut seen) = (Frames::default(), HashMap::new());
        assert_eq!(read(far, &mut frames, &mut seen), Some((2, true)));
        let mut seen: Vec<_> = seen.into_iter().collect();
        seen.sort_by_key(|(at, _)| *at);
        let [(question, answered), (place, acknowledged)] = &seen[..] else {
            panic!("{seen:?}");
        };
        assert_eq!((*question, answered.answers), ((1, 1), 1));
        assert_eq!((*place, acknowledged.acknowledged), ((2, 1), 1));
        end(&scene.outbox, &scene.queue, scene.threads);
    });
}

/// A request comes back on another channel, and then its channel is closed, whenever its handler ends.
#[test]
fn a_request_that_comes_back_while_it_is_answered_is_acknowledged_where_it_has() {
    let name = "a_request_that_comes_back_while_it_is_answered_is_acknowledged_where_it_has";
    explore(name, Time::StandsStill, || {
        let mut scene = begin();
        let far = &mut scene.far;
        send_request(far, (1, 1), b"21");
        give_back(far, b"21");
        let (mut frames, mut last) = (Frames::default(), None);
        let mut answers = 0;
        while last != Some((2, true)) {
            let mut seen = HashMap::new();
            last = read(far, &mut frames, &mut seen);
            answers += seen.get(&(1, 1)).map_or(0, |seen: &Seen| seen.answers);
            assert!(last.is_some());
        }
        assert!(answers >= 1);
        end(&scene.outbox, &scene.queue, scene.threads);
    });
}

/// Two requests that are alike, both given to somebody else before: neither waits for the other.
#[test]
fn two_that_are_alike_on_one_channel_are_executed_at_once() {
    let name = "two_that_are_alike_on_one_channel_are_executed_at_once";
    explore(name, Time::StandsStill, || {
        let mut scene = begin();
        let far = &mut scene.far;
        let mut bytes = Vec::new();
        put_delivery(&mut bytes, (1, 1), true, &[1, 1], b"both");
        put_delivery(&mut bytes, (1, 2), true, &[1, 1], b"both");
        far.write(&bytes);
        // Each says that it has begun, and waits.
        for _ in 0..2 {
            scene.begun.recv().unwrap();
        }
        for _ in 0..2 {
            scene.go_on.send(()).unwrap();
        }
        end(&scene.outbox, &scene.queue, scene.threads);
    });
}

/// Two that are alike on two channels, both alive: the second waits for no more than that this is known.
#[test]
fn two_that_are_alike_on_two_channels_are_executed_at_once() {
    let name = "two_that_are_alike_on_two_channels_are_executed_at_once";
    explore(name, Time::StandsStill, || {
        let mut scene = begin();
        let mut bytes = Vec::new();
        put_delivery(&mut bytes, (1, 1), true, &[1, 1], b"both");
        put_delivery(&mut bytes, (2, 1), true, &[1, 1], b"both");
        scene.far.write(&bytes);
        let mut far = scene.far;
        scene.threads.push(thread::spawn(move || {
            let mut frames = Frames::default();
            while let Some(frame) = frames.next(&mut far) {
                if frame.payload.starts_with(&[0, 60, 0, 10]) {
                    say_limited(&far, frame.channel);
                }
            }
        }));
        scene.begun.recv().unwrap();
        scene.begun.recv().unwrap();
        for _ in 0..2 {
            scene.go_on.send(()).unwrap();
        }
        end(&scene.outbox, &scene.queue, scene.threads);
    });
}

fn answer_all() {
    let mut scene = begin();
    let (mut frames, mut seen) = (Frames::default(), HashMap::new());
    let (far, total) = (&mut scene.far, WORKERS as u64 * REQUESTS);
    let send = |far: &Far, request: (u16, u64)| {
        let body: &[u8] = if request.1 == SLOW { b"slow" } else { b"21" };
        send_request(far, request, body);
    };
    let mut next = [1 + u64::from(PREFETCH); WORKERS];
    for tag in 1..=u64::from(PREFETCH) {
        (1..)
            .take(WORKERS)
            .for_each(|channel| send(far, (channel, tag)));
    }
    for count in 1..=total {
        let (channel, _) = read(far, &mut frames, &mut seen).expect("nobody has ended it");
        let tag = &mut next[usize::from(channel) - 1];
        if *tag <= REQUESTS {
            send(far, (channel, *tag));
            *tag += 1;
        }
        if count == total - WORKERS as u64 {
            (0..WORKERS).for_each(|_| scene.go_on.send(()).unwrap());
        }
    }
    let answered = Seen {
        answers: 1,
        acknowledged: 1,
        given_back: 0,
    };
    assert!(seen.len() as u64 == total && seen.values().all(|one| *one == answered));
    end(&scene.outbox, &scene.queue, scene.threads);
}

#[test]
fn every_request_is_answered_once() {
    explore(
        "every_request_is_answered_once",
        Time::StandsStill,
        answer_all,
    );
}

#[test]
fn every_request_is_answered_once_while_time_passes() {
    explore(
        "every_request_is_answered_once_while_time_passes",
        Time::Passes,
        answer_all,
    );
}

/// What a supervisor does when it is stopped: it gives back what nobody has begun, until every
/// channel is cancelled and no worker busy.
fn drain(queue: &WorkQueue, channels: &[Arc<Channel>], events: &Receiver<Event>) {
    queue.stop();
    let mut cancelled = 0;
    loop {
        let (busy, backlog) = queue.take_backlog();
        for (channel, tag) in backlog {
            channel.say(|out, id| put_requeue(out, id, tag));
        }
        if busy == 0 && cancelled == channels.len() {
            return;
        }
        match events.recv().expect("the queue has the sender") {
            Event::Finished => {}
            Event::Incoming(_, Incoming::Channel(_, ChannelEvent::Cancelled)) => cancelled += 1,
            Event::Incoming(_, other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_drain_ends_and_each_request_is_answered_or_given_back() {
    let name = "a_drain_ends_and_each_request_is_answered_or_given_back";
    explore(name, Time::StandsStill, || {
        let scene = begin();
        let Scene {
            go_on: _go_on,
            begun: _begun,
            queue,
            channels,
            events,
            threads,
            mut far,
            outbox,
        } = scene;
        let draining = thread::spawn({
            let queue = Arc::clone(&queue);
            move || drain(&queue, &channels, &events)
        });
        let count = thread_rng().gen_range(1..=REQUESTS);
        for tag in 1..=count {
            for channel in 1..=WORKERS as u16 {
                send_request(&far, (channel, tag), b"21");
            }
        }
        for channel in 1..=WORKERS as u16 {
            let mut cancel_ok = Vec::new();
            put_frame(&mut cancel_ok, METHOD, channel, &[0, 60, 0, 31, 1, b'c']);
            far.write(&cancel_ok);
        }
        let (mut frames, mut seen) = (Frames::default(), HashMap::new());
        for _ in 0..count * WORKERS as u64 {
            read(&mut far, &mut frames, &mut seen).expect("nobody has ended it");
        }
        draining.join().unwrap();
        for (request, seen) in &seen {
            let Seen {
                answers,
                acknowledged,
                given_back,
            } = seen;
            assert_eq!(answers, acknowledged, "{request:?}");
            assert_eq!(acknowledged + given_back, 1, "{request:?}");
        }
        end(&outbox, &queue, threads);
    });
}
