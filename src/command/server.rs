//! `fibrpc server`: the tutorial's server.

use crate::command::cli::{Algorithm, Global, ServerArgs, ServerPlan};
use crate::command::lines::Lines;
use crate::command::signals::on_first_signal;
use crate::fib::{self, parse_n};
use fibrpc::{Error, Request};
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
    on_first_signal(move || stopper.stop())?;
    let lines = Arc::new(Lines::start()?);
    let announced = Arc::new(Announced(Once::new()));
    let handler = {
        let (lines, announced) = (Arc::clone(&lines), Arc::clone(&announced));
        move |request: &Request| {
            // The first request may be quicker than the thread that waits for the start.
            announced.once(&lines);
            let n = parse_n(request.body(), max_n)?;
            if !quiet {
                // A server goes on when nobody reads its output any more.
                let _ = lines.print(&format!(" [.] fib({n})"));
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
        announced.once(&lines);
        serving.wait()
    });
    // Workers may be left behind with their clones, so this is not the end of the lines.
    let _ = lines.flush();
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

/// Whether it was said that the server is ready.
struct Announced(Once);

impl Announced {
    fn once(&self, lines: &Lines) {
        self.0.call_once(|| {
            let _ = lines.print(" [x] Awaiting RPC requests");
            // To systemd, if it has started us and wants to know.
            if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
                log::warn!("cannot tell systemd that the server is ready: {error}");
            }
        });
    }
}
