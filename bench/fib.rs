//! The recursion alone, without a broker: how long does fib(42) take here?
//!
//! ```text
//! cargo run --release --example fib 42
//! ```

#[allow(dead_code)] // it is the command's
#[path = "../src/fib.rs"]
mod fib;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let n = std::env::args().nth(1).ok_or("which n?")?.parse()?;
    println!("{}", fib::recursive(n));
    Ok(())
}
