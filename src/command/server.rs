//! `fibrpc server`: the tutorial's server.

use crate::command::cli::Global;
use crate::command::cli::serving::{Algorithm, ServerArgs, ServerPlan};
use crate::command::serving::{Output, serve};
use crate::fib::{self, parse_n};
use fibrpc::Request;
use std::process::ExitCode;

/// Runs the command: answers requests until interrupted.
pub fn server(args: ServerArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let ServerPlan {
        serving,
        algorithm,
        max_n,
    } = args.plan(global)?;
    let handler = move |request: &Request, output: &Output| {
        let n = parse_n(request.body(), max_n)?;
        output.request(format_args!("fib({n})"));
        let result = match algorithm {
            Algorithm::Recursive => u128::from(fib::recursive(n)),
            Algorithm::Fast => fib::fast(n).unwrap_or_else(|| unreachable!("n is at most {max_n}")),
        };
        Ok(result.to_string())
    };
    serve(serving, handler, || ())
}
