//! What the store keeps of all this, and what a start makes of it.

use crate::{
    Crypto, Federation, Now, Record, Refusal, Write, federation::Admission, membership::Slot, record::sign,
};
use prost::Message as _;
use std::collections::BTreeMap;
use tombolo_proto::tombolo::federation::v1 as pb;
use tombolo_types::Code;

/// What the store holds: keys and values of [`Write::Put`], and `imports/<cluster>`.
pub type Saved = BTreeMap<String, Vec<u8>>;

/// Where a statement is kept.
pub(crate) fn record_key((cluster, signer): &Slot) -> String {
    format!("record/{cluster}/{signer}")
}

impl<C: Crypto> Federation<C> {
    pub(crate) fn take_own(&mut self, record: Record, writes: &mut Vec<Write>) {
        let signed = sign(&self.crypto, record.encode());
        if self.membership.offer(&signed, &self.crypto) == Ok(true) {
            writes.push(Write::Put {
                key: record_key(&(record.cluster, record.admitted_by)),
                value: signed.encode_to_vec(),
            });
        }
    }

    pub(crate) fn self_write(&self) -> Write {
        let (founder, founder_key) = self.membership.founder();
        Write::Put {
            key: "self".into(),
            value: pb::StoredSelf {
                epoch: self.epoch,
                founder: founder.to_string(),
                founder_key: founder_key.0.to_vec(),
                profile_version: self.profile_version,
            }
            .encode_to_vec(),
        }
    }

    /// Reads records, profiles and admissions, checking each signature again; what does not fit is dropped.
    pub(crate) fn load(&mut self, saved: &Saved, writes: &mut Vec<Write>, now: Now) {
        let signed = |prefix: &'static str| {
            let of = saved.iter().filter(move |(key, _)| key.starts_with(prefix));
            of.map(|(key, value)| {
                (
                    key.clone(),
                    pb::Signed::decode(value.as_slice()).unwrap_or_default(),
                )
            })
            .collect::<Vec<_>>()
        };
        let mut left = signed("record/");
        // Admitting members come before admitted ones in no order of keys: go on as long as one more fits.
        loop {
            let before = left.len();
            left.retain(|(_, record)| self.membership.offer(record, &self.crypto).is_err());
            if left.len() == before {
                break;
            }
        }
        for (key, profile) in signed("profile/") {
            if self.membership.offer_profile(&profile, &self.crypto).is_err() {
                left.push((key, profile));
            }
        }
        for (key, _) in left {
            self.audit(
                Refusal::new(Code::MembershipOld, format!("{key} in the store does not count")),
                now,
            );
            writes.push(Write::Delete { key });
        }
        for (key, value) in saved.iter().filter(|(key, _)| key.starts_with("admission/")) {
            let admission = pb::StoredAdmission::decode(value.as_slice())
                .ok()
                .and_then(|stored| {
                    let signed = stored.record?;
                    Some(Admission {
                        record: Record::decode(&signed.body).ok()?,
                        signed,
                        invite_id: stored.invite_id.try_into().ok()?,
                        expires_unix_ms: stored.expires_unix_ms,
                    })
                });
            match admission {
                Some(admission) => drop(
                    self.admissions
                        .insert(admission.record.cluster.clone(), admission),
                ),
                None => writes.push(Write::Delete { key: key.clone() }),
            }
        }
    }
}
