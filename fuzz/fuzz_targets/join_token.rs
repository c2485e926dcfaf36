//! A text that claims to be a join token never panics, and one that is taken has no other text.
#![no_main]

#[path = "check/join_token.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::check(bytes));
