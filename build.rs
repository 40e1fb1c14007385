//! Finds out the commit that is being built, for `fibrpc --version`.

use std::process::Command;

fn git(arguments: &[&str]) -> Option<String> {
    let done = Command::new("git").args(arguments).output().ok()?;
    let said = String::from_utf8(done.stdout).ok()?;
    done.status.success().then(|| said.trim().to_owned())
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // From a published package there is no repository, or, worse, somebody else's around it.
    let ours = git(&["ls-files", "--error-unmatch", "build.rs"]).is_some();
    let commit = ours
        .then(|| git(&["rev-parse", "--short=12", "HEAD"]))
        .flatten();
    let commit = commit.map_or_else(String::new, |commit| format!(" ({commit})"));
    println!("cargo::rustc-env=FIBRPC_COMMIT={commit}");
    // The file changes with every commit and checkout.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
}
