//! What must hold of any bytes: those that a broker may send, and what a peer may put into a
//! message. Only for tests and for the fuzzer; `docs/proof.md` tells of both.
//!
//! A target takes an input and panics if a promise is broken. `cargo test` gives it the inputs in
//! `tests/corpus`, and `make fuzz` has libFuzzer look for others.

mod assembled; // what becomes of a stream
mod bounds; // time and memory
mod frames;
mod message;
#[cfg(test)]
mod read_back; // what others make of the frames that we write
mod socket;

pub use frames::frames;
pub use message::message;
pub use socket::socket;

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::panic::catch_unwind;
    use std::path::Path;

    /// Gives a target each input of its corpus.
    fn replay(name: &str, target: fn(&[u8])) {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/corpus")
            .join(name);
        let mut inputs: Vec<_> = fs::read_dir(&corpus)
            .unwrap_or_else(|error| panic!("{}: {error}", corpus.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(inputs.len() >= 10, "{} inputs only", inputs.len());
        for input in inputs {
            let bytes = fs::read(&input).unwrap();
            let done = catch_unwind(|| target(&bytes));
            assert!(done.is_ok(), "it was {}", input.display());
        }
    }

    #[test]
    fn every_stream_of_the_corpus_is_assembled_the_same_in_any_pieces() {
        replay("frames", frames);
    }

    #[test]
    fn every_stream_of_the_corpus_comes_out_of_the_socket_as_it_went_in() {
        replay("socket", socket);
    }

    #[test]
    fn every_message_of_the_corpus_is_read_and_can_be_answered() {
        replay("message", message);
    }
}
