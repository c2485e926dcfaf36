//! A discovery in this process, and real clients over loopback TLS: enrolment, certificates, xDS, admin API.
#![allow(
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    clippy::print_stdout,
    reason = "a test stops where it fails"
)]

mod admin;
mod certificates;
mod clusters;
mod enrolment;
mod federation;
mod federation_churn;
mod federation_hostile;
mod federation_joins;
mod federation_names;
mod gateways;
mod hostile;
mod hostile_member;
mod lab;
mod liveness;
mod members;
mod renaming;
mod trust;
mod xds;
