//! `fibrpc reply`: a server around a command of the user's, or one that echoes.

use crate::command::child::Program;
use crate::command::cli::serving::{Replier, ReplyArgs, ReplyPlan};
use crate::command::cli::{Global, usage};
use crate::command::serving::{Output, serve};
use fibrpc::{Request, Response};
use std::process::ExitCode;
use std::sync::Arc;

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
