//! `fibrpc server`: the tutorial's server.

use crate::command::cli::Global;
use crate::command::cli::serving::{Algorithm, ServerArgs, ServerPlan};
use crate::command::lines::{LAST_LINES, Lines};
use crate::command::signals::on_first_signal;
use crate::fib::{self, parse_n};
use fibrpc::{Error, Request};
use std::io::ErrorKind;
use std::process::ExitCode;
use std::sync::{Arc, Once};

/// Runs the command: answers requests until interrupted.
pub fn server(args: ServerArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let ServerPlan {
        server,
        algorithm,
        max_n,
        quiet,
    } = args.plan(global)?;
    let stopper = server.stopper();
    // How long the drain may take is the library's affair.
    on_first_signal(None, move || stopper.stop())?;
    let output = Arc::new(Output {
        lines: Lines::stdout()?,
        announced: Once::new(),
        complained: Once::new(),
    });
    let handler = {
        let output = Arc::clone(&output);
        move |request: &Request| {
            // The first request may be quicker than the thread that waits for the start.
            output.announce();
            let n = parse_n(request.body(), max_n)?;
            if !quiet {
                output.print(&format!(" [.] fib({n})"));
            }
            let result = match algorithm {
                Algorithm::Recursive => u128::from(fib::recursive(n)),
                Algorithm::Fast => {
                    fib::fast(n).unwrap_or_else(|| unreachable!("n is at most {max_n}"))
                }
            };
            Ok(result.to_string())
        }
    };
    let served = server.start(handler).and_then(|serving| {
        output.announce();
        serving.wait()
    });
    // Whoever reads them had the time of the drain.
    let _ = output.lines.flush(Some(LAST_LINES));
    match served {
        // Told to stop while it was still connecting.
        Err(Error::Stopped) => {}
        Err(error) => return Err(error.into()),
        Ok(stats) => log::info!(
            "stopped: {} answered, {} refused, {} expired, {} without reply_to",
            stats.answered,
            stats.refused,
            stats.expired,
            stats.unanswerable
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// The lines of a server. They are a courtesy: it goes on when nobody reads them, or when the disk
/// is full that they go to.
struct Output {
    lines: Lines,
    /// Whether it was said that the server is ready.
    announced: Once,
    /// Whether it was said that the lines cannot be written.
    complained: Once,
}

impl Output {
    fn announce(&self) {
        self.announced.call_once(|| {
            self.print(" [x] Awaiting RPC requests");
            // To systemd, if it has started us and wants to know.
            if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
                log::warn!("cannot tell systemd that the server is ready: {error}");
            }
        });
    }

    fn print(&self, line: &str) {
        match self.lines.offer(line) {
            // Whoever closes stdout wants no lines.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                self.complained.call_once(|| {
                    log::warn!("cannot write to stdout: {error}; the server goes on without");
                })
            }
            _ => {}
        }
    }
}
