//! Packets of applications never panic the flow table, leave something behind in it, or make it write nonsense.
#![no_main]

#[path = "check/packet_flow.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drop(check::check(bytes)));
