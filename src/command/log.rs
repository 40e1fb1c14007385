//! The log: what is written on stderr, as text for people or as JSON for programs.

use crate::command::cli::LogFormat;
use crate::command::lines::{LAST_LINES, stderr};
use env_logger::fmt::Formatter;
use log::{LevelFilter, Record};
use serde::Serialize;
use std::env::{self, VarError};
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::time::SystemTime;

/// Logs to stderr: warnings, and more with -v or as `RUST_LOG` says.
pub fn start(verbose: u8, format: LogFormat) {
    let ours = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    };
    let (filters, wrong) = match env::var("RUST_LOG") {
        Ok(filters) => match env_filter::Builder::new().try_parse(&filters) {
            Ok(_) => (filters, None),
            Err(error) => (String::new(), Some(error.to_string())),
        },
        Err(VarError::NotPresent) => (String::new(), None),
        Err(error) => (String::new(), Some(error.to_string())),
    };
    let mut logger = env_logger::Builder::new();
    logger
        .filter_module("fibrpc", ours)
        .parse_filters(&filters)
        .target(env_logger::Target::Pipe(Box::new(Log)));
    match format {
        LogFormat::Text => text(&mut logger),
        LogFormat::Json => json(&mut logger),
    }
    logger.init();
    if let Some(wrong) = wrong {
        log::warn!(
            "RUST_LOG is ignored: {wrong}; it is a level (error, warn, info, debug, trace, off), \
             or a module and its level, as in fibrpc=debug"
        );
    }
}

/// Whether a command line that clap cannot read asks for JSON: then what is wrong with it is to be
/// told in JSON, too.
pub fn is_json_asked_for(arguments: impl Iterator<Item = OsString>) -> bool {
    let ours: Vec<_> = arguments.take_while(|argument| argument != "--").collect();
    ours.iter().any(|argument| argument == "--log=json")
        || ours
            .windows(2)
            .any(|pair| pair[0] == "--log" && pair[1] == "json")
}

fn text(logger: &mut env_logger::Builder) {
    // journald adds the time itself.
    let with_time = env::var_os("JOURNAL_STREAM").is_none();
    let style = match has_colours() {
        true => env_logger::WriteStyle::Always,
        false => env_logger::WriteStyle::Never,
    };
    logger.write_style(style).format(move |out, record| {
        let style = out.default_level_style(record.level());
        if with_time {
            write!(out, "{} ", out.timestamp_millis())?;
        }
        writeln!(out, "{style}{}{style:#} {}", record.level(), record.args())
    });
}

fn json(logger: &mut env_logger::Builder) {
    logger.write_style(env_logger::WriteStyle::Never).format(
        |out: &mut Formatter, record: &Record<'_>| {
            let level = record.level().as_str().to_ascii_lowercase();
            let event = Event::new(&level, record.target(), &record.args().to_string()).line();
            writeln!(out, "{event}")
        },
    );
    stderr::write_as(event_of);
    // A panic would write lines of its own.
    panic::set_hook(Box::new(|panic| {
        stderr::offer(&format!("error: {panic}"));
        // One of the main thread ends the process.
        stderr::flush(LAST_LINES);
    }));
}

/// A line of the log.
#[derive(Serialize)]
struct Event<'a> {
    /// RFC 3339, in UTC.
    time: String,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    level: &'a str,
    /// The module that it comes from.
    target: &'a str,
    message: &'a str,
}

impl Event<'_> {
    fn new<'a>(level: &'a str, target: &'a str, message: &'a str) -> Event<'a> {
        Event {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            level,
            target,
            message,
        }
    }

    fn line(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| unreachable!("four texts can be written"))
    }
}

/// The event that is told by a line for people which is not of the log: why the command failed, a
/// hint, how many lines are missing.
fn event_of(line: &str) -> String {
    let line = line.trim();
    let (level, message) = match (line.strip_prefix("error: "), line.strip_prefix("[!] ")) {
        (Some(error), _) => ("error", error),
        (_, Some(dropped)) => ("warn", dropped),
        _ => ("info", line),
    };
    Event::new(level, "fibrpc", message).line()
}

/// Whether stderr is a terminal that is to show colours. Source: <https://no-color.org>.
fn has_colours() -> bool {
    let is = |name: &str, value: &str| env::var_os(name).is_some_and(|is| is == value);
    io::stderr().is_terminal()
        && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && !is("TERM", "dumb")
        && !is("CLICOLOR", "0")
}

/// Where the log goes. A thread that logs never waits for whoever reads the log: it may be one
/// that others wait for.
struct Log;

impl Write for Log {
    /// Takes a whole record.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(record);
        stderr::log(text.strip_suffix('\n').unwrap_or(&text));
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn a_line_for_people_becomes_an_event_on_one_line() {
        for (line, level, message) in [
            ("error: no\tbroker\x1b[31m\n", "error", "no\tbroker\x1b[31m"),
            ("error: two\nlines", "error", "two\nlines"),
            ("  hint: is it running?", "info", "hint: is it running?"),
            (" [!] 3 lines dropped", "warn", "3 lines dropped"),
        ] {
            let event = event_of(line);
            assert!(!event.contains(char::is_control), "{event}");
            let event: Value = serde_json::from_str(&event).unwrap();
            assert_eq!(event["level"], level);
            assert_eq!(event["message"], message);
        }
    }
}
