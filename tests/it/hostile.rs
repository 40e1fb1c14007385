//! A hundred thousand messages that no client would send, against a running server.

use crate::support::{PATIENCE, Peer, RawPeer, long_string, server, short_string, unique, url};
use amiquip::AmqpProperties;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

/// How many messages are sent.
const MESSAGES: usize = 100_000;

/// The server is asked for a good answer after every so many.
const ROUND: usize = 1000;

/// The largest body, in bytes.
const BODY_MAX: usize = 16 << 20;

/// How deep the tables are nested; deeper is a test of its own.
const DEPTH_MAX: u32 = 12;

/// Where the numbers come from. Another seed, other messages.
const SEED: u64 = 0x5eed;

/// The server's memory in KiB, as far as this system tells.
fn resident(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn bytes(rng: &mut StdRng, max: usize) -> Vec<u8> {
    let len = rng.random_range(0..=max);
    // All at once: a call for each of some 70 million bytes would take a test's build a minute.
    let mut bytes = vec![0; len];
    match rng.random_range(0..3) {
        0 => rng.fill(&mut bytes[..]),
        1 => {
            rng.fill(&mut bytes[..]);
            for byte in &mut bytes {
                *byte = b' ' + *byte % 95;
            }
        }
        _ => {
            let text = "ünï✓\u{10ffff}".as_bytes();
            for part in bytes.chunks_mut(text.len()) {
                part.copy_from_slice(&text[..part.len()]);
            }
        }
    }
    bytes
}

fn body(rng: &mut StdRng, index: usize) -> Vec<u8> {
    // Rarely, something large: first of all the largest.
    if index % (MESSAGES / 5) == 10 {
        return vec![rng.random(); BODY_MAX];
    }
    match rng.random_range(0..1000) {
        0 => bytes(rng, 1 << 20),
        1..50 => bytes(rng, 8192),
        50..400 => bytes(rng, 80),
        // A good body, and some changes to it.
        _ => {
            let mut body = rng.random_range(-10..300_i64).to_string().into_bytes();
            for _ in 0..rng.random_range(0..3) {
                let at = rng.random_range(0..=body.len());
                body.insert(at, rng.random());
            }
            body
        }
    }
}

/// A field of a table: type and value. Whatever RabbitMQ accepts; what it refuses never arrives.
fn field(rng: &mut StdRng, depth: u32) -> Vec<u8> {
    const FIXED: [(u8, usize); 12] = [
        (b'V', 0),
        (b't', 1),
        (b'b', 1),
        (b'B', 1),
        (b's', 2),
        (b'u', 2),
        (b'I', 4),
        (b'i', 4),
        (b'f', 4),
        (b'l', 8),
        (b'd', 8),
        (b'T', 8),
    ];
    let mut out = match rng.random_range(0..6) {
        0 => return [&b"S"[..], &long_string(&bytes(rng, 50))].concat(),
        1 => return [&b"x"[..], &long_string(&bytes(rng, 50))].concat(),
        2 if depth < DEPTH_MAX => {
            return [&b"F"[..], &long_string(&table(rng, depth + 1))].concat();
        }
        3 if depth < DEPTH_MAX => {
            let items: Vec<u8> = (0..rng.random_range(0..3))
                .flat_map(|_| field(rng, depth + 1))
                .collect();
            return [&b"A"[..], &long_string(&items)].concat();
        }
        _ => {
            let &(kind, len) = FIXED.choose(rng).unwrap();
            let mut out = vec![kind];
            out.extend((0..len).map(|_| rng.random::<u8>()));
            out
        }
    };
    // Numbers that are not a number, the broker itself does not survive.
    match out[0] {
        b'f' => out[1..].copy_from_slice(&rng.random::<f32>().to_be_bytes()),
        b'd' => out[1..].copy_from_slice(&rng.random::<f64>().to_be_bytes()),
        _ => {}
    }
    out
}

fn table(rng: &mut StdRng, depth: u32) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..rng.random_range(0..4) {
        let key = match rng.random_range(0..4) {
            0 => b"x-error-kind".to_vec(),
            1 => b"x-death".to_vec(),
            _ => bytes(rng, 20),
        };
        // These two would make the broker route copies elsewhere.
        if key != b"CC" && key != b"BCC" {
            out.extend(short_string(&key));
            out.extend(field(rng, depth));
        }
    }
    out
}

/// Flags and properties: any of them, and anything in them that RabbitMQ lets through.
fn properties(rng: &mut StdRng, callbacks: &[&str]) -> (u16, Vec<u8>) {
    let mut flags = 0;
    let mut out = Vec::new();
    // Content type and encoding, headers, delivery mode, priority, correlation id, reply to,
    // message id, timestamp, type, app id. Not expiration and user id: the broker checks those.
    for bit in [15, 14, 13, 12, 11, 10, 9, 7, 6, 5, 3] {
        if rng.random_bool(0.4) {
            continue;
        }
        flags |= 1 << bit;
        match bit {
            13 => out.extend(long_string(&table(rng, 0))),
            12 => out.push(rng.random_range(1..=2)),
            11 => out.push(rng.random()),
            6 => out.extend(rng.random::<[u8; 8]>()),
            9 if rng.random_bool(0.7) => {
                out.extend(short_string(callbacks.choose(rng).unwrap().as_bytes()));
            }
            _ => out.extend(short_string(&bytes(rng, 255))),
        }
    }
    (flags, out)
}

#[test]
fn a_hundred_thousand_hostile_messages_harm_nothing() {
    println!("seed {SEED:#x}");
    let mut rng = StdRng::seed_from_u64(SEED);
    let queue = unique("hostile");
    let mut server = server(
        &url(),
        &queue,
        &["--quiet", "--workers", "4", "--algorithm", "fast"],
    );
    let peer = Peer::connect(&url());
    let mut raw = RawPeer::connect(&url());
    // Where replies end up: a queue that keeps few, one that is not there, direct reply-to.
    let sink = raw.declare_bounded_queue();
    let callbacks = [
        sink.as_str(),
        "no.such.queue",
        "amq.rabbitmq.reply-to.nobody",
    ];
    let mut early = None;
    for index in 0..MESSAGES {
        let (flags, properties) = properties(&mut rng, &callbacks);
        let body = body(&mut rng, index);
        raw.publish(&queue, flags, &properties, &body);
        if index % ROUND == ROUND - 1 {
            raw.flush();
            let good = AmqpProperties::default().with_correlation_id("good".to_owned());
            let answer = peer.ask(&queue, b"30", good);
            assert_eq!(
                answer.body, b"832040",
                "after {index} messages, seed {SEED:#x}"
            );
        }
        if index == MESSAGES / 4 {
            early = resident(server.pid());
        }
    }
    let late = resident(server.pid());
    if let (Some(early), Some(late)) = (early, late) {
        println!("server memory: {early} KiB after a quarter, {late} KiB at the end");
        // Whichever thread reads a message keeps its memory for the next: 4 workers and the I/O
        // thread, with 16 MiB each.
        assert!(late < early + 5 * 16 * 1024, "{early} KiB -> {late} KiB");
    }
    server.signal("TERM");
    assert!(
        server.wait(PATIENCE).success(),
        "the same process is still there"
    );
    let (_, stderr) = server.output();
    let unexpected = stderr
        .lines()
        .find(|line| !line.contains("without reply_to"));
    assert_eq!(unexpected, None, "seed {SEED:#x}");
}
