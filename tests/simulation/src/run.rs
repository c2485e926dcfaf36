//! The story of a run, and the checks.

use crate::{
    keys::Keys,
    model::ModelMember,
    simulation::{Millis, Node, Simulation},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_federation::{
    Crypto, Event, ExportedGateway, ExportedPort, ExportedService, Grant, Invite, Locality, Presence,
    ServiceName, Standing,
};
use tombolo_types::{InviteToken, SpiffeId};

/// What a run was made of.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    /// Clusters, liars among them.
    pub clusters: usize,
    /// Things that happened.
    pub steps: u64,
    /// Joins that succeeded.
    pub joins: u64,
    /// Members removed.
    pub removals: u64,
    /// Changes of the names of a trust domain.
    pub renamings: u64,
    /// Restarts, those from a backup too.
    pub restarts: u64,
    /// Refusals by code.
    pub audits: BTreeMap<&'static str, u64>,
}

const NAMESPACES: [&str; 4] = ["shop", "bank", "secret", "play"];
/// After the last trouble: longer than every back-off, hold-down and penalty.
const HEALING: Millis = 120_000;
const CALM: Millis = 15_000;

/// Runs one seed; trust domains are renamed in it, or not.
///
/// # Panics
/// When something is that must never be, naming it.
pub fn run(seed: u64, renames: bool) -> Outcome {
    let mut sim = Simulation::new(seed, renames);
    let mut outcome = Outcome::default();
    let count = 3 + sim.random.index(8);
    for index in 0..count {
        let attacker = index > 1 && sim.random.chance(15);
        let outbound_only = index > 0 && sim.random.chance(15);
        let name = format!("{}{index}", ["zinc", "amber", "mint"][sim.random.index(3)]);
        let node = sim.add(&name, attacker, outbound_only);
        sim.change_exports(node);
    }
    let founder = sim.nodes[0].name.clone();
    sim.model.members.insert(
        founder,
        ModelMember {
            grant: Grant::All,
            may_admit: true,
            parent: None,
            live: true,
            first: sim.nodes[0].own.trust_domain.clone(),
            also: BTreeSet::new(),
        },
    );
    sim.rough = sim.random.chance(80);
    for index in 1..count {
        sim.invite_and_join(index, &mut outcome);
        let pause = sim.random.below(4_000);
        sim.advance(pause);
    }
    let troubles = 10 + sim.random.below(50);
    for _ in 0..troubles {
        sim.trouble(&mut outcome);
        sim.rename(&mut outcome);
        let pause = sim.random.below(6_000);
        sim.advance(pause);
    }
    sim.heal(&mut outcome);
    sim.check_healed(seed);
    sim.churn = 0;
    sim.advance(CALM);
    assert_eq!(
        sim.churn, 0,
        "seed {seed}: no connection ends and nothing changes when nothing happens"
    );
    sim.check_healed(seed);
    outcome.clusters = count;
    outcome.steps = sim.steps;
    outcome.audits = sim.audits;
    outcome
}

impl Simulation {
    pub(crate) fn advance(&mut self, by: Millis) {
        let until = self.at + by;
        self.run_until(until);
    }

    fn change_exports(&mut self, node: usize) {
        let td = self.nodes[node].own.trust_domain.clone();
        let mut wanted = self.nodes[node].wanted.clone();
        for _ in 0..=self.random.below(3) {
            let name = ServiceName {
                namespace: NAMESPACES[self.random.index(NAMESPACES.len())].into(),
                name: ["web", "db", "api"][self.random.index(3)].into(),
            };
            if self.random.chance(20) {
                wanted.services.remove(&name);
                continue;
            }
            let id = SpiffeId::new(td.clone(), &name.namespace, &name.name).expect("valid names");
            let presences = (0..=self.random.below(2)).map(|zone| Presence {
                network: "".into(),
                locality: Locality {
                    region: "r".into(),
                    zone: zone.to_string().into(),
                    subzone: "".into(),
                },
                healthy: u32::try_from(self.random.below(5)).unwrap_or(0),
                capacity: u32::try_from(self.random.below(50)).unwrap_or(0),
            });
            let service = ExportedService {
                name: name.clone(),
                ports: vec![ExportedPort {
                    port: 80,
                    protocol: "HTTP".into(),
                    name: "http".into(),
                }],
                subject_alt_names: vec![id],
                presences: presences.collect(),
            };
            let service = service.checked().expect("a valid service");
            wanted.services.insert(name, Arc::new(service));
        }
        if self.random.chance(30) {
            wanted.gateways = (0..self.random.below(3))
                .map(|index| ExportedGateway {
                    network: "".into(),
                    address: format!("192.0.2.{index}").into(),
                    hbone_port: 15008,
                    quic_port: None,
                    locality: Locality::default(),
                })
                .collect();
        }
        let name = self.nodes[node].name.clone();
        self.model.remember(&name, &wanted);
        self.nodes[node].wanted = wanted.clone();
        self.handle(node, Event::Exports(wanted));
    }

    /// An operator makes an invite somewhere and uses it on `joiner`.
    fn invite_and_join(&mut self, joiner: usize, outcome: &mut Outcome) {
        let name = self.nodes[joiner].name.clone();
        let may_invite = |sim: &Self, node: usize| {
            let it = &sim.nodes[node];
            let member = sim.model.members.get(&it.name);
            node != joiner && !it.attacker && member.is_some_and(|member| member.live && member.may_admit)
        };
        let inviters: Vec<usize> = (0..self.nodes.len())
            .filter(|node| may_invite(self, *node))
            .collect();
        if inviters.is_empty() || self.model.is_live(&name) {
            return;
        }
        let inviter = inviters[self.random.index(inviters.len())];
        let cut = self.cut.contains(&(inviter.min(joiner), inviter.max(joiner)));
        if cut || self.nodes[inviter].core.is_none() || self.nodes[joiner].core.is_none() {
            return;
        }
        // One that cannot read all records cannot join.
        if self.nodes[joiner].old && self.model.any_alias() {
            return;
        }
        let invited = self.nodes[joiner].own.trust_domain.clone();
        let check = self.nodes[inviter]
            .core
            .as_ref()
            .map(|core| core.check_invite(&name, &invited, false));
        if !matches!(check, Some(Ok(()))) {
            return;
        }
        let seed = [self.random.below(256) as u8; 32];
        let invite_key = Keys::new(&seed, self.real_keys);
        let mut list = vec!["shop"];
        list.extend(self.random.chance(50).then_some("bank"));
        let grant = if self.random.chance(20) {
            Grant::All
        } else {
            Grant::from_list(list).expect("namespaces")
        };
        let may_admit = !self.nodes[joiner].attacker && self.random.chance(30);
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.random.next().to_be_bytes());
        let mut invite = Invite {
            id,
            public_key: invite_key.public_key(),
            cluster: name.as_str().into(),
            trust_domain: invited,
            namespaces: grant.clone(),
            may_admit,
            share_trust_domain: false,
            expires_unix_ms: self.now(inviter).unix_ms + 600_000,
            used_by: None,
        };
        let token = InviteToken {
            id,
            root_pin: [0; 32],
            seed: seed.into(),
            trust_domain: self.nodes[inviter].own.trust_domain.clone(),
            cluster: name.clone(),
            endpoints: vec!["x:443".into()],
        };
        // The answer may be lost some times; asking again must be harmless.
        for attempt in 0..3 {
            let exporter = [self.random.below(99) as u8; 32];
            let now = self.now(joiner);
            let Some(core) = &self.nodes[joiner].core else {
                return;
            };
            let Ok(request) = core.join_request(&token, &invite_key, &exporter, false) else {
                return;
            };
            let inviter_now = self.now(inviter);
            let Some(core) = &mut self.nodes[inviter].core else {
                return;
            };
            let mut stolen = request.clone();
            stolen.member_key = vec![7; 32];
            assert!(
                core.redeem(&invite, &stolen, &exporter, inviter_now).is_err(),
                "another key"
            );
            assert!(
                core.redeem(&invite, &request, &[99; 32], inviter_now).is_err(),
                "another connection"
            );
            let (response, actions) = match core.redeem(&invite, &request, &exporter, inviter_now) {
                Ok(done) => done,
                Err(refusal) => panic!("{name} at {}: {refusal}", self.nodes[inviter].name),
            };
            self.carry_out(inviter, actions, None);
            assert!(
                self.nodes[inviter].invites_used.contains(&id),
                "marked before the answer"
            );
            invite.used_by = Some(self.keys(joiner).public_key());
            if self.rough && attempt < 2 && self.random.chance(30) {
                if self.random.chance(30) {
                    self.crash(inviter);
                    self.start(inviter);
                }
                continue;
            }
            let Some(core) = &mut self.nodes[joiner].core else {
                return;
            };
            match core.accept(&response, now) {
                Ok(actions) => self.carry_out(joiner, actions, None),
                Err(refusal) => panic!("{name}: {refusal}"),
            }
            outcome.joins += 1;
            self.say(format_args!(
                "{name} joins at {}: {grant:?} {may_admit}",
                self.nodes[inviter].name
            ));
            self.model.members.insert(
                name.clone(),
                ModelMember {
                    grant,
                    may_admit,
                    parent: Some(self.nodes[inviter].name.clone()),
                    live: true,
                    first: self.nodes[joiner].own.trust_domain.clone(),
                    also: BTreeSet::new(),
                },
            );
            self.nodes[joiner].backup = None;
            return;
        }
    }

    /// True if what `node` knows about `target` and whom that admitted is what the model says.
    pub(crate) fn knows(&self, node: usize, target: &str) -> bool {
        let Some(core) = &self.nodes[node].core else {
            return false;
        };
        let members = core.members();
        let live = |name: &str| {
            members
                .iter()
                .find(|status| status.member.record.cluster.as_ref() == name)
                .filter(|status| status.member.standing == Standing::Live)
        };
        let same = |name: &str| match (
            live(name),
            self.model.members.get(name).filter(|member| member.live),
        ) {
            (None, None) => true,
            (Some(status), Some(member)) => {
                let record = &status.member.record;
                let parent = member.parent.as_deref().unwrap_or(name);
                record.namespaces == member.grant
                    && record.may_admit == member.may_admit
                    && record.admitted_by.as_ref() == parent
                    && self.is_latest(record)
                    && record.trust_domain == member.first
                    && record.aliases == member.also
            }
            (Some(_), None) | (None, Some(_)) => false,
        };
        same(target)
            && self.model.members.keys().all(|name| {
                let child = self.model.members[name].parent.as_deref() == Some(target)
                    || live(name).is_some_and(|status| status.member.record.admitted_by.as_ref() == target);
                !child || same(name)
            })
    }

    /// What the operators did, with `TRACE=1`.
    pub(crate) fn say(&self, what: std::fmt::Arguments<'_>) {
        if std::env::var_os("TRACE").is_some() {
            println!("{:>9} ms {what}", self.at);
        }
    }

    fn pick(&mut self) -> usize {
        let count = self.nodes.len();
        self.random.index(count)
    }

    fn trouble(&mut self, outcome: &mut Outcome) {
        let node = self.pick();
        match self.random.below(14) {
            0..=4 => self.change_exports(node),
            5 => {
                outcome.restarts += 1;
                self.crash(node);
                let pause = self.random.below(15_000);
                self.advance(pause);
                self.start(node);
            }
            6 => {
                let other = self.pick();
                if other != node {
                    self.cut.insert((node.min(other), node.max(other)));
                    if self.random.chance(50) {
                        self.cut_links_between(node, other);
                    }
                }
            }
            7 => {
                // A whole side is cut off.
                let side: Vec<bool> = (0..self.nodes.len()).map(|_| self.random.chance(50)).collect();
                for a in 0..side.len() {
                    for b in a + 1..side.len() {
                        if side[a] != side[b] {
                            self.cut.insert((a, b));
                        }
                    }
                }
            }
            8 => self.cut.clear(),
            9 => self.command(node, outcome),
            10 => {
                let joiner = self.pick();
                self.invite_and_join(joiner, outcome);
            }
            11 => {
                // Root rotation, a new certificate, and a move.
                self.handle(node, Event::Renewed);
                let rotated = format!("{}+", self.nodes[node].own.roots_pem);
                let endpoints = self.nodes[node].own.endpoints.clone();
                self.nodes[node].own.roots_pem.clone_from(&rotated);
                let now = self.now(node);
                if let Some(core) = &mut self.nodes[node].core {
                    let actions = core.set_profile(rotated, endpoints, now).expect("within bounds");
                    self.carry_out(node, actions, None);
                }
            }
            12 => {
                let it = &mut self.nodes[node];
                let waits = it.store.keys().any(|key| key.starts_with("admission/"));
                if !waits
                    && it
                        .core
                        .as_ref()
                        .is_some_and(tombolo_federation::Federation::is_member)
                {
                    it.backup = Some(it.store.clone());
                }
            }
            _ => {
                // What nobody else has heard of is lost with the disk, and no protocol brings it back.
                let lost = self.nodes[node].store.iter().any(|(key, value)| {
                    let holds = |(other, it): (usize, &Node)| {
                        other != node
                            && !it.attacker
                            && self.model.is_live(&it.name)
                            && it.store.get(key) == Some(value)
                    };
                    key.starts_with("admission/")
                        || (key.starts_with("record/") && !self.nodes.iter().enumerate().any(holds))
                });
                if let Some(backup) = self.nodes[node].backup.clone().filter(|_| !lost) {
                    outcome.restarts += 1;
                    self.say(format_args!("{} is restored", self.nodes[node].name));
                    self.crash(node);
                    self.nodes[node].store = backup;
                    self.start(node);
                }
            }
        }
    }

    /// An operator removes a member or changes its rights.
    fn command(&mut self, node: usize, outcome: &mut Outcome) {
        let own = self.nodes[node].name.clone();
        let targets: Vec<String> = self
            .model
            .members
            .keys()
            .filter(|name| **name != own)
            .cloned()
            .collect();
        if targets.is_empty() || self.nodes[node].attacker || !self.model.is_live(&own) {
            return;
        }
        let target = targets[self.random.index(targets.len())].clone();
        let children = self.model.children(&target);
        if !self.model.is_live(&target) || !self.knows(node, &target) {
            return;
        }
        // A join that only the target knows yet would be lost with it, and the model cannot say whether it is.
        let lost = self
            .nodes
            .iter()
            .any(|it| it.store.keys().any(|key| key.starts_with("admission/")));
        if lost {
            return;
        }
        let removes = self.random.chance(40);
        let grant = Grant::from_list(["shop", NAMESPACES[self.random.index(4)]]).expect("namespaces");
        let is_liar = self
            .find(&target)
            .is_some_and(|target| self.nodes[target].attacker);
        let may_admit = !is_liar && self.random.chance(50);
        let now = self.now(node);
        let Some(core) = &mut self.nodes[node].core else {
            return;
        };
        let result = if removes {
            core.remove(&target, now)
        } else {
            core.set_grant(&target, grant.clone(), may_admit, now)
        };
        let allowed = self.model.is_ancestor(&own, &target)
            && self
                .model
                .members
                .get(&own)
                .is_some_and(|member| member.may_admit);
        let Ok(actions) = result else {
            return;
        };
        self.carry_out(node, actions, None);
        self.say(format_args!(
            "{own} {} {target}: {grant:?}, counts: {allowed}",
            if removes { "removes" } else { "grants" }
        ));
        if !allowed {
            return;
        }
        if let Some(member) = self.model.members.get_mut(&target) {
            member.parent = Some(own.clone());
            if removes {
                member.live = false;
                outcome.removals += 1;
            } else {
                member.grant = grant;
                member.may_admit = may_admit;
            }
        }
        if removes || !may_admit {
            for child in children {
                if let Some(member) = self.model.members.get_mut(&child) {
                    member.parent = Some(own.clone());
                }
            }
        }
    }

    fn heal(&mut self, outcome: &mut Outcome) {
        self.rough = false;
        self.cut.clear();
        for node in 0..self.nodes.len() {
            if self.nodes[node].core.is_none() {
                self.start(node);
            }
        }
        self.advance(HEALING);
        if self.nodes.iter().any(|node| node.old) {
            self.end_renamings(outcome);
            self.advance(HEALING);
        }
    }
}
