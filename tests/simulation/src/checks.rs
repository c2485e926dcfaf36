//! What must hold.

use crate::simulation::Simulation;
use std::collections::{BTreeMap, BTreeSet};
use tombolo_federation::Imports;

impl Simulation {
    /// What must hold whenever anything is published.
    pub(crate) fn check_imports(&self, node: usize, cluster: &str, imports: Option<&Imports>) {
        let it = &self.nodes[node];
        let Some(imports) = imports.filter(|_| !it.attacker) else {
            return;
        };
        let who = format!("{} of {cluster}", it.name);
        assert_ne!(cluster, it.name, "a cluster does not import itself");
        let Some(source) = self.find(cluster) else {
            panic!("{who}: nobody has that name")
        };
        let source = &self.nodes[source];
        assert!(
            self.model.members.contains_key(cluster) || self.at < 2_000,
            "{who}: never admitted"
        );
        let names = std::iter::once(&imports.trust_domain).chain(&imports.also);
        for name in names.chain(&imports.former) {
            assert!(source.names.contains(name), "{who}: {name} was never its name");
        }
        let grant = it.core.as_ref().and_then(|core| {
            let members = core.members();
            let status = members
                .iter()
                .find(|status| status.member.record.cluster.as_ref() == cluster)?;
            Some(status.member.record.namespaces.clone())
        });
        for (name, service) in &imports.services {
            assert!(
                grant.as_ref().is_none_or(|grant| grant.allows(&name.namespace)),
                "{who}: {name} is outside the grant"
            );
            assert!(
                service
                    .subject_alt_names
                    .iter()
                    .all(|id| source.names.contains(&id.trust_domain)),
                "{who}: {name} has identities of others"
            );
            if !source.attacker {
                let values = self.model.history.get(&(cluster.to_owned(), name.clone()));
                assert!(
                    values.is_some_and(|values| values.contains(service)),
                    "{who}: {name} is nothing that its owner ever said"
                );
            }
        }
    }

    /// What must hold when the network is whole and nothing happened for a while.
    pub(crate) fn check_healed(&self, seed: u64) {
        let live: Vec<&str> = self
            .nodes
            .iter()
            .map(|node| node.name.as_str())
            .filter(|name| self.model.is_live(name))
            .collect();
        for it in self.nodes.iter().filter(|node| !node.attacker) {
            let Some(core) = &it.core else {
                panic!("seed {seed}: {} is down", it.name)
            };
            let world = core.world();
            if !self.model.is_live(&it.name) {
                continue;
            }
            let held: Vec<&str> = world.clusters.keys().map(AsRef::as_ref).collect();
            let mut others: Vec<&str> = live.iter().filter(|name| **name != it.name).copied().collect();
            others.sort_unstable();
            assert_eq!(held, others, "seed {seed}: the members that {} knows", it.name);
            for (cluster, imports) in &world.clusters {
                let Some(source) = self.find(cluster) else {
                    continue;
                };
                let source = &self.nodes[source];
                // Two that can only dial have no way to each other; a liar's session may be closed at any time.
                let no_way = source.own.endpoints.is_empty() && it.own.endpoints.is_empty();
                if source.attacker || no_way {
                    continue;
                }
                let who = format!("seed {seed}: {} (old: {}) of {cluster}", it.name, it.old);
                assert!(!imports.stale, "{who} is stale");
                let expected = self.model.expected(cluster, &source.wanted);
                let names = |services: &tombolo_federation::Services| {
                    services.keys().map(ToString::to_string).collect::<Vec<_>>()
                };
                assert_eq!(
                    names(&imports.services),
                    names(&expected.services),
                    "{who}: services"
                );
                assert_eq!(imports.services, expected.services, "{who}");
                assert_eq!(imports.gateways, expected.gateways, "{who}: gateways");
                assert_eq!(*imports.roots_pem, *source.own.roots_pem, "{who}: roots");
                let names = std::iter::once(&imports.trust_domain).chain(&imports.also);
                let names: BTreeSet<_> = names.cloned().collect();
                let model = &self.model.members[&**cluster];
                assert_eq!(names, model.names(), "{who}: names of its trust domain");
                assert_eq!(
                    imports.trust_domain, source.own.trust_domain,
                    "{who}: the first name"
                );
            }
            let mut sessions: BTreeMap<&str, usize> = BTreeMap::new();
            for (_, peer) in core.connections() {
                *sessions.entry(peer.map_or("?", AsRef::as_ref)).or_default() += 1;
            }
            for (peer, count) in sessions {
                let liar = self.find(peer).is_none_or(|node| self.nodes[node].attacker);
                assert!(
                    count == 1 || liar,
                    "seed {seed}: {} has {count} sessions with {peer}",
                    it.name
                );
            }
        }
    }
}
