//! Where `call` has its numbers from: the arguments, or the lines of stdin.

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, select};
use std::convert::Infallible;
use std::io::{self, BufRead, BufReader, Read};
use std::{str, thread, vec};

/// How many lines may be read ahead.
const READ_AHEAD: usize = 1024;

/// The longest line that may hold a number, in bytes. Of a longer one, no more is kept.
const LINE_MAX: u64 = 256;

/// Reads what a number is, which is not to say that a server accepts it.
pub fn parse(text: &str) -> Result<i128, String> {
    text.parse()
        .map_err(|_| "expected a decimal integer".to_owned())
}

/// Gives one number after the other.
pub enum Source {
    Given(vec::IntoIter<i128>),
    Lines {
        read: Receiver<Next>,
        /// Disconnected when nobody wants any more.
        interrupt: Receiver<Infallible>,
    },
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Number(i128),
    /// A line that is no number: which one, and why.
    Bad(String),
    /// Nothing now.
    Later,
    End,
}

impl Source {
    pub fn given(numbers: Vec<i128>) -> Source {
        Source::Given(numbers.into_iter())
    }

    /// Reads lines in a thread of its own, since reading cannot be interrupted; it is left behind
    /// if nobody wants any more.
    pub fn lines(
        input: impl Read + Send + 'static,
        interrupt: Receiver<Infallible>,
    ) -> io::Result<Source> {
        let (lines, read) = bounded(READ_AHEAD);
        thread::Builder::new()
            .name("fibrpc-stdin".to_owned())
            .spawn(move || read_lines(BufReader::new(input), &lines))?;
        Ok(Source::Lines { read, interrupt })
    }

    /// What comes next; if there is nothing yet, waits for it when told to.
    pub fn next(&mut self, wait: bool) -> Next {
        match self {
            Source::Given(numbers) => numbers.next().map_or(Next::End, Next::Number),
            Source::Lines { read, interrupt } if wait => select! {
                recv(read) -> next => next.unwrap_or(Next::End),
                recv(interrupt) -> _ => Next::End,
            },
            Source::Lines { read, .. } => match read.try_recv() {
                Ok(next) => next,
                Err(TryRecvError::Empty) => Next::Later,
                Err(TryRecvError::Disconnected) => Next::End,
            },
        }
    }
}

/// Sends each line; ends when there are no more, or nobody listens.
fn read_lines(mut input: impl BufRead, lines: &Sender<Next>) {
    let mut line = Vec::new();
    for number in 1_u64.. {
        line.clear();
        let next = match read_line(&mut input, &mut line) {
            Ok(0) => return,
            Ok(_) => match read_number(&line) {
                None => continue,
                Some(Ok(n)) => Next::Number(n),
                Some(Err(reason)) => Next::Bad(format!("line {number} of stdin: {reason}")),
            },
            Err(error) => {
                let _ = lines.send(Next::Bad(format!("line {number} of stdin: {error}")));
                return;
            }
        };
        if lines.send(next).is_err() {
            return;
        }
    }
}

/// Reads a line, of which no more than a little over [`LINE_MAX`] bytes are kept; says how many
/// it had, and 0 at the end.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    let mut len = input.by_ref().take(LINE_MAX + 1).read_until(b'\n', line)?;
    if len > LINE_MAX as usize && !line.ends_with(b"\n") {
        len += input.skip_until(b'\n')?;
    }
    Ok(len)
}

/// The number that a line holds; `None` if it is blank.
fn read_number(line: &[u8]) -> Option<Result<i128, String>> {
    let line = line.trim_ascii();
    if line.is_empty() {
        return None;
    }
    let number = match str::from_utf8(line) {
        Ok(text) if line.len() <= LINE_MAX as usize => parse(text),
        Ok(_) => return Some(Err(format!("longer than {LINE_MAX} bytes"))),
        Err(_) => parse(""),
    };
    Some(number.map_err(|reason| format!("{reason}, not \"{}\"", line.escape_ascii())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(input: &'static [u8]) -> Vec<Next> {
        let (_running, interrupt) = bounded(0);
        let mut source = Source::lines(input, interrupt).unwrap();
        let mut all = Vec::new();
        loop {
            match source.next(true) {
                Next::End => return all,
                next => all.push(next),
            }
        }
    }

    #[test]
    fn each_line_is_a_number_and_blank_ones_are_none() {
        assert_eq!(
            all(b"1\n\n -2 \r\n+3"),
            [Next::Number(1), Next::Number(-2), Next::Number(3)]
        );
        assert_eq!(all(b""), []);
    }

    #[test]
    fn a_bad_line_is_told_with_its_number_and_the_next_is_read() {
        let Next::Bad(reason) = &all(b"1\n\nabc\n4\n")[1] else {
            panic!("not told");
        };
        assert!(
            reason.contains("line 3") && reason.contains("abc"),
            "{reason}"
        );
        assert_eq!(all(b"\xff\n4\n")[1], Next::Number(4));
    }

    #[test]
    fn an_endless_line_is_not_kept() {
        let input: &'static [u8] = [&[b'1'; 1 << 20][..], b"\n7\n"].concat().leak();
        let all = all(input);
        assert!(
            matches!(&all[0], Next::Bad(reason) if reason.contains("longer than")),
            "{all:?}"
        );
        assert_eq!(all[1], Next::Number(7));
    }

    #[test]
    fn an_interrupt_ends_the_wait_for_a_line() {
        let (running, interrupt) = bounded(0);
        let (_open, never) = io::pipe().map(|(read, write)| (write, read)).unwrap();
        let mut source = Source::lines(never, interrupt).unwrap();
        drop(running);
        assert_eq!(source.next(true), Next::End);
    }
}
