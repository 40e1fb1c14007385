//! Lines on stdout and stderr: from any thread, whole, in order, and without a system call for each.
//!
//! A server that prints a line per request from each of its workers spends more time on printing
//! than on serving. Here a worker only appends to a buffer. A thread writes the first line at
//! once, and what comes shortly after together.
//!
//! Whoever reads the lines may stop reading, and the disk that they go to may be full. Then it
//! depends on what the lines are. Answers are the product: [`Lines::print`] waits until there is
//! room, and fails when nothing can be written. A server's lines are a courtesy: [`Lines::offer`]
//! never waits. What it cannot keep it drops, and how many lines that were is written in their
//! place.

use anyhow::Context;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long lines are collected after a write, at most.
const COLLECT: Duration = Duration::from_millis(5);

/// How much may wait for whoever reads our output, in bytes. As much again may be on its way.
const BUFFER_MAX: usize = 64 << 10;

/// How long the last lines of a process may take whose lines are a courtesy.
pub const LAST_LINES: Duration = Duration::from_secs(1);

/// How often a write is tried again to a pipe that somebody else has made non-blocking.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Stdout or stderr, for lines.
#[derive(Clone)]
pub struct Lines(Arc<Shared>);

struct Shared {
    /// What it is called.
    name: &'static str,
    /// Makes what is written of a line that says that others are missing.
    note: fn(&str) -> String,
    state: Mutex<State>,
    /// There are lines for the writer, or they are written, or that failed.
    changed: Condvar,
    /// The writer is to collect no longer: somebody waits for it, or the buffer is full. Apart from `changed`, so that a
    /// line that is only collected wakes nobody.
    hurried: Condvar,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// How many lines were offered after those in `buffer`, and dropped.
    dropped: u64,
    /// Whether the writer has taken lines that are not written yet.
    writing: bool,
    /// Why a line could not be written, the first time.
    failed: Option<io::Error>,
    /// Whether somebody waits for the lines to be written.
    hurry: bool,
}

impl Lines {
    /// Lines for stdout.
    pub fn stdout() -> io::Result<Lines> {
        Lines::start("stdout", io::stdout().as_fd(), str::to_owned)
    }

    /// Starts the thread that writes. It owns a descriptor of its own, is joined by nobody, since a
    /// write cannot be interrupted, and ends with the process.
    fn start(
        name: &'static str,
        to: BorrowedFd<'_>,
        note: fn(&str) -> String,
    ) -> io::Result<Lines> {
        let out = File::from(to.try_clone_to_owned()?);
        let shared = Arc::new(Shared {
            name,
            note,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            hurried: Condvar::new(),
        });
        thread::Builder::new()
            .name(format!("fibrpc-{name}"))
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.write_for_ever(out)
            })?;
        Ok(Lines(shared))
    }

    /// Prints a line; waits for whoever reads them.
    ///
    /// # Errors
    ///
    /// Writing an earlier line has failed, such as to a pipe that was closed.
    pub fn print(&self, line: &str) -> io::Result<()> {
        let state = self.0.wait_while(None, State::is_full)?;
        self.0.append(state, &[line.as_bytes(), b"\n"]);
        Ok(())
    }

    /// Prints bytes as they are, which may be many: no more than [`BUFFER_MAX`] are copied at a
    /// time. Waits for whoever reads them. For a stream that one thread prints to, since another
    /// could come between.
    ///
    /// # Errors
    ///
    /// As of [`Lines::print`].
    pub fn print_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(BUFFER_MAX) {
            let state = self.0.wait_while(None, State::is_full)?;
            self.0.append(state, &[piece]);
        }
        Ok(())
    }

    /// Prints a line if there is room for it, and never waits.
    ///
    /// # Errors
    ///
    /// As of [`Lines::print`]; the line is printed all the same if that is possible again.
    pub fn offer(&self, line: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        let failed = state.check();
        if state.is_full() {
            state.dropped += 1;
        } else {
            self.0.append(state, &[line.as_bytes(), b"\n"]);
        }
        failed
    }

    /// Waits until all lines so far are written.
    ///
    /// # Errors
    ///
    /// As of [`Lines::print`]; [`ErrorKind::TimedOut`] if there is a limit and it has passed.
    pub fn flush(&self, limit: Option<Duration>) -> io::Result<()> {
        self.0.lock().hurry = true;
        self.0.hurried.notify_all();
        self.0
            .wait_while(limit, |state| state.writing || !state.buffer.is_empty())
            .map(drop)
    }
}

impl State {
    fn is_full(&self) -> bool {
        self.buffer.len() >= BUFFER_MAX
    }

    fn check(&self) -> io::Result<()> {
        match &self.failed {
            None => Ok(()),
            Some(error) => Err(error
                .raw_os_error()
                .map_or_else(|| error.kind().into(), io::Error::from_raw_os_error)),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, mut state: MutexGuard<'_, State>, parts: &[&[u8]]) {
        if state.buffer.is_empty() {
            self.changed.notify_all();
        }
        for part in parts {
            state.buffer.extend_from_slice(part);
        }
        if state.is_full() {
            self.hurried.notify_all();
        }
    }

    /// Waits while something is so, and nothing has failed.
    fn wait_while(
        &self,
        limit: Option<Duration>,
        is_so: impl Fn(&State) -> bool,
    ) -> io::Result<MutexGuard<'_, State>> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut state = self.lock();
        loop {
            state.check()?;
            if !is_so(&state) {
                return Ok(state);
            }
            state =
                match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                    None => self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner),
                    Some(Duration::ZERO) => return Err(ErrorKind::TimedOut.into()),
                    Some(left) => {
                        self.changed
                            .wait_timeout(state, left)
                            .unwrap_or_else(PoisonError::into_inner)
                            .0
                    }
                };
        }
    }

    /// The writer. It goes on after a failure: there may be room on the disk again.
    fn write_for_ever(&self, mut out: File) {
        // Whether the last line written is only the beginning of one.
        let mut torn = false;
        loop {
            let mut state = self
                .changed
                .wait_while(self.lock(), |state| state.buffer.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            let lines = std::mem::take(&mut state.buffer);
            let dropped = std::mem::take(&mut state.dropped);
            state.writing = true;
            drop(state);

            let done = self.write(&mut out, &mut torn, &lines, dropped);

            let mut state = self.lock();
            state.writing = false;
            state.hurry = false;
            if let Err((lost, error)) = done {
                state.dropped += lost;
                state.failed.get_or_insert(error);
            }
            self.changed.notify_all();
            let _ = self
                .hurried
                .wait_timeout_while(state, COLLECT, |state| !state.hurry && !state.is_full());
        }
    }

    /// Writes lines, and how many are missing after them. An error tells how many are missing now.
    fn write(
        &self,
        out: &mut File,
        torn: &mut bool,
        lines: &[u8],
        dropped: u64,
    ) -> Result<(), (u64, io::Error)> {
        let count = |lines: &[u8]| lines.iter().filter(|&&byte| byte == b'\n').count() as u64;
        if *torn {
            write_all(out, b"\n").map_err(|(_, error)| (count(lines) + dropped, error))?;
            *torn = false;
        }
        write_all(out, lines).map_err(|(written, error)| {
            *torn = written > 0 && lines[written - 1] != b'\n';
            (count(&lines[written..]) + dropped, error)
        })?;
        if dropped == 0 {
            return Ok(());
        }
        let note = format!(" [!] {dropped} lines dropped: {} is not read", self.name);
        let note = (self.note)(&note) + "\n";
        write_all(out, note.as_bytes()).map_err(|(written, error)| {
            *torn = written > 0;
            (dropped, error)
        })
    }
}

/// Writes all of it; an error tells how much was written before.
fn write_all(out: &mut impl Write, bytes: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut written = 0;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(0) => return Err((written, ErrorKind::WriteZero.into())),
            Ok(len) => written += len,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
            Err(error) => return Err((written, error)),
        }
    }
    Ok(())
}

/// What is said when an answer cannot be written.
pub const CANNOT_WRITE: &str = "cannot write to stdout";

/// Writes a command's whole output. That nobody reads it any more is no error.
pub fn print(output: &str) -> anyhow::Result<()> {
    let lines = Lines::stdout()?;
    let printed = lines.print(output.trim_end_matches('\n'));
    match printed.and_then(|()| lines.flush(None)) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        done => done.context(CANNOT_WRITE),
    }
}

/// Lines for stderr: the log, and why a command failed.
pub mod stderr {
    use super::*;

    /// Without a thread to be had, nothing is said.
    static LINES: LazyLock<io::Result<Lines>> =
        LazyLock::new(|| Lines::start("stderr", io::stderr().as_fd(), written));

    /// What is made of a line before it is written, if it is not to stay as it is.
    static FORM: OnceLock<fn(&str) -> String> = OnceLock::new();

    /// Has every line that is not the log's written in another form.
    pub fn write_as(form: fn(&str) -> String) {
        let _ = FORM.set(form);
    }

    /// Whether lines are written in another form.
    pub fn is_formatted() -> bool {
        FORM.get().is_some()
    }

    fn written(line: &str) -> String {
        FORM.get()
            .map_or_else(|| line.to_owned(), |form| form(line))
    }

    /// A line of the log, which has its form.
    pub fn log(line: &str) {
        if let Ok(lines) = &*LINES {
            let _ = lines.offer(line);
        }
    }

    /// A line that is worth no wait.
    pub fn offer(line: &str) {
        log(&written(line));
    }

    /// A line that is as good as an answer: waits for whoever reads it.
    pub fn print(line: &str) {
        if let Ok(lines) = &*LINES {
            let line = written(line);
            // What has failed once may work again; who has closed stderr does not want to know.
            if lines.print(&line).is_err() {
                let _ = lines.offer(&line);
            }
            let _ = lines.flush(None);
        }
    }

    /// Waits until all lines so far are written, at most for so long.
    pub fn flush(limit: Duration) {
        if let Ok(lines) = &*LINES {
            let _ = lines.flush(Some(limit));
        }
    }
}
