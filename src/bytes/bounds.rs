//! How much time and memory an input may take.

use crate::amqp::incoming::RESERVED_MAX;
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// How long each 1024 bytes that have begun may take, of a core's time: a busy machine stops a thread
/// now and then, and that does not count. Most take a hundredth of it.
const TIME_PER_KIB: Duration = Duration::from_millis(10);

/// How long each piece may take besides that comes by a socket, which is a system call or some.
const TIME_PER_PIECE: Duration = Duration::from_millis(1);

/// How often what took too long is tried, in all. A thread that shares its core may find nothing of its
/// own in the cache, so the shortest time counts.
const TRIES: usize = 5;

/// How much memory the input's own bytes may take, for each of them. The most greedy is a header
/// that is a number: ten octets can say one of which the text has some 330.
const MEMORY_PER_BYTE: usize = 64;

/// How much memory there may be besides: a buffer to read into, and what vectors begin with.
const REST: usize = 256 << 10;

/// Holds what is done with `len` bytes to the time that it may take, of which so many pieces come by a
/// socket.
pub fn in_time<T>(len: usize, pieces: usize, mut work: impl FnMut() -> T) -> T {
    let most = TIME_PER_KIB * (len / 1024 + 1) as u32 + TIME_PER_PIECE * pieces as u32;
    let mut shortest = Duration::MAX;
    for _ in 0..TRIES {
        let began = core_time();
        let done = work();
        shortest = shortest.min(core_time() - began);
        if shortest <= most {
            return done;
        }
    }
    panic!("{len} bytes took {shortest:?}, and may take {most:?}");
}

/// For how long this thread has had a core, ever.
fn core_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Holds the memory that is there for `len` bytes that have arrived to what may be: whatever lengths
/// they claim, it is twice the largest message at most, and what there is besides.
pub fn in_memory(len: usize, held: usize) {
    let most = RESERVED_MAX + (MEMORY_PER_BYTE * len).min(RESERVED_MAX) + REST;
    assert!(held <= most, "{len} bytes hold {held}, and may hold {most}");
}
