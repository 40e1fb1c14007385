//! The recursion alone, without a broker: how long does fib(42) take here?
//!
//! ```text
//! cargo run --release --example fib 42
//! ```

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let n = std::env::args().nth(1).ok_or("which n?")?.parse()?;
    println!("{}", fibrpc::fib::recursive(n));
    Ok(())
}
