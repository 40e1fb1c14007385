//! Where questions come from: they are given, or a thread reads them from files and stdin.

use crossbeam_channel::{Receiver, SendError, Sender, TryRecvError, bounded, select};
use std::convert::Infallible;
use std::io::{self, BufRead, BufReader, Read};
use std::{mem, thread, vec};

/// How much of an input is read at once, in bytes.
const READ_SIZE: usize = 64 << 10;

/// A question; or why there is none where one was expected, and where that is.
pub type Found<Q> = Result<Q, String>;

/// What was found together: the lines that came in one read, or one file.
pub type Batch<Q> = Vec<Found<Q>>;

/// Gives one question after the other.
pub enum Source<Q> {
    Given(vec::IntoIter<Q>),
    Read {
        batch: vec::IntoIter<Found<Q>>,
        batches: Receiver<Batch<Q>>,
        /// Disconnected when nobody wants any more.
        interrupt: Receiver<Infallible>,
        /// How many questions there are, if that is known before they are read.
        total: Option<usize>,
    },
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<Q> {
    Question(Q),
    /// What is no question: where it stands, and why.
    Bad(String),
    /// Nothing now.
    Later,
    End,
}

impl<Q: Send + 'static> Source<Q> {
    pub fn given(questions: Vec<Q>) -> Source<Q> {
        Source::Given(questions.into_iter())
    }

    /// Reads in a thread of its own, since reading cannot be interrupted; it is left behind if
    /// nobody wants any more. `read` ends when there are no more, or with an error when nobody
    /// listens. What it has read ahead is three batches: one being given out, one that waits, and
    /// one in its hands.
    pub fn read(
        interrupt: Receiver<Infallible>,
        total: Option<usize>,
        read: impl FnOnce(&Sender<Batch<Q>>) -> Result<(), SendError<Batch<Q>>> + Send + 'static,
    ) -> io::Result<Source<Q>> {
        let (found, batches) = bounded(1);
        thread::Builder::new()
            .name("fibrpc-input".to_owned())
            .spawn(move || read(&found))?;
        Ok(Source::Read {
            batch: Vec::new().into_iter(),
            batches,
            interrupt,
            total,
        })
    }

    /// How many questions there are in all, if that is known.
    pub fn total(&self) -> Option<u64> {
        let total = match self {
            Source::Given(questions) => Some(questions.len()),
            Source::Read { total, .. } => *total,
        };
        total.map(|total| total as u64)
    }

    /// What comes next; if there is nothing yet, waits for it when told to.
    pub fn next(&mut self, wait: bool) -> Next<Q> {
        let (batch, batches, interrupt) = match self {
            Source::Given(questions) => {
                return questions.next().map_or(Next::End, Next::Question);
            }
            Source::Read {
                batch,
                batches,
                interrupt,
                ..
            } => (batch, batches, interrupt),
        };
        loop {
            if let Some(found) = batch.next() {
                return found.map_or_else(Next::Bad, Next::Question);
            }
            let received = if wait {
                select! {
                    recv(batches) -> next => next.ok(),
                    recv(interrupt) -> _ => None,
                }
            } else {
                match batches.try_recv() {
                    Ok(next) => Some(next),
                    Err(TryRecvError::Empty) => return Next::Later,
                    Err(TryRecvError::Disconnected) => None,
                }
            };
            match received {
                Some(next) => *batch = next.into_iter(),
                None => return Next::End,
            }
        }
    }
}

/// Reads the lines of stdin, and sends what `question` makes of each: of its number and its bytes
/// without the line end. It may make nothing of one. A line of more than `longest` bytes is told,
/// and not kept.
///
/// Lines that came together are sent together. So what is read ahead is bounded by [`READ_SIZE`],
/// or by the longest line, and no line waits for the next.
pub fn read_lines<Q>(
    stdin: impl Read,
    longest: u64,
    question: impl Fn(u64, Vec<u8>) -> Result<Option<Q>, String>,
    to: &Sender<Batch<Q>>,
) -> Result<(), SendError<Batch<Q>>> {
    let mut input = BufReader::with_capacity(READ_SIZE, stdin);
    let mut batch = Vec::new();
    let bad = |number: u64, reason: String| Err(format!("line {number} of stdin: {reason}"));
    for number in 1.. {
        let made = match read_line(&mut input, longest) {
            Ok(None) => break,
            Ok(Some(line)) if line.len() as u64 > longest => {
                Err(format!("longer than {longest} bytes"))
            }
            Ok(Some(line)) => question(number, line),
            Err(error) => {
                batch.push(bad(number, error.to_string()));
                break;
            }
        };
        match made {
            Ok(question) => batch.extend(question.map(Ok)),
            Err(reason) => batch.push(bad(number, reason)),
        }
        if !batch.is_empty() && !input.buffer().contains(&b'\n') {
            to.send(mem::take(&mut batch))?;
        }
    }
    to.send(batch)
}

/// Reads a line, of which one byte more than `longest` is kept, and no line end. `None` at the end.
fn read_line(input: &mut impl BufRead, longest: u64) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut limited = input.by_ref().take(longest + 1);
    if limited.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    if line.ends_with(b"\n") {
        line.pop();
    } else if line.len() as u64 > longest {
        input.skip_until(b'\n')?;
    }
    // It has grown by doubling.
    line.shrink_to_fit();
    Ok(Some(line))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lines of at most eight bytes are read as; a blank one as nothing.
    fn all(input: &'static [u8]) -> Vec<Next<String>> {
        let (_running, interrupt) = bounded(0);
        let text = |number, line: Vec<u8>| match &line[..] {
            b"" => Ok(None),
            b"bad" => Err("not good".to_owned()),
            line => Ok(Some(format!("{number}:{}", line.escape_ascii()))),
        };
        let read = move |to: &Sender<_>| read_lines(input, 8, text, to);
        let mut source = Source::read(interrupt, None, read).unwrap();
        let mut all = Vec::new();
        loop {
            match source.next(true) {
                Next::End => return all,
                next => all.push(next),
            }
        }
    }

    fn question(text: &str) -> Next<String> {
        Next::Question(text.to_owned())
    }

    #[test]
    fn a_line_is_its_bytes_without_the_line_end() {
        assert_eq!(
            all(b"a\r\n\n\xff\0\nlast"),
            [
                question(r"1:a\r"),
                question(r"3:\xff\x00"),
                question("4:last")
            ]
        );
        assert_eq!(all(b""), []);
    }

    #[test]
    fn a_bad_line_is_told_with_its_number_and_the_next_is_read() {
        let all = all(b"a\n\nbad\nd\n");
        assert_eq!(all[1], Next::Bad("line 3 of stdin: not good".to_owned()));
        assert_eq!(all[2], question("4:d"));
    }

    #[test]
    fn a_line_that_is_too_long_is_not_kept() {
        let input: &'static [u8] = [&[b'1'; 1 << 20][..], b"\n12345678\n123456789"]
            .concat()
            .leak();
        let all = all(input);
        let too_long = |next: &Next<String>| matches!(next, Next::Bad(reason) if reason.contains("longer than 8"));
        assert!(too_long(&all[0]) && too_long(&all[2]), "{all:?}");
        assert_eq!(all[1], question("2:12345678"));
    }

    #[test]
    fn a_line_does_not_wait_for_the_next() {
        let (input, mut output) = io::pipe().unwrap();
        let (_running, interrupt) = bounded(0);
        let text = |_, line: Vec<u8>| Ok(String::from_utf8(line).ok());
        let read = move |to: &Sender<_>| read_lines(input, 8, text, to);
        let mut source = Source::read(interrupt, None, read).unwrap();
        // The beginning of another is no reason to wait.
        io::Write::write_all(&mut output, b"first\nsec").unwrap();
        assert_eq!(source.next(true), question("first"));
        assert_eq!(source.next(false), Next::Later);
        drop(output);
        assert_eq!(source.next(true), question("sec"));
        assert_eq!(source.next(true), Next::End);
    }

    #[test]
    fn an_interrupt_ends_the_wait_for_a_question() {
        let (running, interrupt) = bounded(0);
        let (never, _open) = io::pipe().unwrap();
        let read = move |to: &Sender<Batch<()>>| read_lines(never, 8, |_, _| Ok(None), to);
        let mut source = Source::read(interrupt, None, read).unwrap();
        drop(running);
        assert_eq!(source.next(true), Next::End);
    }
}
