//! The certificate authority of a trust domain: a self-made root, or a plugged CA with Istio's file names.
//!
//! Position: layer 4, inside discovery. Enrolment and the CA service find out who asks; this crate signs.
//!
//! ```
//! use std::time::{Duration, SystemTime};
//! use tombolo_ca::Authority;
//! use tombolo_identity::{WorkloadIdentity, generate_csr};
//! let folder = tempfile::tempdir().unwrap();
//! let td = "mesh.example".parse().unwrap();
//! let now = SystemTime::now();
//! let authority = Authority::create(&folder.path().join("ca"), &td, now).unwrap();
//! let id = "spiffe://mesh.example/ns/shop/sa/catalog".parse().unwrap();
//! let request = generate_csr(Some(&id)).unwrap();
//! let issued = authority.issue(&request.csr_pem, &id, None, Duration::ZERO, now).unwrap();
//! let (identity, _roots) = WorkloadIdentity::from_issued(&issued.cert_chain, &request.key_pem).unwrap();
//! assert_eq!(identity.id(), &id);
//! ```
//!
//! # Files
//! | file | content |
//! |---|---|
//! | `ca-key.pem`, `ca-cert.pem` | signing key and its certificate |
//! | `cert-chain.pem` | sent between a certificate and the roots: intermediates, or a new root cross-signed by the old one; optional for a self-made root |
//! | `root-cert.pem` | the roots; the first is the one that join tokens pin |
//! | `extra-roots.pem` | further roots to publish; optional |
//! | `trust-domain` | whose authority it is |
//!
//! **Invariant:** a request gives its public key and nothing else; identity, names and life are the caller's.
//! **Invariant:** size, signature, key strength, life and identity are checked before the private key is used.
//! **Invariant:** an authority is never overwritten, and no error or `Debug` text holds key material.
//! **Invariant:** no clock: `now` is an argument.

mod authority;
mod csr;
mod error;
mod files;
mod material;
mod rotation;

pub use authority::{Authority, Issued, TtlLimits};
pub use error::CaError;
pub use rotation::Publication;
