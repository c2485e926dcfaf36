//! From a connection to a session: who the peer is, which of two connections stays, what is said on it.

use crate::{
    Action, ConnId, Crypto, Federation, MemberKey, Now, Refusal, Standing,
    codec::Writer,
    connection::Connection,
    limits::{
        CONNECTIONS_MAX, DEPTH_MAX, DIAL_BACKOFF, DIAL_BACKOFF_MAX, EPOCH_INTERVAL, EPOCH_JUMP_MAX,
        HEARTBEAT_INTERVAL, NAMELESS_MAX, PART_BYTES, PENALTY, RECORDS_INTERVAL,
    },
};
use prost::Message as _;
use std::{sync::Arc, time::Duration};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{Code, TrustDomain};

/// Forged records on one connection before it is closed: each costs the check of a signature.
const FORGED_MAX: usize = 8;

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
    pub(crate) fn send(&mut self, conn: ConnId, message: Message) {
        self.out.push(Action::Send {
            conn,
            message: pb::PeerMessage {
                message: Some(message),
            },
        });
    }

    pub(crate) fn connected(
        &mut self,
        conn: ConnId,
        dialled: Option<Arc<str>>,
        trust_domain: TrustDomain,
        exporter: [u8; 32],
        now: Now,
    ) {
        if let Some(cluster) = &dialled
            && let Some(peer) = self.peers.get_mut(cluster)
        {
            peer.dialling = None;
        }
        // One trust domain takes no place from another, whatever it opens and says nothing on.
        let nameless = self.connections.values();
        let nameless = nameless.filter(|other| other.peer.is_none() && other.trust_domain == trust_domain);
        if self.connections.len() >= CONNECTIONS_MAX
            || nameless.count() >= NAMELESS_MAX
            || !self.is_member()
            || self.connections.contains_key(&conn)
        {
            self.out.push(Action::Close { conn });
            return;
        }
        let (epoch, instance) = (self.epoch, self.instance);
        let proof = hello_proof(&exporter, &self.own.cluster, epoch, instance, dialled.is_some());
        let hello = pb::Hello {
            version: self.own.version.clone(),
            features: Vec::new(),
            cluster: self.own.cluster.to_string(),
            epoch,
            instance,
            proof: self.crypto.sign(&proof),
            chain: self.membership.chain(&self.own.cluster),
        };
        self.connections.insert(
            conn,
            Connection {
                dialled,
                trust_domain,
                exporter,
                opened: now.monotonic,
                heard: now.monotonic,
                heartbeat_at: now.monotonic + HEARTBEAT_INTERVAL,
                peer: None,
                instance: 0,
                started: false,
                sent: None,
                outstanding: None,
                full_at: None,
                receiving: None,
                resyncing: false,
                synced: false,
                records_at: now.monotonic,
                digest: None,
                forged: 0,
            },
        );
        self.send(conn, Message::Hello(hello));
    }

    pub(crate) fn received(&mut self, conn: ConnId, message: pb::PeerMessage, now: Now) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return; // closed here while it was under way
        };
        connection.heard = now.monotonic;
        let peer = connection.peer.clone();
        if let Some(peer) = peer.as_ref().and_then(|peer| self.peers.get_mut(peer)) {
            peer.heard = now.monotonic;
        }
        let result = match (message.message, peer) {
            (Some(Message::Hello(hello)), None) => self.hello(conn, &hello, now),
            (Some(Message::Refused(refused)), peer) => {
                self.refused(conn, &refused, peer, now);
                Ok(())
            }
            (Some(Message::Start(start)), Some(peer)) => self.start_exports(conn, &peer, &start, now),
            (Some(Message::Records(records)), Some(peer)) => self.records(conn, &peer, &records, now),
            (Some(Message::Exports(part)), Some(peer)) => self.exports_part(conn, &peer, part, now),
            (Some(Message::Ack(ack)), Some(_)) => {
                self.ack(conn, ack.seq, now);
                Ok(())
            }
            (Some(Message::Resync(_)), Some(_)) => {
                self.resync_asked(conn, now);
                Ok(())
            }
            (Some(Message::Heartbeat(heartbeat)), Some(_)) => {
                self.heartbeat(conn, heartbeat.records_digest, now);
                Ok(())
            }
            (None, Some(_)) => Ok(()), // of a later version
            (_, _) => Err(Refusal::new(Code::PeerProtocol, "a message out of its order")),
        };
        if let Err(refusal) = result {
            self.refuse(conn, refusal, now);
        }
    }

    /// Says why, closes, and lets a member that broke the rules wait.
    pub(crate) fn refuse(&mut self, conn: ConnId, refusal: Refusal, now: Now) {
        let Some(connection) = self.connections.get(&conn) else {
            return; // closed here while it was under way
        };
        let known = connection.peer.as_ref().or(connection.dialled.as_ref()).cloned();
        let at_fault = matches!(
            refusal.code,
            Code::PeerProtocol | Code::ExportTooLarge | Code::MembershipForged | Code::MemberVersion
        );
        self.part(conn, refusal, now);
        if at_fault && let Some(peer) = known.and_then(|cluster| self.peers.get_mut(&cluster)) {
            peer.next_dial = now.monotonic + PENALTY;
        }
    }

    /// Says why, and closes.
    pub(crate) fn part(&mut self, conn: ConnId, refusal: Refusal, now: Now) {
        let refusal = match self.connections.get(&conn).and_then(|of| self.supposed(of)) {
            Some(cluster) => refusal.of(&cluster),
            None => refusal,
        };
        self.send(
            conn,
            Message::Refused(pb::Refused {
                code: refusal.code.to_string(),
                cause: refusal.cause.clone(),
            }),
        );
        self.audit(refusal, now);
        self.end(conn, now);
    }

    /// Who is at the other end, for people: by its proof; by whom was dialled; by its certificate, if one member alone
    /// has that trust domain.
    fn supposed(&self, connection: &Connection) -> Option<Arc<str>> {
        let named = connection.peer.as_ref().or(connection.dialled.as_ref());
        if named.is_some() {
            return named.cloned();
        }
        let members = self.membership.view().values();
        let mut of = members.filter(|member| member.record.trust_domain == connection.trust_domain);
        match (of.next(), of.next()) {
            (Some(one), None) => Some(one.record.cluster.clone()),
            (_, _) => None,
        }
    }

    fn refused(&mut self, conn: ConnId, refused: &pb::Refused, peer: Option<Arc<str>>, now: Now) {
        let dialled = self
            .connections
            .get(&conn)
            .and_then(|connection| connection.dialled.clone());
        let code = Code::find(&refused.code).unwrap_or(Code::PeerProtocol);
        let refusal = Refusal::new(code, format!("the peer refused: {}", refused.cause));
        if let Some(peer) = peer
            .as_ref()
            .or(dialled.as_ref())
            .and_then(|peer| self.peers.get_mut(peer))
        {
            peer.said = code.message(&refusal.cause);
        }
        // "Unknown" is how a new member is greeted by those that have not heard of it yet.
        if code != Code::MemberUnknown {
            self.audit(
                match peer.or(dialled) {
                    Some(cluster) => refusal.of(&cluster),
                    None => refusal,
                },
                now,
            );
        }
        self.end(conn, now);
    }

    fn hello(&mut self, conn: ConnId, hello: &pb::Hello, now: Now) -> Result<(), Refusal> {
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
            (Some(member), _, _) => (member.record.key, member.record.trust_domain.clone()),
            (None, Some(admission), _) => (admission.record.key, admission.record.trust_domain.clone()),
            (None, None, Some(member)) => (member.record.key, member.record.trust_domain.clone()),
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
        if expected != trust_domain {
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

    fn start_exports(
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

    fn records(
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

    fn heartbeat(&mut self, conn: ConnId, records_digest: u64, now: Now) {
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

    pub(crate) fn closed(&mut self, conn: ConnId, now: Now) {
        let dialled = self.forget_connection(conn);
        if let Some(cluster) = dialled {
            self.back_off(&cluster, now);
        }
    }

    /// Sessions that this side dialled are to show its present certificate; the others are for their diallers to move.
    pub(crate) fn renew(&mut self) {
        for peer in self.peers.values_mut() {
            let session = peer.active.and_then(|conn| self.connections.get(&conn));
            peer.renewing |= session.is_some_and(|session| session.dialled.is_some());
        }
    }

    pub(crate) fn dial_failed(&mut self, cluster: &Arc<str>, now: Now) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.dialling = None;
        }
        self.back_off(cluster, now);
    }

    /// Closes, and counts it as a failed dial if this side dialled.
    pub(crate) fn end(&mut self, conn: ConnId, now: Now) {
        self.out.push(Action::Close { conn });
        self.closed(conn, now);
    }

    /// Closes one that is not needed.
    pub(crate) fn drop_connection(&mut self, conn: ConnId) {
        self.out.push(Action::Close { conn });
        self.forget_connection(conn);
    }

    /// Returns the member that was dialled.
    fn forget_connection(&mut self, conn: ConnId) -> Option<Arc<str>> {
        let connection = self.connections.remove(&conn)?;
        let peer = connection.peer.as_ref().and_then(|peer| self.peers.get_mut(peer));
        if let Some(peer) = peer
            && peer.active == Some(conn)
        {
            peer.active = None;
            peer.good_since = None;
        }
        connection.dialled
    }

    fn back_off(&mut self, cluster: &Arc<str>, now: Now) {
        let share = self.random(512);
        if let Some(peer) = self.peers.get_mut(cluster) {
            let wait = (DIAL_BACKOFF * 2u32.saturating_pow(peer.failures.min(16))).min(DIAL_BACKOFF_MAX);
            peer.failures = peer.failures.saturating_add(1);
            let wait = wait / 2 + wait * u32::try_from(share).unwrap_or(0) / 1024;
            peer.next_dial = peer.next_dial.max(now.monotonic + wait);
        }
    }

    /// Ends everything with a cluster that is no member any more, or has another key.
    pub(crate) fn drop_peer(&mut self, cluster: &Arc<str>, code: Code) {
        let conns: Vec<ConnId> = self
            .connections
            .iter()
            .filter(|(_, connection)| {
                connection.peer.as_ref().or(connection.dialled.as_ref()) == Some(cluster)
            })
            .map(|(conn, _)| *conn)
            .collect();
        for conn in conns {
            self.send(
                conn,
                Message::Refused(pb::Refused {
                    code: code.to_string(),
                    cause: cluster.to_string(),
                }),
            );
            self.drop_connection(conn);
        }
        self.peers.remove(cluster);
        self.changed.insert(cluster.clone());
    }

    /// The public key of a member that is one now.
    pub(crate) fn key_in_use(&self, key: &MemberKey) -> bool {
        self.membership
            .view()
            .values()
            .any(|member| member.is_live() && member.record.key == *key)
    }

    /// Time since a moment, for messages.
    pub(crate) fn since(now: Now, at: Duration) -> Duration {
        now.monotonic.saturating_sub(at)
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
