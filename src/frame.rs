//! The few AMQP 0-9-1 frames that we write ourselves, and the one kind that we check before
//! amiquip reads it. Pure; no I/O.
//!
//! Why write frames beside an AMQP library? A publish through amiquip is three messages to its
//! I/O thread, and up to three wake-ups, three writes and three TCP segments; with the
//! acknowledgement four. Written here, a reply and its ack are one buffer and one write, made by
//! the thread that has computed the reply (see [`crate::socket`]).
//!
//! Source of the layout: AMQP 0-9-1 specification, sections 2.3.5 (frames) and 4.2 (grammar),
//! and RabbitMQ's errata for the types of a field table.

/// A frame's type octet.
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
/// The octet that ends every frame.
const END: u8 = 0xCE;

/// Octets before a frame's payload: type, channel, size.
pub(crate) const PREFIX_LEN: usize = 7;
/// All octets of a frame that are not payload.
pub(crate) const OVERHEAD: usize = PREFIX_LEN + 1;

/// The longest payload of a body frame. Every peer must accept frames of 4096 octets
/// (`frame-min-size`), and amiquip does not tell what it has negotiated beyond that.
const BODY_PAYLOAD_MAX: usize = 4096 - OVERHEAD;

const CLASS_BASIC: u16 = 60;
const BASIC_CANCEL: u16 = 30;
const BASIC_PUBLISH: u16 = 40;
const BASIC_ACK: u16 = 80;
const BASIC_REJECT: u16 = 90;

/// The longest AMQP short string, in bytes: names of queues, correlation ids.
pub(crate) const SHORT_STRING_MAX: usize = 255;

/// The properties of a message that we send. Each is at most [`SHORT_STRING_MAX`] bytes.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Properties<'a> {
    pub content_type: Option<&'a str>,
    /// One header, a name and its value.
    pub header: Option<(&'a str, &'a str)>,
    pub correlation_id: Option<&'a str>,
    pub reply_to: Option<&'a str>,
    /// How long the message may wait in a queue, in milliseconds.
    pub expiration: Option<&'a str>,
}

/// A message to the default exchange, which routes it to the queue that its key names.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Publish<'a> {
    pub routing_key: &'a str,
    /// Whether the broker returns the message if no queue has that name.
    pub mandatory: bool,
    pub properties: Properties<'a>,
    pub body: &'a [u8],
}

/// Appends `basic.publish` with its content.
pub(crate) fn put_publish(out: &mut Vec<u8>, channel: u16, message: &Publish<'_>) {
    put_method(out, channel, BASIC_PUBLISH, |out| {
        put_u16(out, 0); // reserved
        put_short_string(out, ""); // the default exchange
        put_short_string(out, message.routing_key);
        out.push(u8::from(message.mandatory));
    });
    put_frame(out, HEADER, channel, |out| {
        put_u16(out, CLASS_BASIC);
        put_u16(out, 0); // weight, unused
        out.extend_from_slice(&(message.body.len() as u64).to_be_bytes());
        put_properties(out, &message.properties);
    });
    for chunk in message.body.chunks(BODY_PAYLOAD_MAX) {
        put_frame(out, BODY, channel, |out| out.extend_from_slice(chunk));
    }
}

/// Appends `basic.ack` for one delivery.
pub(crate) fn put_ack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64) {
    put_method(out, channel, BASIC_ACK, |out| {
        out.extend_from_slice(&delivery_tag.to_be_bytes());
        out.push(0); // this one only
    });
}

/// Appends `basic.reject`, which puts one delivery back into its queue.
pub(crate) fn put_requeue(out: &mut Vec<u8>, channel: u16, delivery_tag: u64) {
    put_method(out, channel, BASIC_REJECT, |out| {
        out.extend_from_slice(&delivery_tag.to_be_bytes());
        out.push(1); // requeue
    });
}

/// Appends `basic.cancel` without asking for an answer.
pub(crate) fn put_cancel(out: &mut Vec<u8>, channel: u16, consumer_tag: &str) {
    put_method(out, channel, BASIC_CANCEL, |out| {
        put_short_string(out, consumer_tag);
        out.push(1); // no-wait
    });
}

fn put_method(out: &mut Vec<u8>, channel: u16, method: u16, arguments: impl FnOnce(&mut Vec<u8>)) {
    put_frame(out, METHOD, channel, |out| {
        put_u16(out, CLASS_BASIC);
        put_u16(out, method);
        arguments(out);
    });
}

fn put_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: impl FnOnce(&mut Vec<u8>)) {
    out.push(kind);
    put_u16(out, channel);
    put_sized(out, payload);
    out.push(END);
}

/// Appends what `content` appends, behind its length as four octets.
fn put_sized(out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    content(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends the flags that say which properties follow, and those, in the order of the flags.
fn put_properties(out: &mut Vec<u8>, properties: &Properties<'_>) {
    let flags = u16::from(properties.content_type.is_some()) << 15
        | u16::from(properties.header.is_some()) << 13
        | u16::from(properties.correlation_id.is_some()) << 10
        | u16::from(properties.reply_to.is_some()) << 9
        | u16::from(properties.expiration.is_some()) << 8;
    put_u16(out, flags);
    if let Some(content_type) = properties.content_type {
        put_short_string(out, content_type);
    }
    if let Some((name, value)) = properties.header {
        put_sized(out, |out| {
            put_short_string(out, name);
            out.push(b'S'); // a long string
            put_sized(out, |out| out.extend_from_slice(value.as_bytes()));
        });
    }
    let rest = [
        properties.correlation_id,
        properties.reply_to,
        properties.expiration,
    ];
    for value in rest.into_iter().flatten() {
        put_short_string(out, value);
    }
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// # Panics
///
/// If `value` is longer than its length octet can say; callers check what comes from outside.
fn put_short_string(out: &mut Vec<u8>, value: &str) {
    out.push(u8::try_from(value.len()).expect("an AMQP short string has at most 255 bytes"));
    out.extend_from_slice(value.as_bytes());
}

/// The first octets of a frame that arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefix {
    /// Whether this is a content header: the frame that carries a message's properties.
    pub is_content_header: bool,
    /// The length of the whole frame, in octets.
    pub frame_len: usize,
}

/// Reads the start of a frame; `None` while fewer than [`PREFIX_LEN`] octets are there.
pub(crate) fn prefix(bytes: &[u8]) -> Option<Prefix> {
    let (prefix, _) = bytes.split_first_chunk::<PREFIX_LEN>()?;
    let [kind, _, _, a, b, c, d] = *prefix;
    let payload_len = u32::from_be_bytes([a, b, c, d]) as usize;
    Some(Prefix {
        is_content_header: kind == HEADER,
        frame_len: payload_len + OVERHEAD,
    })
}

/// Takes out of a whole content header frame, in place, what amiquip's parser does not survive.
///
/// - A table or array inside the headers becomes a byte array: the parser recurses, and a table
///   nested some thousand deep overflows its thread's stack, which aborts the process. We read
///   no header that is nested.
/// - In a property that is not UTF-8, the offending bytes become `?`: the parser would otherwise
///   lose its place, and with it the other properties or the connection.
///
/// The message would come back after each restart, so refusing it is no way out. What follows
/// something malformed is left as it is; the broker checks lengths when a message is published.
pub(crate) fn defuse(frame: &mut [u8]) {
    // Behind the prefix: class, weight, body size, flags.
    const FLAGS_AT: usize = PREFIX_LEN + 2 + 2 + 8;
    let end = frame.len().saturating_sub(1);
    let Some(mut cursor) = frame
        .get_mut(..end)
        .and_then(|frame| frame.get_mut(FLAGS_AT..))
        .map(Cursor)
    else {
        return;
    };
    let Some(flags) = cursor.u16() else { return };
    // The types of the 14 properties, from the flags' highest bit down: a short string, a
    // table, or a number of so many octets.
    const PROPERTIES: &[u8; 14] = b"ssF11ssss8ssss";
    for (index, kind) in PROPERTIES.iter().enumerate() {
        if flags >> (15 - index) & 1 == 0 {
            continue;
        }
        let done = match kind {
            b's' => cursor
                .u8()
                .and_then(|len| cursor.take(usize::from(len)))
                .map(make_utf8),
            b'F' => cursor.u32().and_then(|len| cursor.take(len)).map(flatten),
            octets => cursor.take(usize::from(octets - b'0')).map(drop),
        };
        if done.is_none() {
            return;
        }
    }
}

fn make_utf8(mut text: &mut [u8]) {
    while let Err(error) = std::str::from_utf8(text) {
        let bad = error.valid_up_to();
        text[bad] = b'?';
        text = &mut text[bad + 1..];
    }
}

/// Turns the tables and arrays directly within a table into byte arrays of the same length.
fn flatten(table: &mut [u8]) {
    let mut cursor = Cursor(table);
    while flatten_entry(&mut cursor).is_some() {}
}

fn flatten_entry(cursor: &mut Cursor<'_>) -> Option<()> {
    let key_len = cursor.u8()?;
    cursor.take(usize::from(key_len))?;
    let kind = cursor.take(1)?;
    if matches!(kind[0], b'F' | b'A') {
        kind[0] = b'x';
    }
    let len = match kind[0] {
        b'V' => 0,
        b't' | b'b' | b'B' => 1,
        b's' | b'U' | b'u' => 2,
        b'I' | b'i' | b'f' => 4,
        b'D' => 5,
        b'l' | b'L' | b'd' | b'T' => 8,
        b'S' | b'x' => cursor.u32()?,
        _ => return None, // where the parser stops reading the table, too
    };
    cursor.take(len).map(drop)
}

/// What is left to read of some bytes that may be changed.
struct Cursor<'a>(&'a mut [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a mut [u8]> {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)
            .map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Option<usize> {
        let bytes: &[u8; 4] = self.take(4)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::frame::{AMQPContentHeader, AMQPFrame, parse_frame};
    use amq_protocol::protocol::AMQPClass;
    use amq_protocol::protocol::basic::AMQPMethod;
    use amq_protocol::types::{AMQPValue, FieldTable};
    use proptest::prelude::*;

    /// Reads frames back with the parser that amiquip uses.
    fn parse_all(mut bytes: &[u8]) -> Vec<AMQPFrame> {
        let mut frames = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).expect("a well-formed frame");
            frames.push(frame);
            bytes = rest;
        }
        frames
    }

    fn content_header(frame: &AMQPFrame) -> &AMQPContentHeader {
        match frame {
            AMQPFrame::Header(_, _, header) => header,
            other => panic!("not a content header: {other:?}"),
        }
    }

    /// A content header frame with the given flags and property bytes.
    fn raw_header(flags: u16, properties: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_frame(&mut out, HEADER, 1, |out| {
            put_u16(out, CLASS_BASIC);
            put_u16(out, 0);
            out.extend_from_slice(&2_u64.to_be_bytes());
            put_u16(out, flags);
            out.extend_from_slice(properties);
        });
        out
    }

    fn nested_table(depth: usize) -> Vec<u8> {
        let mut table = Vec::new();
        for _ in 0..depth {
            let mut outer = vec![1, b'k', b'F'];
            put_sized(&mut outer, |out| out.extend_from_slice(&table));
            table = outer;
        }
        let mut out = Vec::new();
        put_sized(&mut out, |out| out.extend_from_slice(&table));
        out
    }

    proptest! {
        #[test]
        fn a_publish_reads_back(
            channel: u16,
            key in "[a-z]{0,255}",
            mandatory: bool,
            content_type in proptest::option::of("[a-z/]{0,40}"),
            header in proptest::option::of(("[a-z-]{1,20}", "\\PC{0,40}")),
            correlation_id in proptest::option::of("[0-9a-f]{0,255}"),
            reply_to in proptest::option::of("[a-z.]{0,255}"),
            expiration in proptest::option::of("[0-9]{1,9}"),
            body in proptest::collection::vec(any::<u8>(), 0..10_000),
        ) {
            let message = Publish {
                routing_key: &key,
                mandatory,
                properties: Properties {
                    content_type: content_type.as_deref(),
                    header: header.as_ref().map(|(name, value)| (name.as_str(), value.as_str())),
                    correlation_id: correlation_id.as_deref(),
                    reply_to: reply_to.as_deref(),
                    expiration: expiration.as_deref(),
                },
                body: &body,
            };
            let mut out = Vec::new();
            put_publish(&mut out, channel, &message);
            let frames = parse_all(&out);
            let AMQPFrame::Method(c, AMQPClass::Basic(AMQPMethod::Publish(publish))) = &frames[0] else {
                panic!("not a publish: {:?}", frames[0]);
            };
            prop_assert_eq!(*c, channel);
            prop_assert_eq!(&publish.exchange, "");
            prop_assert_eq!(&publish.routing_key, &key);
            prop_assert_eq!(publish.mandatory, mandatory);
            prop_assert!(!publish.immediate);
            let read = content_header(&frames[1]);
            prop_assert_eq!(read.body_size, body.len() as u64);
            prop_assert_eq!(read.properties.content_type(), &content_type);
            prop_assert_eq!(read.properties.correlation_id(), &correlation_id);
            prop_assert_eq!(read.properties.reply_to(), &reply_to);
            prop_assert_eq!(read.properties.expiration(), &expiration);
            let headers = header.map(|(name, value)| {
                FieldTable::from([(name, AMQPValue::LongString(value))])
            });
            prop_assert_eq!(read.properties.headers(), &headers);
            let mut content = Vec::new();
            for frame in &frames[2..] {
                let AMQPFrame::Body(_, bytes) = frame else { panic!("not a body: {frame:?}") };
                prop_assert!(bytes.len() <= BODY_PAYLOAD_MAX);
                content.extend_from_slice(bytes);
            }
            prop_assert_eq!(content, body);
        }

        #[test]
        fn defusing_leaves_the_length_and_never_panics(mut bytes: Vec<u8>) {
            let len = bytes.len();
            defuse(&mut bytes);
            prop_assert_eq!(bytes.len(), len);
        }

        #[test]
        fn defusing_leaves_flat_utf8_properties_alone(
            correlation_id in "\\PC{0,60}",
            header in "\\PC{0,60}",
        ) {
            let mut out = Vec::new();
            put_frame(&mut out, HEADER, 1, |out| {
                put_u16(out, CLASS_BASIC);
                put_u16(out, 0);
                out.extend_from_slice(&0_u64.to_be_bytes());
                put_properties(out, &Properties {
                    header: Some(("x-error-kind", &header)),
                    correlation_id: Some(&correlation_id),
                    ..Properties::default()
                });
            });
            let before = out.clone();
            defuse(&mut out);
            prop_assert_eq!(out, before);
        }

        #[test]
        fn properties_that_are_not_utf8_keep_their_neighbours(
            bad in proptest::collection::vec(0x80_u8..=0xff, 1..20),
        ) {
            // content type, correlation id, reply to: the first two hold the bad bytes.
            let mut properties = Vec::new();
            for value in [&bad[..], &bad[..], b"callback"] {
                properties.push(value.len() as u8);
                properties.extend_from_slice(value);
            }
            let mut frame = raw_header(1 << 15 | 1 << 10 | 1 << 9, &properties);
            defuse(&mut frame);
            let frames = parse_all(&frame);
            let read = &content_header(&frames[0]).properties;
            prop_assert_eq!(read.reply_to().as_deref(), Some("callback"));
            prop_assert_eq!(read.correlation_id().as_ref().unwrap().len(), bad.len());
        }
    }

    #[test]
    fn acks_requeues_and_cancels_read_back() {
        let mut out = Vec::new();
        put_ack(&mut out, 7, u64::MAX);
        put_requeue(&mut out, 7, 3);
        put_cancel(&mut out, 7, "tag");
        let frames = parse_all(&out);
        let [
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Ack(ack))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Reject(reject))),
            AMQPFrame::Method(7, AMQPClass::Basic(AMQPMethod::Cancel(cancel))),
        ] = &frames[..]
        else {
            panic!("unexpected frames: {frames:?}");
        };
        assert_eq!((ack.delivery_tag, ack.multiple), (u64::MAX, false));
        assert_eq!((reject.delivery_tag, reject.requeue), (3, true));
        assert_eq!((cancel.consumer_tag.as_str(), cancel.nowait), ("tag", true));
    }

    #[test]
    fn a_table_nested_20000_deep_is_flat_afterwards() {
        // reply to, behind the headers, must still be found.
        let mut properties = nested_table(20_000);
        properties.extend_from_slice(b"\x08callback");
        let mut frame = raw_header(1 << 13 | 1 << 9, &properties);
        defuse(&mut frame);
        let frames = parse_all(&frame);
        let read = &content_header(&frames[0]).properties;
        assert_eq!(read.reply_to().as_deref(), Some("callback"));
        let headers = read.headers().as_ref().unwrap();
        assert!(
            matches!(headers.get("k"), Some(AMQPValue::ByteArray(_))),
            "{headers:?}"
        );
    }

    #[test]
    fn an_array_in_an_array_in_the_headers_is_flat_afterwards() {
        let mut table = vec![1, b'a', b'A'];
        put_sized(&mut table, |out| {
            out.push(b'A');
            put_sized(out, |out| out.push(b'V'));
        });
        table.extend_from_slice(b"\x01bt\x01");
        let mut properties = Vec::new();
        put_sized(&mut properties, |out| out.extend_from_slice(&table));
        let mut frame = raw_header(1 << 13, &properties);
        defuse(&mut frame);
        let frames = parse_all(&frame);
        let headers = content_header(&frames[0])
            .properties
            .headers()
            .as_ref()
            .unwrap();
        assert!(
            matches!(headers.get("a"), Some(AMQPValue::ByteArray(_))),
            "{headers:?}"
        );
        assert_eq!(headers.get("b"), Some(&AMQPValue::Boolean(true)));
    }

    #[test]
    fn a_prefix_needs_seven_octets() {
        let mut out = Vec::new();
        put_ack(&mut out, 1, 1);
        assert_eq!(prefix(&out[..6]), None);
        assert_eq!(
            prefix(&out),
            Some(Prefix {
                is_content_header: false,
                frame_len: out.len()
            })
        );
    }
}
