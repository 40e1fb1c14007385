//! Lines on stdout: from any thread, whole, in order, and without a system call for each.
//!
//! A server that prints a line per request from each of its workers spends more time on printing
//! than on serving. Here a worker only appends to a buffer. A thread writes the first line at
//! once, and what comes shortly after together.

use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long lines are collected after a write, at most.
const COLLECT: Duration = Duration::from_millis(5);

/// How much may wait for whoever reads our output, in bytes, before printing has to wait, too.
const BUFFER_MAX: usize = 1 << 20;

/// Stdout, for lines.
pub struct Lines {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There are lines for the writer, or they are written, or it is broken.
    changed: Condvar,
    /// The writer is to collect no longer: somebody waits for it. Apart from `changed`, so that a
    /// line that is only collected wakes nobody.
    hurried: Condvar,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// Whether the writer has taken lines that are not written yet.
    writing: bool,
    /// Why nothing can be written any more.
    broken: Option<ErrorKind>,
    /// Whether somebody waits for the lines to be written.
    hurry: bool,
    /// Whether no more lines will come.
    finished: bool,
}

impl Lines {
    /// Starts the thread that writes, which ends with [`Lines::finish`].
    pub fn start() -> io::Result<Lines> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            hurried: Condvar::new(),
        });
        let writer = thread::Builder::new()
            .name("fibrpc-stdout".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.write_all()
            })?;
        Ok(Lines {
            shared,
            writer: Some(writer),
        })
    }

    /// Prints a line.
    ///
    /// # Errors
    ///
    /// Writing an earlier line has failed, such as to a pipe that was closed.
    pub fn print(&self, line: &str) -> io::Result<()> {
        let mut state = self
            .shared
            .wait_while(|state| state.buffer.len() >= BUFFER_MAX)?;
        if state.buffer.is_empty() {
            self.shared.changed.notify_all();
        }
        state.buffer.extend_from_slice(line.as_bytes());
        state.buffer.push(b'\n');
        Ok(())
    }

    /// Waits until all lines so far are written.
    ///
    /// # Errors
    ///
    /// As of [`Lines::print`].
    pub fn flush(&self) -> io::Result<()> {
        self.shared.lock().hurry = true;
        self.shared.hurried.notify_all();
        self.shared
            .wait_while(|state| state.writing || !state.buffer.is_empty())
            .map(drop)
    }

    /// Writes what is left, and ends.
    ///
    /// # Errors
    ///
    /// As of [`Lines::print`].
    pub fn finish(mut self) -> io::Result<()> {
        self.end();
        self.flush()
    }

    fn end(&mut self) {
        self.shared.lock().finished = true;
        self.shared.changed.notify_all();
        self.shared.hurried.notify_all();
        if let Some(writer) = self.writer.take() {
            // It does not panic; if it did, the lines are gone all the same.
            let _ = writer.join();
        }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while something is so, and nothing is broken.
    fn wait_while(
        &self,
        mut is_so: impl FnMut(&State) -> bool,
    ) -> io::Result<MutexGuard<'_, State>> {
        let state = self
            .changed
            .wait_while(self.lock(), |state| state.broken.is_none() && is_so(state))
            .unwrap_or_else(PoisonError::into_inner);
        match state.broken {
            Some(kind) => Err(kind.into()),
            None => Ok(state),
        }
    }

    /// The writer: writes until there is nothing left and nothing to come.
    fn write_all(&self) {
        while let Ok(mut state) =
            self.wait_while(|state| state.buffer.is_empty() && !state.finished)
        {
            if state.buffer.is_empty() {
                return;
            }
            let lines = std::mem::take(&mut state.buffer);
            state.writing = true;
            drop(state);
            let mut stdout = io::stdout().lock();
            let written = stdout.write_all(&lines).and_then(|()| stdout.flush());
            drop(stdout);
            let mut state = self.lock();
            state.writing = false;
            state.hurry = false;
            state.broken = written.err().map(|error| error.kind());
            self.changed.notify_all();
            let _ = self
                .hurried
                .wait_timeout_while(state, COLLECT, |state| !state.hurry && !state.finished);
        }
    }
}
