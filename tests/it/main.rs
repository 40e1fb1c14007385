//! Tests against a real broker: `make test` starts one.

mod cli;
mod failures;
mod hostile;
mod interop;
mod rpc;
mod support;
