//! What searches of schedules have in common: two ends of a connection, and the frames between them.

use crate::amqp::channel::Channel;
use crate::amqp::frame::{BODY, END, HEADER, METHOD, PREFIX_LEN};
use crate::amqp::inbox::Sink;
use crate::amqp::model::amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use crate::amqp::model::net::{Far, connect};
use crate::amqp::outbox::Outbox;
use crate::amqp::stream::{self, Opened, Stream};
use crate::amqp::transport::Transport;
use std::sync::Arc;

/// Our end of a connection, and the far end. `room` is how many bytes the socket takes that the far
/// end has not read.
pub(crate) fn pair(room: usize, sink: Box<dyn Sink>) -> (Opened, Far) {
    let (near, far) = connect(room);
    let transport = Transport::Plain(Arc::new(near));
    (stream::share(transport, None, sink).unwrap(), far)
}

/// amiquip's part, whose end is that of the connection.
pub(crate) fn start_io(stream: Stream) -> Connection {
    let options = ConnectionOptions::<Auth>::default();
    Connection::insecure_open_stream(stream, options, ConnectionTuning::default()).unwrap()
}

/// A channel that is open.
pub(crate) fn channel(id: u16, outbox: &Arc<Outbox>) -> Arc<Channel> {
    Arc::new(Channel::new(id, Arc::clone(outbox)))
}

/// The longest frame of a body, in octets.
const FRAME_MAX: usize = 40 << 10;

/// A frame, as the far end reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub kind: u8,
    pub channel: u16,
    pub payload: Vec<u8>,
}

/// The frames that come out at the far end.
#[derive(Default)]
pub(crate) struct Frames {
    bytes: Vec<u8>,
    taken: usize,
}

impl Frames {
    /// The next one; `None` when our end is shut.
    pub fn next(&mut self, far: &mut Far) -> Option<Frame> {
        loop {
            let bytes = &self.bytes[self.taken..];
            if let [kind, high, low, len @ .., _, _, _] = &bytes[..bytes.len().min(10)]
                && let Ok(len) = <[u8; 4]>::try_from(len)
                && bytes.len() > PREFIX_LEN + u32::from_be_bytes(len) as usize
            {
                let end = PREFIX_LEN + u32::from_be_bytes(len) as usize;
                assert_eq!(bytes[end], END, "a frame that is not whole");
                let frame = Frame {
                    kind: *kind,
                    channel: u16::from_be_bytes([*high, *low]),
                    payload: bytes[PREFIX_LEN..end].to_vec(),
                };
                self.taken += end + 1;
                return Some(frame);
            }
            let more = far.read();
            if more.is_empty() {
                return None;
            }
            self.bytes.drain(..self.taken);
            self.taken = 0;
            self.bytes.extend_from_slice(&more);
        }
    }
}

/// Appends a frame.
pub(crate) fn put_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(END);
}

/// Appends a message that a queue gives to a consumer, as a broker does; `id` is its correlation
/// id and, before that, where an answer goes.
pub(crate) fn put_deliver(out: &mut Vec<u8>, channel: u16, tag: u64, id: &[u8], body: &[u8]) {
    put_delivery(out, (channel, tag), false, id, body);
}

/// The same of one that it may have given to somebody before.
pub(crate) fn put_delivery(
    out: &mut Vec<u8>,
    (channel, tag): (u16, u64),
    redelivered: bool,
    id: &[u8],
    body: &[u8],
) {
    let short = |text: &[u8]| [&[text.len() as u8], text].concat();
    let tag = tag.to_be_bytes();
    let deliver = [
        &[0, 60, 0, 60][..],
        &short(b"c"),
        &tag,
        &[redelivered.into()],
        &short(b""),
        &short(b"q"),
    ];
    put_frame(out, METHOD, channel, &deliver.concat());
    let len = (body.len() as u64).to_be_bytes();
    // correlation_id and reply_to.
    let header = [
        &[0, 60, 0, 0][..],
        &len,
        &[0b110, 0],
        &short(id),
        &short(id),
    ];
    put_frame(out, HEADER, channel, &header.concat());
    for part in body.chunks(FRAME_MAX) {
        put_frame(out, BODY, channel, part);
    }
}
