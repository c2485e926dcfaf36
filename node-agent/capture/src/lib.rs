//! Capture: the TUN device `mesh0`, its packet loop, and the protocol between the agent and `tombolo-netd`.
//!
//! Position: layer 4, the first step of the data path. Packets of applications to virtual addresses become
//! [`Captured`] events; a connection stays in connect() until its [`PendingFlow`] is accepted or refused. The agent
//! gets the device from netd ([`netd::NetdClient`]) and needs no capability for any of this.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::path::Path;
//! use tombolo_capture::{Capture, CaptureConfig, Captured, Refusal, netd::NetdClient};
//! let plan = tombolo_types::AddressPlan::default();
//! let netd = NetdClient::connect(Path::new(tombolo_capture::netd::SOCKET)).await?;
//! let families = netd.set_address(plan, true, true).await?;
//! let tun = netd.open_tun().await?;
//! let config = CaptureConfig { ipv4: families.ipv4, ipv6: families.ipv6, ..CaptureConfig::new(plan) };
//! let tasks = tombolo_runtime::TaskGroup::new("agent");
//! let mut capture = Capture::start(tun, config, &tasks).await?;
//! netd.set_route(plan, families.ipv4, families.ipv6).await?;
//! while let Some(captured) = capture.events.recv().await {
//!     if let Captured::Connect(flow) = captured {
//!         flow.refuse(Refusal::HostUnreachable);
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! **Invariant:** the only crate with unsafe code; each block says why it is sound.
//! **Invariant:** only packets of this host, or of bridges that were opted in, are taken: by their source, and a
//! connection by its socket, too, where the host forwards.
//! **Invariant:** no allocation per packet of an open connection; the table's lock is never held over a system call on
//! the device or over an await.

mod addresses;
mod capture;
mod device;
mod error;
mod event;
mod frozen;
pub mod handover;
mod listener;
mod masquerade;
pub mod netd;
mod packets;
pub mod privilege;
mod pump;
mod shared;
mod stranger;

pub use capture::{Capture, CaptureConfig, CaptureMonitor, CaptureStats};
pub use error::CaptureError;
pub use event::{Captured, DnsQuery, PendingFlow, Ping};
pub use frozen::{Frozen, FrozenListener, OpenFlows};
pub use tombolo_flow::Refusal;
