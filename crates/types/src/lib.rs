//! Validated names and ids, join tokens, ports, address plan and the table of diagnostic codes.
//!
//! Position: layer 0; every other crate uses these words. A value of a type from here is valid: parse, don't validate.
//!
//! **Invariant:** no tokio, clock, randomness, files or sockets.

mod code;
mod device;
mod invite;
mod mesh;
mod names;
pub mod networks;
mod proxy;
mod reject;
mod spiffe;
mod token;
mod token_text;
mod version;

pub use code::{Code, CodeEntry, Severity};
pub use device::{DeviceId, ParseDeviceIdError};
pub use invite::{INVITE_PREFIX, InviteToken};
pub use mesh::{AddressPlan, AddressPlanError, NetworkAddress, ports, reserved_namespace};
pub use names::{Hostname, NameError, NamespacedName, TrustDomain, check_label};
pub use proxy::{PROXY_MAX, PROXY_PREFIX, PROXY_SIGNATURE, ProxyError, ProxyHeader};
pub use reject::{Reject, RejectClass};
pub use spiffe::{SpiffeError, SpiffeId};
pub use token::{JoinToken, TOKEN_PREFIX};
pub use token_text::TokenError;
pub use version::far_apart;
