//! SIGINT and SIGTERM.

use crate::command::exit::INTERRUPTED;
use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::{process, thread};

/// Does something on the first SIGINT or SIGTERM; exits at once on the second.
pub fn on_first_signal(action: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot listen for signals")?;
    let listen = move || {
        let mut action = Some(action);
        for _ in signals.forever() {
            match action.take() {
                Some(action) => action(),
                None => process::exit(i32::from(INTERRUPTED)),
            }
        }
    };
    // Owned by nobody; it ends with the process.
    thread::Builder::new()
        .name("fibrpc-signals".to_owned())
        .spawn(listen)?;
    Ok(())
}
