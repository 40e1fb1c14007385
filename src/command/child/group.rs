//! A process group that runs: a command, and what it has started.
//!
//! The thread that runs it does everything itself. It sleeps in one `poll` for the three pipes, for
//! the end of the command, and for the server's, so no pipe can fill up while another is waited
//! for, and no wait is without an end.

use crate::command::child::last_words::LastWords;
use crate::command::lines::stderr;
use fibrpc::Response;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionbio;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, kill_process_group, test_kill_process_group,
    waitid, waitpgid,
};
use std::io::{self, ErrorKind, PipeReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// How long a command has from SIGTERM to SIGKILL, and what it has left behind.
pub const KILL_AFTER: Duration = Duration::from_secs(1);

/// How long its output is read once a command has ended, if something that it has started keeps it
/// open.
const READ_ON_TIME: Duration = Duration::from_millis(100);

/// How long a process may take to end that was sent SIGKILL. One that the kernel holds takes
/// longer, and is left to a thread.
const DEATH_TIME: Duration = Duration::from_secs(1);

/// How often it is looked whether something has ended, where nothing tells.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// How much is read at a time, in bytes: as much as Linux keeps in a pipe.
const CHUNK: usize = 64 << 10;

/// A command that runs, and what it has started.
pub struct Group<'a> {
    child: Child,
    /// The command's, and the group's.
    pid: Pid,
    /// Readable once the command has ended, where the system has that.
    pidfd: Option<OwnedFd>,
    stdin: Option<ChildStdin>,
    /// What of the body is still to be written.
    body: &'a [u8],
    stdout: Option<ChildStdout>,
    output: Vec<u8>,
    stderr: Option<ChildStderr>,
    last_words: LastWords,
}

/// How a command has ended, and what it has said.
pub struct Ended {
    pub end: End,
    pub output: Vec<u8>,
    /// The last line of its stderr; empty if there is none.
    pub last_words: String,
}

pub enum End {
    /// By itself.
    Exited(ExitStatus),
    /// Killed: its caller's time was up.
    TimeUp,
    /// Killed: the server has stopped.
    Stopping,
    /// Killed: its output is longer than a message can be.
    TooMuch,
}

/// What is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum For {
    /// The end of the command.
    Exit,
    /// The end of its stdout and stderr.
    Output,
}

/// What came of waiting.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    /// What was waited for.
    Happened,
    TimeUp,
    Stopping,
    TooMuch,
}

impl<'a> Group<'a> {
    /// Starts a command that has pipes for stdin, stdout and stderr, and a process group of its own.
    pub fn start(command: &mut Command, body: &'a [u8]) -> io::Result<Group<'a>> {
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let group = Group {
            pid,
            pidfd: pidfd(pid),
            stdin: child.stdin.take(),
            body,
            stdout: child.stdout.take(),
            output: Vec::new(),
            stderr: child.stderr.take(),
            last_words: LastWords::default(),
            child,
        };
        match group.make_non_blocking() {
            Ok(()) => Ok(group),
            Err(error) => {
                group.end();
                Err(error)
            }
        }
    }

    fn make_non_blocking(&self) -> io::Result<()> {
        let ours = [
            self.stdin.as_ref().map(AsFd::as_fd),
            self.stdout.as_ref().map(AsFd::as_fd),
            self.stderr.as_ref().map(AsFd::as_fd),
        ];
        for pipe in ours.into_iter().flatten() {
            ioctl_fionbio(pipe, true)?;
        }
        Ok(())
    }

    /// Lets it run until the command ends, or is to be ended: at the deadline, or when `stop` hangs
    /// up. Nothing of it is left then.
    pub fn run(mut self, deadline: Option<Instant>, stop: &PipeReader) -> Ended {
        let mut event = self.wait_for(For::Exit, deadline, Some(stop.as_fd()));
        if event == Event::Happened {
            let read_on = Some(Instant::now() + READ_ON_TIME);
            // It decides by its own end; what of the output comes late is lost.
            event = match self.wait_for(For::Output, read_on, None) {
                Event::TooMuch => Event::TooMuch,
                _ => Event::Happened,
            };
        }
        let output = std::mem::take(&mut self.output);
        let (status, last_words) = self.end();
        let end = match (event, status) {
            (Event::Happened, Some(status)) => End::Exited(status),
            (Event::TooMuch, _) => End::TooMuch,
            (Event::Stopping, _) => End::Stopping,
            // It is gone, and nobody knows how.
            (Event::TimeUp, _) | (Event::Happened, None) => End::TimeUp,
        };
        Ended {
            end,
            output,
            last_words,
        }
    }

    /// Ends what still runs: SIGTERM, and SIGKILL a second later. Returns how the command has ended,
    /// and its last words.
    fn end(mut self) -> (Option<ExitStatus>, String) {
        // The command is not waited for yet, so its number is not that of another group.
        self.send(Signal::TERM);
        let kill_at = Instant::now() + KILL_AFTER;
        // What else it writes is for nobody.
        self.stdin = None;
        self.stdout = None;
        self.output = Vec::new();
        if self.wait_for(For::Exit, Some(kill_at), None) != Event::Happened {
            self.send(Signal::KILL);
            let give_up_at = Some(Instant::now() + DEATH_TIME);
            if self.wait_for(For::Exit, give_up_at, None) != Event::Happened {
                return (None, self.leave_behind());
            }
        }
        let status = self.child.wait().ok();
        if !self.is_gone_by(kill_at) {
            self.send(Signal::KILL);
            self.is_gone_by(Instant::now() + DEATH_TIME);
        }
        (status, self.last_words.finish(stderr::offer))
    }

    /// Waits for it in a thread, which is owned by nobody: the kernel does not let it go.
    fn leave_behind(mut self) -> String {
        log::warn!("process {} does not end, although killed", self.child.id());
        let wait = move || self.child.wait();
        let _ = thread::Builder::new()
            .name("fibrpc-killed".to_owned())
            .spawn(wait);
        self.last_words.finish(stderr::offer)
    }

    /// Sends a signal to the command and what it has started. That there is nobody is no error.
    fn send(&self, signal: Signal) {
        let _ = kill_process_group(self.pid, signal);
    }

    /// Whether nothing of the group runs any more, at a certain time at the latest. The command has
    /// been waited for.
    fn is_gone_by(&self, deadline: Instant) -> bool {
        loop {
            // Orphans are ours if we are the first process, as in a container.
            while let Ok(Some(_)) = waitpgid(self.pid, WaitOptions::NOHANG) {}
            if test_kill_process_group(self.pid).is_err() {
                return true;
            }
            if has_ended(self.pid) {
                // And if one was started while we looked.
                self.send(Signal::KILL);
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Writes and reads until something has happened.
    fn wait_for(
        &mut self,
        what: For,
        deadline: Option<Instant>,
        stop: Option<BorrowedFd<'_>>,
    ) -> Event {
        let mut chunk = [0; CHUNK];
        loop {
            self.write();
            if self.read(&mut chunk).is_err() {
                return Event::TooMuch;
            }
            let has_happened = match what {
                For::Exit => self.has_exited(),
                For::Output => self.stdout.is_none() && self.stderr.is_none(),
            };
            if has_happened {
                return Event::Happened;
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Event::TimeUp;
            }
            if self.sleep(what, left, stop) {
                return Event::Stopping;
            }
        }
    }

    /// Sleeps until there is something to do. Returns whether it is to stop.
    fn sleep(&self, what: For, left: Option<Duration>, stop: Option<BorrowedFd<'_>>) -> bool {
        let reading = PollFlags::IN;
        let pidfd = self.pidfd.as_ref().filter(|_| what == For::Exit);
        let mut all = Vec::with_capacity(5);
        // First, so that it is found again.
        all.extend(stop.map(|stop| PollFd::from_borrowed_fd(stop, reading)));
        all.extend(
            self.stdin
                .as_ref()
                .map(|pipe| PollFd::new(pipe, PollFlags::OUT)),
        );
        all.extend(self.stdout.as_ref().map(|pipe| PollFd::new(pipe, reading)));
        all.extend(self.stderr.as_ref().map(|pipe| PollFd::new(pipe, reading)));
        all.extend(pidfd.map(|pidfd| PollFd::new(pidfd, reading)));
        let left = match (what, pidfd) {
            (For::Exit, None) => Some(left.map_or(LOOK_INTERVAL, |left| left.min(LOOK_INTERVAL))),
            _ => left,
        };
        // A time that is too long for the system is none.
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut all, left.as_ref()) {
            Ok(_) => stop.is_some() && !all[0].revents().is_empty(),
            Err(rustix::io::Errno::INTR) => false,
            Err(error) => {
                log::warn!("cannot wait for a command: {error}");
                thread::sleep(LOOK_INTERVAL);
                false
            }
        }
    }

    fn has_exited(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        // An error says that somebody else has waited for it.
        !matches!(waitid(WaitId::Pid(self.pid), options), Ok(None))
    }

    /// Writes what there is room for.
    fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        while !self.body.is_empty() {
            match stdin.write(self.body) {
                Ok(len) => self.body = &self.body[len..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Whoever does not read its stdin does not need to.
                Err(_) => break,
            }
        }
        self.stdin = None;
    }

    /// Reads what there is, at most a chunk of each.
    fn read(&mut self, chunk: &mut [u8]) -> Result<(), TooMuch> {
        if let Some(pipe) = &mut self.stdout {
            match read(pipe, chunk) {
                Some(0) => self.stdout = None,
                Some(len) => {
                    if self.output.len() + len > Response::BODY_MAX {
                        return Err(TooMuch);
                    }
                    self.output.extend_from_slice(&chunk[..len]);
                }
                None => {}
            }
        }
        if let Some(pipe) = &mut self.stderr {
            match read(pipe, chunk) {
                Some(0) => self.stderr = None,
                Some(len) => self.last_words.take(&chunk[..len], stderr::offer),
                None => {}
            }
        }
        Ok(())
    }
}

/// The output is longer than a message can be.
struct TooMuch;

/// How much there was to read, 0 at the end; `None` if there is nothing yet.
fn read(pipe: &mut impl Read, chunk: &mut [u8]) -> Option<usize> {
    loop {
        match pipe.read(chunk) {
            Ok(len) => return Some(len),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            // There is no other that a pipe can have.
            Err(_) => return Some(0),
        }
    }
}

/// What tells when a process has ended. Linux has it since 5.3; without it, we look from time to
/// time.
#[cfg(target_os = "linux")]
fn pidfd(pid: Pid) -> Option<OwnedFd> {
    use rustix::process::{PidfdFlags, pidfd_open};
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

#[cfg(not(target_os = "linux"))]
fn pidfd(_: Pid) -> Option<OwnedFd> {
    None
}

/// Whether all of a group that is still there have ended, and only nobody has waited for them yet.
/// That is up to the first process, which in a container may take its time, or never do it.
#[cfg(target_os = "linux")]
fn has_ended(group: Pid) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return false;
    };
    let group = group.as_raw_nonzero().to_string();
    let mut is_there = false;
    for process in processes.flatten() {
        let stat = std::fs::read(process.path().join("stat")).unwrap_or_default();
        let stat = String::from_utf8_lossy(&stat);
        // "1 (a name) Z 2 3 ...": state, parent, group. The name may hold anything.
        let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
        let state = fields.next();
        if fields.nth(1) == Some(&*group) {
            if !matches!(state, Some("Z" | "X")) {
                return false;
            }
            is_there = true;
        }
    }
    is_there
}

#[cfg(not(target_os = "linux"))]
fn has_ended(_: Pid) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Stdio;

    fn start<'a>(line: &str, body: &'a [u8]) -> Group<'a> {
        let mut command = Command::new("sh");
        let command = command.args(["-c", line]).process_group(0);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        Group::start(command.stderr(Stdio::piped()), body).unwrap()
    }

    /// The first process may take seconds to do so, as on some virtual machines, or never do it.
    #[test]
    fn what_is_left_behind_ends_without_the_first_process_waiting_for_it() {
        let (stop, _until) = io::pipe().unwrap();
        for _ in 0..3 {
            let started = Instant::now();
            let ended = start("sleep 1000 & echo hi", b"").run(None, &stop);
            assert_eq!(ended.output, b"hi\n");
            assert!(matches!(ended.end, End::Exited(status) if status.success()));
            assert!(started.elapsed() < KILL_AFTER, "{:?}", started.elapsed());
        }
    }

    #[test]
    fn where_nothing_tells_of_its_end_a_command_is_looked_after() {
        let (stop, _until) = io::pipe().unwrap();
        for line in ["cat; exit 3", "cat; exec >&- 2>&-; sleep 0.1; exit 3"] {
            let mut group = start(line, b"body");
            group.pidfd = None;
            let ended = group.run(None, &stop);
            assert_eq!(ended.output, b"body");
            assert!(matches!(ended.end, End::Exited(status) if status.code() == Some(3)));
        }
        let mut group = start("sleep 1000", b"");
        group.pidfd = None;
        let deadline = Instant::now() + Duration::from_millis(50);
        assert!(matches!(group.run(Some(deadline), &stop).end, End::TimeUp));
    }
}
