//! A command that is run for each request: stdin is the request's body, stdout the reply's.
//!
//! Each runs in a process group of its own. So a Ctrl-C at the terminal is not sent to it, and what
//! it has started can be ended with it.

mod group; // a process group that runs
mod last_words; // what it says on stderr

use fibrpc::{RemoteError, Request};
use group::{End, Group, KILL_AFTER};
use signal_hook::low_level::signal_name;
use std::collections::HashSet;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, PipeWriter};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What the variables begin with that hold a request's headers.
const HEADER: &str = "FIBRPC_HEADER_";

/// The variables that hold what else there is to know of a request.
const CORRELATION_ID: &str = "FIBRPC_CORRELATION_ID";
const CONTENT_TYPE: &str = "FIBRPC_CONTENT_TYPE";
const REDELIVERED: &str = "FIBRPC_REDELIVERED";
const TIME_LEFT: &str = "FIBRPC_TIME_LEFT_MS";

/// Where commands are looked for if `PATH` does not say.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// How long the end of all commands may take: that they are killed, and some time to notice.
const ALL_ENDED_TIME: Duration = KILL_AFTER.saturating_mul(3);

/// How long after its caller's time is up a request is answered with that, at the earliest. A caller
/// that waits no longer has said so itself by then: its exit code is 4, and not 3 now and then.
const CALLER_FIRST: Duration = Duration::from_millis(100);

/// A command, to be run for any number of requests at the same time.
pub struct Program {
    /// As it was typed.
    name: OsString,
    /// Where it is. Found once: a name without a slash would keep the standard library from
    /// starting it without a fork.
    path: PathBuf,
    arguments: Vec<OsString>,
    /// Our environment.
    environment: Vec<(OsString, OsString)>,
    running: Running,
}

impl Program {
    /// Finds a command, as a shell would.
    ///
    /// # Errors
    ///
    /// Why it could not be started.
    pub fn find(command: Vec<OsString>) -> Result<Program, String> {
        let mut command = command.into_iter();
        let name = command.next().unwrap_or_default();
        let path = find(&name, env::var_os("PATH"))
            .map_err(|reason| format!("cannot run '{}': {reason}", name.display()))?;
        Ok(Program {
            path,
            arguments: command.collect(),
            environment: env::vars_os()
                .filter(|(name, _)| is_for_commands(name))
                .collect(),
            running: Running::new()
                .map_err(|error| format!("cannot run '{}': {error}", name.display()))?,
            name,
        })
    }

    /// Runs it for a request, to its end; that is soon after the caller's time is up. Does not return
    /// once all are to end ([`Program::end_all`]).
    ///
    /// # Errors
    ///
    /// What the caller is told: it could not be started, or ended otherwise than with success.
    pub fn run(&self, request: &Request) -> Result<Vec<u8>, RemoteError> {
        let Some(counted) = self.running.enter() else {
            wait_for_exit();
        };
        let deadline = request
            .time_left()
            .and_then(|left| Instant::now().checked_add(left));
        let group = Group::start(&mut self.command(request), request.body()).map_err(|error| {
            log::warn!("cannot run '{}': {error}", self.path.display());
            RemoteError::internal(format!("the command cannot be started: {error}"))
        })?;
        let ended = group.run(deadline, &self.running.told);
        let message = match ended.end {
            End::Exited(status) if status.success() => return Ok(ended.output),
            End::Exited(status) => match ended.last_words.as_str() {
                "" => fate(status),
                words => words.to_owned(),
            },
            End::TimeUp => {
                let late = deadline.map_or(Duration::ZERO, |deadline| deadline.elapsed());
                thread::sleep(CALLER_FIRST.saturating_sub(late));
                "the command was killed: its caller's time was up".to_owned()
            }
            End::Stopping => {
                drop(counted);
                wait_for_exit();
            }
            End::TooMuch => format!(
                "the command was killed: its output is longer than a message can be, {} bytes",
                fibrpc::Response::BODY_MAX
            ),
        };
        log::info!("'{}' failed: {message}", self.name.display());
        Err(RemoteError::internal(message))
    }

    /// Ends those that still run, and starts no more. Returns when there are none, or they cannot
    /// be killed.
    pub fn end_all(&self) {
        self.running.end_all();
    }

    fn command(&self, request: &Request) -> Command {
        let mut command = Command::new(&self.path);
        command
            .arg0(&self.name)
            .args(&self.arguments)
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .envs(variables(request))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        command
    }
}

/// Keeps a worker from answering while the process exits: its request is then not acknowledged, and
/// the broker gives it to another server. After a second signal, the connection is still there.
fn wait_for_exit() -> ! {
    loop {
        thread::park();
    }
}

/// Where a command is: at its path, or in the directories of `PATH`.
fn find(name: &OsStr, path: Option<OsString>) -> Result<PathBuf, String> {
    if name.is_empty() {
        return Err("its name is empty".to_owned());
    }
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return check_executable(&path).map(|()| path);
    }
    let mut first = None;
    for directory in env::split_paths(&path.unwrap_or_else(|| DEFAULT_PATH.into())) {
        // An empty one is the current directory.
        let file = Path::new(".").join(directory).join(name);
        match check_executable(&file) {
            Ok(()) => return Ok(file),
            Err(reason) if file.exists() => {
                first.get_or_insert(format!("{}: {reason}", file.display()));
            }
            Err(_) => {}
        }
    }
    Err(first.unwrap_or_else(|| "it is not in PATH; is it installed?".to_owned()))
}

fn check_executable(file: &Path) -> Result<(), String> {
    let found = file.metadata().map_err(|error| error.to_string())?;
    match found.permissions().mode() & 0o111 {
        _ if !found.is_file() => Err("it is no file".to_owned()),
        0 => Err("it is not executable; `chmod +x` makes it so".to_owned()),
        _ => Ok(()),
    }
}

/// Whether a command is to have a variable of ours: not what an outer `fibrpc reply` says of
/// another request, nor where systemd hears from us.
fn is_for_commands(name: &OsStr) -> bool {
    let ours = [
        CORRELATION_ID,
        CONTENT_TYPE,
        REDELIVERED,
        TIME_LEFT,
        "NOTIFY_SOCKET",
    ];
    !ours.iter().any(|ours| name == *ours) && !name.as_bytes().starts_with(HEADER.as_bytes())
}

/// What a command's environment says of a request. A value that holds a NUL byte is left out, since
/// an environment cannot hold it, and a part of it could be taken for the whole.
fn variables(request: &Request) -> Vec<(OsString, OsString)> {
    let mut variables: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &str, value: &[u8]| {
        if !value.contains(&0) {
            variables.push((name.into(), OsStr::from_bytes(value).to_owned()));
        }
    };
    if let Some(id) = request.correlation_id() {
        set(CORRELATION_ID, id);
    }
    if let Some(content_type) = request.content_type() {
        set(CONTENT_TYPE, content_type.as_bytes());
    }
    set(REDELIVERED, if request.redelivered() { b"1" } else { b"0" });
    if let Some(left) = request.time_left() {
        set(TIME_LEFT, left.as_millis().to_string().as_bytes());
    }
    // Of several that come to the same name, the first counts, as of several with the same name.
    let mut named = HashSet::new();
    for (name, value) in request.headers().iter() {
        let name = header_variable(name);
        if named.insert(name.clone()) {
            set(&name, value.as_bytes());
        }
    }
    variables
}

/// The variable that holds a header.
fn header_variable(name: &str) -> String {
    let letter = |letter: char| match letter.to_ascii_uppercase() {
        letter if letter.is_ascii_alphanumeric() => letter,
        _ => '_',
    };
    HEADER.chars().chain(name.chars().map(letter)).collect()
}

/// How a command has ended that says nothing itself.
fn fate(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => match signal_name(signal) {
            Some(name) => format!("killed by {name}"),
            None => format!("killed by signal {signal}"),
        },
        (None, None) => status.to_string(),
    }
}

/// How many commands run, and how they learn that they are to end.
struct Running {
    /// Hung up when they are to end.
    told: PipeReader,
    state: Mutex<State>,
    /// One has ended.
    ended: Condvar,
}

struct State {
    count: usize,
    /// Until they are to end.
    teller: Option<PipeWriter>,
}

impl Running {
    fn new() -> io::Result<Running> {
        let (told, teller) = io::pipe()?;
        Ok(Running {
            told,
            state: Mutex::new(State {
                count: 0,
                teller: Some(teller),
            }),
            ended: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more until it is dropped; nothing if all are to end.
    fn enter(&self) -> Option<Counted<'_>> {
        let mut state = self.lock();
        state.teller.as_ref()?;
        state.count += 1;
        Some(Counted(self))
    }

    fn end_all(&self) {
        let mut state = self.lock();
        state.teller = None;
        let (state, _) = self
            .ended
            .wait_timeout_while(state, ALL_ENDED_TIME, |state| state.count > 0)
            .unwrap_or_else(PoisonError::into_inner);
        if state.count > 0 {
            log::warn!("{} commands could not be killed", state.count);
        }
    }
}

struct Counted<'a>(&'a Running);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.lock().count -= 1;
        self.0.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_and_values(request: &Request) -> Vec<(String, String)> {
        let text = |text: OsString| text.into_string().unwrap();
        variables(request)
            .into_iter()
            .map(|(name, value)| (text(name), text(value)))
            .collect()
    }

    #[test]
    fn a_header_is_in_a_variable_of_upper_case_letters_digits_and_underscores() {
        for (header, expected) in [
            ("traceparent", "FIBRPC_HEADER_TRACEPARENT"),
            ("x-user.id 2", "FIBRPC_HEADER_X_USER_ID_2"),
            ("gr\u{f6}\u{df}e", "FIBRPC_HEADER_GR__E"),
            ("=\0\n", "FIBRPC_HEADER____"),
            ("", "FIBRPC_HEADER_"),
        ] {
            assert_eq!(header_variable(header), expected);
        }
    }

    #[test]
    fn of_headers_that_come_to_the_same_name_the_first_counts() {
        let request = Request::new("")
            .with_header("x-a", "1")
            .with_header("X_A", "2");
        let set = names_and_values(&request);
        let values: Vec<_> = set.iter().filter(|(name, _)| name.ends_with("A")).collect();
        assert_eq!(values, [&("FIBRPC_HEADER_X_A".to_owned(), "1".to_owned())]);
        // Also if it cannot be had: a part of what was sent must not stand for the whole.
        let request = Request::new("")
            .with_header("x-a", "1\0")
            .with_header("X_A", "2");
        let set = names_and_values(&request);
        assert!(set.iter().all(|(name, _)| !name.ends_with("A")), "{set:?}");
    }

    #[test]
    fn what_no_environment_can_hold_is_left_out_and_what_was_not_said_is_absent() {
        let request = Request::new("")
            .with_correlation_id(b"a\0b")
            .with_content_type("text\0")
            .with_redelivered(true);
        let redelivered = (REDELIVERED.to_owned(), "1".to_owned());
        assert_eq!(names_and_values(&request), [redelivered]);
    }

    #[test]
    fn variables_of_another_request_are_not_inherited() {
        for (name, expected) in [
            ("PATH", true),
            ("FIBRPC_QUEUE", true),
            ("FIBRPC_TIME_LEFT_MS", false),
            ("FIBRPC_HEADER_X", false),
            ("NOTIFY_SOCKET", false),
        ] {
            assert_eq!(is_for_commands(OsStr::new(name)), expected, "{name}");
        }
    }

    #[test]
    fn a_command_is_found_as_a_shell_finds_it_or_it_is_said_why_not() {
        let find = |name: &str, path: &str| find(OsStr::new(name), Some(path.into()));
        let sh = find("sh", "/nowhere:/bin").unwrap();
        assert_eq!(sh, Path::new("/bin/sh"));
        assert_eq!(find("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        for (name, path, reason) in [
            ("sh", "/nowhere", "not in PATH"),
            ("passwd", "/etc", "/etc/passwd: it is not executable"),
            ("etc", "/", "no file"),
            ("/nowhere/sh", "/bin", "No such file"),
            ("", "/bin", "empty"),
        ] {
            let said = find(name, path).unwrap_err();
            assert!(said.contains(reason), "{name}: {said}");
        }
        // In the directory where we are.
        assert!(find("Cargo.toml", "").unwrap_err().contains("chmod"));
    }
}
