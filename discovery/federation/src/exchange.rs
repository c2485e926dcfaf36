//! Exports on a session: what is sent, and what is believed.

use crate::{
    Action, ConnId, Crypto, ExportedService, Exports, Federation, Now, Refusal, ServiceName,
    connection::Receiving,
    exports::{check_mesh_domain, gateways_from_proto},
    limits::{ALIASES_MAX, EXPORTS_BYTES_MAX, PART_BYTES, RESYNC_INTERVAL, SERVICES_MAX},
};
use imbl::ordmap::DiffItem;
use prost::Message as _;
use std::sync::Arc;
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{Code, check_label};

/// The change from one state to another (`None`: from nothing) in parts of bounded size.
fn parts(from: Option<&(u64, Exports)>, to_seq: u64, to: &Exports) -> Vec<pb::ExportsPart> {
    let nothing = Exports::default();
    let (from_seq, old) = from.map_or((0, &nothing), |(seq, exports)| (*seq, exports));
    let mut all = Vec::new();
    let mut part = pb::ExportsPart::default();
    if from_seq == 0 || old.gateways != to.gateways {
        part.gateways = Some(pb::GatewayList {
            gateways: to.gateways.iter().map(crate::ExportedGateway::to_proto).collect(),
        });
    }
    if from_seq == 0 || old.mesh_domain != to.mesh_domain {
        part.mesh_domain = to.mesh_domain.to_string();
    }
    let mut bytes = part.encoded_len();
    for item in old.services.diff(&to.services) {
        let (service, removed) = match item {
            DiffItem::Add(_, service)
            | DiffItem::Update {
                new: (_, service), ..
            } => (Some(service.to_proto()), None),
            DiffItem::Remove(name, _) => (
                None,
                Some(pb::ServiceName {
                    namespace: name.namespace.to_string(),
                    name: name.name.to_string(),
                }),
            ),
        };
        let length = 8
            + service.as_ref().map_or(0, prost::Message::encoded_len)
            + removed.as_ref().map_or(0, prost::Message::encoded_len);
        if bytes + length > PART_BYTES {
            all.push(std::mem::take(&mut part));
            bytes = 0;
        }
        bytes += length;
        part.services.extend(service);
        part.removed.extend(removed);
    }
    all.push(part);
    let count = all.len();
    for (index, part) in all.iter_mut().enumerate() {
        part.from_seq = from_seq;
        part.to_seq = to_seq;
        part.part = u32::try_from(index).unwrap_or(u32::MAX);
        part.last = index + 1 == count;
    }
    all
}

impl<C: Crypto> Federation<C> {
    pub(crate) fn flush_all(&mut self, now: Now) {
        let active: Vec<ConnId> = self.peers.values().filter_map(|peer| peer.active).collect();
        for conn in active {
            self.flush(conn, now);
        }
    }

    /// Sends what the peer does not have, unless it still owes an acknowledgement.
    pub(crate) fn flush(&mut self, conn: ConnId, now: Now) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        let current = connection.sent.as_ref().is_some_and(|(seq, _)| *seq == self.seq);
        if !connection.started || connection.outstanding.is_some() || current {
            return;
        }
        if connection.sent.is_none() {
            if connection
                .full_at
                .is_some_and(|at| now.monotonic < at + RESYNC_INTERVAL)
            {
                return; // the timer comes back to it
            }
            connection.full_at = Some(now.monotonic);
        }
        let parts = parts(connection.sent.as_ref(), self.seq, &self.exports);
        connection.sent = Some((self.seq, self.exports.clone()));
        connection.outstanding = Some(self.seq);
        for part in parts {
            self.send(conn, Message::Exports(part));
        }
    }

    pub(crate) fn ack(&mut self, conn: ConnId, seq: u64, now: Now) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        if connection.outstanding == Some(seq) {
            connection.outstanding = None;
            self.flush(conn, now);
        }
    }

    pub(crate) fn resync_asked(&mut self, conn: ConnId, now: Now) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.sent = None;
        connection.outstanding = None;
        self.flush(conn, now);
    }

    /// Asks for everything, once until it comes.
    pub(crate) fn resync(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return;
        };
        connection.receiving = None;
        connection.synced = false;
        if !connection.resyncing {
            connection.resyncing = true;
            self.send(conn, Message::Resync(pb::Resync {}));
        }
    }

    /// Takes a part; the last one makes the change.
    pub(crate) fn exports_part(
        &mut self,
        conn: ConnId,
        cluster: &Arc<str>,
        part: pb::ExportsPart,
        now: Now,
    ) -> Result<(), Refusal> {
        let Some(member) = self.membership.live(cluster).cloned() else {
            return Ok(());
        };
        let Some(peer) = self.peers.get(cluster).filter(|peer| peer.active == Some(conn)) else {
            return Ok(());
        };
        let Some(connection) = self.connections.get_mut(&conn) else {
            return Ok(());
        };
        let held_state = (peer.held.instance, peer.held.seq);
        if connection.resyncing && part.from_seq != 0 {
            return Ok(());
        }
        if part.to_seq < part.from_seq || part.to_seq == 0 {
            return Err(Refusal::new(Code::PeerProtocol, "a state with a lower number"));
        }
        if part.part == 0 {
            if part.from_seq != 0 && held_state != (connection.instance, part.from_seq) {
                self.resync(conn);
                return Ok(());
            }
            connection.receiving = Some(Receiving {
                from: part.from_seq,
                to: part.to_seq,
                next_part: 0,
                bytes: 0,
                count: 0,
                services: Vec::new(),
                removed: Vec::new(),
                gateways: None,
                mesh_domain: None,
                refused: false,
            });
        }
        let continues = connection.receiving.as_ref().is_some_and(|receiving| {
            (receiving.from, receiving.to, receiving.next_part) == (part.from_seq, part.to_seq, part.part)
        });
        let Some(receiving) = connection.receiving.as_mut().filter(|_| continues) else {
            self.resync(conn);
            return Ok(());
        };
        receiving.next_part += 1;
        receiving.bytes += part.encoded_len();
        receiving.count += part.services.len() + part.removed.len();
        if receiving.bytes > EXPORTS_BYTES_MAX || receiving.count > 2 * SERVICES_MAX {
            return Err(Refusal::new(Code::ExportTooLarge, "one change over the limit"));
        }
        let mut refused = Vec::new();
        if let Some(list) = part.gateways {
            let (gateways, bad) = gateways_from_proto(list.gateways);
            receiving.gateways = Some(gateways);
            refused.extend(bad);
        }
        if !part.mesh_domain.is_empty() {
            match check_mesh_domain(&part.mesh_domain) {
                Ok(()) => receiving.mesh_domain = Some(part.mesh_domain.into()),
                Err(refusal) => refused.push(refusal),
            }
        }
        for name in part.removed {
            if check_label("namespace", &name.namespace).is_ok() && check_label("service", &name.name).is_ok()
            {
                receiving.removed.push(ServiceName {
                    namespace: name.namespace.into(),
                    name: name.name.into(),
                });
            }
        }
        for service in part.services {
            // One that is refused takes an earlier one of its name with it: what the peer said of it last is not true.
            let name = ServiceName {
                namespace: service.namespace.as_str().into(),
                name: service.name.as_str().into(),
            };
            let checked = ExportedService::from_proto(service).and_then(|service| {
                service.check_exporter(&member)?;
                Ok(service)
            });
            match checked {
                Ok(service) => receiving.services.push(service),
                Err(refusal) => {
                    receiving.removed.push(name);
                    refused.push(refusal);
                }
            }
        }
        receiving.refused |= !refused.is_empty();
        for refusal in refused {
            self.audit(refusal.of(cluster), now);
        }
        if part.last {
            self.apply(conn, cluster, now)
        } else {
            Ok(())
        }
    }

    fn apply(&mut self, conn: ConnId, cluster: &Arc<str>, now: Now) -> Result<(), Refusal> {
        let Some(connection) = self.connections.get_mut(&conn) else {
            return Ok(());
        };
        let Some(receiving) = connection.receiving.take() else {
            return Ok(());
        };
        let Some(peer) = self.peers.get_mut(cluster) else {
            return Ok(());
        };
        let full = receiving.from == 0;
        let mut exports = if full {
            Exports::default()
        } else {
            peer.held.exports.clone()
        };
        for name in &receiving.removed {
            exports.services.remove(name);
        }
        for service in receiving.services {
            match exports.services.get(&service.name) {
                Some(held) if **held == service => {}
                Some(_) | None => drop(exports.services.insert(service.name.clone(), Arc::new(service))),
            }
        }
        if let Some(gateways) = receiving.gateways {
            exports.gateways = gateways;
        }
        if let Some(mesh_domain) = receiving.mesh_domain {
            exports.mesh_domain = mesh_domain;
        }
        if exports.services.len() > SERVICES_MAX {
            return Err(Refusal::new(
                Code::ExportTooLarge,
                format!("over {SERVICES_MAX} services"),
            ));
        }
        let moved = receiving.from != receiving.to;
        peer.held.refused = receiving.refused || (peer.held.refused && !full);
        peer.held.epoch = peer.seen.map_or(0, |(epoch, _)| epoch);
        peer.held.instance = connection.instance;
        peer.held.seq = receiving.to;
        connection.resyncing &= !full;
        connection.synced = !connection.resyncing;
        if peer.held.exports != exports {
            peer.held.exports = exports;
            self.changed.insert(cluster.clone());
        }
        if moved {
            self.out.push(Action::SaveImports {
                cluster: cluster.clone(),
            });
            let seq = receiving.to;
            self.send(conn, Message::Ack(pb::Ack { seq }));
        }
        self.good(cluster, now);
        Ok(())
    }

    /// The record of a member changed: what it may not export goes at once, what it may now is asked for.
    pub(crate) fn refilter(&mut self, cluster: &Arc<str>, now: Now) {
        let Some(member) = self.membership.live(cluster).cloned() else {
            return;
        };
        let Some(peer) = self.peers.get_mut(cluster) else {
            return;
        };
        let outside: Vec<ServiceName> = peer
            .held
            .exports
            .services
            .values()
            .filter(|service| service.check_exporter(&member).is_err())
            .map(|service| service.name.clone())
            .collect();
        for name in &outside {
            peer.held.exports.services.remove(name);
        }
        peer.held.refused |= !outside.is_empty();
        if peer.active.is_none() {
            // Perhaps at another address now.
            peer.next_dial = peer.next_dial.min(now.monotonic);
            peer.failures = 0;
            peer.held.start_over();
        }
        let ask = peer.active.filter(|_| peer.held.refused);
        self.changed.insert(cluster.clone());
        if let Some(conn) = ask {
            self.resync(conn);
        }
    }

    /// What [`Action::SaveImports`] asks to store; `None`: nothing is held of this cluster.
    pub fn imports_value(&self, cluster: &str) -> Option<Vec<u8>> {
        let peer = self.peers.get(cluster)?;
        let held = &peer.held;
        let signs = peer.names.first();
        let stored = pb::StoredImports {
            epoch: held.epoch,
            instance: held.instance,
            // With something missing there is no state that the peer could go on from.
            seq: if held.refused { 0 } else { held.seq },
            services: held
                .exports
                .services
                .values()
                .map(|service| service.to_proto())
                .collect(),
            gateways: held
                .exports
                .gateways
                .iter()
                .map(crate::ExportedGateway::to_proto)
                .collect(),
            mesh_domain: held.exports.mesh_domain.to_string(),
            trust_domain: signs.map(ToString::to_string).unwrap_or_default(),
            former_trust_domains: peer.former.iter().map(ToString::to_string).collect(),
        };
        (held.seq > 0).then(|| stored.encode_to_vec())
    }

    /// Takes the imports of an earlier run, checked as if they came from the peer: they serve until it is back.
    pub(crate) fn load_imports(&mut self, saved: &crate::Saved) {
        for (cluster, peer) in &mut self.peers {
            let Some(member) = self.membership.live(cluster) else {
                continue;
            };
            let stored = saved
                .get(&format!("imports/{cluster}"))
                .and_then(|value| pb::StoredImports::decode(value.as_slice()).ok());
            let Some(stored) = stored else { continue };
            let count = stored.services.len();
            let services: crate::Services = stored
                .services
                .into_iter()
                .take(SERVICES_MAX)
                .filter_map(|service| ExportedService::from_proto(service).ok())
                .filter(|service| service.check_exporter(member).is_ok())
                .map(|service| (service.name.clone(), Arc::new(service)))
                .collect();
            let complete = services.len() == count;
            peer.held.refused = !complete;
            peer.held.exports = Exports {
                services,
                gateways: gateways_from_proto(stored.gateways).0,
                mesh_domain: Some(stored.mesh_domain)
                    .filter(|domain| check_mesh_domain(domain).is_ok())
                    .unwrap_or_default()
                    .into(),
            };
            peer.names = stored.trust_domain.parse().into_iter().collect();
            let former = stored.former_trust_domains.iter().take(ALIASES_MAX);
            peer.former = former.filter_map(|name| name.parse().ok()).collect();
            peer.held.epoch = stored.epoch;
            peer.held.instance = stored.instance;
            // Incomplete: the state has no number that the peer could go on from.
            peer.held.seq = if complete { stored.seq } else { 0 };
            peer.seen = (stored.epoch > 0).then_some((stored.epoch, stored.instance));
            self.changed.insert(cluster.clone());
        }
    }
}
