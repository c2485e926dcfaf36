//! Who is who: certificates, keys, proofs, and the TLS settings of every connection of the mesh.
//!
//! Position: layer 1. The CA issues what is read here; tunnel, discovery and the control client take their
//! `rustls::ClientConfig` and `ServerConfig` from here and nowhere else, and ask [`peer_of`] who they speak with.
//!
//! ```
//! use tombolo_identity::{LiveIdentity, generate_csr, hbone_server_config};
//! let id = "spiffe://mesh.example/ns/shop/sa/catalog".parse().unwrap();
//! let request = generate_csr(Some(&id)).unwrap(); // goes to the CA; the key stays
//! assert!(request.csr_pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"));
//! let live = LiveIdentity::new(None, Vec::new()); // certificate and roots come later, without a new configuration
//! let config = hbone_server_config(&live).unwrap();
//! assert_eq!(config.alpn_protocols, [b"h2"]);
//! ```
//!
//! **Invariant:** an identity is believed only by a root of its own trust domain.
//! **Invariant:** an expected identity is met by one of another trust domain only where a bundle says that both names are
//! of one trust domain.
//! **Invariant:** TLS 1.3 only, no resumption, no tickets, no early data; a handshake reads the roots and the
//! certificate of its moment.
//! **Invariant:** no clock (rustls passes the time of a handshake), no files, no sockets, no tokio. Randomness only
//! inside `generate*` and signatures.
//! **Invariant:** no private key in `Debug`, `Display` or an error. Keys that this crate holds are wiped when
//! dropped; the copies inside rustls and AWS-LC are theirs.

mod bundle;
mod csr;
mod device;
mod error;
mod live;
mod peer;
mod pem;
mod pinned;
pub mod proof;
mod refusal;
pub mod serial;
mod tls;
mod verify;
mod workload;

pub use bundle::{RootFacts, TrustBundle, root_facts, root_pin};
pub use csr::{KeyAndCsr, generate_csr};
pub use device::{DeviceKey, JoinKey, verify_device_signature, verify_join_signature};
pub use error::IdentityError;
pub use live::{Current, LiveIdentity};
pub use peer::{Peer, is_of_first_root, is_of_signing_name, peer_of, still_trusted};
pub use pem::{certificates_from_pem, certificates_to_pem};
pub use pinned::PinnedRoots;
pub use proof::{client_exporter, server_exporter};
pub use refusal::{ConnectRefusal, PeerRefusal, utc};
pub use tls::{
    asked_trust_domain, control_client_config, control_server_name, discovery_server_config,
    federated_server_config, hbone_client_config, hbone_server_config, hbone_server_name,
    pinned_client_config, provider,
};
pub use workload::WorkloadIdentity;
