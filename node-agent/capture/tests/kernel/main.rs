//! Capture with the real kernel: TUN device, routes, sockets. Each test runs in a network namespace of its own; netd
//! runs in the test's process, the agent in a process without any capability, the test itself is the application.
//!
//! Needs root and /dev/net/tun. Without them each test prints SKIPPED, and fails if TOMBOLO_TEST_REQUIRE names
//! `capture`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "all of it is a test")]
#![allow(
    clippy::unwrap_in_result,
    clippy::missing_panics_doc,
    reason = "all of it is a test"
)]

mod agent;
mod cost;
mod data;
mod lan;
mod life;
mod namespace;
