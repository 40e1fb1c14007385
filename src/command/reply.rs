//! `fibrpc reply`: a server around a command of the user's, or one that echoes.

use crate::command::child::Program;
use crate::command::cli::serving::{Replier, ReplyArgs, ReplyPlan};
use crate::command::cli::{Global, usage};
use crate::command::serving::{Output, serve};
use fibrpc::{Request, Response};
use rustix::process::{Resource, getrlimit};
use std::process::ExitCode;
use std::sync::Arc;

/// How many files a command needs while it is started: both ends of three pipes, and itself.
const FILES_PER_COMMAND: usize = 7;

/// How many the server needs beside, about.
const FILES_OF_SERVER: usize = 20;

/// Runs the command: answers requests until interrupted.
pub fn reply(args: ReplyArgs, global: &Global) -> anyhow::Result<ExitCode> {
    let ReplyPlan { serving, replier } = args.plan(global)?;
    let print = |request: &Request, output: &Output| {
        output.request(format_args!("{} bytes", request.body().len()));
    };
    match replier {
        Replier::Echo => {
            let handler = move |request: &Request, output: &Output| {
                print(request, output);
                Ok(Response::from(request))
            };
            serve(serving, handler, || ())
        }
        Replier::Command(command) => {
            let program = Arc::new(Program::find(command).map_err(usage)?);
            warn_of_few_files(serving.workers);
            let handler = {
                let program = Arc::clone(&program);
                move |request: &Request, output: &Output| {
                    print(request, output);
                    Ok(program.run(request)?)
                }
            };
            serve(serving, handler, move || program.end_all())
        }
    }
}

/// Warns if so many commands may not have their pipes at the same time: a request that meets that is
/// answered with an error, though another server could have executed it.
fn warn_of_few_files(workers: usize) {
    let needed = (workers * FILES_PER_COMMAND + FILES_OF_SERVER) as u64;
    if let Some(allowed) = getrlimit(Resource::Nofile).current
        && allowed < needed
    {
        log::warn!(
            "{workers} commands at a time may need {needed} open files, and {allowed} are allowed; \
             take fewer --workers, or allow more by `ulimit -n {needed}`"
        );
    }
}
