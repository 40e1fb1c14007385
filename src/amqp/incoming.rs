//! What comes in: from frames to deliveries, returned messages, and events of a channel. Pure; no
//! I/O.
//!
//! We read all that comes on a channel, and two notices; what is of the connection as a whole,
//! channel 0, is amiquip's. So a delivery is read
//! here, by the thread that waits for it, and amiquip never sees one. That also decides what a
//! stranger's message can do to us: nothing. Headers are skipped by their lengths and never parsed
//! recursively, so a table nested a thousand deep is so many bytes. Property values are bytes, and
//! need be no text.

use crate::amqp::body::{Body, LARGE_MIN};
use crate::amqp::frame::{
    BASIC_ACK, BASIC_CANCEL, BASIC_CANCEL_OK, BASIC_CONSUME_OK, BASIC_DELIVER, BASIC_NACK,
    BASIC_QOS_OK, BASIC_RETURN, BODY, CHANNEL_CLOSE, CHANNEL_CLOSE_OK, CHANNEL_OPEN_OK,
    CLASS_BASIC, CLASS_CHANNEL, CLASS_CONFIRM, CLASS_QUEUE, CONFIRM_SELECT_OK, END, FRAME_MAX,
    HEADER, HEADER_MAX, METHOD, OVERHEAD, PREFIX_LEN, QUEUE_DECLARE_OK, reply_code,
};
use std::fmt;

const CLASS_CONNECTION: u16 = 10;
const CONNECTION_START: u16 = 10;
const CONNECTION_START_OK: u16 = 11;
const CONNECTION_TUNE: u16 = 30;
const CONNECTION_CLOSE: u16 = 50;
const CONNECTION_BLOCKED: u16 = 60;
const CONNECTION_UNBLOCKED: u16 = 61;

const HEARTBEAT: u8 = 8;

/// How much memory is set aside for messages before their content is there, in bytes, for all on a
/// connection together: what is said of a length is a claim. It is the most that RabbitMQ 3 takes
/// unless configured otherwise, and until it is used it is only a range of addresses.
pub(crate) const RESERVED_MAX: usize = 128 << 20;

/// How many messages may have begun at the same time: as many as RabbitMQ gives a connection channels
/// unless configured otherwise. It sends each as a whole, so that one is the most there is. They are
/// looked through for each frame.
const UNFINISHED_MAX: usize = 2047;

/// How deep the tables of the handshake may be nested. RabbitMQ's are so twice, and some 600 levels
/// are too many for the stack of amiquip's thread in a build without optimization.
const NESTED_MAX: usize = 256;

/// A message as it arrived.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub head: Head,
    pub body: Vec<u8>,
}

/// The part of a content header that holds the properties: flags, and what they announce.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Head(Vec<u8>);

/// What comes in for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// A message from a queue.
    Delivery(Delivery),
    /// A message of ours that the broker could not route.
    Returned(Message),
    /// What the broker says of messages that we have published.
    Confirm(Confirm),
    /// Something has happened to the channel of that number.
    Channel(u16, ChannelEvent),
    /// The broker has stopped reading what we publish, for this reason (`connection.blocked`).
    /// Source: <https://www.rabbitmq.com/docs/connection-blocked>.
    Blocked(String),
    /// The broker reads again.
    Unblocked,
}

/// A message that a queue has given to one of our consumers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub channel: u16,
    /// What an acknowledgement on that channel refers to.
    pub tag: u64,
    pub redelivered: bool,
    pub message: Message,
}

/// What the broker says of a message that was published on a channel on which it confirms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Confirm {
    pub channel: u16,
    /// Counts what was published on the channel, from 1.
    pub tag: u64,
    /// Whether it is about all messages up to this one, too.
    pub multiple: bool,
    /// Whether the broker has taken it.
    pub taken: bool,
}

/// What can happen to a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChannelEvent {
    /// It is open.
    Opened,
    /// Its queue exists, and this was its state.
    Declared(Declared),
    /// It has a new prefetch limit, and all before that is done.
    Limited,
    /// The broker confirms from now on what is published on it.
    Confirming,
    /// It consumes.
    Consuming,
    /// It does not consume any more, as we asked.
    Cancelled,
    /// It does not consume any more: its queue is gone.
    QueueGone,
    /// The broker closed it, for this reason, and waits for our answer
    /// ([`Connection::note`](super::connection::Connection::note)).
    Closed(CloseReason),
    /// It is closed, as we asked.
    ClosedAsAsked,
}

/// A queue that was declared, or asked after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Declared {
    pub name: Vec<u8>,
    /// How many messages wait for a consumer.
    pub ready: u32,
    pub consumers: u32,
}

/// The properties of a message that we read, verbatim: any bytes that the peer chose.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received<'a> {
    pub content_type: Option<&'a [u8]>,
    /// The content of the headers' table.
    pub headers: Table<'a>,
    pub correlation_id: Option<&'a [u8]>,
    pub reply_to: Option<&'a [u8]>,
    pub message_id: Option<&'a [u8]>,
    /// Milliseconds, in decimal.
    pub expiration: Option<&'a [u8]>,
}

/// The content of a field table: names and values, as they lie on the wire.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Table<'a>(&'a [u8]);

/// The value of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum FieldValue<'a> {
    Text(&'a [u8]),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// Nothing that is one line of text: bytes, a time, a table, an array.
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
                b'F' => cursor.length().and_then(|len| cursor.take(len)),
                octets => cursor.take(usize::from(octets - b'0')),
            };
            let Some(value) = value else { break };
            match index {
                0 => received.content_type = Some(value),
                2 => received.headers = Table(value),
                5 => received.correlation_id = Some(value),
                6 => received.reply_to = Some(value),
                7 => received.expiration = Some(value),
                8 => received.message_id = Some(value),
                _ => {}
            }
        }
        received
    }
}

impl<'a> Table<'a> {
    /// The value of the first field of that name.
    pub fn get(mut self, name: &str) -> Option<FieldValue<'a>> {
        self.find(|(key, _)| *key == name.as_bytes())
            .map(|(_, value)| value)
    }
}

/// Gives the fields one after the other, as far as they are well-formed.
impl<'a> Iterator for Table<'a> {
    type Item = (&'a [u8], FieldValue<'a>);

    fn next(&mut self) -> Option<(&'a [u8], FieldValue<'a>)> {
        let mut cursor = Cursor(self.0);
        let name = cursor.short_string()?;
        let value = cursor.field_value()?;
        self.0 = cursor.0;
        Some((name, value))
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
    let Some(([kind, _, _, a, b, c, d], _)) = bytes.split_first_chunk::<PREFIX_LEN>() else {
        return Ok(None);
    };
    let max = match *kind {
        HEADER => HEADER_MAX,
        _ => FRAME_MAX,
    };
    match u32::from_be_bytes([*a, *b, *c, *d]) as usize + OVERHEAD {
        len if len <= max => Ok(Some(len)),
        _ => Err(Malformed),
    }
}

/// Why the broker closes a connection or a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CloseReason {
    pub code: u16,
    pub text: String,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some of RabbitMQ's texts have several lines.
        let words: Vec<_> = self.text.split_whitespace().collect();
        write!(f, "the broker said {} {}", self.code, words.join(" "))
    }
}

impl CloseReason {
    /// The longest message that the broker takes, in bytes, if it says that one was longer.
    /// Source: `max_message_size` in <https://www.rabbitmq.com/docs/configure>.
    pub fn message_max(&self) -> Option<usize> {
        // "message size 20000000 is larger than configured max size 16777216"
        let is_meant = self.code == reply_code::PRECONDITION_FAILED
            && self.text.contains("message size")
            && self.text.contains("larger than");
        let last = self.text.rsplit(|c: char| !c.is_ascii_digit());
        last.filter(|number| is_meant && !number.is_empty())
            .find_map(|number| number.parse().ok())
    }

    /// Whether a message that was published may be the cause.
    pub fn blames_a_message(&self) -> bool {
        // Otherwise it was an operator, a permission that we lack for every message, or a request
        // that was executed for too long.
        !matches!(
            self.code,
            reply_code::CONNECTION_FORCED | reply_code::ACCESS_REFUSED
        ) && !self.is_consumer_timeout()
    }

    /// Whether a delivery has not been acknowledged in time.
    /// Source: <https://www.rabbitmq.com/docs/consumers#acknowledgement-timeout>.
    pub fn is_consumer_timeout(&self) -> bool {
        self.code == reply_code::PRECONDITION_FAILED
            && self.text.contains("delivery acknowledgement")
    }

    /// Reads it from the frame that says so; `None` from any other.
    pub fn from_frame(frame: &[u8]) -> Option<CloseReason> {
        let (prefix, payload) = frame.split_first_chunk::<PREFIX_LEN>()?;
        let mut cursor = Cursor(payload);
        (prefix[0] == METHOD
            && cursor.u16() == Some(CLASS_CONNECTION)
            && cursor.u16() == Some(CONNECTION_CLOSE))
        .then(|| cursor.close_reason())
    }
}

/// What the broker offers in the handshake (`connection.tune`).
/// Source: <https://www.rabbitmq.com/docs/configure> (`channel_max`, `heartbeat`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tune {
    /// How many channels a connection may have.
    pub channel_max: u16,
    /// The longest frame, in octets; 0 sets no limit.
    pub frame_max: usize,
    /// Seconds between heartbeats; 0 leaves it to us.
    pub heartbeat: u16,
}

impl Tune {
    /// Reads it from the frame that says so; `None` from any other.
    pub fn from_frame(frame: &[u8]) -> Option<Tune> {
        let (prefix, payload) = frame.split_first_chunk::<PREFIX_LEN>()?;
        let mut cursor = Cursor(payload);
        if prefix[0] != METHOD
            || cursor.u16() != Some(CLASS_CONNECTION)
            || cursor.u16() != Some(CONNECTION_TUNE)
        {
            return None;
        }
        // 0 means that the broker sets no limit.
        let channel_max = cursor
            .u16()
            .map(|max| if max == 0 { u16::MAX } else { max })?;
        let frame_max = cursor.length()?;
        let heartbeat = cursor.u16()?;
        Some(Tune {
            channel_max,
            frame_max,
            heartbeat,
        })
    }

    /// Puts another heartbeat into the frame that this was read from.
    pub fn set_heartbeat(frame: &mut [u8], seconds: u16) {
        if let Some(at) = frame.len().checked_sub(3) {
            frame[at..at + 2].copy_from_slice(&seconds.to_be_bytes());
        }
    }
}

/// What became of some bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// How many they were.
    pub len: usize,
    pub parsed: Parsed,
}

/// What became of a frame, or of a part of one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// What it was, or what it completed.
    pub incoming: Option<Incoming>,
    /// Whether amiquip is to have it.
    pub pass_on: bool,
}

impl Parsed {
    /// Something that amiquip is not to have.
    fn ours(incoming: impl Into<Option<Incoming>>) -> Parsed {
        Parsed {
            incoming: incoming.into(),
            pass_on: false,
        }
    }
}

/// Puts messages together from their frames. Those of one channel come one after the other;
/// those of several may mingle.
#[derive(Default)]
pub(crate) struct Assembler {
    unfinished: Vec<Unfinished>,
    /// The frame of a body of which a part has been taken.
    cut: Option<Cut>,
}

/// A body's frame that has not arrived as a whole.
struct Cut {
    channel: u16,
    /// How much of its payload is still to come.
    left: usize,
}

/// A message whose frames have not all arrived.
struct Unfinished {
    channel: u16,
    /// What it will be; its message is filled in as it arrives.
    incoming: Incoming,
    /// How much of the body is still to come; `None` before the content header.
    missing: Option<u64>,
    /// How much of it is there. A large one has its length from the beginning.
    filled: usize,
}

impl Assembler {
    /// Takes a frame from the beginning of `bytes`; of a body's frame, what is there of it: so a
    /// large body is never waited for elsewhere. `None` if more must arrive first.
    ///
    /// # Errors
    ///
    /// It is malformed, or out of order.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Option<Taken>, Malformed> {
        if self.cut.is_some() {
            return self.take_part(bytes);
        }
        match frame_len(bytes)? {
            Some(len) if len <= bytes.len() => {
                let parsed = self.frame(&bytes[..len])?;
                Ok(Some(Taken { len, parsed }))
            }
            Some(len) if bytes[0] == BODY => {
                let channel = u16::from_be_bytes([bytes[1], bytes[2]]);
                let left = len - OVERHEAD;
                self.missing(channel)
                    .filter(|missing| *missing >= left as u64)
                    .ok_or(Malformed)?;
                self.cut = Some(Cut { channel, left });
                Ok(Some(Taken {
                    len: PREFIX_LEN,
                    parsed: Parsed::ours(None),
                }))
            }
            _ => Ok(None),
        }
    }

    /// Whether a message has begun that is not whole.
    pub fn has_begun(&self) -> bool {
        !self.unfinished.is_empty()
    }

    /// Whether a part of a frame has been taken.
    pub fn is_amid_a_frame(&self) -> bool {
        self.cut.is_some()
    }

    /// Takes more of the frame of which a part has been taken.
    fn take_part(&mut self, bytes: &[u8]) -> Result<Option<Taken>, Malformed> {
        let (Some(cut), Some(first)) = (&mut self.cut, bytes.first()) else {
            return Ok(None);
        };
        let channel = cut.channel;
        let (len, payload) = match cut.left.min(bytes.len()) {
            0 if *first == END => {
                self.cut = None;
                (1, &[][..])
            }
            0 => return Err(Malformed),
            len => {
                cut.left -= len;
                (len, &bytes[..len])
            }
        };
        let at = self.append(channel, payload)?;
        let parsed = match self.cut {
            None => Parsed::ours(self.finish(at)),
            Some(_) => Parsed::ours(None),
        };
        Ok(Some(Taken { len, parsed }))
    }

    /// Takes one whole frame.
    fn frame(&mut self, frame: &[u8]) -> Result<Parsed, Malformed> {
        let (prefix, rest) = frame.split_first_chunk::<PREFIX_LEN>().ok_or(Malformed)?;
        let (&end, payload) = rest.split_last().ok_or(Malformed)?;
        if end != END {
            return Err(Malformed);
        }
        let channel = u16::from_be_bytes([prefix[1], prefix[2]]);
        match prefix[0] {
            METHOD => self.method(channel, payload),
            HEADER => self.header(channel, payload).map(Parsed::ours),
            BODY => {
                let at = self.append(channel, payload)?;
                Ok(Parsed::ours(self.finish(at)))
            }
            _ => Ok(Parsed {
                incoming: None,
                pass_on: true,
            }),
        }
    }

    fn method(&mut self, channel: u16, payload: &[u8]) -> Result<Parsed, Malformed> {
        let mut cursor = Cursor(payload);
        let class = cursor.u16().ok_or(Malformed)?;
        let method = cursor.u16().ok_or(Malformed)?;
        let event = match (class, method) {
            (CLASS_BASIC, BASIC_DELIVER) => {
                cursor.short_string().ok_or(Malformed)?; // the consumer's tag
                let tag = cursor.u64().ok_or(Malformed)?;
                let redelivered = cursor.u8().ok_or(Malformed)? & 1 == 1;
                let delivery = Delivery {
                    channel,
                    tag,
                    redelivered,
                    message: Message::default(),
                };
                self.begin(channel, Incoming::Delivery(delivery))?;
                return Ok(Parsed::ours(None));
            }
            (CLASS_BASIC, BASIC_RETURN) => {
                self.begin(channel, Incoming::Returned(Message::default()))?;
                return Ok(Parsed::ours(None));
            }
            (CLASS_BASIC, BASIC_ACK | BASIC_NACK) => {
                return Ok(Parsed::ours(Incoming::Confirm(Confirm {
                    channel,
                    tag: cursor.u64().ok_or(Malformed)?,
                    multiple: cursor.u8().ok_or(Malformed)? & 1 == 1,
                    taken: method == BASIC_ACK,
                })));
            }
            // amiquip would do no more than log them.
            (CLASS_CONNECTION, CONNECTION_BLOCKED) => {
                let reason = cursor.short_string().ok_or(Malformed)?;
                let reason = String::from_utf8_lossy(reason).into_owned();
                return Ok(Parsed::ours(Incoming::Blocked(reason)));
            }
            (CLASS_CONNECTION, CONNECTION_UNBLOCKED) => {
                return Ok(Parsed::ours(Incoming::Unblocked));
            }
            // amiquip parses tables recursively, and of what a broker says to it this one has some.
            (CLASS_CONNECTION, CONNECTION_START) if may_nest(payload) > NESTED_MAX => {
                return Err(Malformed);
            }
            // This one has them, too, and so have methods of other classes: they are not for us.
            (CLASS_CONNECTION, CONNECTION_START_OK) => return Err(Malformed),
            _ if channel == 0 && class != CLASS_CONNECTION => return Err(Malformed),
            _ if channel == 0 => {
                return Ok(Parsed {
                    incoming: None,
                    pass_on: true,
                });
            }
            (CLASS_BASIC, BASIC_CONSUME_OK) => ChannelEvent::Consuming,
            (CLASS_BASIC, BASIC_CANCEL_OK) => ChannelEvent::Cancelled,
            (CLASS_BASIC, BASIC_CANCEL) => ChannelEvent::QueueGone,
            (CLASS_BASIC, BASIC_QOS_OK) => ChannelEvent::Limited,
            (CLASS_CONFIRM, CONFIRM_SELECT_OK) => ChannelEvent::Confirming,
            (CLASS_QUEUE, QUEUE_DECLARE_OK) => ChannelEvent::Declared(Declared {
                name: cursor.short_string().ok_or(Malformed)?.to_vec(),
                ready: cursor.u32().ok_or(Malformed)?,
                consumers: cursor.u32().ok_or(Malformed)?,
            }),
            (CLASS_CHANNEL, CHANNEL_OPEN_OK) => ChannelEvent::Opened,
            (CLASS_CHANNEL, CHANNEL_CLOSE | CHANNEL_CLOSE_OK) => {
                self.unfinished
                    .retain(|unfinished| unfinished.channel != channel);
                match method {
                    CHANNEL_CLOSE => ChannelEvent::Closed(cursor.close_reason()),
                    _ => ChannelEvent::ClosedAsAsked,
                }
            }
            // Nothing that we have asked for.
            _ => return Ok(Parsed::ours(None)),
        };
        Ok(Parsed::ours(Incoming::Channel(channel, event)))
    }

    fn begin(&mut self, channel: u16, incoming: Incoming) -> Result<(), Malformed> {
        if self.position(channel).is_some() || self.unfinished.len() == UNFINISHED_MAX {
            return Err(Malformed);
        }
        self.unfinished.push(Unfinished {
            channel,
            incoming,
            missing: None,
            filled: 0,
        });
        Ok(())
    }

    fn position(&self, channel: u16) -> Option<usize> {
        self.unfinished
            .iter()
            .position(|unfinished| unfinished.channel == channel)
    }

    fn header(&mut self, channel: u16, payload: &[u8]) -> Result<Option<Incoming>, Malformed> {
        let mut cursor = Cursor(payload);
        cursor.length().ok_or(Malformed)?; // class and weight
        let body_len = cursor.u64().ok_or(Malformed)?;
        let at = self.position(channel).ok_or(Malformed)?;
        let unreserved = RESERVED_MAX.saturating_sub(self.reserved());
        let unfinished = &mut self.unfinished[at];
        if unfinished.missing.replace(body_len).is_some() {
            return Err(Malformed);
        }
        let message = unfinished.message();
        message.head = Head(cursor.0.to_vec());
        let reserved = usize::try_from(body_len).map_or(unreserved, |len| len.min(unreserved));
        message.body = match reserved {
            0..LARGE_MIN => Vec::with_capacity(reserved),
            // It is read to where it stays.
            _ => Body::scratch(reserved),
        };
        Ok(self.finish(at))
    }

    /// How much memory is set aside for the bodies that are not whole, in bytes.
    fn reserved(&mut self) -> usize {
        let bodies = self.unfinished.iter_mut().map(Unfinished::message);
        bodies.map(|message| message.body.capacity()).sum()
    }

    /// How much is missing of the body on that channel; `None` if none has begun.
    fn missing(&self, channel: u16) -> Option<u64> {
        self.unfinished[self.position(channel)?].missing
    }

    /// Appends to the body on that channel; says where that is.
    fn append(&mut self, channel: u16, payload: &[u8]) -> Result<usize, Malformed> {
        let at = self.position(channel).ok_or(Malformed)?;
        let unfinished = &mut self.unfinished[at];
        let missing = unfinished.missing.as_mut().ok_or(Malformed)?;
        *missing = missing.checked_sub(payload.len() as u64).ok_or(Malformed)?;
        let filled = unfinished.filled;
        let body = &mut unfinished.message().body;
        let (here, behind) = payload.split_at(payload.len().min(body.len() - filled));
        body[filled..filled + here.len()].copy_from_slice(here);
        body.extend_from_slice(behind);
        unfinished.filled += payload.len();
        Ok(at)
    }

    /// Where the rest of a large body's frame belongs, of which a part has been taken. What is put
    /// there is told to [`Assembler::put`].
    pub fn place(&mut self) -> Option<&mut [u8]> {
        let Cut { channel, left } = *self.cut.as_ref()?;
        let at = self.position(channel)?;
        let unfinished = &mut self.unfinished[at];
        let filled = unfinished.filled;
        let place = &mut unfinished.message().body[filled..];
        let len = left.min(place.len());
        (len > 0).then_some(&mut place[..len])
    }

    /// Takes note that so many bytes were put into that place.
    pub fn put(&mut self, len: usize) {
        let Some(cut) = &mut self.cut else { return };
        cut.left -= len;
        let channel = cut.channel;
        if let Some(at) = self.position(channel) {
            let unfinished = &mut self.unfinished[at];
            unfinished.filled += len;
            unfinished.missing = unfinished.missing.map(|missing| missing - len as u64);
        }
    }

    fn finish(&mut self, at: usize) -> Option<Incoming> {
        (self.unfinished[at].missing == Some(0)).then(|| self.unfinished.swap_remove(at).incoming)
    }
}

impl Unfinished {
    fn message(&mut self) -> &mut Message {
        match &mut self.incoming {
            Incoming::Delivery(Delivery { message, .. }) | Incoming::Returned(message) => message,
            other => unreachable!("{other:?} has no content"),
        }
    }
}

/// How deep tables and arrays in these bytes may be nested: each has a letter in front, so that there
/// are no more of them than letters.
fn may_nest(bytes: &[u8]) -> usize {
    let letters = bytes.iter().filter(|octet| matches!(octet, b'A' | b'F'));
    letters.count()
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

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// A length of four octets.
    fn length(&mut self) -> Option<usize> {
        self.u32().map(|len| len as usize)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A field's type and value. Source of the types and lengths:
    /// <https://www.rabbitmq.com/amqp-0-9-1-errata#section_3>.
    fn field_value(&mut self) -> Option<FieldValue<'a>> {
        Some(match self.u8()? {
            b'V' => FieldValue::Other,
            b't' => FieldValue::Boolean(self.u8()? != 0),
            b'b' => FieldValue::Integer(i8::from_be_bytes(self.array()?).into()),
            b'B' => FieldValue::Integer(self.u8()?.into()),
            b's' => FieldValue::Integer(i16::from_be_bytes(self.array()?).into()),
            b'u' => FieldValue::Integer(self.u16()?.into()),
            b'I' => FieldValue::Integer(i32::from_be_bytes(self.array()?).into()),
            b'i' => FieldValue::Integer(u32::from_be_bytes(self.array()?).into()),
            b'l' | b'L' => FieldValue::Integer(i64::from_be_bytes(self.array()?)),
            b'f' => FieldValue::Float(f32::from_be_bytes(self.array()?).into()),
            b'd' => FieldValue::Float(f64::from_be_bytes(self.array()?)),
            b'D' => {
                let scale = self.u8()?;
                let unscaled = i32::from_be_bytes(self.array()?);
                FieldValue::Float(f64::from(unscaled) / 10_f64.powi(scale.into()))
            }
            b'T' => {
                self.u64()?;
                FieldValue::Other
            }
            kind @ (b'S' | b'x' | b'F' | b'A') => {
                let len = self.length()?;
                let value = self.take(len)?;
                match kind {
                    b'S' => FieldValue::Text(value),
                    _ => FieldValue::Other,
                }
            }
            _ => return None,
        })
    }

    fn short_string(&mut self) -> Option<&'a [u8]> {
        let len = self.u8()?;
        self.take(usize::from(len))
    }

    /// The beginning of `connection.close` and `channel.close`.
    fn close_reason(&mut self) -> CloseReason {
        let code = self.u16().unwrap_or_default();
        let text = self.short_string().unwrap_or_default();
        CloseReason {
            code,
            text: String::from_utf8_lossy(text).into_owned(),
        }
    }
}

#[cfg(any(all(test, not(shuttle)), fuzzing))]
impl Assembler {
    /// How much memory the messages hold that are not whole, in bytes.
    pub fn memory(&mut self) -> usize {
        let held = self.unfinished.iter_mut().map(|unfinished| {
            let message = unfinished.message();
            size_of::<Unfinished>() + message.head.0.capacity() + message.body.capacity()
        });
        held.sum()
    }
}

#[cfg(test)]
mod tests;
