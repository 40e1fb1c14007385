//! Each example, run as its reader would run it, and the README's, which is one of them.

use crate::support::{Finished, root, run, url};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// An example, beside the binary, where `cargo test` has built it.
pub fn program(name: &str) -> Command {
    let mut program = PathBuf::from(env!("CARGO_BIN_EXE_fibrpc"));
    program.pop();
    program.extend(["examples", name]);
    assert!(
        program.exists(),
        "{} is not built: run `make test`, which builds the examples",
        program.display()
    );
    let mut command = Command::new(program);
    command.env("AMQP_URL", url());
    command
}

fn example(name: &str) -> Finished {
    let done = run(&mut program(name));
    assert_eq!(done.code(), Some(0), "{}", done.stderr);
    done
}

#[test]
fn uppercase_answers_and_refuses() {
    assert_eq!(
        example("uppercase").stdout,
        "GRÜSSE\n\
         the server answered with an error (no-text): there is nothing to do\n\
         1 answered, 1 refused\n"
    );
}

#[test]
fn the_readme_shows_the_example_as_it_is() {
    let read = |file: &str| fs::read_to_string(root().join(file)).unwrap();
    let example = read("examples/uppercase.rs");
    let (_, code) = example.split_once("\n\n").unwrap();
    let shown = format!("```rust,no_run\n{code}```\n");
    assert!(
        read("README.md").contains(&shown),
        "README.md does not show examples/uppercase.rs below its first comment:\n{shown}"
    );
}

#[test]
fn pool_shares_one_connection() {
    let pool = example("pool");
    assert!(
        pool.stdout.starts_with("16 threads, 200 calls each: "),
        "{}",
        pool.stdout
    );
    assert!(pool.stdout.ends_with("\n1 connection\n"), "{}", pool.stdout);
    assert_eq!(pool.stderr, "");
}

#[cfg(feature = "json")]
#[test]
fn json_is_typed_and_names_the_field_that_is_wrong() {
    let json = example("json");
    let (price, error) = json.stdout.split_once('\n').unwrap();
    assert_eq!(price, "Price { cents: 750 }");
    assert!(
        error.contains("(invalid-argument)") && error.contains("at count:"),
        "{error}"
    );
}

#[test]
fn relay_hands_on_the_trace_and_what_is_left_of_the_time() {
    assert_eq!(
        example("relay").stdout,
        "greet has 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01 and less than 2 s\n\
         hello, ada (by greet)\n"
    );
}
