//! The clusters, the network between them, and time.

use crate::{
    attack::{Loot, tamper},
    keys::{Keys, Random},
    model::Model,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    sync::Arc,
    time::Duration,
};
use tombolo_federation::{Action, ConnId, Event, Exports, Federation, Now, Own, Saved, Write};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::TrustDomain;

/// Milliseconds of virtual time.
pub(crate) type Millis = u64;

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) own: Own,
    pub(crate) key_seed: [u8; 32],
    pub(crate) core: Option<Federation<Keys>>,
    pub(crate) boot: u64,
    pub(crate) store: Saved,
    pub(crate) backup: Option<Saved>,
    pub(crate) skew_ms: i64,
    pub(crate) wanted: Exports,
    pub(crate) attacker: bool,
    pub(crate) loot: Loot,
    pub(crate) tick_at: Option<Millis>,
    pub(crate) invites_used: BTreeSet<[u8; 16]>,
    /// Every name that its trust domain ever had: it has a certificate for each.
    pub(crate) names: BTreeSet<TrustDomain>,
    /// Of a release that knows nothing of other names: it reads no record with any.
    pub(crate) old: bool,
}

#[derive(Debug, Clone)]
enum What {
    Message(Box<pb::PeerMessage>),
    Closed,
}

#[derive(Debug)]
struct End {
    node: usize,
    boot: u64,
    conn: ConnId,
    /// Not before this: a stream keeps its order.
    next_at: Millis,
}

#[derive(Debug)]
struct Link {
    ends: [End; 2],
    alive: bool,
}

#[derive(Debug)]
enum Happening {
    Tick {
        node: usize,
        boot: u64,
    },
    Arrive {
        link: usize,
        to: usize,
        what: What,
    },
    Dialled {
        node: usize,
        boot: u64,
        cluster: Arc<str>,
        target: usize,
        names: Vec<TrustDomain>,
        shown: TrustDomain,
    },
}

pub(crate) struct Simulation {
    pub(crate) nodes: Vec<Node>,
    pub(crate) model: Model,
    pub(crate) random: Random,
    pub(crate) at: Millis,
    pub(crate) real_keys: bool,
    /// Chance for the names of trust domains: apart, so that a story without renamings is what it always was.
    pub(crate) renaming: Option<Random>,
    /// Pairs that cannot reach each other now.
    pub(crate) cut: BTreeSet<(usize, usize)>,
    /// The network loses and delays.
    pub(crate) rough: bool,
    /// The liars lie.
    pub(crate) lying: bool,
    pub(crate) steps: u64,
    pub(crate) audits: BTreeMap<&'static str, u64>,
    /// Connections between honest members that ended, and stale marks that changed, since it was set to zero.
    pub(crate) churn: u64,
    links: Vec<Link>,
    by_conn: BTreeMap<(usize, ConnId), usize>,
    queue: BinaryHeap<Reverse<(Millis, u64, usize)>>,
    happenings: BTreeMap<usize, Happening>,
    next_id: usize,
    next_conn: u64,
}

impl Simulation {
    pub(crate) fn new(seed: u64, renames: bool) -> Self {
        Self {
            nodes: Vec::new(),
            model: Model::default(),
            random: Random(seed),
            at: 1_000,
            real_keys: seed.is_multiple_of(64),
            renaming: renames.then_some(Random(!seed)),
            cut: BTreeSet::new(),
            rough: false,
            lying: true,
            steps: 0,
            audits: BTreeMap::new(),
            churn: 0,
            links: Vec::new(),
            by_conn: BTreeMap::new(),
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            next_id: 0,
            next_conn: 0,
        }
    }

    pub(crate) fn add(&mut self, name: &str, attacker: bool, outbound_only: bool) -> usize {
        let mut key_seed = [0; 32];
        for chunk in key_seed.chunks_mut(8) {
            chunk.copy_from_slice(&self.random.next().to_be_bytes());
        }
        let minor = self.random.below(2);
        let trust_domain: TrustDomain = format!("{name}.example").parse().expect("a valid name");
        let first = self.nodes.is_empty();
        let old = !attacker && !first && self.renaming.as_mut().is_some_and(|random| random.chance(8));
        self.nodes.push(Node {
            name: name.to_owned(),
            own: Own {
                cluster: name.into(),
                trust_domain: trust_domain.clone(),
                also: Vec::new(),
                roots_pem: format!("root-{name}-0"),
                endpoints: if outbound_only {
                    Vec::new()
                } else {
                    vec![format!("{name}.sim:443")]
                },
                version: format!("0.{}.0", 4 + minor),
                share_trust_domain: false,
            },
            key_seed,
            core: None,
            boot: 0,
            store: Saved::new(),
            backup: None,
            skew_ms: i64::try_from(self.random.below(120_000)).unwrap_or(0) - 60_000,
            wanted: Exports::default(),
            attacker,
            loot: Loot::default(),
            tick_at: None,
            invites_used: BTreeSet::new(),
            names: BTreeSet::from([trust_domain]),
            old,
        });
        let node = self.nodes.len() - 1;
        self.start(node);
        node
    }

    pub(crate) fn now(&self, node: usize) -> Now {
        Now {
            // The monotonic clock of each process starts somewhere else.
            monotonic: Duration::from_millis(self.at + 77_000 * node as u64),
            unix_ms: i64::try_from(self.at).unwrap_or(0) + 1_700_000_000_000 + self.nodes[node].skew_ms,
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    pub(crate) fn keys(&self, node: usize) -> Keys {
        Keys::new(&self.nodes[node].key_seed, self.real_keys)
    }

    pub(crate) fn start(&mut self, node: usize) {
        let (seed, now, keys) = (self.random.next(), self.now(node), self.keys(node));
        let it = &mut self.nodes[node];
        it.boot += 1;
        it.tick_at = None;
        let (core, actions) = Federation::start(it.own.clone(), keys, &it.store, seed, now);
        it.core = Some(core);
        let wanted = it.wanted.clone();
        self.carry_out(node, actions, None);
        self.alone(node);
        self.handle(node, Event::Exports(wanted));
    }

    /// The process dies; its peers learn it soon, later, or never.
    pub(crate) fn crash(&mut self, node: usize) {
        self.nodes[node].core = None;
        self.nodes[node].boot += 1;
        for link in 0..self.links.len() {
            for side in 0..2 {
                if self.links[link].alive && self.links[link].ends[side].node == node {
                    self.links[link].alive = false;
                    if self.random.chance(70) {
                        let delay = self.random.below(500);
                        self.schedule_arrival(link, 1 - side, What::Closed, delay);
                    }
                }
            }
        }
    }

    pub(crate) fn handle(&mut self, node: usize, event: Event) {
        let now = self.now(node);
        let Some(core) = &mut self.nodes[node].core else {
            return;
        };
        let actions = core.handle(event, now);
        // Now and then the process dies half way through what it was told to do.
        let cut = (self.rough && !self.nodes[node].attacker && self.random.below(4000) == 0)
            .then(|| self.random.index(actions.len() + 1));
        self.carry_out(node, actions, cut);
    }

    pub(crate) fn carry_out(&mut self, node: usize, actions: Vec<Action>, die_at: Option<usize>) {
        for (index, action) in actions.into_iter().enumerate() {
            if die_at == Some(index) {
                self.crash(node);
                self.start(node);
                return;
            }
            self.act(node, action);
        }
        self.schedule_tick(node);
    }

    fn schedule_tick(&mut self, node: usize) {
        let now = self.now(node);
        let it = &mut self.nodes[node];
        let Some((when, _)) = it.core.as_ref().and_then(Federation::next_timeout) else {
            return;
        };
        let wait = u64::try_from(when.saturating_sub(now.monotonic).as_millis()).unwrap_or(u64::MAX);
        // At least one: a timer that is due and does nothing would stop the time.
        let at = self.at + wait.clamp(1, 3_600_000);
        if it
            .tick_at
            .is_none_or(|already| already <= self.at || at < already)
        {
            it.tick_at = Some(at);
            let boot = it.boot;
            self.schedule(at, Happening::Tick { node, boot });
        }
    }

    fn schedule(&mut self, at: Millis, happening: Happening) {
        self.next_id += 1;
        self.happenings.insert(self.next_id, happening);
        self.queue.push(Reverse((at, self.next_id as u64, self.next_id)));
    }

    fn schedule_arrival(&mut self, link: usize, to: usize, what: What, delay: Millis) {
        let end = &mut self.links[link].ends[to];
        let at = end.next_at.max(self.at + delay);
        end.next_at = at;
        self.schedule(at, Happening::Arrive { link, to, what });
    }

    fn reachable(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    fn latency(&mut self) -> Millis {
        // A lost segment comes again after its timeout.
        if self.rough && self.random.chance(3) {
            200 + self.random.below(2_000)
        } else {
            1 + self.random.below(60)
        }
    }

    fn act(&mut self, node: usize, action: Action) {
        match action {
            Action::Persist(writes) => {
                for write in writes {
                    match write {
                        Write::Put { key, value } => drop(self.nodes[node].store.insert(key, value)),
                        Write::Delete { key } => drop(self.nodes[node].store.remove(&key)),
                        Write::InviteUsed { id, .. } => drop(self.nodes[node].invites_used.insert(id)),
                    }
                }
            }
            Action::SaveImports { cluster } => {
                let value = self.nodes[node]
                    .core
                    .as_ref()
                    .and_then(|core| core.imports_value(&cluster));
                if let Some(value) = value.filter(|_| self.random.chance(60)) {
                    self.nodes[node].store.insert(format!("imports/{cluster}"), value);
                }
            }
            Action::Send { conn, message } => self.send(node, conn, message),
            Action::Dial {
                cluster,
                endpoints,
                names,
                shown,
                ..
            } => {
                let target = endpoints
                    .first()
                    .and_then(|endpoint| endpoint.strip_suffix(".sim:443"))
                    .and_then(|name| self.find(name));
                let Some(target) = target else {
                    panic!("{} dials {endpoints:?}", self.nodes[node].name)
                };
                let shown = self.shown(node, shown);
                let (boot, delay) = (self.nodes[node].boot, self.latency() * 2);
                let at = self.at + delay;
                self.schedule(
                    at,
                    Happening::Dialled {
                        node,
                        boot,
                        cluster,
                        target,
                        names,
                        shown,
                    },
                );
            }
            Action::Close { conn } => self.close(node, conn),
            Action::Publish { world, changed } => {
                for cluster in &changed {
                    self.check_imports(node, cluster, world.clusters.get(cluster).map(AsRef::as_ref));
                }
                let honest = |name: &Arc<str>| self.find(name).is_some_and(|n| !self.nodes[n].attacker);
                if !self.nodes[node].attacker && changed.iter().any(honest) {
                    self.churn += 1;
                }
            }
            Action::Audit(refusal) => {
                self.say(format_args!("{} refuses: {refusal}", self.nodes[node].name));
                *self.audits.entry(refusal.code.entry().id).or_default() += 1;
            }
        }
    }

    fn send(&mut self, node: usize, conn: ConnId, message: pb::PeerMessage) {
        let Some(&link) = self.by_conn.get(&(node, conn)) else {
            return;
        };
        if !self.links[link].alive {
            return;
        }
        let side =
            usize::from(self.links[link].ends[1].node == node && self.links[link].ends[1].conn == conn);
        let messages = if self.nodes[node].attacker && self.lying {
            self.lies(node, message)
        } else {
            vec![message]
        };
        for message in messages {
            let delay = self.latency();
            self.schedule_arrival(link, 1 - side, What::Message(Box::new(message)), delay);
        }
        // Connections die of themselves, and both sides learn it at different times.
        if self.rough && self.random.below(400) == 0 {
            self.cut_link(link);
        }
    }

    fn lies(&mut self, node: usize, message: pb::PeerMessage) -> Vec<pb::PeerMessage> {
        if !self.random.chance(15) {
            return vec![message];
        }
        let Some(core) = &self.nodes[node].core else {
            return vec![message];
        };
        let members = core.members();
        let own = members
            .iter()
            .find(|status| status.member.record.cluster.as_ref() == self.nodes[node].name);
        let others: Vec<_> = members
            .iter()
            .filter(|status| status.member.record.cluster.as_ref() != self.nodes[node].name)
            .collect();
        let (Some(own), false) = (own, others.is_empty()) else {
            return vec![message];
        };
        let victim = &others[self.random.index(others.len())].member.record;
        let keys = Keys::new(&self.nodes[node].key_seed, self.real_keys);
        tamper(
            message,
            &own.member.record,
            victim,
            &keys,
            &self.nodes[node].loot,
            &mut self.random,
            self.renaming.as_mut(),
        )
    }

    fn cut_link(&mut self, link: usize) {
        if !std::mem::take(&mut self.links[link].alive) {
            return;
        }
        for to in 0..2 {
            // One side may never hear of it: it finds the silence out.
            if self.random.chance(80) {
                let delay = self.random.below(2_000);
                self.schedule_arrival(link, to, What::Closed, delay);
            }
        }
    }

    pub(crate) fn cut_links_between(&mut self, a: usize, b: usize) {
        for link in 0..self.links.len() {
            let ends = [self.links[link].ends[0].node, self.links[link].ends[1].node];
            if ends == [a, b] || ends == [b, a] {
                self.cut_link(link);
            }
        }
    }

    fn close(&mut self, node: usize, conn: ConnId) {
        let Some(link) = self.by_conn.remove(&(node, conn)) else {
            return;
        };
        let side =
            usize::from(self.links[link].ends[1].node == node && self.links[link].ends[1].conn == conn);
        let other = self.links[link].ends[1 - side].node;
        if !self.nodes[node].attacker && !self.nodes[other].attacker {
            self.churn += 1;
        }
        if std::mem::take(&mut self.links[link].alive) {
            let delay = self.latency();
            self.schedule_arrival(link, 1 - side, What::Closed, delay);
        }
    }

    /// One happening. False when nothing is left before `until`.
    pub(crate) fn step(&mut self, until: Millis) -> bool {
        let Some(&Reverse((at, _, id))) = self.queue.peek() else {
            return false;
        };
        if at > until {
            self.at = until;
            return false;
        }
        self.queue.pop();
        self.at = self.at.max(at);
        self.steps += 1;
        let Some(happening) = self.happenings.remove(&id) else {
            return true;
        };
        match happening {
            Happening::Tick { node, boot } => {
                if self.nodes[node].boot == boot {
                    self.handle(node, Event::Tick);
                }
            }
            Happening::Dialled {
                node,
                boot,
                cluster,
                target,
                names,
                shown,
            } => self.dialled(node, boot, cluster, target, &names, shown),
            Happening::Arrive { link, to, what } => self.arrive(link, to, what),
        }
        true
    }

    fn dialled(
        &mut self,
        node: usize,
        boot: u64,
        cluster: Arc<str>,
        target: usize,
        names: &[TrustDomain],
        shown: TrustDomain,
    ) {
        if self.nodes[node].boot != boot || self.nodes[node].core.is_none() {
            return;
        }
        let lost = self.rough && self.random.chance(10);
        if !self.reachable(node, target) || self.nodes[target].core.is_none() || lost {
            self.handle(node, Event::DialFailed { cluster });
            return;
        }
        let Some(shown) = self.handshake(node, target, names, shown) else {
            self.handle(node, Event::DialFailed { cluster });
            return;
        };
        let mut exporter = [0; 32];
        exporter[..8].copy_from_slice(&self.random.next().to_be_bytes());
        self.next_conn += 2;
        let conns = [ConnId(self.next_conn), ConnId(self.next_conn + 1)];
        let pair = [node, target];
        let end = |side: usize| End {
            node: pair[side],
            boot: self.nodes[pair[side]].boot,
            conn: conns[side],
            next_at: self.at,
        };
        self.links.push(Link {
            ends: [end(0), end(1)],
            alive: true,
        });
        let link = self.links.len() - 1;
        for side in 0..2 {
            self.by_conn.insert((pair[side], conns[side]), link);
        }
        for side in 0..2 {
            let event = Event::Connected {
                conn: conns[side],
                dialled: (side == 0).then(|| cluster.clone()),
                trust_domain: shown[1 - side].clone(),
                exporter,
            };
            self.handle(pair[side], event);
        }
    }

    fn arrive(&mut self, link: usize, to: usize, what: What) {
        let (node, boot, conn) = {
            let end = &self.links[link].ends[to];
            (end.node, end.boot, end.conn)
        };
        let from = self.links[link].ends[1 - to].node;
        if self.nodes[node].boot != boot || !self.by_conn.contains_key(&(node, conn)) {
            return;
        }
        if !self.reachable(from, node) {
            // It waits in the kernel of the sender; the order stays.
            let delay = 200;
            self.schedule_arrival(link, to, what, delay);
            return;
        }
        match what {
            What::Message(mut message) => {
                if self.nodes[node].old {
                    crate::names::keep_readable(&mut message);
                }
                if self.nodes[node].attacker
                    && let Some(Message::Records(records)) = &message.message
                {
                    let loot = &mut self.nodes[node].loot.records;
                    loot.extend(records.records.iter().cloned());
                    let spare = loot.len().saturating_sub(200);
                    loot.drain(..spare);
                }
                self.handle(
                    node,
                    Event::Received {
                        conn,
                        message: *message,
                    },
                );
            }
            What::Closed => {
                self.by_conn.remove(&(node, conn));
                if !self.nodes[node].attacker && !self.nodes[from].attacker {
                    self.churn += 1;
                }
                self.handle(node, Event::Closed { conn });
            }
        }
    }

    pub(crate) fn run_until(&mut self, until: Millis) {
        while self.step(until) {}
        self.at = self.at.max(until);
    }
}
