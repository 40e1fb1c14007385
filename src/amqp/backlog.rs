//! What waits to be written: whole frames, in chunks. Pure; no I/O.
//!
//! Small frames are appended to the last chunk, to leave together. A large message comes encoded
//! and is moved in as a chunk of its own. What a full socket leaves of a chunk stays in it. So a
//! large message is never copied here, and nothing that is done under the outbox's lock takes
//! longer because of it.

use std::collections::VecDeque;

/// A chunk of this size, in bytes, is appended to no more.
const CHUNK_MAX: usize = 64 << 10;

/// How much of empty buffers is kept, in bytes: the memory of a new one costs more than its use.
const BUFFERS_KEPT_MAX: usize = 2 << 20;

/// What waits to be written, in order.
#[derive(Default)]
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
}

/// Whole frames, of which the first bytes may have left.
#[derive(Default)]
pub(crate) struct Chunk {
    frames: Vec<u8>,
    written: usize,
}

impl Chunk {
    /// What is still to be written.
    pub fn left(&self) -> &[u8] {
        &self.frames[self.written..]
    }

    /// Takes note that the next `len` bytes have left. A large buffer that is done with is freed
    /// here, which takes time: so not under a lock.
    pub fn advance(&mut self, len: usize) {
        self.written += len;
        if self.written == self.frames.len() {
            self.written = 0;
            if self.frames.capacity() <= BUFFERS_KEPT_MAX {
                self.frames.clear();
            } else {
                self.frames = Vec::new();
            }
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

    /// Takes the frames that `encode` appends, which are not many; it may append none.
    pub fn append(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let last = self
            .chunks
            .pop_back_if(|last| last.frames.len() < CHUNK_MAX);
        let mut last = last.unwrap_or_else(|| Chunk {
            frames: self.take_spare(),
            written: 0,
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

    /// An empty buffer for frames, one that has been used if there is one.
    pub fn take_spare(&mut self) -> Vec<u8> {
        self.spares.pop().unwrap_or_default()
    }

    /// Keeps an empty buffer for later.
    fn keep(&mut self, frames: Vec<u8>) {
        let kept: usize = self.spares.iter().map(Vec::capacity).sum();
        if frames.capacity() > 0 && kept + frames.capacity() <= BUFFERS_KEPT_MAX {
            self.spares.push(frames);
        }
    }

    /// Takes encoded frames as they are.
    pub fn push(&mut self, frames: Vec<u8>) {
        if !frames.is_empty() {
            self.len += frames.len();
            self.chunks.push_back(Chunk { frames, written: 0 });
        }
    }

    /// Takes the first chunk out, to write some of it. It is to be put back.
    pub fn take(&mut self) -> Option<Chunk> {
        let chunk = self.chunks.pop_front()?;
        self.leaving = chunk.left().len();
        Some(chunk)
    }

    /// Puts what was taken out back, after its next `written` bytes have left.
    pub fn put_back(&mut self, chunk: Chunk, written: usize) {
        self.len -= written;
        self.written += written as u64;
        self.leaving = chunk.left().len();
        if chunk.frames.is_empty() {
            self.keep(chunk.frames);
        } else {
            self.chunks.push_front(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Append(usize),
        Push(usize),
        /// Another thread appends while the first chunk is being written.
        Write(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let len = || prop_oneof![Just(0), 1..300_usize, 60_000..70_000_usize];
        prop_oneof![
            len().prop_map(Step::Append),
            len().prop_map(Step::Push),
            (0..100_000_usize, len()).prop_map(|(most, appended)| Step::Write(most, appended)),
        ]
    }

    proptest! {
        #[test]
        fn what_leaves_is_what_came_in_order_and_once(
            steps in proptest::collection::vec(step(), 0..60),
        ) {
            let mut backlog = Backlog::default();
            let (mut came, mut left) = (Vec::<u8>::new(), Vec::<u8>::new());
            let mut next = 0_u8;
            let mut some = |len: usize| -> Vec<u8> {
                let bytes = (0..len).map(|_| {
                    next = next.wrapping_add(1) % 251;
                    next
                });
                bytes.collect()
            };
            for step in steps {
                match step {
                    Step::Append(len) => {
                        let bytes = some(len);
                        backlog.append(|out| out.extend(&bytes));
                        came.extend(bytes);
                    }
                    Step::Push(len) => {
                        let bytes = some(len);
                        came.extend(&bytes);
                        backlog.push(bytes);
                    }
                    Step::Write(most, appended) => {
                        let Some(mut chunk) = backlog.take() else {
                            prop_assert!(backlog.is_empty());
                            continue;
                        };
                        prop_assert!(!chunk.left().is_empty());
                        let written = chunk.left().len().min(most);
                        left.extend(&chunk.left()[..written]);
                        chunk.advance(written);
                        let bytes = some(appended);
                        backlog.append(|out| out.extend(&bytes));
                        came.extend(bytes);
                        backlog.put_back(chunk, written);
                    }
                }
                prop_assert_eq!(backlog.len(), came.len() - left.len());
                prop_assert!(backlog.behind() <= backlog.len());
            }
            while let Some(mut chunk) = backlog.take() {
                let written = chunk.left().len();
                left.extend(chunk.left());
                chunk.advance(written);
                backlog.put_back(chunk, written);
            }
            prop_assert!(backlog.is_empty());
            prop_assert_eq!(backlog.behind(), 0);
            prop_assert_eq!(left, came);
        }
    }

    #[test]
    fn a_large_message_is_moved_and_not_copied() {
        let mut backlog = Backlog::default();
        backlog.append(|out| out.push(1));
        let large = vec![2; 1 << 20];
        let place = large.as_ptr();
        backlog.push(large);
        // Not behind it in the same buffer, which would have to grow.
        backlog.append(|out| out.push(3));
        let mut small = backlog.take().unwrap();
        small.advance(1);
        backlog.put_back(small, 1);
        for left in [1 << 20, (1 << 20) - 5] {
            let mut chunk = backlog.take().unwrap();
            assert_eq!(chunk.left().len(), left);
            assert_eq!(chunk.frames.as_ptr(), place);
            assert_eq!(backlog.behind(), 1);
            chunk.advance(5);
            backlog.put_back(chunk, 5);
        }
    }

    #[test]
    fn small_frames_leave_together_and_only_small_buffers_are_kept() {
        let mut backlog = Backlog::default();
        for byte in 0..100 {
            backlog.append(|out| out.push(byte));
        }
        let mut chunk = backlog.take().unwrap();
        assert_eq!(chunk.left().len(), 100);
        chunk.advance(100);
        backlog.put_back(chunk, 100);
        assert_eq!(backlog.spares.len(), 1);
        backlog.push(vec![0; BUFFERS_KEPT_MAX + 1]);
        let mut chunk = backlog.take().unwrap();
        chunk.advance(BUFFERS_KEPT_MAX + 1);
        assert_eq!(chunk.frames.capacity(), 0);
        backlog.put_back(chunk, BUFFERS_KEPT_MAX + 1);
        assert!(backlog.is_empty());
        assert_eq!(backlog.spares.len(), 1);
    }
}
