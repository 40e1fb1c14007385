//! The tutorial's function: Fibonacci numbers by the slow recursion, and by fast doubling; and how a
//! request asks for one. Pure; no I/O.

use fibrpc::RemoteError;
use std::str;

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
    if n < 2 {
        n.into()
    } else {
        recursive(n - 1) + recursive(n - 2)
    }
}

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

/// The kind of the error for a number that is well-formed, and refused.
pub const OUT_OF_RANGE: &str = "out-of-range";

/// The longest request body read as a number, in bytes. The longest number that any server
/// answers has three digits; this leaves room for zeros, and none for megabytes.
const NUMBER_BODY_MAX: usize = 64;

/// Reads a request's body: a decimal integer, and at most `n_max`.
///
/// # Errors
///
/// `invalid-argument` for what is not a decimal integer (ASCII digits, one sign at most) or is
/// longer than 64 bytes; `out-of-range` for an integer below 0 or above `n_max`.
pub fn parse_n(body: &[u8], n_max: u32) -> Result<u32, RemoteError> {
    let text = match str::from_utf8(body) {
        Ok(text) if text.len() <= NUMBER_BODY_MAX => text,
        _ => return Err(not_a_number(body)),
    };
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(not_a_number(body));
    }
    // All digits, so the only way left to fail is a number that does not fit.
    match text.parse::<i128>().map(u32::try_from) {
        Ok(Ok(n)) if n <= n_max => Ok(n),
        _ => Err(RemoteError::new(
            OUT_OF_RANGE,
            format!("n = {text} is out of range: this server computes fib(0) to fib({n_max})"),
        )),
    }
}

fn not_a_number(body: &[u8]) -> RemoteError {
    /// How much of a stranger's body an error message repeats, in bytes.
    const SHOWN_MAX: usize = 32;
    let shown = body[..body.len().min(SHOWN_MAX)].escape_ascii();
    let ellipsis = if body.len() > SHOWN_MAX { "..." } else { "" };
    RemoteError::invalid_argument(format!(
        "the request must be a decimal integer of at most {NUMBER_BODY_MAX} bytes, \
         not \"{shown}{ellipsis}\" ({} bytes)",
        body.len()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    fn kind_of(body: &[u8]) -> Result<u32, String> {
        parse_n(body, 186).map_err(|error| error.kind().to_owned())
    }

    #[test]
    fn a_decimal_integer_in_range_is_accepted() {
        assert_eq!(kind_of(b"0"), Ok(0));
        assert_eq!(kind_of(b"186"), Ok(186));
        assert_eq!(kind_of(b"+30"), Ok(30));
        assert_eq!(kind_of(b"00030"), Ok(30));
        assert_eq!(kind_of(b"-0"), Ok(0));
    }

    #[test]
    fn what_is_not_a_decimal_integer_is_an_invalid_argument() {
        for body in [
            &b""[..],
            b"-",
            b"+",
            b"abc",
            b"30 ",
            b" 30",
            b"3.0",
            b"1e3",
            b"0x1e",
            b"--3",
        ] {
            assert_eq!(
                kind_of(body),
                Err(RemoteError::INVALID_ARGUMENT.to_owned()),
                "{body:?}"
            );
        }
        assert_eq!(
            kind_of("３０".as_bytes()),
            Err(RemoteError::INVALID_ARGUMENT.to_owned())
        );
        assert_eq!(
            kind_of(&[0xff, 0xfe]),
            Err(RemoteError::INVALID_ARGUMENT.to_owned())
        );
        assert_eq!(
            kind_of(&[b'1'; 65]),
            Err(RemoteError::INVALID_ARGUMENT.to_owned())
        );
    }

    #[test]
    fn an_integer_that_the_server_refuses_is_out_of_range() {
        for body in [&b"-1"[..], b"187", b"4294967296", &[b'9'; 64]] {
            assert_eq!(kind_of(body), Err(OUT_OF_RANGE.to_owned()), "{body:?}");
        }
    }

    #[test]
    fn an_error_message_repeats_little_of_a_huge_body() {
        let error = parse_n(&[0; 1 << 20], 45).unwrap_err();
        assert!(error.message().len() < 300, "{}", error.message().len());
        assert!(
            error.message().contains("1048576 bytes"),
            "{}",
            error.message()
        );
    }

    proptest! {
        #[test]
        fn every_number_in_range_reads_back(n in 0..=186_u32) {
            prop_assert_eq!(kind_of(n.to_string().as_bytes()), Ok(n));
        }

        #[test]
        fn no_body_makes_the_parser_panic(body: Vec<u8>) {
            let _ = parse_n(&body, 186);
        }
    }
}
