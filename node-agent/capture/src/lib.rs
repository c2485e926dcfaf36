//! Capture: the TUN device `mesh0`, its packet loop, and the protocol between the agent and `tombolo-netd`.

mod capture;
mod device;
mod error;
mod event;
pub mod netd;

pub use capture::{Capture, CaptureConfig, CaptureStats};
pub use error::CaptureError;
pub use event::{Captured, DnsQuery, PendingFlow, Ping};
pub use tombolo_flow::Refusal;
