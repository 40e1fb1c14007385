//! docs/ten-ways-it-breaks.md shows what its commands print: `scripts/ten-ways` runs them.

use crate::support::{Process, root};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Above the script's own deadline, a boot and a stop of its broker.
const ALL_RUNS: Duration = Duration::from_secs(1_000);

#[test]
fn the_ten_ways_are_shown_as_they_happen() {
    // Where `cargo test` has built the binary, and the examples beside it.
    let mut built = PathBuf::from(env!("CARGO_BIN_EXE_fibrpc"));
    built.pop();
    let mut process = Process::spawn(
        Command::new(root().join("scripts/broker"))
            // It stops and blocks its broker, so that must be one of its own.
            .env_remove("FIBRPC_TEST_URL")
            .env_remove("AMQP_URL")
            .env_remove("BROKER_DIR")
            .arg("with-broker")
            .arg(root().join("scripts/ten-ways"))
            .arg(built)
            .arg("--check")
            .arg(root().join("docs/ten-ways-it-breaks.md")),
    );
    let status = process.wait(ALL_RUNS);
    let (_, stderr) = process.output();
    assert!(status.success(), "{stderr}");
}
