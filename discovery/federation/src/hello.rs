//! Who a peer is, which of two connections to it stays, and where both go on.

use crate::{
    Action, ConnId, Crypto, Federation, Now, Refusal, Standing,
    codec::Writer,
    limits::{ALIASES_MAX, DEPTH_MAX, EPOCH_INTERVAL, EPOCH_JUMP_MAX},
};
use std::sync::Arc;
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::Code;

/// What the member key signs in a Hello.
fn hello_proof(exporter: &[u8; 32], cluster: &str, epoch: u64, instance: u64, dialled: bool) -> Vec<u8> {
    Writer::new(b"tombolo hello\0\x01")
        .bytes(exporter)
        .text(cluster)
        .number(epoch)
        .number(instance)
        .flag(dialled)
        .finish()
}

/// At most one minor release apart, of one major release.
pub(crate) fn versions_fit(own: &str, peer: &str) -> bool {
    let parse = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.split('.');
        let (major, minor) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        parts.next().map(|_| (major, minor))
    };
    match (parse(own), parse(peer)) {
        (Some(own), Some(peer)) => own.0 == peer.0 && own.1.abs_diff(peer.1) <= 1,
        _ => false,
    }
}

impl<C: Crypto> Federation<C> {
    /// The first message of this side.
    pub(crate) fn greeting(&self, exporter: &[u8; 32], dialled: bool) -> Message {
        let (epoch, instance) = (self.epoch, self.instance);
        let proof = hello_proof(exporter, &self.own.cluster, epoch, instance, dialled);
        let names = std::iter::once(&self.own.trust_domain).chain(&self.own.also);
        Message::Hello(pb::Hello {
            version: self.own.version.clone(),
            features: Vec::new(),
            cluster: self.own.cluster.to_string(),
            epoch,
            instance,
            proof: self.crypto.sign(&proof),
            chain: self.membership.chain(&self.own.cluster),
            trust_domains: names.map(ToString::to_string).collect(),
        })
    }

    pub(crate) fn hello(&mut self, conn: ConnId, hello: &pb::Hello, now: Now) -> Result<(), Refusal> {
        let Some(connection) = self.connections.get(&conn) else {
            return Ok(());
        };
        let (dialled, trust_domain) = (connection.dialled.clone(), connection.trust_domain.clone());
        let exporter = connection.exporter;
        let unproven = |what: &str| {
            Err(Refusal::new(
                Code::PeerProof,
                format!("{:?}: {what}", hello.cluster),
            ))
        };
        if !versions_fit(&self.own.version, &hello.version) {
            return Err(Refusal::new(
                Code::MemberVersion,
                format!("{:?} here, {:?} there", self.own.version, hello.version),
            ));
        }
        let cluster: Arc<str> = hello.cluster.as_str().into();
        if cluster == self.own.cluster {
            return unproven("that is the name of this cluster");
        }
        if dialled.as_ref().is_some_and(|dialled| *dialled != cluster) {
            return unproven("another member was dialled");
        }
        // Never heard of; or removed, as far as is known here, and admitted again since then.
        let unknown = self.membership.live(&cluster).is_none() && !self.admissions.contains_key(&cluster);
        if unknown && hello.chain.len() <= DEPTH_MAX + 1 {
            // Each record proves itself; what they say of others is no more than gossip.
            self.take(&hello.chain, &[], None, now);
        }
        let member = self.membership.view().get(&cluster);
        let admission = self.admissions.get(&cluster);
        let live = member.filter(|member| member.is_live());
        let (key, expected) = match (live, admission, member) {
            (Some(member), _, _) => (member.record.key, member.may_come_as(&trust_domain)),
            (None, Some(admission), _) => {
                let record = &admission.record;
                (record.key, record.has_name(&trust_domain))
            }
            (None, None, Some(member)) => (member.record.key, member.may_come_as(&trust_domain)),
            (None, None, None) => return Err(Refusal::new(Code::MemberUnknown, &cluster)),
        };
        let is_pending = live.is_none() && admission.is_some();
        let standing = member.map(|member| member.standing);
        let proof = hello_proof(
            &exporter,
            &cluster,
            hello.epoch,
            hello.instance,
            dialled.is_none(),
        );
        if !expected {
            return unproven("another trust domain");
        }
        if !self.crypto.verify(&key, &proof, &hello.proof) {
            return unproven("the signature does not fit");
        }
        if is_pending {
            self.confirm_admission(&cluster, now)?;
        } else if live.is_none() {
            // It proved to be who it was: it may learn what became of it.
            self.tell_records(conn);
            let code = match standing {
                Some(Standing::Contested) => Code::MemberContested,
                Some(Standing::Removed | Standing::Live) | None => Code::MemberRemoved,
            };
            return Err(Refusal::new(code, &cluster));
        }
        self.established(conn, &cluster, hello, now);
        Ok(())
    }

    /// The peer is who it says. Settles which connection stays.
    fn established(&mut self, conn: ConnId, cluster: &Arc<str>, hello: &pb::Hello, now: Now) {
        let Some(peer) = self.peers.get_mut(cluster) else {
            return;
        };
        let mut epoch_seen = 0;
        let mut restored = false;
        // Shown to people: what versions look like fits.
        peer.version = hello.version.chars().take(32).collect::<String>().into();
        let names = hello.trust_domains.iter().take(ALIASES_MAX + 1);
        let names = names.filter_map(|name| name.parse().ok()).collect();
        if peer.names != names {
            peer.names = names;
            self.changed.insert(cluster.clone());
        }
        match peer.seen {
            Some((epoch, instance)) if hello.epoch <= epoch && hello.instance != instance => {
                restored = true;
                epoch_seen = epoch;
            }
            Some(_) | None => peer.seen = Some((hello.epoch, hello.instance)),
        }
        let (active, have) = (peer.active, (peer.held.epoch, peer.held.instance, peer.held.seq));
        let start = pb::Start {
            have_epoch: have.0,
            have_instance: have.1,
            have_seq: have.2,
            epoch_seen,
        };
        if restored {
            // No session before it has raised its epoch: a copy of a member that is alive would replace it otherwise.
            self.send(conn, Message::Start(start));
            let cause = format!("epoch {} after {epoch_seen}", hello.epoch);
            self.audit(Refusal::new(Code::PeerRestored, cause).of(cluster), now);
            self.end(conn, now);
            return;
        }
        let own = &self.own.cluster;
        let dialler = |dialled: &Option<Arc<str>>| {
            if dialled.is_some() {
                own.clone()
            } else {
                cluster.clone()
            }
        };
        let new_by = self
            .connections
            .get(&conn)
            .map(|connection| dialler(&connection.dialled));
        let old = active.and_then(|active| self.connections.get(&active));
        if let (Some(active), Some(old), Some(new_by)) = (active, old, new_by) {
            let old_by = dialler(&old.dialled);
            let keeps_old = old.instance == hello.instance && old_by < new_by;
            if keeps_old {
                self.drop_connection(conn);
                return;
            }
            self.drop_connection(active);
        }
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.peer = Some(cluster.clone());
            connection.instance = hello.instance;
            connection.records_at = now.monotonic;
        }
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.active = Some(conn);
            peer.heard = now.monotonic;
            peer.good_since = None;
            peer.renewing = false;
            peer.said.clear();
        }
        self.send(conn, Message::Start(start));
        self.tell_records(conn);
    }

    pub(crate) fn start_exports(
        &mut self,
        conn: ConnId,
        peer: &Arc<str>,
        start: &pb::Start,
        now: Now,
    ) -> Result<(), Refusal> {
        if start.epoch_seen >= self.epoch {
            // This discovery was restored from a backup (or runs twice): it goes above everything that was seen.
            let due = self
                .raised_at
                .is_none_or(|at| now.monotonic >= at + EPOCH_INTERVAL);
            if start.epoch_seen - self.epoch <= EPOCH_JUMP_MAX && due {
                self.raised_at = Some(now.monotonic);
                self.epoch = start.epoch_seen.saturating_add(1);
                self.out.push(Action::Persist(vec![self.self_write()]));
                let cause = format!("{peer} has seen epoch {}", start.epoch_seen);
                self.audit(
                    Refusal::new(Code::PeerRestored, cause).of(&self.own.cluster.clone()),
                    now,
                );
            }
            self.end(conn, now);
            return Ok(());
        }
        let Some(connection) = self.connections.get_mut(&conn) else {
            return Ok(());
        };
        if connection.started {
            return Err(Refusal::new(Code::PeerProtocol, "a second start"));
        }
        connection.started = true;
        if (start.have_instance, start.have_seq) == (self.instance, self.seq) {
            // It holds everything: an empty change says so.
            connection.sent = Some((self.seq, self.exports.clone()));
            let part = pb::ExportsPart {
                from_seq: self.seq,
                to_seq: self.seq,
                last: true,
                ..pb::ExportsPart::default()
            };
            self.send(conn, Message::Exports(part));
        }
        self.flush(conn, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_release_apart() {
        for (own, peer, fits) in [
            ("0.4.1", "0.4.0", true),
            ("0.4.1", "0.5.9-rc.1", true),
            ("0.4.1", "0.3.0", true),
            ("0.4.1", "0.6.0", false),
            ("0.4.1", "0.2.0", false),
            ("1.0.0", "0.9.0", false),
            ("0.4.1", "0.4", false),
            ("0.4.1", "", false),
            ("0.4.1", "x.y.z", false),
            ("0.4.1", "0.99999999999.0", false),
        ] {
            assert_eq!(versions_fit(own, peer), fits, "{own} {peer}");
        }
    }
}
