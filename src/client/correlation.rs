//! Correlation ids: which call a reply is for.

use crate::amqp::sync::atomic::{AtomicU64, Ordering};
use crate::amqp::time::random;
use std::fmt;

/// Says which call a reply is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct CorrelationId(u128);

impl CorrelationId {
    const LEN: usize = 32;

    /// Reads an id; `None` if it is none of ours.
    pub fn parse(text: &[u8]) -> Option<CorrelationId> {
        if text.len() != Self::LEN {
            return None;
        }
        let text = std::str::from_utf8(text).ok()?;
        u128::from_str_radix(text, 16).ok().map(CorrelationId)
    }
}

impl fmt::Display for CorrelationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Gives each call of a client an id: half of it random, the other half counted. Nobody who has
/// not been sent one can guess it and answer in the server's place.
pub(crate) struct CorrelationIds {
    client: u64,
    next: AtomicU64,
}

impl CorrelationIds {
    pub fn new() -> CorrelationIds {
        CorrelationIds {
            client: random(),
            next: AtomicU64::new(0),
        }
    }

    pub fn next(&self) -> CorrelationId {
        let call = self.next.fetch_add(1, Ordering::Relaxed);
        CorrelationId(u128::from(self.client) << 64 | u128::from(call))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_correlation_id_reads_back(id: u128) {
            prop_assert_eq!(
                CorrelationId::parse(CorrelationId(id).to_string().as_bytes()),
                Some(CorrelationId(id))
            );
        }

        #[test]
        fn a_foreign_correlation_id_is_no_panic(text: Vec<u8>) {
            let _ = CorrelationId::parse(&text);
        }
    }
}
