//! What is made of the command line's definition: completions and the manual.

use crate::command::cli::{Cli, usage};
use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use std::fs;
use std::path::Path;

/// The script that completes command lines, for a shell.
pub fn completions(shell: Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fibrpc", &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// Writes the manual pages into a folder that exists: `fibrpc.1`, and one for each subcommand.
pub fn write_manual(folder: &Path) -> anyhow::Result<()> {
    if !folder.is_dir() {
        let folder = folder.display();
        return Err(usage(format!("'{folder}' is no folder; `mkdir` makes one")).into());
    }
    // There is no page about `help`, and none is to refer to it. The options of all commands are not to
    // stand between a command's own.
    let mut command = Cli::command()
        .disable_help_subcommand(true)
        .mut_args(|arg| match arg.is_global_set() {
            true => arg.help_heading("Global options"),
            false => arg,
        });
    // With this, subcommands have the options of all, and are called `fibrpc server`.
    command.build();
    let version = command.get_version().unwrap_or_default().to_owned();
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    for page in subcommands.chain([&command]) {
        let page = clap_mangen::Man::new(page.clone())
            .source(format!("fibrpc {version}"))
            .manual("fibrpc");
        let file = folder.join(page.get_filename());
        let mut text = Vec::new();
        page.render(&mut text)?;
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}
