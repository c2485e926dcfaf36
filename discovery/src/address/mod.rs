//! The addresses of members: what a node may claim, and how a claim is settled.
//!
//! The device is the key, an address only a claim. It is taken when it is the source of the control connection, lies
//! in the CIDRs of the WorkloadGroup, or answers a dial of the HBONE port with the device's certificate.

mod claims;
mod keeper;

pub use claims::{Choice, choose, may_be_claimed};
pub use keeper::AddressKeeper;
pub(crate) use keeper::{cidrs_of, place};
