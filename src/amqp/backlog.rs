//! What waits to be written: whole frames, in chunks. Pure; no I/O.
//!
//! Small frames are appended to the last chunk, to leave together. A large body is not copied: a
//! chunk refers to it, and puts its frames around it as it is written. What a full socket leaves of
//! a chunk stays in it. So nothing that is done under the outbox's lock takes longer because of a
//! large message, and its bytes are in memory once.

use crate::amqp::body::LARGE_MIN;
use crate::amqp::frame::{
    Content, END, FRAME_MIN, OVERHEAD, PREFIX_LEN, Publish, body_prefix, put_body, put_publish,
};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;

/// A chunk of this size, in bytes, is appended to no more.
const CHUNK_MAX: usize = 64 << 10;

/// How much of empty buffers is kept, in bytes: the memory of a new one costs more than its use.
const BUFFERS_KEPT_MAX: usize = 1 << 20;

/// How many parts a chunk is written in at a time, at most: [`Chunk::left`].
const PARTS_MAX: usize = 48;

/// What waits to be written, in order.
pub(crate) struct Backlog {
    /// None is empty. Whoever writes has taken the first one out meanwhile.
    chunks: VecDeque<Chunk>,
    /// How many bytes wait, those of the chunk that is taken out among them.
    len: usize,
    /// How many of those are in the chunk that has begun to leave.
    leaving: usize,
    /// How many bytes have left, ever.
    written: u64,
    /// Empty buffers for the next chunks.
    spares: Vec<Vec<u8>>,
    /// The longest frame that the broker accepts, in octets.
    frame_max: usize,
}

/// Frames, of which the first bytes may have left.
#[derive(Default)]
pub(crate) struct Chunk {
    /// Whole frames.
    frames: Vec<u8>,
    /// The body of the last message among those, if its own frames are to be made yet.
    body: Option<Body>,
    written: usize,
}

/// A body whose frames are made as they are written.
struct Body {
    content: Arc<dyn Content>,
    /// The payload of each of its frames, but for the last one, in bytes.
    payload_max: usize,
    /// What stands before that.
    prefix: [u8; PREFIX_LEN],
    /// What stands before the payload of the last frame.
    last_prefix: [u8; PREFIX_LEN],
}

impl Body {
    fn new(content: Arc<dyn Content>, channel: u16, frame_max: usize) -> Body {
        let payload_max = frame_max - OVERHEAD;
        let len = content.body().len();
        let last = len - payload_max * (len.div_ceil(payload_max) - 1);
        Body {
            content,
            payload_max,
            prefix: body_prefix(channel, payload_max),
            last_prefix: body_prefix(channel, last),
        }
    }

    /// How many octets its frames have.
    fn framed_len(&self) -> usize {
        let len = self.content.body().len();
        len + OVERHEAD * len.div_ceil(self.payload_max)
    }

    /// Adds what is left behind the next `skip` bytes of its frames, as far as there is room.
    fn put_parts<'a>(&'a self, parts: &mut Parts<'a>, skip: usize) {
        let whole = self.payload_max + OVERHEAD;
        let (first, mut skip) = (skip / whole, skip % whole);
        let mut rest = self
            .content
            .body()
            .get(first * self.payload_max..)
            .unwrap_or_default();
        while !rest.is_empty() {
            let (payload, behind) = rest.split_at(rest.len().min(self.payload_max));
            let prefix = if behind.is_empty() {
                &self.last_prefix
            } else {
                &self.prefix
            };
            for part in [prefix, payload, &[END]] {
                if !parts.push(part, &mut skip) {
                    return;
                }
            }
            rest = behind;
        }
    }
}

/// The next bytes of a chunk, in parts that lie in different places.
pub(crate) struct Parts<'a> {
    slices: [IoSlice<'a>; PARTS_MAX],
    count: usize,
    len: usize,
    /// How many bytes they may have together.
    most: usize,
}

impl<'a> Parts<'a> {
    fn new(most: usize) -> Parts<'a> {
        Parts {
            slices: [IoSlice::new(&[]); PARTS_MAX],
            count: 0,
            len: 0,
            most,
        }
    }

    /// At least one byte, if there are any.
    pub fn slices(&self) -> &[IoSlice<'a>] {
        &self.slices[..self.count]
    }

    /// How many bytes they have together.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds the part of `bytes` that is left behind the next `skip` ones; false if there is no more
    /// room.
    fn push(&mut self, bytes: &'a [u8], skip: &mut usize) -> bool {
        let skipped = bytes.len().min(*skip);
        *skip -= skipped;
        let bytes = &bytes[skipped..];
        let bytes = &bytes[..bytes.len().min(self.most - self.len)];
        if !bytes.is_empty() {
            self.slices[self.count] = IoSlice::new(bytes);
            self.count += 1;
            self.len += bytes.len();
        }
        self.count < PARTS_MAX && self.len < self.most
    }
}

impl Chunk {
    fn len(&self) -> usize {
        self.frames.len() + self.body.as_ref().map_or(0, Body::framed_len)
    }

    /// What is still to be written, or the beginning of that: `most` bytes at most.
    pub fn left(&self, most: usize) -> Parts<'_> {
        let mut parts = Parts::new(most);
        let mut skip = self.written;
        if parts.push(&self.frames, &mut skip)
            && let Some(body) = &self.body
        {
            body.put_parts(&mut parts, skip);
        }
        parts
    }

    /// Takes note that the next `len` bytes have left. A large body that is done with may be freed
    /// here, which takes time: so not under a lock.
    pub fn advance(&mut self, len: usize) {
        self.written += len;
        if self.written == self.len() {
            self.written = 0;
            self.frames.clear();
            self.body = None;
        }
    }
}

impl Default for Backlog {
    fn default() -> Backlog {
        Backlog {
            chunks: VecDeque::new(),
            len: 0,
            leaving: 0,
            written: 0,
            spares: Vec::new(),
            frame_max: FRAME_MIN,
        }
    }
}

impl Backlog {
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many bytes wait, those that are being written included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many bytes wait behind the chunk that has begun to leave.
    pub fn behind(&self) -> usize {
        self.len - self.leaving
    }

    /// How many bytes have left, ever.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Learns the longest frame that the broker accepts, in octets; [`FRAME_MIN`] until then.
    pub fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
    }

    /// Takes the frames that `encode` appends, which are small; it may append none.
    pub fn append(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let last = self
            .chunks
            .pop_back_if(|last| last.body.is_none() && last.frames.len() < CHUNK_MAX);
        let mut last = last.unwrap_or_else(|| Chunk {
            frames: self.spares.pop().unwrap_or_default(),
            ..Chunk::default()
        });
        let before = last.frames.len();
        encode(&mut last.frames);
        self.len += last.frames.len() - before;
        if last.frames.is_empty() {
            self.keep(last.frames);
        } else {
            self.chunks.push_back(last);
        }
    }

    /// Takes a message with its body.
    pub fn publish(&mut self, channel: u16, message: &Publish<'_>) {
        let frame_max = self.frame_max;
        let body = message.content.body();
        self.append(|out| {
            put_publish(out, channel, message);
            if body.len() < LARGE_MIN {
                put_body(out, channel, frame_max, body);
            }
        });
        if body.len() >= LARGE_MIN
            && let Some(last) = self.chunks.back_mut()
        {
            let body = Body::new(Arc::clone(message.content), channel, frame_max);
            self.len += body.framed_len();
            last.body = Some(body);
        }
    }

    /// Keeps an empty buffer for later.
    fn keep(&mut self, frames: Vec<u8>) {
        let kept: usize = self.spares.iter().map(Vec::capacity).sum();
        if frames.capacity() > 0 && kept + frames.capacity() <= BUFFERS_KEPT_MAX {
            self.spares.push(frames);
        }
    }

    /// Takes the first chunk out, to write some of it. It is to be put back.
    pub fn take(&mut self) -> Option<Chunk> {
        let chunk = self.chunks.pop_front()?;
        self.leaving = chunk.len() - chunk.written;
        Some(chunk)
    }

    /// Puts what was taken out back, after its next `written` bytes have left.
    pub fn put_back(&mut self, chunk: Chunk, written: usize) {
        self.len -= written;
        self.written += written as u64;
        self.leaving = chunk.len() - chunk.written;
        if self.leaving == 0 {
            self.keep(chunk.frames);
        } else {
            self.chunks.push_front(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::amqp::frame::Properties;
    use proptest::prelude::*;

    const CHANNEL: u16 = 7;

    /// Two frames, filled.
    const LEN_MAX: usize = 131_064 * 2;

    #[derive(Debug, Clone)]
    enum Step {
        Append(usize),
        Publish(usize),
        /// Another thread appends while the first chunk is being written: asked for so many bytes,
        /// the socket takes this part of them in a thousand.
        Write(usize, usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let len = || prop_oneof![Just(0), 1..300_usize, 60_000..70_000_usize, Just(LEN_MAX)];
        prop_oneof![
            len().prop_map(Step::Append),
            len().prop_map(Step::Publish),
            (1..600_000_usize, 0..=1000_usize, 0..300_usize)
                .prop_map(|(most, taken, appended)| Step::Write(most, taken, appended)),
        ]
    }

    fn message(content: &Arc<dyn Content>) -> Publish<'_> {
        Publish {
            routing_key: b"queue",
            mandatory: false,
            properties: Properties::default(),
            content,
        }
    }

    fn bytes_of(parts: &Parts<'_>) -> Vec<u8> {
        let slices: Vec<&[u8]> = parts.slices().iter().map(|slice| &**slice).collect();
        slices.concat()
    }

    /// Bytes that tell where they belong, in pieces one after the other. Nothing here goes byte by
    /// byte: without optimisation, that takes most of a minute.
    struct Source {
        pattern: Vec<u8>,
        given: usize,
    }

    impl Source {
        fn new() -> Source {
            let period: Vec<u8> = (0..251).collect();
            Source {
                pattern: period.repeat(LEN_MAX / period.len() + 2),
                given: 0,
            }
        }

        fn some(&mut self, len: usize) -> Vec<u8> {
            let from = self.given % 251;
            self.given += len;
            self.pattern[from..][..len].to_vec()
        }
    }

    proptest! {
        #[test]
        fn what_leaves_is_what_came_in_order_and_once(
            steps in proptest::collection::vec(step(), 0..60),
            frame_max in prop_oneof![Just(FRAME_MIN), Just(131_072_usize)],
        ) {
            let mut backlog = Backlog::default();
            backlog.set_frame_max(frame_max);
            let (mut came, mut left) = (Vec::<u8>::new(), Vec::<u8>::new());
            let mut source = Source::new();
            for step in steps {
                match step {
                    Step::Append(len) => {
                        let bytes = source.some(len);
                        backlog.append(|out| out.extend_from_slice(&bytes));
                        came.extend(bytes);
                    }
                    Step::Publish(len) => {
                        let bytes = source.some(len);
                        let content: Arc<dyn Content> = Arc::new(bytes);
                        put_publish(&mut came, CHANNEL, &message(&content));
                        put_body(&mut came, CHANNEL, frame_max, content.body());
                        backlog.publish(CHANNEL, &message(&content));
                    }
                    Step::Write(most, taken, appended) => {
                        let Some(mut chunk) = backlog.take() else {
                            prop_assert!(backlog.is_empty());
                            continue;
                        };
                        let parts = chunk.left(most);
                        let bytes = bytes_of(&parts);
                        prop_assert!(!bytes.is_empty() && bytes.len() <= most);
                        prop_assert_eq!(bytes.len(), parts.len());
                        let written = bytes.len() * taken / 1000;
                        left.extend_from_slice(&bytes[..written]);
                        chunk.advance(written);
                        let bytes = source.some(appended);
                        backlog.append(|out| out.extend_from_slice(&bytes));
                        came.extend(bytes);
                        backlog.put_back(chunk, written);
                    }
                }
                prop_assert_eq!(backlog.len(), came.len() - left.len());
                prop_assert!(backlog.behind() <= backlog.len());
            }
            while let Some(mut chunk) = backlog.take() {
                let bytes = bytes_of(&chunk.left(usize::MAX));
                left.extend_from_slice(&bytes);
                chunk.advance(bytes.len());
                backlog.put_back(chunk, bytes.len());
            }
            prop_assert!(backlog.is_empty());
            prop_assert_eq!(backlog.behind(), 0);
            prop_assert!(left == came);
        }
    }

    #[test]
    fn a_large_body_is_not_copied_and_dropped_when_it_has_left() {
        let mut backlog = Backlog::default();
        let body = Arc::new(vec![2; 1 << 20]);
        let content: Arc<dyn Content> = body.clone();
        backlog.publish(CHANNEL, &message(&content));
        drop(content);
        // Behind it, and not in the same chunk.
        backlog.append(|out| out.push(3));
        let mut chunk = backlog.take().unwrap();
        assert_eq!(backlog.behind(), 1);
        let in_place = body.as_ptr_range();
        let parts = chunk.left(usize::MAX);
        let payloads = parts
            .slices()
            .iter()
            .filter(|part| part.len() > PREFIX_LEN)
            .skip(1);
        for payload in payloads {
            assert!(in_place.contains(&payload.as_ptr()));
        }
        assert_eq!(Arc::strong_count(&body), 2);
        let len = chunk.len();
        chunk.advance(len);
        assert_eq!(Arc::strong_count(&body), 1);
        backlog.put_back(chunk, len);
        assert_eq!(bytes_of(&backlog.take().unwrap().left(usize::MAX)), [3]);
    }

    #[test]
    fn small_messages_leave_together_and_not_all_buffers_are_kept() {
        let mut backlog = Backlog::default();
        let content: Arc<dyn Content> = Arc::new(vec![1; 100]);
        for _ in 0..100 {
            backlog.publish(CHANNEL, &message(&content));
        }
        let mut chunk = backlog.take().unwrap();
        assert_eq!(chunk.left(usize::MAX).slices().len(), 1);
        let len = chunk.len();
        chunk.advance(len);
        backlog.put_back(chunk, len);
        assert!(backlog.is_empty());
        assert_eq!(backlog.spares.len(), 1);
        backlog.keep(Vec::with_capacity(BUFFERS_KEPT_MAX));
        assert_eq!(backlog.spares.len(), 1);
    }
}
