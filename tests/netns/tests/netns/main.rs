//! Real programs on a real kernel: every host is a network namespace with a TUN device, a resolver and applications.
//!
//! One binary, one module per concern. Each test makes its own lab and removes it. Needs root and the release build.

mod lab;
