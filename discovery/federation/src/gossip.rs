//! Membership on a session: what is told, and what is taken.

use crate::{
    ConnId, Crypto, Federation, Now, Refusal,
    limits::{PART_BYTES, RECORDS_INTERVAL},
};
use prost::Message as _;
use std::sync::Arc;
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::Code;

/// Forged records on one connection before it is closed: each costs the check of a signature.
const FORGED_MAX: usize = 8;

impl<C: Crypto> Federation<C> {
    pub(crate) fn records(
        &mut self,
        conn: ConnId,
        peer: &Arc<str>,
        records: &pb::Records,
        now: Now,
    ) -> Result<(), Refusal> {
        let mut budget = self
            .connections
            .get(&conn)
            .map_or(0, |c| FORGED_MAX.saturating_sub(c.forged));
        // One at a time only until the budget is spent: honest members send none that is forged.
        let mut forged = 0;
        for chunk in records.records.chunks(64) {
            let count = self.take(chunk, &[], Some(peer), now);
            forged += count;
            budget = budget.saturating_sub(count);
            if budget == 0 {
                break;
            }
        }
        if budget > 0 {
            forged += self.take(&[], &records.profiles, Some(peer), now);
        }
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.forged += forged;
            if connection.forged >= FORGED_MAX {
                return Err(Refusal::new(Code::MembershipForged, "too many forged records"));
            }
        }
        Ok(())
    }

    pub(crate) fn heartbeat(&mut self, conn: ConnId, records_digest: u64, now: Now) {
        let own = self.membership.digest();
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.digest = Some(records_digest);
        if records_digest != own && now.monotonic >= connection.records_at + RECORDS_INTERVAL {
            connection.records_at = now.monotonic;
            self.tell_records(conn);
        }
    }

    /// Sends everything that counts.
    pub(crate) fn tell_records(&mut self, conn: ConnId) {
        let records: Vec<pb::Signed> = self
            .membership
            .signed_records()
            .into_iter()
            .map(|(_, signed)| signed)
            .collect();
        let profiles: Vec<pb::Signed> = self
            .membership
            .signed_profiles()
            .into_iter()
            .map(|(_, signed)| signed)
            .collect();
        self.tell(conn, &records, &profiles);
    }

    pub(crate) fn tell_all(&mut self, records: &[pb::Signed], profiles: &[pb::Signed]) {
        let active: Vec<ConnId> = self.peers.values().filter_map(|peer| peer.active).collect();
        for conn in active {
            self.tell(conn, records, profiles);
        }
    }

    fn tell(&mut self, conn: ConnId, records: &[pb::Signed], profiles: &[pb::Signed]) {
        let mut message = pb::Records::default();
        let mut bytes = 0;
        let mut messages = Vec::new();
        let items = records
            .iter()
            .map(|r| (true, r))
            .chain(profiles.iter().map(|p| (false, p)));
        for (is_record, signed) in items {
            bytes += signed.encoded_len() + 8;
            if bytes > PART_BYTES {
                messages.push(std::mem::take(&mut message));
                bytes = signed.encoded_len() + 8;
            }
            if is_record {
                message.records.push(signed.clone());
            } else {
                message.profiles.push(signed.clone());
            }
        }
        if message != pb::Records::default() {
            messages.push(message);
        }
        for message in messages {
            self.send(conn, Message::Records(message));
        }
    }
}
