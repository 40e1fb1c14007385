//! Tests against a real broker: `make test` starts one.

mod bench;
mod chaos;
mod cli;
mod cluster;
mod failures;
mod hostile;
mod interop;
mod rpc;
mod support;
#[cfg(feature = "tls")]
mod tls;
