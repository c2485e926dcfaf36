//! Trust domains are renamed while everything else happens: another name is given, certificates are made for it, the old
//! name goes.

use crate::{run::Outcome, simulation::Simulation};
use std::sync::Arc;
use tombolo_federation::{ExportedService, Federation, NameChange, Record, Standing};
use tombolo_proto::tombolo::federation::v1::{self as pb, peer_message::Message};
use tombolo_types::{Code, SpiffeId, TrustDomain};

/// A member of a release before other names refuses each record that has any.
pub(crate) fn keep_readable(message: &mut pb::PeerMessage) {
    let reads = |signed: &pb::Signed| Record::decode(&signed.body).is_ok_and(|it| it.aliases.is_empty());
    if let Some(Message::Records(records)) = &mut message.message {
        records.records.retain(reads);
    }
    if let Some(Message::Hello(hello)) = &mut message.message {
        hello.chain.retain(reads);
    }
}

impl Simulation {
    /// The name of the certificate that a node shows when it dials.
    pub(crate) fn shown(&self, node: usize, wanted: TrustDomain) -> TrustDomain {
        let it = &self.nodes[node];
        if it.names.contains(&wanted) {
            wanted
        } else {
            it.own.trust_domain.clone()
        }
    }

    /// The names that both sides of a connection show; `None`: one of them believes no certificate of the other.
    pub(crate) fn handshake(
        &self,
        node: usize,
        target: usize,
        names: &[TrustDomain],
        shown: TrustDomain,
    ) -> Option<[TrustDomain; 2]> {
        let it = &self.nodes[target];
        let asked = names.first().filter(|name| it.names.contains(*name));
        let answers = asked.unwrap_or(&it.own.trust_domain).clone();
        let core = it.core.as_ref()?;
        let members = core.members();
        let dialler = members
            .iter()
            .find(|status| *status.member.record.cluster == *self.nodes[node].name);
        // Who is not known here brings its records itself.
        let known = dialler.is_some_and(|status| status.member.standing == Standing::Live);
        let believes = !known || core.peer_roots().iter().any(|(name, _)| *name == shown);
        (names.contains(&answers) && believes).then_some([shown, answers])
    }

    /// True if nobody holds a later one: names come and go, and what was restored looks like what it is again.
    pub(crate) fn is_latest(&self, record: &Record) -> bool {
        let of_same = |held: &Record| {
            held.cluster == record.cluster
                && (held.incarnation, &held.admitted_by) == (record.incarnation, &record.admitted_by)
        };
        let cores = self.nodes.iter().filter(|it| !it.attacker);
        let mut held = cores
            .filter_map(|it| it.core.as_ref())
            .flat_map(Federation::members);
        self.renaming.is_none()
            || !held.any(|status| {
                let held = &status.member.record;
                of_same(held) && held.version > record.version
            })
    }

    /// A founder that knows of no others says at its start who it is.
    pub(crate) fn alone(&mut self, node: usize) {
        let it = &self.nodes[node];
        let Some(core) = &it.core else { return };
        let members = core.members();
        let mut live = members
            .iter()
            .filter(|status| status.member.standing == Standing::Live)
            .map(|status| &status.member.record);
        if let (Some(own), None) = (live.next(), live.next())
            && *own.cluster == *it.name
            && let Some(model) = self.model.members.get_mut(&it.name)
            && model.parent.is_none()
        {
            (model.first, model.also) = (own.trust_domain.clone(), own.aliases.clone());
        }
    }

    /// Chance of its own, so that nothing else changes by it.
    fn draw(&mut self, limit: u64) -> u64 {
        self.renaming.as_mut().map_or(0, |random| random.below(limit))
    }

    /// The next step of some renaming, or the first one of another.
    pub(crate) fn rename(&mut self, outcome: &mut Outcome) {
        if self.renaming.is_none() || self.draw(100) >= 40 {
            return;
        }
        let node = usize::try_from(self.draw(self.nodes.len() as u64)).unwrap_or(0);
        let it = &self.nodes[node];
        let Some(member) = self.model.members.get(&it.name).filter(|member| member.live) else {
            return;
        };
        if it.old || it.attacker || it.core.is_none() {
            return;
        }
        let (first, other) = (member.first.clone(), member.also.first().cloned());
        let (signs, believes) = (it.own.trust_domain.clone(), it.own.also.clone());
        let aborts = self.draw(100) < 15;
        match other {
            None if !believes.is_empty() => self.settle(node, signs, Vec::new()),
            None => self.give(node, outcome),
            Some(new) if signs == first && aborts => self.take_back(node, new, outcome),
            Some(new) if signs == first => self.switch(node, new),
            Some(_) if !believes.is_empty() && !aborts => self.settle(node, signs, Vec::new()),
            Some(_) => self.take_back(node, first, outcome),
        }
    }

    /// Whoever may change the record of a member, knows it as it is, and is up.
    fn speaker(&mut self, node: usize) -> Option<usize> {
        let target = self.nodes[node].name.clone();
        let may = |by: usize| {
            let it = &self.nodes[by];
            let member = self.model.members.get(&it.name);
            let speaks = member.is_some_and(|member| member.live && member.may_admit);
            let above = if by == node {
                self.model.members[&target].parent.is_none()
            } else {
                self.model.is_ancestor(&it.name, &target)
            };
            speaks && above && !it.old && !it.attacker && it.core.is_some() && self.knows(by, &target)
        };
        let all: Vec<usize> = (0..self.nodes.len()).filter(|by| may(*by)).collect();
        let at = usize::try_from(self.draw(all.len() as u64)).unwrap_or(0);
        all.get(at).copied()
    }

    fn change(&mut self, node: usize, by: usize, change: &NameChange) -> Result<(), Code> {
        let target = self.nodes[node].name.clone();
        let now = self.now(by);
        let Some(core) = &mut self.nodes[by].core else {
            return Err(Code::MemberUnknown);
        };
        let done = core.change_names(&target, change, now);
        let actions = done.map_err(|refusal| refusal.code)?;
        self.carry_out(by, actions, None);
        self.say(format_args!(
            "{} says of {target}: {change:?}",
            self.nodes[by].name
        ));
        let speaker = self.nodes[by].name.clone();
        if let Some(member) = self.model.members.get_mut(&target) {
            match change {
                NameChange::Add(name) => drop(member.also.insert(name.clone())),
                NameChange::Drop { name, .. } => {
                    if member.first == *name
                        && let Some(other) = member.also.pop_first()
                    {
                        member.first = other;
                    }
                    member.also.remove(name);
                }
            }
            if by != node {
                member.parent = Some(speaker);
            }
        }
        Ok(())
    }

    fn give(&mut self, node: usize, outcome: &mut Outcome) {
        let Some(by) = self.speaker(node) else { return };
        // A name of another member is refused.
        let other = usize::try_from(self.draw(self.nodes.len() as u64)).unwrap_or(0);
        let taken = self.nodes[other].own.trust_domain.clone();
        let known = self.nodes[by].core.as_ref().is_some_and(|core| {
            let members = core.members();
            members.iter().any(|status| {
                *status.member.record.cluster == *self.nodes[other].name
                    && status.member.standing == Standing::Live
                    && status.member.record.names().any(|name| *name == taken)
            })
        });
        if other != node && known {
            let refused = self.change(node, by, &NameChange::Add(taken));
            assert_eq!(refused, Err(Code::TrustDomainTaken), "{}", self.nodes[node].name);
        }
        let number = self.nodes[node].names.len();
        let name = format!("{}-{number}.example", self.nodes[node].name);
        let name: TrustDomain = name.parse().expect("a valid name");
        self.nodes[node].names.insert(name.clone());
        if self.change(node, by, &NameChange::Add(name)).is_ok() {
            outcome.renamings += 1;
        }
    }

    /// From now on it makes certificates for another name, and believes the one before too.
    fn switch(&mut self, node: usize, name: TrustDomain) {
        let it = &self.nodes[node];
        let Some(core) = &it.core else { return };
        let members = core.members();
        let ready = members.iter().all(|status| {
            status.in_step
                || status.member.standing != Standing::Live
                || *status.member.record.cluster == *it.name
        });
        // Now and then it is forced, whoever is behind; never without its own record.
        if !core.is_listed(&name) || (!ready && self.draw(100) < 70) {
            return;
        }
        let old = self.nodes[node].own.trust_domain.clone();
        self.settle(node, name, vec![old]);
    }

    /// Discovery opens itself anew, with other names.
    fn settle(&mut self, node: usize, name: TrustDomain, also: Vec<TrustDomain>) {
        self.say(format_args!("{} is {name}, also {also:?}", self.nodes[node].name));
        self.crash(node);
        let it = &mut self.nodes[node];
        it.backup = None; // what it is called is in no backup of before
        (it.own.trust_domain, it.own.also) = (name.clone(), also);
        let renamed = it.wanted.services.iter().map(|(key, service)| {
            let ids = service.subject_alt_names.iter().map(|id| SpiffeId {
                trust_domain: name.clone(),
                ..id.clone()
            });
            let service = ExportedService {
                subject_alt_names: ids.collect(),
                ..(**service).clone()
            };
            (key.clone(), Arc::new(service))
        });
        it.wanted.services = renamed.collect();
        let (own, wanted) = (it.name.clone(), it.wanted.clone());
        self.model.remember(&own, &wanted);
        self.start(node);
    }

    fn take_back(&mut self, node: usize, name: TrustDomain, outcome: &mut Outcome) {
        let Some(by) = self.speaker(node) else { return };
        let it = &self.nodes[node];
        let uses = it.own.trust_domain == name;
        let believes = uses || it.own.also.contains(&name);
        let force = !uses && self.draw(100) < 20;
        let done = self.change(node, by, &NameChange::Drop { name, force });
        if by == node && believes && !force {
            assert_eq!(done, Err(Code::TrustDomainInUse), "{}", self.nodes[node].name);
        }
        if done.is_ok() {
            outcome.renamings += 1;
        }
    }

    /// Ends all that were begun: members of older releases follow then.
    pub(crate) fn end_renamings(&mut self, outcome: &mut Outcome) {
        for node in 0..self.nodes.len() {
            let it = &self.nodes[node];
            let Some(member) = self.model.members.get(&it.name).filter(|member| member.live) else {
                continue;
            };
            let (names, signs) = (member.names(), it.own.trust_domain.clone());
            if names.len() < 2 {
                continue;
            }
            if !it.own.also.is_empty() {
                self.settle(node, signs.clone(), Vec::new());
                self.advance(30_000);
            }
            for name in names.into_iter().filter(|name| *name != signs) {
                if let Some(by) = self.speaker(node) {
                    let drop = NameChange::Drop { name, force: true };
                    let done = self.change(node, by, &drop);
                    assert_eq!(done, Ok(()), "{}", self.nodes[node].name);
                    outcome.renamings += 1;
                }
            }
        }
    }
}
