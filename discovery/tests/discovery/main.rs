//! A discovery in this process, and real clients over loopback TLS: enrolment, certificates, xDS, admin API.

mod admin;
mod certificates;
mod enrolment;
mod lab;
mod liveness;
mod xds;
