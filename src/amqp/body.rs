//! The memory of large bodies, used again.
//!
//! An allocator returns memory of such a size to the system, which clears every page of it before
//! it is used next: at 4 MiB that was a tenth of all work of a call. So what is done with is kept
//! here for the next body that arrives, a little of it, whichever connection it was of.

use std::fmt;
use std::mem::take;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A body from this size on, in bytes, is never copied: it is read to where it stays, written from
/// where it lies, and its memory is kept. For a smaller one, to copy it costs less than a read or a
/// write of its own.
pub(crate) const LARGE_MIN: usize = 64 << 10;

/// How much is kept at most, in bytes.
const KEPT_MAX: usize = 16 << 20;

/// What is kept, the latest last.
static SPARES: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// With std's mutex, also where schedules are searched: what is kept outlives each of them.
fn spares() -> MutexGuard<'static, Vec<Vec<u8>>> {
    SPARES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A body's bytes. A clone shares them; when the last is dropped, their memory is used again.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct Body(Arc<Memory>);

#[derive(PartialEq, Eq, Default)]
struct Memory(Vec<u8>);

impl Body {
    /// Bytes to be overwritten: they may be those of another body.
    pub fn scratch(len: usize) -> Vec<u8> {
        let mut spares = spares();
        // What is much longer would be held by what is short.
        let fits = |spare: &Vec<u8>| spare.len() >= len && spare.capacity() <= 2 * len;
        let spare = spares.iter().rposition(fits).map(|at| spares.remove(at));
        drop(spares);
        match spare {
            Some(mut spare) => {
                spare.truncate(len);
                spare
            }
            None => vec![0; len],
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let (len, capacity) = (self.0.len(), self.0.capacity());
        // Of a short one in much memory, that would be kept for none: see `scratch`.
        if len < LARGE_MIN || capacity > KEPT_MAX.min(2 * len) {
            return;
        }
        let mut spares = spares();
        spares.push(take(&mut self.0));
        let mut kept: usize = spares.iter().map(Vec::capacity).sum();
        let too_many = spares.iter().take_while(|spare| {
            let is_too_much = kept > KEPT_MAX;
            kept -= spare.capacity();
            is_too_much
        });
        let count = too_many.count();
        let dropped: Vec<_> = spares.drain(..count).collect();
        drop(spares);
        drop(dropped);
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Body {
        Body(Arc::new(Memory(bytes)))
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.0
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.deref().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In one test, because what is kept is common to all.
    #[test]
    fn memory_is_used_again_if_it_fits_and_not_too_much_is_kept() {
        // Of a size that no other test has.
        const LEN: usize = 3_000_001;
        let body = Body::from(vec![1; LEN]);
        let memory = body.as_ptr();
        let shared = body.clone();
        assert_eq!(shared.as_ptr(), memory);
        drop(body);
        let is_kept = || spares().iter().any(|spare| spare.as_ptr() == memory);
        assert!(!is_kept());
        drop(shared);
        assert!(is_kept());
        let (too_long, too_short) = (Body::scratch(LEN + 1), Body::scratch(LEN / 3));
        assert_eq!((too_long.len(), too_short.len()), (LEN + 1, LEN / 3));
        for other in [&too_long, &too_short] {
            assert_ne!(other.as_ptr(), memory);
        }
        let again = Body::scratch(LEN - 5);
        assert_eq!((again.as_ptr(), again.len()), (memory, LEN - 5));

        for _ in 0..10 {
            drop(Body::from(vec![2; LEN]));
        }
        drop(Body::from(vec![3; KEPT_MAX + 1]));
        drop(Body::from(vec![4; LARGE_MIN - 1]));
        // Short ones in much memory.
        for len in [1, LARGE_MIN] {
            let mut short = Vec::with_capacity(3 * LARGE_MIN);
            short.resize(len, 5);
            drop(Body::from(short));
        }
        let spares = spares();
        let kept: usize = spares.iter().map(Vec::capacity).sum();
        assert!((KEPT_MAX - LEN..=KEPT_MAX).contains(&kept), "{kept}");
        let is_of_use =
            |spare: &Vec<u8>| spare.len() >= LARGE_MIN && spare.capacity() <= 2 * spare.len();
        assert!(spares.iter().all(is_of_use));
    }
}
