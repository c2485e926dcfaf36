//! A snapshot as bytes: what was received, as it was received, so that reading it is applying it again.
//!
//! ```text
//! magic     8  "TMBSNAP\n"
//! format    4  little endian, 1
//! checksum  8  little endian, over the body
//! body         flags (1 byte: 1 = addresses synced, 2 = policies synced), owner (text), then until the end
//!              type URL (text), name (text), version (text), payload (text)
//! text         length (LEB128), bytes
//! ```

use crate::{mix::checksum, own::Own, snapshot::Snapshot};
use prost::encoding::{decode_varint, encode_varint};
use tombolo_proto::{type_url, xds};
use tombolo_types::{AddressPlan, TrustDomain};

const MAGIC: &[u8; 8] = b"TMBSNAP\n";
/// Advanced with every change that an older program would misread. A new type of resources is none: who does not know
/// it leaves it out, and a file without it says that none was received.
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 8;
/// Between the trust domain and the rest of an owner.
const OWNER_PREFIX: &str = "/ns/";
const ADDRESSES_SYNCED: u8 = 1;
const POLICIES_SYNCED: u8 = 2;

/// Types in the order in which they are written.
const TYPES: [&str; 8] = [
    type_url::ADDRESS,
    type_url::AUTHORIZATION,
    type_url::REVOCATIONS,
    type_url::TRUST_BUNDLE,
    type_url::SERVICE_VIP,
    type_url::EXPOSURE,
    type_url::NETWORK_GATEWAYS,
    type_url::EXPORTED_SERVICE,
];

/// Why bytes on disk were not taken. The file is to be set aside; the agent starts without it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// Not a snapshot file.
    #[error("this is not a snapshot")]
    NotASnapshot,
    /// Written by a newer program.
    #[error("the snapshot has format {found}, this program knows {known}: it was written by a newer one")]
    Newer {
        /// Format of the file.
        found: u32,
        /// Format of this program.
        known: u32,
    },
    /// Cut, or bytes have changed.
    #[error("the snapshot is damaged")]
    Damaged,
    /// Written for another workload, for example before the host was enrolled anew.
    #[error("the snapshot belongs to {0}")]
    Foreign(String),
}

impl Snapshot {
    /// As bytes for a file: everything that is held, with versions. A whole-file write; the caller makes it durable.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend([0; 8]);
        let flag = |set, value| if set { value } else { 0 };
        bytes.push(
            flag(self.addresses_synced, ADDRESSES_SYNCED) | flag(self.policies_synced, POLICIES_SYNCED),
        );
        let of = format!("{}{OWNER_PREFIX}{}", self.own.trust_domain, owner(&self.own));
        put(&mut bytes, of.as_bytes());
        for type_url in TYPES {
            self.each_held(type_url, &mut |name, version, payload| {
                for part in [type_url.as_bytes(), name.as_bytes(), version.as_bytes(), payload] {
                    put(&mut bytes, part);
                }
            });
        }
        let sum = checksum(&bytes[HEADER_BYTES..]);
        bytes[12..HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads what [`Snapshot::encode`] wrote. A resource that this program would refuse today is left out: discovery
    /// sends it again, since its version is not named as held.
    ///
    /// # Errors
    /// When the bytes are damaged, written by a newer program, or another workload's.
    pub fn decode(bytes: &[u8], plan: AddressPlan, own: Own) -> Result<Self, SnapshotError> {
        Self::decode_renamed(bytes, plan, own, &[])
    }

    /// As [`Snapshot::decode`], where the own trust domain is or was also known by `names`: what was written under one of
    /// them is still the own workload's.
    ///
    /// # Errors
    /// As [`Snapshot::decode`].
    pub fn decode_renamed(
        bytes: &[u8],
        plan: AddressPlan,
        own: Own,
        names: &[TrustDomain],
    ) -> Result<Self, SnapshotError> {
        let magic = &bytes[..bytes.len().min(MAGIC.len())];
        if magic.is_empty() || magic != &MAGIC[..magic.len()] {
            return Err(SnapshotError::NotASnapshot);
        }
        let header = bytes.get(..HEADER_BYTES).ok_or(SnapshotError::Damaged)?;
        let number = |range: std::ops::Range<usize>| {
            header[range]
                .iter()
                .rev()
                .fold(0u64, |number, &byte| number << 8 | u64::from(byte))
        };
        let format = u32::try_from(number(8..12)).unwrap_or(u32::MAX);
        if format > FORMAT {
            return Err(SnapshotError::Newer {
                found: format,
                known: FORMAT,
            });
        }
        let body = &bytes[HEADER_BYTES..];
        if format != FORMAT || number(12..HEADER_BYTES) != checksum(body) {
            return Err(SnapshotError::Damaged);
        }
        read_body(body, plan, own, names)
    }
}

fn read_body(
    mut body: &[u8],
    plan: AddressPlan,
    own: Own,
    names: &[TrustDomain],
) -> Result<Snapshot, SnapshotError> {
    let (&flags, rest) = body.split_first().ok_or(SnapshotError::Damaged)?;
    body = rest;
    let written_for = take_text(&mut body)?;
    let foreign = || SnapshotError::Foreign(written_for.to_owned());
    let (name, rest) = written_for.split_once(OWNER_PREFIX).ok_or_else(foreign)?;
    if rest != owner(&own) {
        return Err(foreign());
    }
    let mut snapshot = Snapshot::empty(plan, own);
    // Resources of one type stand together; applied together they share their texts.
    let mut batch: (&str, Vec<xds::Resource>) = (TYPES[0], Vec::new());
    while !body.is_empty() {
        let type_url = take_text(&mut body)?;
        let name = take_text(&mut body)?.to_owned();
        let version = take_text(&mut body)?.to_owned();
        let any = prost_types::Any {
            type_url: type_url.to_owned(),
            value: take(&mut body)?.to_vec(),
        };
        if batch.0 != type_url {
            let (of, resources) = std::mem::replace(&mut batch, (type_url, Vec::new()));
            snapshot.apply(of, resources, &[]);
        }
        batch.1.push(xds::Resource {
            name,
            version,
            resource: Some(any),
            ..xds::Resource::default()
        });
    }
    snapshot.apply(batch.0, batch.1, &[]);
    // Written by the same workload before its trust domain was renamed?
    let known = |name: TrustDomain| snapshot.is_own(&name) || names.contains(&name);
    if !name.parse().is_ok_and(known) {
        return Err(foreign());
    }
    snapshot.addresses_synced = flags & ADDRESSES_SYNCED != 0;
    snapshot.policies_synced = flags & POLICIES_SYNCED != 0;
    Ok(snapshot)
}

/// Whose snapshot it is, after the trust domain: names of workloads and policies mean something else to anybody else.
fn owner(own: &Own) -> String {
    let Own {
        namespace,
        workload_name,
        service_account,
        mesh_domain,
        ..
    } = own;
    format!("{namespace}/sa/{service_account}/workload/{workload_name} in {mesh_domain}")
}

fn put(bytes: &mut Vec<u8>, part: &[u8]) {
    encode_varint(part.len() as u64, bytes);
    bytes.extend(part);
}

fn take<'b>(body: &mut &'b [u8]) -> Result<&'b [u8], SnapshotError> {
    let length = decode_varint(body).map_err(|_| SnapshotError::Damaged)?;
    let length = usize::try_from(length).map_err(|_| SnapshotError::Damaged)?;
    let (part, rest) = body.split_at_checked(length).ok_or(SnapshotError::Damaged)?;
    *body = rest;
    Ok(part)
}

fn take_text<'b>(body: &mut &'b [u8]) -> Result<&'b str, SnapshotError> {
    std::str::from_utf8(take(body)?).map_err(|_| SnapshotError::Damaged)
}

#[cfg(test)]
mod tests;
