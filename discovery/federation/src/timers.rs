//! What happens because time passes, and what every call ends with.

use crate::{
    Action, ConnId, Crypto, Federation, Imports, Now, Refusal, World, Write,
    limits::{
        FLAP_WINDOW, HEARTBEAT_INTERVAL, HELLO_TIMEOUT, HOLD_DOWN, HOLD_DOWN_MAX, RESYNC_INTERVAL,
        SILENCE_MAX, STALE_AFTER,
    },
};
use std::{sync::Arc, time::Duration};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{Code, TrustDomain};

impl<C: Crypto> Federation<C> {
    /// The next moment (of the monotonic clock) at which [`crate::Event::Tick`] has something to do, and what.
    pub fn next_timeout(&self) -> Option<(Duration, &'static str)> {
        let mut next: Option<(Duration, &'static str)> = None;
        let mut at = |when: Duration, what| {
            if next.is_none_or(|(soonest, _)| when < soonest) {
                next = Some((when, what));
            }
        };
        for connection in self.connections.values() {
            if connection.peer.is_none() {
                at(connection.opened + HELLO_TIMEOUT, "hello");
            } else {
                at(connection.heartbeat_at, "heartbeat");
                at(connection.heard + SILENCE_MAX, "silence");
                if connection.started && connection.sent.is_none() && connection.outstanding.is_none() {
                    at(
                        connection.full_at.unwrap_or_default() + RESYNC_INTERVAL,
                        "full exports",
                    );
                }
            }
        }
        for (cluster, peer) in &self.peers {
            if let Some(since) = peer.dialling {
                at(since + HELLO_TIMEOUT, "dial without an answer");
            } else if self.may_dial(cluster) {
                at(peer.next_dial, "dial");
            }
            if !peer.stale {
                at(peer.heard + STALE_AFTER, "stale");
            } else if let Some(since) = peer.good_since {
                at(since + peer.hold, "end of hold-down");
            }
        }
        if !self.admissions.is_empty() {
            at(self.admissions_checked + HEARTBEAT_INTERVAL, "admissions");
        }
        next
    }

    fn may_dial(&self, cluster: &Arc<str>) -> bool {
        let endpoints = self
            .membership
            .live(cluster)
            .is_some_and(|member| !member.endpoints().is_empty());
        let peer = self.peers.get(cluster);
        let active = peer.is_some_and(|peer| peer.active.is_some() && !peer.renewing);
        let under_way = self
            .connections
            .values()
            .any(|connection| connection.peer.is_none() && connection.dialled.as_ref() == Some(cluster));
        self.is_member() && endpoints && !active && !under_way
    }

    /// The session of a member is in step: its hold-down starts, if it has not.
    pub(crate) fn good(&mut self, cluster: &Arc<str>, now: Now) {
        if let Some(peer) = self.peers.get_mut(cluster) {
            peer.failures = 0;
            if peer.good_since.is_none() {
                peer.good_since = Some(now.monotonic);
            }
        }
    }

    fn timers(&mut self, now: Now) {
        let at = now.monotonic;
        let (mut silent, mut nameless, mut due, mut waiting) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (conn, connection) in &mut self.connections {
            if connection.peer.is_none() {
                if at >= connection.opened + HELLO_TIMEOUT {
                    nameless.push((*conn, connection.dialled.is_some()));
                }
            } else if at >= connection.heard + SILENCE_MAX {
                silent.push(*conn);
            } else {
                if at >= connection.heartbeat_at {
                    connection.heartbeat_at = at + HEARTBEAT_INTERVAL;
                    due.push(*conn);
                }
                if connection.sent.is_none() {
                    waiting.push(*conn);
                }
            }
        }
        for conn in silent {
            self.end(conn, now);
        }
        for (conn, dialled) in nameless {
            if dialled {
                self.end(conn, now);
            } else {
                let cause = format!("no hello within {} s", HELLO_TIMEOUT.as_secs());
                self.part(conn, Refusal::new(Code::PeerProtocol, cause), now);
            }
        }
        if !due.is_empty() {
            let records_digest = self.membership.digest();
            for conn in due {
                self.send(conn, Message::Heartbeat(pb::Heartbeat { records_digest }));
            }
        }
        for conn in waiting {
            self.flush(conn, now);
        }
        let clusters: Vec<Arc<str>> = self.peers.keys().cloned().collect();
        for cluster in clusters {
            self.peer_timers(&cluster, now);
        }
        if at >= self.admissions_checked + HEARTBEAT_INTERVAL {
            self.admissions_checked = at;
            self.expire_admissions(now);
        }
    }

    fn peer_timers(&mut self, cluster: &Arc<str>, now: Now) {
        let at = now.monotonic;
        let may_dial = self.may_dial(cluster);
        let Some(peer) = self.peers.get_mut(cluster) else {
            return;
        };
        let mut turned_stale = false;
        if !peer.stale && at >= peer.heard + STALE_AFTER {
            peer.stale = true;
            let flaps = peer.cleared_at.is_some_and(|cleared| at < cleared + FLAP_WINDOW);
            peer.hold = if flaps {
                (peer.hold * 2).clamp(HOLD_DOWN, HOLD_DOWN_MAX)
            } else {
                HOLD_DOWN
            };
            turned_stale = true;
        } else if peer.stale && peer.good_since.is_some_and(|since| at >= since + peer.hold) {
            peer.stale = false;
            peer.cleared_at = Some(at);
            self.changed.insert(cluster.clone());
        }
        if peer.dialling.is_some_and(|since| at >= since + HELLO_TIMEOUT) {
            peer.dialling = None;
        }
        let dial = may_dial && peer.dialling.is_none() && at >= peer.next_dial;
        if dial {
            peer.dialling = Some(at);
        }
        if turned_stale {
            self.changed.insert(cluster.clone());
            let since = Self::since(now, self.peers.get(cluster).map_or(at, |peer| peer.heard));
            self.audit(
                Refusal::new(
                    Code::ClusterStale,
                    format!("nothing heard for {} s", since.as_secs()),
                )
                .of(cluster),
                now,
            );
        }
        let shown = self.shown_after(self.peers.get(cluster).map_or(0, |peer| peer.failures));
        if dial && let Some(member) = self.membership.live(cluster) {
            self.out.push(Action::Dial {
                cluster: cluster.clone(),
                endpoints: member.endpoints().to_vec(),
                names: member.names().cloned().collect(),
                shown,
                roots_pem: member.roots_pem().to_owned(),
            });
        }
    }

    fn expire_admissions(&mut self, now: Now) {
        let expired: Vec<Arc<str>> = self
            .admissions
            .iter()
            .filter(|(_, admission)| now.unix_ms >= admission.expires_unix_ms)
            .map(|(cluster, _)| cluster.clone())
            .collect();
        for cluster in expired {
            self.admissions.remove(&cluster);
            let key = format!("admission/{cluster}");
            self.out.push(Action::Persist(vec![Write::Delete { key }]));
            let cause = "it was admitted and never came";
            self.audit(Refusal::new(Code::InviteExpired, cause).of(&cluster), now);
        }
    }

    /// Ends every call: profile, timers, then the world if it differs.
    pub(crate) fn finish(&mut self, now: Now) -> Vec<Action> {
        self.refresh_profile(now);
        self.timers(now);
        let changed = std::mem::take(&mut self.changed);
        if !changed.is_empty() {
            let mut world = (*self.world).clone();
            let mut differs = std::collections::BTreeSet::new();
            for cluster in changed {
                let imports = self.imports(&cluster).map(Arc::new);
                if world.clusters.get(&cluster) == imports.as_ref() {
                    continue;
                }
                match imports {
                    Some(imports) => drop(world.clusters.insert(cluster.clone(), imports)),
                    None => drop(world.clusters.remove(&cluster)),
                }
                differs.insert(cluster);
            }
            if !differs.is_empty() {
                self.world = Arc::new(World {
                    clusters: world.clusters,
                });
                self.out.push(Action::Publish {
                    world: self.world.clone(),
                    changed: differs,
                });
            }
        }
        std::mem::take(&mut self.out)
    }

    fn imports(&self, cluster: &Arc<str>) -> Option<Imports> {
        let member = self.membership.live(cluster)?;
        let peer = self.peers.get(cluster)?;
        let signs = peer.names.first().filter(|name| member.has_name(name));
        let trust_domain = signs.unwrap_or(&member.record.trust_domain);
        let also = member.names().filter(|name| *name != trust_domain);
        let others = || self.membership.view().values().filter(|other| other.is_live());
        let free = |name: &&TrustDomain| !others().any(|other| other.has_name(name));
        Some(Imports {
            cluster: cluster.clone(),
            trust_domain: trust_domain.clone(),
            also: also.cloned().collect(),
            former: peer.former.iter().filter(free).cloned().collect(),
            roots_pem: member.roots_pem().into(),
            gateways: peer.held.exports.gateways.clone(),
            services: peer.held.exports.services.clone(),
            mesh_domain: peer.held.exports.mesh_domain.clone(),
            stale: peer.stale,
        })
    }

    /// Connections that are open, for tests and metrics.
    pub fn connections(&self) -> impl Iterator<Item = (ConnId, Option<&Arc<str>>)> {
        self.connections
            .iter()
            .map(|(conn, connection)| (*conn, connection.peer.as_ref()))
    }
}
