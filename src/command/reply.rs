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

/// Headers that a response cannot have, see [`fibrpc::Headers::insert`].
const RESERVED: [&str; 3] = ["x-error-kind", "CC", "BCC"];

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
                Ok(echo(request))
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

/// The request as a response.
fn echo(request: &Request) -> Response {
    let response = Response::new(request.body());
    let response = match request.content_type() {
        Some(content_type) => response.with_content_type(content_type),
        None => response,
    };
    request
        .headers()
        .iter()
        .filter(|(name, _)| !RESERVED.contains(name))
        .fold(response, |response, (name, value)| {
            response.with_header(name, value)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_has_the_body_the_content_type_and_the_headers_that_it_can_have() {
        let request = Request::new("hello")
            .with_content_type("application/json")
            .with_header("traceparent", "00-1-2-01")
            .with_header("CC", "elsewhere")
            .with_header("x-error-kind", "internal");
        let expected = Response::new("hello")
            .with_content_type("application/json")
            .with_header("traceparent", "00-1-2-01");
        assert_eq!(echo(&request), expected);
        assert_eq!(echo(&Request::new("")), Response::new(""));
    }
}
