//! What `fibrpc server` and `fibrpc reply` have in common: they serve until interrupted, and say so.

use crate::command::cli::serving::ServingPlan;
use crate::command::lines::{LAST_LINES, Lines};
use crate::command::metrics::{Metrics, counted};
use crate::command::signals::on_signals;
use fibrpc::{Error, HandlerError, Request, Response};
use std::fmt;
use std::io::ErrorKind;
use std::process::ExitCode;
use std::sync::{Arc, Once};

/// Serves until interrupted.
///
/// `clean_up` is for what a handler has started elsewhere: it runs when the server has ended, so
/// that nothing can be answered any more, and before the process exits at once on a second signal.
pub fn serve<R: Into<Response>>(
    plan: ServingPlan,
    handler: impl Fn(&Request, &Output) -> Result<R, HandlerError> + Send + Sync + 'static,
    clean_up: impl Fn() + Clone + Send + 'static,
) -> anyhow::Result<ExitCode> {
    let ServingPlan {
        server,
        workers,
        quiet,
        metrics,
    } = plan;
    // Before the first connection: whoever watches wants to see that there is none yet.
    let metrics = metrics.map(|at| Metrics::start(&at, workers)).transpose()?;
    let stopper = server.stopper();
    // How long the drain may take is the library's affair.
    on_signals(None, move || stopper.stop(), clean_up.clone())?;
    let output = Arc::new(Output {
        lines: Lines::stdout()?,
        quiet,
        announced: Once::new(),
        complained: Once::new(),
    });
    let handler = {
        let output = Arc::clone(&output);
        move |request: &Request| {
            // The first request may be quicker than the thread that waits for the start.
            output.announce();
            handler(request, &output)
        }
    };
    let served = server
        .start(counted(metrics.clone(), handler))
        .and_then(|serving| {
            let serving = Arc::new(serving);
            if let Some(metrics) = &metrics {
                metrics.watch(&serving);
            }
            output.announce();
            serving.wait()
        });
    clean_up();
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
pub struct Output {
    lines: Lines,
    /// Whether there is no line for each request.
    quiet: bool,
    /// Whether it was said that the server is ready.
    announced: Once,
    /// Whether it was said that the lines cannot be written.
    complained: Once,
}

impl Output {
    /// Prints what a request asks for, unless told to be quiet.
    pub fn request(&self, what: fmt::Arguments<'_>) {
        if !self.quiet {
            self.print(&format!(" [.] {what}"));
        }
    }

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
