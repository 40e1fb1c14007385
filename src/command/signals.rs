//! SIGINT, SIGTERM, and SIGHUP: the terminal is gone.

use crate::command::exit::INTERRUPTED;
use crate::command::lines::stderr;
use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::time::Duration;
use std::{fs, process, thread};

/// How long a command whose output somebody is to read may take after the first signal to end.
pub const GOODBYE_TIME: Duration = Duration::from_secs(2);

/// How long the last words may take of a process that is to exit at once.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Does something on the first signal; exits at once on the second, and, if there is a limit, when
/// the process has not ended by then: it may be waiting for who reads its output. SIGHUP is no
/// second one, since a terminal that goes may send several.
pub fn on_first_signal(
    limit: Option<Duration>,
    action: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    on_signals(limit, action, || ())
}

/// As [`on_first_signal`], and does something else before it exits on the second.
pub fn on_signals(
    limit: Option<Duration>,
    action: impl FnOnce() + Send + 'static,
    before_exit: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen for signals")?;
    if !is_hangup_ignored() {
        signals
            .add_signal(SIGHUP)
            .context("cannot listen for signals")?;
    }
    let listen = move || {
        let mut arriving = signals.forever();
        arriving.next();
        action();
        if let Some(limit) = limit {
            exit_after(limit);
        }
        arriving.find(|signal| *signal != SIGHUP);
        before_exit();
        exit();
    };
    // Owned by nobody; it ends with the process.
    thread::Builder::new()
        .name("fibrpc-signals".to_owned())
        .spawn(listen)?;
    Ok(())
}

/// Exits at once on SIGINT or SIGTERM: for a command that has nothing to bring to an end.
pub fn exit_on_signal() -> anyhow::Result<()> {
    on_first_signal(None, || {
        stderr::offer("error: interrupted");
        exit();
    })
}

/// Whether we were started to outlive the terminal, as by `nohup`; to listen for the signal would end
/// that. Where it cannot be known, it may be so.
fn is_hangup_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_none_or(|mask| mask >> (SIGHUP - 1) & 1 == 1)
}

fn exit_after(limit: Duration) {
    let last = move || {
        thread::sleep(limit);
        stderr::offer("error: interrupted; nobody reads the output");
        exit();
    };
    // Owned by nobody; it ends with the process. Without it, there is still the second signal.
    let _ = thread::Builder::new()
        .name("fibrpc-signals".to_owned())
        .spawn(last);
}

fn exit() -> ! {
    stderr::flush(LAST_WORDS);
    process::exit(i32::from(INTERRUPTED))
}
