//! The packages suite's tools: packages built by the scripts that users run, and real systemd hosts to install them on.
//!
//! A [`Yard`] is a switch with machines on it; each [`Machine`] is booted by its own systemd (systemd-nspawn, through
//! the script `box` beside this crate) with journald, resolved, dbus and dpkg. Both remove what they made when they
//! are dropped, also when a test panics.
//!
//! **Invariant:** nothing on this machine is changed but `/var/tmp/tombolo-boxes`, where the root that machines boot
//! from is kept, and nothing but making that root needs a network.

mod built;
mod machine;
mod session;
mod upstream;
mod yard;

pub use built::{Built, build, packaging, revision, workspace};
pub use machine::Machine;
pub use session::Session;
pub use upstream::Upstream;
pub use yard::{Yard, required};
