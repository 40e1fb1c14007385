//! Whatever comes by chance comes from the schedule, so that a seed brings it back.

use rand::TryRng;
use shuttle::rand::{RngCore, thread_rng};
use std::convert::Infallible;
use std::hash::{BuildHasherDefault, DefaultHasher};

/// As [`std::collections::HashMap`], in the same order each time.
pub(crate) type HashMap<K, V> = std::collections::HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// As [`std::collections::HashSet`], in the same order each time.
pub(crate) type HashSet<K> = std::collections::HashSet<K, BuildHasherDefault<DefaultHasher>>;

/// As [`rand::rngs::SysRng`].
pub(crate) struct SysRng;

impl TryRng for SysRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(thread_rng().next_u32())
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(thread_rng().next_u64())
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        thread_rng().fill_bytes(out);
        Ok(())
    }
}
