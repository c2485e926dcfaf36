//! The authority as discovery uses it, its files as an operator meets them, its certificates as peers see them.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::unwrap_in_result,
    clippy::wildcard_enum_match_arm,
    clippy::print_stdout,
    reason = "tests"
)]

mod files;
mod handshake;
mod import;
mod issue;
mod openssl;
#[path = "../../../../crates/identity/tests/identity/pair.rs"]
mod pair;
mod rotation;

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tempfile::TempDir;
use tombolo_ca::Authority;
use tombolo_identity::{KeyAndCsr, WorkloadIdentity, generate_csr};
use tombolo_types::{DeviceId, SpiffeId, TrustDomain};

const CATALOG: &str = "spiffe://mesh.example/ns/shop/sa/catalog";
const WEBAPP: &str = "spiffe://mesh.example/ns/shop/sa/webapp";
const DISCOVERY: &str = "spiffe://mesh.example/ns/tombolo-system/sa/discovery";
const DEFAULT: Duration = Duration::ZERO;

fn td() -> TrustDomain {
    "mesh.example".parse().unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn now() -> SystemTime {
    SystemTime::now()
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap().as_secs()
}

struct Made {
    _folder: TempDir,
    dir: PathBuf,
    authority: Authority,
}

/// A new authority in a folder of its own.
fn made() -> Made {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ca");
    let authority = Authority::create(&dir, &td(), now()).unwrap();
    Made {
        _folder: folder,
        dir,
        authority,
    }
}

fn request(uri: &str) -> KeyAndCsr {
    generate_csr(Some(&id(uri))).unwrap()
}

fn issue(
    authority: &Authority,
    uri: &str,
    device: Option<DeviceId>,
    ttl: Duration,
    when: SystemTime,
) -> WorkloadIdentity {
    let request = request(uri);
    let issued = authority
        .issue(&request.csr_pem, &id(uri), device, ttl, when)
        .unwrap();
    WorkloadIdentity::from_issued(&issued.cert_chain, &request.key_pem)
        .unwrap()
        .0
}
