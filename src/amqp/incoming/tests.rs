use super::*;
use crate::amqp::frame::{Content, FRAME_MIN, Properties, Publish, put_ack, put_body, put_publish};
use proptest::prelude::*;
use std::sync::Arc;

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
    let shared: Arc<dyn Content> = Arc::new(body.to_vec());
    let message = Publish {
        routing_key: b"q",
        mandatory: false,
        properties,
        content: &shared,
    };
    put_publish(&mut publish, channel, &message);
    put_body(&mut publish, channel, FRAME_MIN, body);
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

fn take_all(assembler: &mut Assembler, mut bytes: &[u8]) -> Result<Vec<Parsed>, Malformed> {
    let mut taken = Vec::new();
    while let Some(Taken { len, parsed }) = assembler.take(bytes)? {
        taken.push(parsed);
        bytes = &bytes[len..];
    }
    Ok(taken)
}

fn all_incoming(bytes: &[u8]) -> Vec<Incoming> {
    let taken = take_all(&mut Assembler::default(), bytes).unwrap();
    taken
        .into_iter()
        .filter_map(|taken| taken.incoming)
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
        kind in proptest::option::of("\\PC{0,40}"),
        correlation_id in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..255)),
        reply_to in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..255)),
        body in proptest::collection::vec(any::<u8>(), 0..10_000),
    ) {
        let headers: Vec<_> = kind
            .iter()
            .map(|kind| ("x-error-kind".to_owned(), kind.clone()))
            .collect();
        let properties = Properties {
            content_type: Some(b"text/plain"),
            headers: &headers,
            correlation_id: correlation_id.as_deref(),
            reply_to: reply_to.as_deref(),
            expiration: Some(b"1000"),
        };
        let mut out = Vec::new();
        put_delivery(&mut out, channel, tag, properties, &body);
        let mut all = all_incoming(&out);
        prop_assert_eq!(all.len(), 1);
        let Some(Incoming::Delivery(delivery)) = all.pop() else {
            panic!("not a delivery");
        };
        let Delivery { channel: c, tag: t, redelivered, message } = delivery;
        prop_assert_eq!((c, t, redelivered), (channel, tag, true));
        prop_assert_eq!(&message.body, &body);
        let read = message.head.properties();
        prop_assert_eq!(read.correlation_id, correlation_id.as_deref());
        prop_assert_eq!(read.reply_to, reply_to.as_deref());
        prop_assert_eq!(read.message_id, None);
        prop_assert_eq!(read.content_type, Some(&b"text/plain"[..]));
        prop_assert_eq!(read.expiration, Some(&b"1000"[..]));
        let expected = kind.as_ref().map(|kind| FieldValue::Text(kind.as_bytes()));
        prop_assert_eq!(read.headers.get("x-error-kind"), expected);
        prop_assert_eq!(read.headers.get("other"), None);
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
    fn a_delivery_reads_the_same_in_whatever_pieces_it_arrives(
        body in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..10_000),
            (60_000..80_000_usize).prop_map(|len| (0..len).map(|at| (at % 251) as u8).collect()),
        ],
        pieces in proptest::collection::vec(1..3000_usize, 1..40),
    ) {
        let mut out = Vec::new();
        put_delivery(&mut out, 1, 1, Properties::default(), &body);
        put_delivery(&mut out, 2, 2, Properties::default(), &body);
        let (mut assembler, mut taken, mut buffer) = (Assembler::default(), Vec::new(), Vec::new());
        let mut pieces = pieces.into_iter().cycle();
        while !out.is_empty() {
            let piece = pieces.next().map_or(1, |len| len.min(out.len()));
            let mut piece = out.drain(..piece);
            if buffer.is_empty() && let Some(place) = assembler.place() {
                let mut len = 0;
                for (place, byte) in place.iter_mut().zip(&mut piece) {
                    *place = byte;
                    len += 1;
                }
                assembler.put(len);
            }
            buffer.extend(piece);
            while let Some(Taken { len, parsed }) = assembler.take(&buffer).unwrap() {
                prop_assert!(len > 0 && !parsed.pass_on);
                taken.extend(parsed.incoming);
                buffer.drain(..len);
            }
        }
        prop_assert!(buffer.is_empty());
        let bodies: Vec<_> = taken
            .into_iter()
            .map(|incoming| match incoming {
                Incoming::Delivery(delivery) => (delivery.channel, delivery.message.body),
                other => panic!("{other:?}"),
            })
            .collect();
        prop_assert_eq!(bodies, [(1, body.clone()), (2, body)]);
    }

    #[test]
    fn no_head_makes_the_reader_panic(bytes: Vec<u8>) {
        let head = Head(bytes);
        let _ = head.properties().headers.count();
    }
}

#[test]
fn messages_of_two_channels_may_mingle() {
    let mut out = Vec::new();
    put_deliver_method(&mut out, 1, 1);
    put_deliver_method(&mut out, 2, 2);
    put_content(&mut out, 2, Properties::default(), b"two");
    put_content(&mut out, 1, Properties::default(), b"one");
    let bodies: Vec<_> = all_incoming(&out)
        .into_iter()
        .map(|incoming| match incoming {
            Incoming::Delivery(delivery) => (delivery.channel, delivery.message.body),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(bodies, [(2, b"two".to_vec()), (1, b"one".to_vec())]);
}

#[test]
fn a_closed_channel_takes_its_unfinished_message_along() {
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
    let close_reason = CloseReason {
        code: 404,
        text: "gone".to_owned(),
    };
    assert_eq!(
        taken[1],
        Parsed::ours(Incoming::Channel(1, ChannelEvent::Closed(close_reason)))
    );
    assert!(matches!(
        taken[3].incoming,
        Some(Incoming::Delivery(Delivery { tag: 2, .. }))
    ));
}

#[test]
fn a_close_reason_is_read_and_nothing_else_is_taken_for_one() {
    let mut close = Vec::new();
    put_raw(
        &mut close,
        METHOD,
        0,
        b"\0\x0a\0\x32\x01\x40\x03bye\0\0\0\0",
    );
    let close_reason = CloseReason {
        code: 320,
        text: "bye".to_owned(),
    };
    assert_eq!(CloseReason::from_frame(&close), Some(close_reason));
    let mut others = Vec::new();
    put_raw(&mut others, HEARTBEAT, 0, b"");
    assert_eq!(CloseReason::from_frame(&others), None);
    others.clear();
    put_ack(&mut others, 1, 1);
    assert_eq!(CloseReason::from_frame(&others), None);
}

#[test]
fn what_is_of_the_connection_as_a_whole_is_passed_on() {
    let mut out = Vec::new();
    put_raw(&mut out, HEARTBEAT, 0, b"");
    put_raw(&mut out, METHOD, 0, &[0, 10, 0, 50]);
    put_raw(&mut out, METHOD, 1, &[0, 20, 0, 21, 1]); // channel.flow-ok, never asked for
    let taken = take_all(&mut Assembler::default(), &out).unwrap();
    let passed_on: Vec<_> = taken.iter().map(|taken| taken.pass_on).collect();
    assert_eq!(passed_on, [true, true, false]);
}

#[test]
fn what_is_said_of_a_channel_is_an_event_of_it() {
    let mut out = Vec::new();
    put_raw(&mut out, METHOD, 1, b"\0\x14\0\x0b\0\0\0\0");
    put_raw(
        &mut out,
        METHOD,
        2,
        b"\0\x32\0\x0b\x01q\0\0\0\x07\0\0\0\x02",
    );
    put_raw(&mut out, METHOD, 3, b"\0\x3c\0\x0b");
    put_raw(&mut out, METHOD, 4, b"\0\x55\0\x0b");
    put_raw(&mut out, METHOD, 5, b"\0\x14\0\x29");
    put_raw(&mut out, METHOD, 6, b"\0\x3c\0\x50\0\0\0\0\0\0\0\x09\x01");
    put_raw(&mut out, METHOD, 7, b"\0\x3c\0\x78\0\0\0\0\0\0\0\x08\x02");
    let declared = Declared {
        name: b"q".to_vec(),
        ready: 7,
        consumers: 2,
    };
    let confirm = |channel, tag, multiple, taken| {
        Incoming::Confirm(Confirm {
            channel,
            tag,
            multiple,
            taken,
        })
    };
    assert_eq!(
        all_incoming(&out),
        [
            Incoming::Channel(1, ChannelEvent::Opened),
            Incoming::Channel(2, ChannelEvent::Declared(declared)),
            Incoming::Channel(3, ChannelEvent::Limited),
            Incoming::Channel(4, ChannelEvent::Confirming),
            Incoming::Channel(5, ChannelEvent::ClosedAsAsked),
            confirm(6, 9, true, true),
            confirm(7, 8, false, false),
        ]
    );
}

#[test]
fn the_brokers_offer_is_read_and_its_heartbeat_replaced() {
    let mut frame = Vec::new();
    put_raw(&mut frame, METHOD, 0, b"\0\x0a\0\x1e\x07\xff\0\x02\0\0\0\0");
    let offer = |heartbeat| Tune {
        channel_max: 2047,
        frame_max: 131_072,
        heartbeat,
    };
    assert_eq!(Tune::from_frame(&frame), Some(offer(0)));
    Tune::set_heartbeat(&mut frame, 60);
    assert_eq!(Tune::from_frame(&frame), Some(offer(60)));
}

#[test]
fn what_the_broker_says_of_blocking_is_ours() {
    let mut out = Vec::new();
    put_raw(&mut out, METHOD, 0, b"\0\x0a\0\x3c\x06memory");
    put_raw(&mut out, METHOD, 0, b"\0\x0a\0\x3d");
    let parsed = take_all(&mut Assembler::default(), &out).unwrap();
    assert_eq!(
        parsed,
        [
            Parsed::ours(Incoming::Blocked("memory".to_owned())),
            Parsed::ours(Incoming::Unblocked)
        ]
    );
}

#[test]
fn numbers_and_booleans_are_read_as_what_they_are() {
    let table = [
        &b"\x01a"[..],
        b"b\xff",
        b"\x01b",
        b"B\xff",
        b"\x01c",
        b"s\xff\xfe",
        b"\x01d",
        b"i\xff\xff\xff\xff",
        b"\x01e",
        b"l\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x01f",
        b"d\x3f\xf8\0\0\0\0\0\0",
        b"\x01g",
        b"D\x02\0\0\0\x7d",
        b"\x01h",
        b"t\x01",
    ]
    .concat();
    let values: Vec<_> = Table(&table).map(|(_, value)| value).collect();
    assert_eq!(
        values,
        [
            FieldValue::Integer(-1),
            FieldValue::Integer(255),
            FieldValue::Integer(-2),
            FieldValue::Integer(u32::MAX.into()),
            FieldValue::Integer(-1),
            FieldValue::Float(1.5),
            FieldValue::Float(1.25),
            FieldValue::Boolean(true),
        ]
    );
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
    // Also before it is there as a whole, and where its end should be.
    long.truncate(long.len() - 2);
    assert_eq!(take_all(&mut Assembler::default(), &long), Err(Malformed));
    let mut endless = Vec::new();
    put_delivery(&mut endless, 1, 1, Properties::default(), b"body");
    *endless.last_mut().unwrap() = 0;
    let mut assembler = Assembler::default();
    let (most, last) = endless.split_at(endless.len() - 3);
    assert_eq!(take_all(&mut assembler, most).unwrap().len(), 4);
    assert_eq!(take_all(&mut assembler, last), Err(Malformed));
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
    assert_eq!(read.headers.get("k"), Some(FieldValue::Other));
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
        head.properties().headers.get("x-error-kind"),
        Some(FieldValue::Text(b"internal"))
    );
}
