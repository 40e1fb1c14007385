//! What is made of the command line's definition: completions and the manual.

use crate::command::cli::Cli;
use clap::CommandFactory;
use clap_complete::Shell;
use std::io::{self, Write as _};

/// The script that completes command lines, for a shell.
pub fn completions(shell: Shell) -> String {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "fibrpc", &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// The manual page, and those of the subcommands after it.
pub fn manual() -> io::Result<String> {
    let mut command = Cli::command();
    command.build();
    let subcommands: Vec<_> = command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
        .cloned()
        .collect();
    let mut out = Vec::new();
    let man = clap_mangen::Man::new(command);
    man.render(&mut out)?;
    for subcommand in subcommands {
        let man = clap_mangen::Man::new(subcommand.clone());
        writeln!(out, ".SH \"fibrpc {}\"", subcommand.get_name())?;
        man.render_description_section(&mut out)?;
        man.render_options_section(&mut out)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}
