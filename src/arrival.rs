//! What arrives: from frames to deliveries, returned messages and the news about a consumer.
//! Pure; no I/O.
//!
//! The class `basic` is ours, in both directions; everything else is amiquip's. So a delivery is
//! read here, by the thread that waits for it, and amiquip never sees one. That also decides what
//! a stranger's message can do to us: nothing. Headers are skipped by their lengths, not parsed,
//! so a table nested a thousand deep is so many bytes; property values are bytes, and need be no
//! text.

use crate::frame::{
    BASIC_CANCEL, BASIC_CANCEL_OK, BASIC_CONSUME_OK, BASIC_DELIVER, BASIC_RETURN, BODY,
    CLASS_BASIC, END, HEADER, METHOD, OVERHEAD, PREFIX_LEN,
};
use std::fmt;

const CLASS_CONNECTION: u16 = 10;
const CONNECTION_CLOSE: u16 = 50;

const CLASS_CHANNEL: u16 = 20;
const CHANNEL_CLOSE: u16 = 40;
const CHANNEL_CLOSE_OK: u16 = 41;

const HEARTBEAT: u8 = 8;

/// A frame longer than this is none, in bytes. RabbitMQ's are 128 KiB at most, unless configured
/// otherwise.
const FRAME_MAX: usize = 16 << 20;

/// How much memory is set aside for a message before its content is there, in bytes: what is said
/// of a length is a claim. It is what RabbitMQ takes at most, and until it is used it is only a
/// range of addresses.
const RESERVED_MAX: usize = crate::wire::MESSAGE_MAX;

/// A message as it arrived.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub head: Head,
    pub body: Vec<u8>,
}

/// The part of a content header that holds the properties: flags, and what they announce.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Head(Vec<u8>);

/// What arrives for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// A message from a queue.
    Delivery {
        channel: u16,
        delivery_tag: u64,
        redelivered: bool,
        message: Message,
    },
    /// A message of ours that the broker could not route.
    Returned(Message),
    /// Something about the channel of that number.
    Channel(u16, ChannelNews),
}

/// What can happen to a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChannelNews {
    /// It consumes.
    Consuming,
    /// It does not consume any more, as we asked.
    Cancelled,
    /// It does not consume any more: its queue is gone.
    QueueGone,
    /// The broker closed it, for this reason. amiquip is told as well, since it has to answer.
    Closed(Goodbye),
}

/// The properties of a message that we read, verbatim: any bytes that the peer chose.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received<'a> {
    /// The content of the headers' table.
    pub headers: &'a [u8],
    pub correlation_id: Option<&'a [u8]>,
    pub reply_to: Option<&'a [u8]>,
    pub message_id: Option<&'a [u8]>,
}

/// The value of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderValue<'a> {
    LongString(&'a [u8]),
    /// Of a type that no header of ours has.
    Other,
}

impl Head {
    /// The properties, as far as they are well-formed. Source: AMQP 0-9-1, section 4.2.6.1.
    pub fn properties(&self) -> Received<'_> {
        let mut received = Received::default();
        let mut cursor = Cursor(&self.0);
        let Some(flags) = cursor.u16() else {
            return received;
        };
        // The types of the 14 properties, from the flags' highest bit down: a short string, a
        // table, or a number of so many octets.
        const TYPES: &[u8; 14] = b"ssF11ssss8ssss";
        for (index, kind) in TYPES.iter().enumerate() {
            if flags >> (15 - index) & 1 == 0 {
                continue;
            }
            let value = match kind {
                b's' => cursor.short_string(),
                b'F' => cursor.u32().and_then(|len| cursor.take(len)),
                octets => cursor.take(usize::from(octets - b'0')),
            };
            let Some(value) = value else { break };
            match index {
                2 => received.headers = value,
                5 => received.correlation_id = Some(value),
                6 => received.reply_to = Some(value),
                8 => received.message_id = Some(value),
                _ => {}
            }
        }
        received
    }
}

impl<'a> Received<'a> {
    /// The header of that name, if there is one.
    pub fn header(&self, name: &str) -> Option<HeaderValue<'a>> {
        let mut cursor = Cursor(self.headers);
        loop {
            let key = cursor.short_string()?;
            let kind = cursor.u8()?;
            // The lengths of RabbitMQ's field types. Source:
            // <https://www.rabbitmq.com/amqp-0-9-1-errata#section_3>.
            let len = match kind {
                b'V' => 0,
                b't' | b'b' | b'B' => 1,
                b's' | b'u' => 2,
                b'I' | b'i' | b'f' => 4,
                b'D' => 5,
                b'l' | b'L' | b'd' | b'T' => 8,
                b'S' | b'x' | b'F' | b'A' => cursor.u32()?,
                _ => return None,
            };
            let value = cursor.take(len)?;
            if key == name.as_bytes() {
                return Some(match kind {
                    b'S' => HeaderValue::LongString(value),
                    _ => HeaderValue::Other,
                });
            }
        }
    }
}

/// What is not AMQP, or not in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The length of the frame that `bytes` begin with; `None` while that cannot be told.
///
/// # Errors
///
/// It is no frame. A broker that does not speak our version answers so.
pub(crate) fn frame_len(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    if let Some(kind) = bytes.first()
        && !matches!(*kind, METHOD | HEADER | BODY | HEARTBEAT)
    {
        return Err(Malformed);
    }
    let Some(([.., a, b, c, d], _)) = bytes.split_first_chunk::<PREFIX_LEN>() else {
        return Ok(None);
    };
    match u32::from_be_bytes([*a, *b, *c, *d]) as usize + OVERHEAD {
        len if len <= FRAME_MAX => Ok(Some(len)),
        _ => Err(Malformed),
    }
}

/// Why the broker closes a connection or a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Goodbye {
    pub code: u16,
    pub text: String,
}

impl fmt::Display for Goodbye {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some of RabbitMQ's texts have several lines.
        let words: Vec<_> = self.text.split_whitespace().collect();
        write!(f, "the broker said {} {}", self.code, words.join(" "))
    }
}

impl Goodbye {
    /// Reads it from the frame that says so; `None` from any other.
    pub fn from_frame(frame: &[u8]) -> Option<Goodbye> {
        let (prefix, payload) = frame.split_first_chunk::<PREFIX_LEN>()?;
        let mut cursor = Cursor(payload);
        (prefix[0] == METHOD
            && cursor.u16() == Some(CLASS_CONNECTION)
            && cursor.u16() == Some(CONNECTION_CLOSE))
        .then(|| cursor.goodbye())
    }
}

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// What it was, or what it completed.
    pub arrival: Option<Arrival>,
    /// Whether amiquip is to have it.
    pub pass_on: bool,
}

/// Puts messages together from their frames. Those of one channel come one after the other;
/// those of several may mingle.
#[derive(Default)]
pub(crate) struct Assembler {
    unfinished: Vec<Unfinished>,
}

/// A message whose frames have not all arrived.
struct Unfinished {
    channel: u16,
    /// What it will be; its message is filled in as it arrives.
    arrival: Arrival,
    /// How much of the body is still to come; `None` before the content header.
    missing: Option<u64>,
}

impl Assembler {
    /// Takes one whole frame.
    ///
    /// # Errors
    ///
    /// It is malformed, or out of order.
    pub fn take(&mut self, frame: &[u8]) -> Result<Taken, Malformed> {
        let (prefix, rest) = frame.split_first_chunk::<PREFIX_LEN>().ok_or(Malformed)?;
        let (&end, payload) = rest.split_last().ok_or(Malformed)?;
        if end != END {
            return Err(Malformed);
        }
        let channel = u16::from_be_bytes([prefix[1], prefix[2]]);
        let ours = |arrival| Taken {
            arrival,
            pass_on: false,
        };
        match prefix[0] {
            METHOD => self.method(channel, payload),
            HEADER => self.header(channel, payload).map(ours),
            BODY => self.body(channel, payload).map(ours),
            _ => Ok(Taken {
                arrival: None,
                pass_on: true,
            }),
        }
    }

    fn method(&mut self, channel: u16, payload: &[u8]) -> Result<Taken, Malformed> {
        let mut cursor = Cursor(payload);
        let class = cursor.u16().ok_or(Malformed)?;
        let method = cursor.u16().ok_or(Malformed)?;
        let arrival = match (class, method) {
            (CLASS_BASIC, BASIC_DELIVER) => {
                cursor.short_string().ok_or(Malformed)?; // the consumer's tag
                let delivery_tag = cursor.u64().ok_or(Malformed)?;
                let redelivered = cursor.u8().ok_or(Malformed)? & 1 == 1;
                let delivery = Arrival::Delivery {
                    channel,
                    delivery_tag,
                    redelivered,
                    message: Message::default(),
                };
                self.begin(channel, delivery)?;
                None
            }
            (CLASS_BASIC, BASIC_RETURN) => {
                self.begin(channel, Arrival::Returned(Message::default()))?;
                None
            }
            (CLASS_BASIC, BASIC_CONSUME_OK) => {
                Some(Arrival::Channel(channel, ChannelNews::Consuming))
            }
            (CLASS_BASIC, BASIC_CANCEL_OK) => {
                Some(Arrival::Channel(channel, ChannelNews::Cancelled))
            }
            (CLASS_BASIC, BASIC_CANCEL) => Some(Arrival::Channel(channel, ChannelNews::QueueGone)),
            (CLASS_CHANNEL, CHANNEL_CLOSE | CHANNEL_CLOSE_OK) => {
                self.unfinished
                    .retain(|unfinished| unfinished.channel != channel);
                (method == CHANNEL_CLOSE)
                    .then(|| Arrival::Channel(channel, ChannelNews::Closed(cursor.goodbye())))
            }
            _ => None,
        };
        Ok(Taken {
            arrival,
            pass_on: class != CLASS_BASIC,
        })
    }

    fn begin(&mut self, channel: u16, arrival: Arrival) -> Result<(), Malformed> {
        if self.position(channel).is_some() {
            return Err(Malformed);
        }
        self.unfinished.push(Unfinished {
            channel,
            arrival,
            missing: None,
        });
        Ok(())
    }

    fn position(&self, channel: u16) -> Option<usize> {
        self.unfinished
            .iter()
            .position(|unfinished| unfinished.channel == channel)
    }

    fn header(&mut self, channel: u16, payload: &[u8]) -> Result<Option<Arrival>, Malformed> {
        let mut cursor = Cursor(payload);
        cursor.u32().ok_or(Malformed)?; // class and weight
        let body_len = cursor.u64().ok_or(Malformed)?;
        let at = self.position(channel).ok_or(Malformed)?;
        let unfinished = &mut self.unfinished[at];
        if unfinished.missing.replace(body_len).is_some() {
            return Err(Malformed);
        }
        let message = unfinished.message();
        message.head = Head(cursor.0.to_vec());
        let reserved = usize::try_from(body_len).unwrap_or(usize::MAX);
        message.body = Vec::with_capacity(reserved.min(RESERVED_MAX));
        Ok(self.finish(at))
    }

    fn body(&mut self, channel: u16, payload: &[u8]) -> Result<Option<Arrival>, Malformed> {
        let at = self.position(channel).ok_or(Malformed)?;
        let unfinished = &mut self.unfinished[at];
        let missing = unfinished.missing.as_mut().ok_or(Malformed)?;
        *missing = missing.checked_sub(payload.len() as u64).ok_or(Malformed)?;
        unfinished.message().body.extend_from_slice(payload);
        Ok(self.finish(at))
    }

    fn finish(&mut self, at: usize) -> Option<Arrival> {
        (self.unfinished[at].missing == Some(0)).then(|| self.unfinished.swap_remove(at).arrival)
    }
}

impl Unfinished {
    fn message(&mut self) -> &mut Message {
        match &mut self.arrival {
            Arrival::Delivery { message, .. } | Arrival::Returned(message) => message,
            other => unreachable!("{other:?} has no content"),
        }
    }
}

/// What is left to read of some bytes.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[octet]| octet)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// A length.
    fn u32(&mut self) -> Option<usize> {
        self.array()
            .map(|octets| u32::from_be_bytes(octets) as usize)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn short_string(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    /// The beginning of `connection.close` and `channel.close`.
    fn goodbye(&mut self) -> Goodbye {
        let code = self.u16().unwrap_or_default();
        let text = self.short_string().unwrap_or_default();
        Goodbye {
            code,
            text: String::from_utf8_lossy(text).into_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Properties, Publish, put_ack, put_publish};
    use proptest::prelude::*;

    /// A delivery as the broker writes it. Its content is laid out as that of a publish.
    fn put_delivery(
        out: &mut Vec<u8>,
        channel: u16,
        tag: u64,
        properties: Properties<'_>,
        body: &[u8],
    ) {
        put_deliver_method(out, channel, tag);
        put_content(out, channel, properties, body);
    }

    fn put_deliver_method(out: &mut Vec<u8>, channel: u16, tag: u64) {
        let mut payload = vec![0, 60, 0, 60, 3, b't', b'a', b'g'];
        payload.extend_from_slice(&tag.to_be_bytes());
        payload.extend_from_slice(&[1, 0, 1, b'q']); // redelivered, no exchange, a key
        put_raw(out, METHOD, channel, &payload);
    }

    fn put_content(out: &mut Vec<u8>, channel: u16, properties: Properties<'_>, body: &[u8]) {
        let mut publish = Vec::new();
        let message = Publish {
            routing_key: b"q",
            mandatory: false,
            properties,
            body,
        };
        put_publish(&mut publish, channel, &message);
        let method = frame_len(&publish).unwrap().unwrap();
        out.extend_from_slice(&publish[method..]);
    }

    fn put_raw(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
        out.push(kind);
        out.extend_from_slice(&channel.to_be_bytes());
        out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        out.extend_from_slice(payload);
        out.push(END);
    }

    fn take_all(assembler: &mut Assembler, mut bytes: &[u8]) -> Result<Vec<Taken>, Malformed> {
        let mut taken = Vec::new();
        while let Some(len) = frame_len(bytes)? {
            let (frame, rest) = bytes.split_at_checked(len).ok_or(Malformed)?;
            taken.push(assembler.take(frame)?);
            bytes = rest;
        }
        Ok(taken)
    }

    fn arrivals(bytes: &[u8]) -> Vec<Arrival> {
        let taken = take_all(&mut Assembler::default(), bytes).unwrap();
        taken
            .into_iter()
            .filter_map(|taken| taken.arrival)
            .collect()
    }

    /// A head with the given flags and property bytes.
    fn head(flags: u16, properties: &[u8]) -> Head {
        Head([&flags.to_be_bytes()[..], properties].concat())
    }

    fn nested_table(depth: usize) -> Vec<u8> {
        let mut table: Vec<u8> = Vec::new();
        for _ in 0..depth {
            let len = (table.len() as u32).to_be_bytes();
            table = [&[1, b'k', b'F'], &len[..], &table].concat();
        }
        [&(table.len() as u32).to_be_bytes()[..], &table].concat()
    }

    proptest! {
        #[test]
        fn a_delivery_reads_back(
            channel: u16,
            tag: u64,
            kind in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
            correlation_id in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..255)),
            reply_to in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..255)),
            body in proptest::collection::vec(any::<u8>(), 0..10_000),
        ) {
            let properties = Properties {
                content_type: Some(b"text/plain"),
                header: kind.as_ref().map(|kind| (&b"x-error-kind"[..], &kind[..])),
                correlation_id: correlation_id.as_deref(),
                reply_to: reply_to.as_deref(),
                expiration: Some(b"1000"),
            };
            let mut out = Vec::new();
            put_delivery(&mut out, channel, tag, properties, &body);
            let mut all = arrivals(&out);
            prop_assert_eq!(all.len(), 1);
            let Some(Arrival::Delivery { channel: c, delivery_tag, redelivered, message }) = all.pop() else {
                panic!("not a delivery");
            };
            prop_assert_eq!((c, delivery_tag, redelivered), (channel, tag, true));
            prop_assert_eq!(&message.body, &body);
            let read = message.head.properties();
            prop_assert_eq!(read.correlation_id, correlation_id.as_deref());
            prop_assert_eq!(read.reply_to, reply_to.as_deref());
            prop_assert_eq!(read.message_id, None);
            let expected = kind.as_deref().map(HeaderValue::LongString);
            prop_assert_eq!(read.header("x-error-kind"), expected);
            prop_assert_eq!(read.header("other"), None);
        }

        #[test]
        fn no_bytes_make_the_assembler_panic(frames: Vec<(u8, u16, Vec<u8>)>, bytes: Vec<u8>) {
            let mut assembler = Assembler::default();
            for (kind, channel, payload) in frames {
                let mut out = Vec::new();
                put_raw(&mut out, kind % 4, channel % 2, &payload);
                let _ = assembler.take(&out);
            }
            let _ = take_all(&mut assembler, &bytes);
        }

        #[test]
        fn no_head_makes_the_reader_panic(bytes: Vec<u8>) {
            let head = Head(bytes);
            let _ = head.properties().header("x-error-kind");
        }
    }

    #[test]
    fn messages_of_two_channels_may_mingle() {
        let mut out = Vec::new();
        put_deliver_method(&mut out, 1, 1);
        put_deliver_method(&mut out, 2, 2);
        put_content(&mut out, 2, Properties::default(), b"two");
        put_content(&mut out, 1, Properties::default(), b"one");
        let bodies: Vec<_> = arrivals(&out)
            .into_iter()
            .map(|arrival| match arrival {
                Arrival::Delivery {
                    channel, message, ..
                } => (channel, message.body),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(bodies, [(2, b"two".to_vec()), (1, b"one".to_vec())]);
    }

    #[test]
    fn a_closed_channel_is_told_to_both_and_takes_its_unfinished_message_along() {
        let mut out = Vec::new();
        put_deliver_method(&mut out, 1, 1);
        put_raw(
            &mut out,
            METHOD,
            1,
            b"\0\x14\0\x28\x01\x94\x04gone\0\x3c\0\x14",
        );
        put_delivery(&mut out, 1, 2, Properties::default(), b"");
        let taken = take_all(&mut Assembler::default(), &out).unwrap();
        let goodbye = Goodbye {
            code: 404,
            text: "gone".to_owned(),
        };
        assert_eq!(
            taken[1],
            Taken {
                arrival: Some(Arrival::Channel(1, ChannelNews::Closed(goodbye))),
                pass_on: true
            }
        );
        assert!(matches!(
            taken[3].arrival,
            Some(Arrival::Delivery {
                delivery_tag: 2,
                ..
            })
        ));
    }

    #[test]
    fn a_goodbye_is_read_and_nothing_else_is_taken_for_one() {
        let mut close = Vec::new();
        put_raw(
            &mut close,
            METHOD,
            0,
            b"\0\x0a\0\x32\x01\x40\x03bye\0\0\0\0",
        );
        let goodbye = Goodbye {
            code: 320,
            text: "bye".to_owned(),
        };
        assert_eq!(Goodbye::from_frame(&close), Some(goodbye));
        let mut others = Vec::new();
        put_raw(&mut others, HEARTBEAT, 0, b"");
        assert_eq!(Goodbye::from_frame(&others), None);
        others.clear();
        put_ack(&mut others, 1, 1);
        assert_eq!(Goodbye::from_frame(&others), None);
    }

    #[test]
    fn what_is_not_of_the_class_basic_is_passed_on() {
        let mut out = Vec::new();
        put_raw(&mut out, HEARTBEAT, 0, b"");
        put_raw(&mut out, METHOD, 0, &[0, 10, 0, 50]);
        put_ack(&mut out, 1, 1);
        let taken = take_all(&mut Assembler::default(), &out).unwrap();
        let passed_on: Vec<_> = taken.iter().map(|taken| taken.pass_on).collect();
        assert_eq!(passed_on, [true, true, false]);
    }

    #[test]
    fn content_without_its_method_or_beyond_its_length_is_malformed() {
        let mut content = Vec::new();
        put_content(&mut content, 1, Properties::default(), b"body");
        assert_eq!(
            take_all(&mut Assembler::default(), &content),
            Err(Malformed)
        );
        let mut long = Vec::new();
        put_delivery(&mut long, 1, 1, Properties::default(), b"");
        put_raw(&mut long, BODY, 1, b"more");
        assert_eq!(take_all(&mut Assembler::default(), &long), Err(Malformed));
    }

    #[test]
    fn another_protocol_is_no_frame() {
        assert_eq!(frame_len(b"HTTP/1.1 400 Bad Request"), Err(Malformed));
        assert_eq!(frame_len(b"AMQP\0\0\x09\x01"), Err(Malformed));
        assert_eq!(frame_len(&[METHOD, 0, 1, 0xff, 0, 0, 0]), Err(Malformed));
        assert_eq!(frame_len(&[METHOD, 0, 1]), Ok(None));
        assert_eq!(frame_len(b""), Ok(None));
    }

    #[test]
    fn a_table_nested_20000_deep_is_so_many_bytes() {
        // reply to, behind the headers, must still be found.
        let properties = [&nested_table(20_000)[..], b"\x08callback"].concat();
        let head = head(1 << 13 | 1 << 9, &properties);
        let read = head.properties();
        assert_eq!(read.reply_to, Some(&b"callback"[..]));
        assert_eq!(read.header("k"), Some(HeaderValue::Other));
    }

    #[test]
    fn a_header_is_found_behind_every_other_type() {
        let mut table = Vec::new();
        for (kind, len) in [
            (b'V', 0),
            (b't', 1),
            (b'b', 1),
            (b'B', 1),
            (b's', 2),
            (b'u', 2),
            (b'I', 4),
            (b'i', 4),
            (b'f', 4),
            (b'D', 5),
            (b'l', 8),
            (b'L', 8),
            (b'd', 8),
            (b'T', 8),
        ] {
            table.extend_from_slice(&[1, b'k', kind]);
            table.extend_from_slice(&vec![0xff; len]);
        }
        for kind in [b'S', b'x', b'F', b'A'] {
            table.extend_from_slice(&[1, b'k', kind, 0, 0, 0, 3, 1, 2, 3]);
        }
        table.extend_from_slice(b"\x0cx-error-kindS\0\0\0\x08internal");
        let properties = [&(table.len() as u32).to_be_bytes()[..], &table].concat();
        let head = head(1 << 13, &properties);
        assert_eq!(
            head.properties().header("x-error-kind"),
            Some(HeaderValue::LongString(b"internal"))
        );
    }
}
