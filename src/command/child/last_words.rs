//! What a command says on stderr: in lines, of which the last one tells why it failed.

/// The longest line, in bytes. A longer one is passed on as several.
const LINE_MAX: usize = 8 << 10;

/// Makes lines of what comes, in constant memory.
#[derive(Default)]
pub struct LastWords {
    /// A line that has not ended yet.
    line: Vec<u8>,
    /// Whether it goes on with one that was too long.
    is_rest: bool,
    /// The last line that was not blank, or its beginning.
    last: String,
}

impl LastWords {
    /// Takes what has come, and passes on the lines that end with it.
    pub fn take(&mut self, mut bytes: &[u8], mut pass_on: impl FnMut(&str)) {
        while !bytes.is_empty() {
            let room = &bytes[..bytes.len().min(LINE_MAX - self.line.len())];
            match room.iter().position(|&byte| byte == b'\n') {
                Some(end) => {
                    self.line.extend_from_slice(&room[..end]);
                    bytes = &bytes[end + 1..];
                    self.end_line(&mut pass_on);
                    self.is_rest = false;
                }
                None => {
                    self.line.extend_from_slice(room);
                    bytes = &bytes[room.len()..];
                    if self.line.len() == LINE_MAX {
                        self.end_line(&mut pass_on);
                        self.is_rest = true;
                    }
                }
            }
        }
    }

    /// Nothing more comes: passes on what no line end follows. Returns the last line.
    pub fn finish(mut self, mut pass_on: impl FnMut(&str)) -> String {
        if !self.line.is_empty() {
            self.end_line(&mut pass_on);
        }
        self.last
    }

    fn end_line(&mut self, pass_on: &mut impl FnMut(&str)) {
        // Of a line that was too long and ends just here, nothing is left.
        if !(self.is_rest && self.line.is_empty()) {
            let line = String::from_utf8_lossy(&self.line);
            pass_on(&line);
            if !self.is_rest && !line.trim().is_empty() {
                self.last = line.trim().to_owned();
            }
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of what comes in pieces, and the last one.
    fn lines(pieces: &[&[u8]]) -> (Vec<String>, String) {
        let mut lines = Vec::new();
        let mut words = LastWords::default();
        for piece in pieces {
            words.take(piece, |line| lines.push(line.to_owned()));
        }
        let last = words.finish(|line| lines.push(line.to_owned()));
        (lines, last)
    }

    #[test]
    fn the_last_line_is_the_last_that_is_not_blank() {
        let (all, last) = lines(&[b"Trace", b"back\n", b"ValueError: x\r\n \n\n"]);
        assert_eq!(all, ["Traceback", "ValueError: x\r", " ", ""]);
        assert_eq!(last, "ValueError: x");
        assert_eq!(
            lines(&[b"a\nb"]),
            (vec!["a".into(), "b".into()], "b".into())
        );
        assert_eq!(lines(&[]), (Vec::new(), String::new()));
        assert_eq!(lines(&[b"\xff\n"]).1, "\u{fffd}");
    }

    #[test]
    fn a_line_without_an_end_is_passed_on_in_pieces_and_told_by_its_beginning() {
        let long = vec![b'x'; 2 * LINE_MAX];
        let (all, last) = lines(&[b"y", &long, b"z\n"]);
        assert_eq!(all.concat().len(), 2 * LINE_MAX + 2);
        assert!(all.iter().all(|line| line.len() <= LINE_MAX));
        assert!(last.starts_with("yxx") && last.len() == LINE_MAX);
        // One that is exactly as long as a line may be is one line.
        let (all, _) = lines(&[&vec![b'x'; LINE_MAX], b"\nafter\n"]);
        assert_eq!((all.len(), all[1].as_str()), (2, "after"));
    }
}
