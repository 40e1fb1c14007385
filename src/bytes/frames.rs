//! The frames of a broker that may be a hostile one, without a socket.

use crate::amqp::incoming::{ChannelEvent, CloseReason, Incoming, Tune};
use crate::bytes::assembled::{assemble, pieces, split};
use crate::bytes::bounds::in_time;
use std::iter::once;

/// A stream that is longer is not cut into single octets, in bytes: that takes long.
const OCTETS_MAX: usize = 4096;

/// A stream is the same whether it arrives at once, in pieces, or octet by octet. What it says of
/// closing and of tuning is read, too.
pub fn frames(input: &[u8]) {
    let (cuts, stream) = split(input);
    let whole = in_time(stream.len(), 0, || assemble(once(stream)));
    let cut = in_time(stream.len(), 0, || assemble(pieces(cuts, stream)));
    assert_eq!(whole, cut);
    if stream.len() <= OCTETS_MAX {
        assert_eq!(whole, assemble(stream.chunks(1)));
    }
    for incoming in &whole.incoming {
        read(incoming);
    }
    let _ = CloseReason::from_frame(stream);
    if Tune::from_frame(stream).is_some() {
        let mut frame = stream.to_vec();
        Tune::set_heartbeat(&mut frame, 60);
    }
}

/// Looks at all that can be asked of what has come in.
fn read(incoming: &Incoming) {
    match incoming {
        Incoming::Delivery(delivery) => {
            let _ = delivery.message.head.properties().headers.count();
        }
        Incoming::Returned(message) => {
            let _ = message.head.properties().headers.count();
        }
        Incoming::Channel(_, ChannelEvent::Closed(reason)) => {
            let _ = (reason.message_max(), reason.blames_a_message());
            let _ = reason.to_string();
        }
        Incoming::Channel(..)
        | Incoming::Confirm(_)
        | Incoming::Blocked(_)
        | Incoming::Unblocked => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::frame::{FRAME_MAX, HEADER, HEADER_MAX, METHOD};
    use crate::bytes::assembled::Assembled;
    use amq_protocol::frame::parse_frame;

    /// A frame, whose end is right.
    fn framed(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let [high, low] = channel.to_be_bytes();
        let len = (payload.len() as u32).to_be_bytes();
        [&[kind, high, low], &len[..], payload, &[0xCE]].concat()
    }

    /// A delivery and its content header, which claims a body of so many bytes.
    fn begun(channel: u16, body_len: u64, head: &[u8]) -> Vec<u8> {
        let method = framed(METHOD, channel, &[&[0, 60, 0, 60], &[0; 11][..]].concat());
        let len = body_len.to_be_bytes();
        let header = [&[0, 60, 0, 0], &len[..], head].concat();
        [method, framed(HEADER, channel, &header)].concat()
    }

    /// What becomes of a stream, within the bounds.
    fn bounded(stream: &[u8]) -> Assembled {
        frames(&[&[0xff; 8], stream].concat());
        assemble(once(stream))
    }

    #[test]
    fn no_claim_sets_more_aside_than_the_largest_message_however_many_claim() {
        for claim in [1, 60_000, 128 << 20, u64::MAX] {
            let stream: Vec<u8> = (1..=2047)
                .flat_map(|channel| begun(channel, claim, &[0, 0]))
                .collect();
            let assembled = bounded(&stream);
            assert!(!assembled.malformed && assembled.has_begun, "{claim}");
        }
    }

    #[test]
    fn a_message_on_each_channel_that_there_can_be_takes_no_long_search() {
        let stream: Vec<u8> = (1..=u16::MAX)
            .flat_map(|channel| begun(channel, 1, &[0, 0]))
            .collect();
        assert!(bounded(&stream).malformed);
    }

    #[test]
    fn headers_that_fill_the_longest_frame_are_within_the_bounds() {
        // The shortest field, and the number that has the longest text.
        for field in [&b"\0t\x01"[..], b"\0d\0\0\0\0\0\0\0\x01"] {
            let head = |max: usize| {
                let table = field.repeat((max - 64) / field.len());
                let len = (table.len() as u32).to_be_bytes();
                [&[0x20, 0], &len[..], &table].concat()
            };
            assert_eq!(bounded(&begun(1, 0, &head(HEADER_MAX))).incoming.len(), 1);
            let head = head(usize::from(u16::MAX));
            let message = [&(head.len() as u16).to_be_bytes()[..], &head].concat();
            crate::bytes::message::message(&message);
        }
        assert!(bounded(&begun(1, 0, &vec![0; HEADER_MAX])).malformed);
        assert!(bounded(&framed(METHOD, 1, &vec![0; FRAME_MAX])).malformed);
    }

    #[test]
    fn a_table_for_amiquip_is_never_nested_too_deep_for_its_stack() {
        // The server's properties in `connection.start`.
        let start = |depth: usize| {
            let mut table = Vec::new();
            for _ in 0..depth {
                let len = (table.len() as u32).to_be_bytes();
                table = [b"\0F", &len[..], &table].concat();
            }
            let len = (table.len() as u32).to_be_bytes();
            let rest = b"\0\0\0\x01P\0\0\0\x01e";
            let payload = [&[0, 10, 0, 10, 0, 9], &len[..], &table, rest].concat();
            framed(METHOD, 0, &payload)
        };
        // Octets of lengths are counted, too.
        let all = (0..=256).map(|depth| bounded(&start(depth)));
        let deepest = all.take_while(|assembled| !assembled.malformed).last();
        let deepest = deepest.unwrap().passed_on;
        assert!(deepest.len() > 200 * 6);
        // A test's stack is as large as that of amiquip's thread.
        assert!(parse_frame(&deepest).is_ok());
        assert!(bounded(&start(257)).malformed);
        // What has a table, and no broker says.
        for method in [[0, 10, 0, 11], [0, 50, 0, 10], [0, 60, 0, 20]] {
            assert!(bounded(&framed(METHOD, 0, &method)).malformed, "{method:?}");
        }
    }
}
