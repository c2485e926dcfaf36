//! Logs, metrics and the access log of every program.
//!
//! Position: layer 3, beside `tombolo-runtime`. A program calls [`log::init`] once, makes one [`Metrics`] and hands
//! both down; nothing here knows what is measured.
//!
//! ```
//! use tombolo_telemetry::{Metrics, RefusalLabels};
//! let metrics = Metrics::new();
//! metrics.refused.get_or_create(&RefusalLabels { direction: "outbound", reason: "unknown_port" }).inc();
//! assert!(metrics.encode().contains(r#"tombolo_dataplane_refused_total{direction="outbound",reason="unknown_port"} 1"#));
//! ```
//!
//! **Invariant:** a label set comes from identities and names of the mesh or from a fixed vocabulary, never from bytes
//! that a peer chose freely; the number of label sets of one family is bounded.
//! **Invariant:** no secret is ever a field or a label.

mod access;
mod journal;
pub mod log;
pub mod messages;
mod metrics;
mod tcp;

pub use access::{AccessEntry, AccessLog, Direction, Party};
pub use log::{LogConfig, LogError, LogFormat};
pub use metrics::{DnsLabels, GatewayLabels, HandshakeLabels, Metrics, RefusalLabels, SideLabels};
pub use tcp::{TcpLabels, TcpMetrics};
