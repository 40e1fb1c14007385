//! Fibonacci numbers: the tutorial's slow recursion, and fast doubling. Pure; no I/O.

use std::hint::black_box;

/// The largest `n` whose Fibonacci number fits a `u128`: fib(186) is just under 2^128.
pub const FAST_N_MAX: u32 = 186;

/// The largest `n` whose Fibonacci number fits a `u64`, which is what [`recursive`] counts in.
/// It is out of reach anyway: at a billion calls a second, n = 93 takes six centuries.
pub const RECURSIVE_N_MAX: u32 = 93;

/// The tutorial's function: two calls for every number, so the time grows as fast as the
/// result. It is slow on purpose; it stands for real work.
///
/// # Panics
///
/// Overflows `u64` for `n` above [`RECURSIVE_N_MAX`].
pub fn recursive(n: u32) -> u64 {
    // `if n < 2 { n } else { recursive(n - 1) + recursive(n - 2) }`, with the function written out
    // in itself six levels deep, as gcc does by itself and LLVM does not: it halves the time.
    // LLVM, seeing some levels at once, would find calls that are the same and make one of them:
    // 40 times quicker, and not the tutorial's work any more. The black box hides that from it.
    inlined!(black_box(n); 1 2 3 4 5 6)
}

/// The recursion, written out as many levels deep as there are tokens.
macro_rules! inlined {
    ($n:expr;) => {
        recursive($n)
    };
    ($n:expr; $level:tt $($deeper:tt)*) => {{
        let n: u32 = $n;
        if n < 2 {
            u64::from(n)
        } else {
            inlined!(n - 1; $($deeper)*) + inlined!(n - 2; $($deeper)*)
        }
    }};
}
use inlined;

/// The same numbers in about log2(n) steps, exact up to [`FAST_N_MAX`]; `None` above it.
///
/// Fast doubling: `fib(2k) = fib(k) * (2 fib(k+1) - fib(k))` and
/// `fib(2k+1) = fib(k)^2 + fib(k+1)^2`, over the bits of `n` from the highest.
pub fn fast(n: u32) -> Option<u128> {
    if n > FAST_N_MAX {
        return None;
    }
    // (a, b) = (fib(k), fib(k + 1)), where k is the bits of n read so far. In the last step
    // b is fib(n + 1), which overflows for n = 186 and is not needed: hence the wrapping.
    let (mut a, mut b) = (0_u128, 1_u128);
    for bit in (0..u32::BITS - n.leading_zeros()).rev() {
        let even = a.wrapping_mul(b.wrapping_mul(2).wrapping_sub(a));
        let odd = a.wrapping_mul(a).wrapping_add(b.wrapping_mul(b));
        (a, b) = if n >> bit & 1 == 0 {
            (even, odd)
        } else {
            (odd, even.wrapping_add(odd))
        };
    }
    Some(a)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, by addition; checked, so that it cannot wrap.
    fn by_definition(n: u32) -> Option<u128> {
        let (mut a, mut b) = (0_u128, Some(1_u128));
        for _ in 0..n {
            (a, b) = (b?, b.and_then(|b| a.checked_add(b)));
        }
        Some(a)
    }

    #[test]
    fn the_numbers_everyone_knows() {
        assert_eq!(fast(0), Some(0));
        assert_eq!(fast(1), Some(1));
        assert_eq!(fast(30), Some(832_040));
        assert_eq!(fast(93), Some(12_200_160_415_121_876_738));
        assert_eq!(fast(94), Some(19_740_274_219_868_223_167));
        assert_eq!(
            fast(186),
            Some(332_825_110_087_067_562_321_196_029_789_634_457_848)
        );
    }

    #[test]
    fn fast_agrees_with_the_definition_over_its_whole_range_and_stops_there() {
        for n in 0..=FAST_N_MAX {
            assert_eq!(fast(n), by_definition(n), "n = {n}");
        }
        assert_eq!(
            by_definition(FAST_N_MAX + 1),
            None,
            "186 is the last that fits"
        );
        assert_eq!(fast(FAST_N_MAX + 1), None);
        assert_eq!(fast(u32::MAX), None);
    }

    #[test]
    fn recursive_agrees_with_fast() {
        for n in 0..=27 {
            assert_eq!(Some(u128::from(recursive(n))), fast(n), "n = {n}");
        }
        assert!(fast(RECURSIVE_N_MAX).is_some_and(|f| u64::try_from(f).is_ok()));
        assert!(fast(RECURSIVE_N_MAX + 1).is_some_and(|f| u64::try_from(f).is_err()));
    }
}
