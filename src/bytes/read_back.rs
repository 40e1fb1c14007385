//! What others make of the frames that we write: amq-protocol, and Python's pika. Both tell of each
//! frame in a line, with every argument that there is, and so does whoever has it written.

use crate::amqp::backlog::Backlog;
use crate::amqp::frame::{
    Content, Declare, FRAME_MIN, OVERHEAD, Properties, Publish, put_ack, put_cancel, put_close,
    put_close_ok, put_confirm_select, put_consume, put_declare, put_open, put_qos, put_requeue,
};
use amq_protocol::frame::{AMQPFrame, parse_frame};
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::{basic, channel, confirm, queue};
use amq_protocol::types::{AMQPValue, FieldTable};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Seek, Write as _};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// How many steps are generated.
const STEPS: usize = 360;

/// Where the numbers come from. Another seed, other frames.
const SEED: u64 = 0x5eed;

/// Frames, and a line for each that says what is in it.
#[derive(Default)]
struct Written {
    backlog: Backlog,
    lines: Vec<String>,
}

impl Written {
    /// Frames of every kind, with texts of every length and bodies that end at the end of a frame,
    /// before and behind it.
    fn generated(rng: &mut StdRng) -> Written {
        let mut written = Written::default();
        for step in 0..STEPS {
            match step % 12 {
                0 => written.declare(rng),
                1 => written.acknowledge(rng),
                2 => written.consume(rng),
                3 => written.channel(rng),
                _ => written.publish(rng),
            }
        }
        written
    }

    /// Puts a frame of a method, whose arguments that line tells.
    fn method(&mut self, line: String, encode: impl FnOnce(&mut Vec<u8>)) {
        self.backlog.append(encode);
        self.lines.push(line);
    }

    fn channel(&mut self, rng: &mut StdRng) {
        let number = rng.random();
        self.method(format!("{number} Channel.Open out_of_band="), |out| {
            put_open(out, number);
        });
        self.method(format!("{number} Confirm.Select nowait=0"), |out| {
            put_confirm_select(out, number);
        });
        let close = "Channel.Close class_id=0 method_id=0 reply_code=200 reply_text=";
        self.method(format!("{number} {close}"), |out| put_close(out, number));
        self.method(format!("{number} Channel.CloseOk"), |out| {
            put_close_ok(out, number);
        });
    }

    fn declare(&mut self, rng: &mut StdRng) {
        let number = rng.random();
        let name = text(rng, 255);
        let [passive, durable, exclusive, auto_delete] = rng.random();
        let texts = [text(rng, 255), text(rng, 900)];
        let all = [("x-queue-type", "quorum"), (&texts[0], &texts[1])];
        let arguments = &all[..rng.random_range(0..=2)];
        let declare = Declare {
            name: name.as_bytes(),
            passive,
            durable,
            exclusive,
            auto_delete,
            arguments,
        };
        let line = format!(
            "{number} Queue.Declare arguments={} auto_delete={} durable={} exclusive={} nowait=0 \
             passive={} queue={} ticket=0",
            table(arguments.iter().copied()),
            u8::from(auto_delete),
            u8::from(durable),
            u8::from(exclusive),
            u8::from(passive),
            hex(name.as_bytes()),
        );
        self.method(line, |out| put_declare(out, number, &declare));
    }

    fn acknowledge(&mut self, rng: &mut StdRng) {
        let (number, tag, prefetch) = (rng.random(), rng.random(), rng.random());
        let line = format!("{number} Basic.Ack delivery_tag={tag} multiple=0");
        self.method(line, |out| put_ack(out, number, tag));
        let line = format!("{number} Basic.Nack delivery_tag={tag} multiple=0 requeue=1");
        self.method(line, |out| put_requeue(out, number, tag));
        let line =
            format!("{number} Basic.Qos global_qos=0 prefetch_count={prefetch} prefetch_size=0");
        self.method(line, |out| put_qos(out, number, prefetch));
    }

    fn consume(&mut self, rng: &mut StdRng) {
        let (number, no_ack) = (rng.random(), rng.random());
        let name = text(rng, 255);
        let line = format!(
            "{number} Basic.Consume arguments= consumer_tag={} exclusive=0 no_ack={} no_local=0 \
             nowait=0 queue={} ticket=0",
            hex(b"fibrpc"),
            u8::from(no_ack),
            hex(name.as_bytes()),
        );
        self.method(line, |out| {
            put_consume(out, number, name.as_bytes(), no_ack)
        });
        let tag = hex(b"fibrpc");
        let line = format!("{number} Basic.Cancel consumer_tag={tag} nowait=0");
        self.method(line, |out| put_cancel(out, number));
    }

    fn publish(&mut self, rng: &mut StdRng) {
        let (number, mandatory) = (rng.random(), rng.random());
        let routing_key = text(rng, 255);
        let mut maybe = |max| rng.random_bool(0.6).then(|| text(rng, max));
        let [content_type, correlation_id, reply_to, expiration] = [255; 4].map(&mut maybe);
        let names: BTreeMap<_, _> = (0..rng.random_range(0..5))
            .map(|_| (text(rng, 255), text(rng, 2000)))
            .collect();
        let headers: Vec<_> = names.into_iter().collect();
        // Rarely the longest, to be done soon.
        let frame_max = match rng.random_range(0..20) {
            0 => 128 << 10,
            1..5 => 5000,
            _ => FRAME_MIN,
        };
        let payload_max = frame_max - OVERHEAD;
        let len = match rng.random_range(0..10) {
            0..6 => rng.random_range(0..300),
            6 => payload_max - 1,
            7 => payload_max,
            8 => payload_max + 1,
            _ => 2 * payload_max,
        };
        let mut body = vec![0; len];
        rng.fill(&mut body);

        let mut line = format!("{number} properties");
        if let Some(content_type) = &content_type {
            write!(line, " content_type={}", hex(content_type.as_bytes())).unwrap();
        }
        if let Some(id) = &correlation_id {
            write!(line, " correlation_id={}", hex(id.as_bytes())).unwrap();
        }
        if let Some(expiration) = &expiration {
            write!(line, " expiration={}", hex(expiration.as_bytes())).unwrap();
        }
        if !headers.is_empty() {
            let fields = headers.iter().map(|(name, value)| (&**name, &**value));
            write!(line, " headers={}", table(fields)).unwrap();
        }
        if let Some(reply_to) = &reply_to {
            write!(line, " reply_to={}", hex(reply_to.as_bytes())).unwrap();
        }
        write!(line, " of {len}").unwrap();
        self.lines.push(format!(
            "{number} Basic.Publish exchange= immediate=0 mandatory={} routing_key={} ticket=0",
            u8::from(mandatory),
            hex(routing_key.as_bytes()),
        ));
        self.lines.push(line);
        for payload in body.chunks(payload_max) {
            self.lines.push(format!("{number} body {}", hex(payload)));
        }
        let content: Arc<dyn Content> = Arc::new(body);
        self.backlog.set_frame_max(frame_max);
        self.backlog.publish(
            number,
            &Publish {
                routing_key: routing_key.as_bytes(),
                mandatory,
                properties: Properties {
                    content_type: content_type.as_ref().map(String::as_bytes),
                    headers: &headers,
                    correlation_id: correlation_id.as_ref().map(String::as_bytes),
                    reply_to: reply_to.as_ref().map(String::as_bytes),
                    expiration: expiration.as_ref().map(String::as_bytes),
                },
                content: &content,
            },
        );
    }

    /// All that was written, as it leaves.
    fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(mut chunk) = self.backlog.take() {
            let parts = chunk.left(1 << 20);
            let len = parts.len();
            for part in parts.slices() {
                bytes.extend_from_slice(part);
            }
            chunk.advance(len);
            self.backlog.put_back(chunk, len);
        }
        bytes
    }
}

/// A text of at most `max` bytes, often as many.
fn text(rng: &mut StdRng, max: usize) -> String {
    let len = match rng.random_range(0..8) {
        0 => 0,
        1 => max,
        _ => rng.random_range(0..=max.min(40)),
    };
    let letters = ['a', 'z', ' ', '=', '\n', '\0', 'ü', '✓', '\u{10ffff}'];
    let mut text = String::new();
    while text.len() < len {
        text.push(*letters.choose(rng).unwrap());
    }
    text.truncate(text.floor_char_boundary(len));
    text
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
    let digits = digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]);
    digits.map(char::from).collect()
}

/// A table of texts, in the order of the names.
fn table<'a>(fields: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    let mut fields: Vec<_> = fields
        .map(|(name, value)| format!("{}:S{}", hex(name.as_bytes()), hex(value.as_bytes())))
        .collect();
    fields.sort();
    fields.join(",")
}

/// What amq-protocol makes of the frames, a line for each.
fn as_amq_protocol_reads(mut bytes: &[u8]) -> Vec<String> {
    let mut lines = Vec::new();
    while !bytes.is_empty() {
        let (rest, frame) = parse_frame(bytes).expect("a well-formed frame");
        lines.push(match frame {
            AMQPFrame::Method(channel, method) => format!("{channel} {}", method_line(&method)),
            AMQPFrame::Header(channel, 60, header) => {
                let mut line = format!("{channel} properties");
                let properties = &header.properties;
                let texts = [
                    ("content_type", properties.content_type()),
                    ("correlation_id", properties.correlation_id()),
                    ("expiration", properties.expiration()),
                ];
                for (name, text) in texts {
                    if let Some(text) = text {
                        write!(line, " {name}={}", hex(text.as_bytes())).unwrap();
                    }
                }
                if let Some(headers) = properties.headers() {
                    write!(line, " headers={}", fields(headers)).unwrap();
                }
                if let Some(reply_to) = properties.reply_to() {
                    write!(line, " reply_to={}", hex(reply_to.as_bytes())).unwrap();
                }
                write!(line, " of {}", header.body_size).unwrap();
                line
            }
            AMQPFrame::Body(channel, payload) => format!("{channel} body {}", hex(&payload)),
            other => panic!("unexpected: {other:?}"),
        });
        bytes = rest;
    }
    lines
}

/// A method and all its arguments. Of the flags whose names have a hyphen, it reads none, and says
/// that they are not set.
fn method_line(method: &AMQPClass) -> String {
    use AMQPClass::{Basic, Channel, Confirm, Queue};
    let hex = |text: &String| hex(text.as_bytes());
    match method {
        Channel(channel::AMQPMethod::Open(_)) => "Channel.Open out_of_band=".to_owned(),
        Channel(channel::AMQPMethod::Close(m)) => format!(
            "Channel.Close class_id={} method_id={} reply_code={} reply_text={}",
            m.class_id,
            m.method_id,
            m.reply_code,
            hex(&m.reply_text),
        ),
        Channel(channel::AMQPMethod::CloseOk(_)) => "Channel.CloseOk".to_owned(),
        Confirm(confirm::AMQPMethod::Select(m)) => {
            format!("Confirm.Select nowait={}", u8::from(m.nowait))
        }
        Queue(queue::AMQPMethod::Declare(m)) => format!(
            "Queue.Declare arguments={} auto_delete={} durable={} exclusive={} nowait={} \
             passive={} queue={} ticket=0",
            fields(&m.arguments),
            u8::from(m.auto_delete),
            u8::from(m.durable),
            u8::from(m.exclusive),
            u8::from(m.nowait),
            u8::from(m.passive),
            hex(&m.queue),
        ),
        Basic(basic::AMQPMethod::Ack(m)) => format!(
            "Basic.Ack delivery_tag={} multiple={}",
            m.delivery_tag,
            u8::from(m.multiple)
        ),
        Basic(basic::AMQPMethod::Nack(m)) => format!(
            "Basic.Nack delivery_tag={} multiple={} requeue={}",
            m.delivery_tag,
            u8::from(m.multiple),
            u8::from(m.requeue)
        ),
        Basic(basic::AMQPMethod::Qos(m)) => format!(
            "Basic.Qos global_qos={} prefetch_count={} prefetch_size={}",
            u8::from(m.global),
            m.prefetch_count,
            m.prefetch_size
        ),
        Basic(basic::AMQPMethod::Consume(m)) => format!(
            "Basic.Consume arguments={} consumer_tag={} exclusive={} no_ack={} no_local={} \
             nowait={} queue={} ticket=0",
            fields(&m.arguments),
            hex(&m.consumer_tag),
            u8::from(m.exclusive),
            u8::from(m.no_ack),
            u8::from(m.no_local),
            u8::from(m.nowait),
            hex(&m.queue),
        ),
        Basic(basic::AMQPMethod::Cancel(m)) => format!(
            "Basic.Cancel consumer_tag={} nowait={}",
            hex(&m.consumer_tag),
            u8::from(m.nowait)
        ),
        Basic(basic::AMQPMethod::Publish(m)) => format!(
            "Basic.Publish exchange={} immediate={} mandatory={} routing_key={} ticket=0",
            hex(&m.exchange),
            u8::from(m.immediate),
            u8::from(m.mandatory),
            hex(&m.routing_key),
        ),
        other => panic!("unexpected: {other:?}"),
    }
}

fn fields(fields: &FieldTable) -> String {
    let text = |value| match value {
        AMQPValue::LongString(text) => text,
        other => panic!("unexpected: {other:?}"),
    };
    let texts: Vec<_> = fields
        .iter()
        .map(|(name, value)| (name, text(value.clone())))
        .collect();
    table(texts.iter().map(|(name, value)| (&***name, &**value)))
}

/// What pika makes of the frames, a line for each. `make test` installs it (scripts/peers).
fn as_pika_reads(bytes: &[u8]) -> Vec<String> {
    let mut frames = tempfile::tempfile().unwrap();
    frames.write_all(bytes).unwrap();
    frames.rewind().unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pika = Command::new(root.join("target/peers/bin/python"))
        .arg(root.join("tests/peers/read_frames.py"))
        .stdin(frames)
        .output()
        .expect("these tests need a Python peer: run `make test`, which installs it");
    assert!(pika.status.success(), "{}", pika.stderr.escape_ascii());
    let lines = String::from_utf8(pika.stdout).unwrap();
    lines.lines().map(str::to_owned).collect()
}

/// Holds what was read against what was written, and shows the first line that differs.
fn compare(read: &[String], written: &[String]) {
    for (read, written) in read.iter().zip(written) {
        assert_eq!(read, written);
    }
    assert_eq!(read.len(), written.len());
}

#[test]
fn amq_protocol_reads_every_frame_as_it_was_meant() {
    let mut written = Written::generated(&mut StdRng::seed_from_u64(SEED));
    let without_hyphens = |line: &String| {
        let line = line.replace("auto_delete=1", "auto_delete=0");
        line.replace("no_ack=1", "no_ack=0")
    };
    let lines: Vec<_> = written.lines.iter().map(without_hyphens).collect();
    compare(&as_amq_protocol_reads(&written.bytes()), &lines);
}

#[test]
fn pika_reads_every_frame_as_it_was_meant() {
    let mut written = Written::generated(&mut StdRng::seed_from_u64(SEED + 1));
    compare(&as_pika_reads(&written.bytes()), &written.lines);
}
