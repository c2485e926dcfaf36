use std::fmt;

/// Whose fault a refused or failed connection is. One match in `tombolo-dataplane` maps it to CONNECT status, response
/// flag, metric label, log level and exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectClass {
    /// This host: no file descriptors, no port, a broken application.
    Local,
    /// The peer broke the protocol or is not who it must be.
    PeerMisbehaved,
    /// The peer is honest but speaks something else.
    PeerIncompatible,
    /// A policy says no.
    PolicyDenied,
    /// No such service or port.
    NoRoute,
    /// The service exists, but no endpoint took the connection.
    UpstreamUnhealthy,
    /// What is needed to decide has not been received from discovery.
    ControlPlaneStale,
    /// A limit of ours.
    Overload,
}

/// A refusal: class and a short reason in a fixed vocabulary (it is a metric label and a log field).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// Whose fault.
    pub class: RejectClass,
    /// Stable, for example `no_healthy_endpoint`.
    pub reason: &'static str,
    /// For people; empty if the reason says all.
    pub detail: String,
}

impl Reject {
    /// Without detail.
    pub fn new(class: RejectClass, reason: &'static str) -> Self {
        Self {
            class,
            reason,
            detail: String::new(),
        }
    }

    /// Adds a detail for people.
    #[must_use]
    pub fn with_detail(mut self, detail: impl fmt::Display) -> Self {
        self.detail = detail.to_string();
        self
    }
}

impl fmt::Display for Reject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.detail.is_empty() {
            f.write_str(self.reason)
        } else {
            write!(f, "{}: {}", self.reason, self.detail)
        }
    }
}

impl std::error::Error for Reject {}
