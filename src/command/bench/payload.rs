//! What a request carries, and which reply to it is right.

use crate::fib;
use fibrpc::{Client, RequestBuilder};

pub struct Payload {
    pub body: Vec<u8>,
    /// As a client sends it, if `None`.
    pub content_type: Option<String>,
    pub right: Right,
}

/// Which of the replies that are no errors are right.
pub enum Right {
    Any,
    Exactly(Vec<u8>),
}

impl Payload {
    /// Asks the tutorial's server for a number.
    pub fn fib(n: u32) -> Payload {
        let fib = fib::fast(n).expect("the command line allows no larger n");
        Payload {
            body: n.to_string().into_bytes(),
            content_type: None,
            right: Right::Exactly(fib.to_string().into_bytes()),
        }
    }

    pub fn request<'c>(&self, client: &'c Client, queue: &str) -> RequestBuilder<'c> {
        let request = client.request(queue).body(&*self.body);
        match &self.content_type {
            Some(content_type) => request.content_type(content_type),
            None => request,
        }
    }

    pub fn is_right(&self, reply: &[u8]) -> bool {
        match &self.right {
            Right::Any => true,
            Right::Exactly(body) => reply == body,
        }
    }
}

/// A text of that many bytes, always the same: letters, digits, `-` and `_` in an order that does
/// not repeat, so that an echo which is cut, shifted or put together wrongly is not right by chance.
pub fn pattern(len: usize) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    // Knuth's linear congruential generator (MMIX); its upper bits are the good ones.
    let mut state = 0_u64;
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ALPHABET[(state >> 58) as usize]
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_part_of_a_pattern_is_like_another() {
        const LEN: usize = 100_000;
        let pattern = pattern(LEN);
        assert_eq!(pattern.len(), LEN);
        let parts: HashSet<_> = pattern.windows(16).collect();
        assert_eq!(parts.len(), LEN - 15);
        assert_eq!(super::pattern(10), pattern[..10]);
    }
}
