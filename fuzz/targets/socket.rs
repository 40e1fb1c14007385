//! `src/bytes/socket.rs`, for libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fibrpc::bytes::socket(input));
