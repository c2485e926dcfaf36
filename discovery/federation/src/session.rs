//! Connections: opened, read, refused and ended.

use crate::{
    Action, ConnId, Crypto, Federation, MemberKey, Now, Refusal,
    connection::Connection,
    limits::{CONNECTIONS_MAX, DIAL_BACKOFF, DIAL_BACKOFF_MAX, HEARTBEAT_INTERVAL, NAMELESS_MAX, PENALTY},
};
use std::{sync::Arc, time::Duration};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{Code, TrustDomain};

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
        let hello = self.greeting(&exporter, dialled.is_some());
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
        self.send(conn, hello);
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
        let mut of = members.filter(|member| member.record.has_name(&connection.trust_domain));
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
