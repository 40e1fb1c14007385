//! What a number is that `call` asks for, and how a line of stdin holds one.

use crate::command::questions::{Source, read_lines};
use crossbeam_channel::Receiver;
use std::convert::Infallible;
use std::{io, str};

/// The longest line that may hold a number, in bytes.
const LINE_MAX: u64 = 256;

/// Reads what a number is, which is not to say that a server accepts it.
pub fn parse(text: &str) -> Result<i128, String> {
    text.parse()
        .map_err(|_| "expected a decimal integer".to_owned())
}

/// The numbers on stdin, one a line.
pub fn from_stdin(interrupt: Receiver<Infallible>) -> io::Result<Source<i128>> {
    Source::read(interrupt, None, |to| {
        read_lines(io::stdin(), LINE_MAX, |_, line| read_number(&line), to)
    })
}

/// The number that a line holds; `None` if it is blank.
fn read_number(line: &[u8]) -> Result<Option<i128>, String> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let number = parse(str::from_utf8(line).unwrap_or_default());
    number
        .map(Some)
        .map_err(|reason| format!("{reason}, not \"{}\"", line.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_number_and_a_blank_one_is_none() {
        for (line, number) in [
            (&b"1"[..], Some(1)),
            (b" -2 \r", Some(-2)),
            (b"+3", Some(3)),
            (b" \r", None),
        ] {
            assert_eq!(read_number(line), Ok(number));
        }
        for (line, shown) in [(&b"abc"[..], "abc"), (b"\xff", r"\xff"), (b"1 2", "1 2")] {
            let reason = read_number(line).unwrap_err();
            assert!(reason.contains(shown), "{reason}");
        }
    }
}
