//! What one subscriber has of one type, and what it still needs: pure.
//!
//! Incremental xDS: a subscriber names resources, or takes all (wildcard). At most one response is under way; while
//! it is not acknowledged nothing is queued, and afterwards only the difference to the latest world is sent. So a slow
//! client costs no memory.

use super::demand::Demand;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_proto::xds::{DeltaDiscoveryRequest, Resource};
use tombolo_registry::{Compiled, Resources};

/// A response to be: resources and removed names.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Push {
    pub(super) resources: Vec<Resource>,
    pub(super) removed: Vec<String>,
}

/// State of one type on one stream.
#[derive(Debug, Default)]
pub(super) struct Watch {
    wildcard: bool,
    /// Names asked for, as they were asked for.
    names: BTreeSet<String>,
    /// Wildcard: exactly what the client has.
    base: Resources,
    /// Names the client has or was told of, with their versions: on top of `base`.
    told: BTreeMap<String, Arc<str>>,
    pending: Option<String>,
    nonce: u64,
    /// The client must hear something, even if it is nothing.
    owes_answer: bool,
    /// Names that must be answered although nothing of them changed: fresh subscriptions.
    asked: BTreeSet<String>,
}

/// What a request did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// Acknowledged the response under way.
    Ack,
    /// Took it in part: the named resources were refused.
    Nack(String),
    /// Changed the subscription.
    Subscription,
    /// Nothing: an old nonce.
    Stale,
}

impl Watch {
    /// Takes a request of this type. `first` is the first one of the stream.
    pub(super) fn handle(&mut self, request: &DeltaDiscoveryRequest, first: bool) -> Heard {
        let (on, off) = (
            &request.resource_names_subscribe,
            &request.resource_names_unsubscribe,
        );
        let changes = first || !on.is_empty() || !off.is_empty();
        if first {
            // No name at all is the old form of wildcard.
            self.wildcard = on.is_empty() && off.is_empty();
            for (name, version) in &request.initial_resource_versions {
                self.told.insert(name.clone(), version.as_str().into());
            }
            self.owes_answer = true;
        }
        for name in on {
            if name == "*" {
                self.owes_answer |= !self.wildcard;
                self.wildcard = true;
            } else {
                self.names.insert(name.clone());
                self.asked.insert(name.clone());
            }
        }
        for name in off {
            if name == "*" {
                self.drop_wildcard();
            } else {
                self.names.remove(name);
                self.asked.remove(name);
                if !self.wildcard {
                    self.told.remove(name);
                }
            }
        }
        if request.response_nonce.is_empty() || first {
            return Heard::Subscription;
        }
        if self.pending.as_deref() != Some(request.response_nonce.as_str()) {
            return if changes {
                Heard::Subscription
            } else {
                Heard::Stale
            };
        }
        self.pending = None;
        match &request.error_detail {
            Some(error) => Heard::Nack(error.message.clone()),
            None => Heard::Ack,
        }
    }

    fn drop_wildcard(&mut self) {
        if self.wildcard {
            self.wildcard = false;
            // What only the wildcard brought is not kept up to date any more; the client drops it by itself.
            self.base = Resources::new();
            let names = &self.names;
            self.told.retain(|name, _| names.contains(name));
        }
    }

    /// True while a response waits for its acknowledgement.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// The version of a resource that the client was sent last.
    pub(super) fn version_of(&self, name: &str) -> Option<Arc<str>> {
        let held = self.base.get(name).map(|compiled| Arc::clone(&compiled.version));
        held.or_else(|| self.told.get(name).cloned())
    }

    /// Resources that the client was sent.
    pub(super) fn len(&self) -> usize {
        self.base.len() + self.told.len()
    }

    /// Names of the client's that are remembered.
    pub(super) fn remembered(&self) -> usize {
        self.names.len() + self.told.len()
    }

    pub(super) fn is_wildcard(&self) -> bool {
        self.wildcard
    }

    pub(super) fn names(&self) -> usize {
        self.names.len()
    }

    /// What to send now, with its nonce; `None` if there is nothing, or a response is under way.
    pub(super) fn push(&mut self, world: &Resources, demand: &mut dyn Demand) -> Option<(Push, String)> {
        if self.pending.is_some() {
            return None;
        }
        let mut push = Push::default();
        if self.wildcard {
            self.push_wildcard(world, &mut push);
        }
        if !self.names.is_empty() {
            self.push_named(world, demand, &mut push);
        } else if !self.wildcard {
            // Nothing is subscribed: what the client still names from before does not concern it.
            self.told.clear();
        }
        self.asked.clear();
        if push == Push::default() && !self.owes_answer {
            return None;
        }
        self.owes_answer = false;
        self.nonce += 1;
        let nonce = format!("{:x}", self.nonce);
        self.pending = Some(nonce.clone());
        Some((push, nonce))
    }

    fn push_wildcard(&mut self, world: &Resources, push: &mut Push) {
        use imbl::ordmap::DiffItem;
        for difference in self.base.diff(world) {
            match difference {
                DiffItem::Add(name, new) => {
                    // After a reconnect: what the client has in the same version is not sent again.
                    if self.told.remove(&**name).as_ref() != Some(&new.version) {
                        push.resources.push(wire(new, None));
                    }
                }
                DiffItem::Update {
                    old: (_, old),
                    new: (_, new),
                } => {
                    if old.version != new.version {
                        push.resources.push(wire(new, None));
                    }
                }
                DiffItem::Remove(name, _) => push.removed.push(name.to_string()),
            }
        }
        self.base = world.clone();
        // What the client named at its reconnect and is not there (any more).
        let names = &self.names;
        let stale: Vec<String> = self
            .told
            .keys()
            .filter(|name| !names.contains(*name))
            .cloned()
            .collect();
        for name in stale {
            self.told.remove(&name);
            push.removed.push(name);
        }
    }

    fn push_named(&mut self, world: &Resources, demand: &mut dyn Demand, push: &mut Push) {
        // Everything that the names lead to, under the name that the client will file it.
        let mut wanted: BTreeMap<String, (Arc<Compiled>, bool)> = BTreeMap::new();
        let mut missing = BTreeSet::new();
        for name in &self.names {
            let found = demand.find(world, name);
            if found.is_empty() {
                missing.insert(name.clone());
            }
            for (index, compiled) in found.into_iter().enumerate() {
                // A client that asked by an address waits for a resource of exactly that name.
                if index == 0 && *compiled.name != **name {
                    wanted.insert(name.clone(), (Arc::clone(&compiled), true));
                }
                wanted
                    .entry(compiled.name.to_string())
                    .or_insert((compiled, false));
            }
        }
        for (name, (compiled, echoed)) in &wanted {
            let fresh = self.asked.contains(name);
            let by_wildcard = self.wildcard && !echoed && !fresh;
            if by_wildcard {
                continue;
            }
            let told = self.told.insert(name.clone(), Arc::clone(&compiled.version));
            let sent = push.resources.iter().any(|resource| resource.name == *name);
            if !sent && (fresh || told.as_ref() != Some(&compiled.version)) {
                push.resources
                    .push(wire(compiled, echoed.then_some(name.as_str())));
            }
        }
        let gone: Vec<String> = self
            .told
            .keys()
            .filter(|name| !wanted.contains_key(*name))
            .cloned()
            .collect();
        for name in gone {
            self.told.remove(&name);
            if !push.removed.contains(&name) {
                push.removed.push(name);
            }
        }
        for name in missing {
            if self.asked.contains(&name) && !push.removed.contains(&name) {
                push.removed.push(name);
            }
        }
    }
}

fn wire(compiled: &Compiled, under: Option<&str>) -> Resource {
    Resource {
        version: compiled.version.to_string(),
        resource: Some(compiled.any.clone()),
        name: under.unwrap_or(&compiled.name).to_owned(),
        aliases: compiled.aliases.clone(),
        ttl: None,
    }
}

#[cfg(test)]
mod tests;
