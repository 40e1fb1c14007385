//! Where `request` has its bodies from: arguments, files, and stdin as a whole or by lines.

use crate::command::pipeline::Question;
use crate::command::questions::{Batch, Found, Source, read_lines};
use crossbeam_channel::{Receiver, SendError, Sender};
use fibrpc::Response;
use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The longest body that the library sends, in bytes. Of a longer one no more is read.
pub const BODY_MAX: u64 = Response::BODY_MAX as u64;

/// An argument that stands for one body, or for one a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BodyArg {
    /// The body itself.
    Literal(Vec<u8>),
    /// All that a file holds.
    File(PathBuf),
    /// All of stdin.
    Stdin,
    /// Each line of stdin.
    Lines,
}

/// A request's body, until it is sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Body {
    bytes: Vec<u8>,
    pub origin: Origin,
}

/// Which of several bodies it is, to say what a failure is about.
#[derive(Debug, PartialEq, Eq)]
pub enum Origin {
    /// The only one.
    Only,
    /// An argument, from 1.
    Argument(usize),
    File(PathBuf),
    Stdin,
    /// A line of stdin, from 1.
    Line(u64),
}

impl Question for Body {
    fn take_body(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// What stands before the failure in an error message.
impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Only => Ok(()),
            Origin::Argument(index) => write!(f, "body {index}: "),
            Origin::File(path) => write!(f, "{}: ", path.display()),
            Origin::Stdin => f.write_str("stdin: "),
            Origin::Line(number) => write!(f, "line {number} of stdin: "),
        }
    }
}

/// Reads what the arguments stand for, in their order.
pub fn source(args: Vec<BodyArg>, interrupt: Receiver<Infallible>) -> io::Result<Source<Body>> {
    let total = (!args.contains(&BodyArg::Lines)).then_some(args.len());
    Source::read(interrupt, total, |to| read(args, io::stdin(), to))
}

fn read(
    args: Vec<BodyArg>,
    mut stdin: impl Read,
    to: &Sender<Batch<Body>>,
) -> Result<(), SendError<Batch<Body>>> {
    let is_only = args.len() == 1;
    for (arg, index) in args.into_iter().zip(1..) {
        let (bytes, origin) = match arg {
            BodyArg::Lines => {
                let body = |number, bytes| {
                    let origin = Origin::Line(number);
                    Ok(Some(Body { bytes, origin }))
                };
                read_lines(&mut stdin, BODY_MAX, body, to)?;
                continue;
            }
            BodyArg::Literal(bytes) => (Ok(bytes), Origin::Argument(index)),
            BodyArg::Stdin => (read_whole("stdin", Ok(&mut stdin)), Origin::Stdin),
            BodyArg::File(path) => (read_file(&path), Origin::File(path)),
        };
        let origin = if is_only { Origin::Only } else { origin };
        to.send(vec![bytes.map(|bytes| Body { bytes, origin })])?;
    }
    Ok(())
}

/// All that a file holds; or a sentence that names it.
pub fn read_file(path: &Path) -> Found<Vec<u8>> {
    read_whole(&format!("'{}'", path.display()), File::open(path))
}

/// All that an input holds; or a sentence that names it.
fn read_whole(name: &str, input: io::Result<impl Read>) -> Found<Vec<u8>> {
    let mut bytes = Vec::new();
    input
        .and_then(|input| input.take(BODY_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read {name}: {error}"))?;
    if bytes.len() as u64 > BODY_MAX {
        return Err(format!(
            "{name} is longer than {BODY_MAX} bytes, which is the most that a request can have"
        ));
    }
    // It has grown by doubling.
    bytes.shrink_to_fit();
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::unbounded;

    fn all(args: Vec<BodyArg>, stdin: &[u8]) -> Vec<Found<(Vec<u8>, String)>> {
        let (found, batches) = unbounded();
        read(args, stdin, &found).unwrap();
        drop(found);
        let shown = |body: Body| (body.bytes, body.origin.to_string());
        batches
            .iter()
            .flatten()
            .map(|found| found.map(shown))
            .collect()
    }

    fn body(bytes: &[u8], origin: &str) -> Found<(Vec<u8>, String)> {
        Ok((bytes.to_owned(), origin.to_owned()))
    }

    #[test]
    fn bodies_come_in_the_order_of_the_arguments() {
        let args = vec![BodyArg::Literal(b"a".to_vec()), BodyArg::Lines];
        assert_eq!(
            all(args, b"\nb\r\n\xff\0"),
            [
                body(b"a", "body 1: "),
                body(b"", "line 1 of stdin: "),
                body(b"b\r", "line 2 of stdin: "),
                body(b"\xff\0", "line 3 of stdin: "),
            ]
        );
        assert_eq!(all(vec![BodyArg::Stdin], b"a\nb\n"), [body(b"a\nb\n", "")]);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named_and_the_others_are_read() {
        let missing = || BodyArg::File("/no/such/file".into());
        let all = all(
            vec![missing(), BodyArg::Stdin, BodyArg::File("/".into())],
            b"x",
        );
        let said = |index: usize| all[index].clone().unwrap_err();
        assert!(said(0).contains("'/no/such/file'"), "{}", said(0));
        assert_eq!(all[1], body(b"x", "stdin: "));
        assert!(said(2).contains("'/'"), "{}", said(2));
    }

    #[test]
    fn an_endless_file_is_refused() {
        let endless = all(vec![BodyArg::File("/dev/zero".into())], b"");
        let said = endless[0].clone().unwrap_err();
        assert!(said.contains("longer than"), "{said}");
    }
}
