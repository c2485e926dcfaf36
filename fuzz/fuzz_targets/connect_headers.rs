//! What a peer writes into a CONNECT never panics, and what is understood means the same when it is told again.
#![no_main]

#[path = "check/connect_headers.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| check::check(bytes));
