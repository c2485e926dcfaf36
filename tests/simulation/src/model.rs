use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_federation::{ExportedService, Exports, Grant, ServiceName};
use tombolo_types::TrustDomain;

/// What the set should be, kept beside the cores from the commands alone.
#[derive(Debug, Clone)]
pub(crate) struct ModelMember {
    pub(crate) grant: Grant,
    pub(crate) may_admit: bool,
    pub(crate) parent: Option<String>,
    pub(crate) live: bool,
    /// Names of its trust domain: the one that its record calls so, and the others.
    pub(crate) first: TrustDomain,
    pub(crate) also: BTreeSet<TrustDomain>,
}

impl ModelMember {
    pub(crate) fn names(&self) -> BTreeSet<TrustDomain> {
        let first = std::iter::once(&self.first);
        first.chain(&self.also).cloned().collect()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) members: BTreeMap<String, ModelMember>,
    /// Every value that a service ever had at its owner.
    pub(crate) history: BTreeMap<(String, ServiceName), Vec<Arc<ExportedService>>>,
}

impl Model {
    pub(crate) fn is_live(&self, name: &str) -> bool {
        self.members.get(name).is_some_and(|member| member.live)
    }

    /// True if `ancestor` may still speak about `name`.
    pub(crate) fn is_ancestor(&self, ancestor: &str, name: &str) -> bool {
        let mut at = name.to_owned();
        for _ in 0..32 {
            let Some(parent) = self.members.get(&at).and_then(|member| member.parent.clone()) else {
                return false;
            };
            if parent == ancestor {
                return true;
            }
            at = parent;
        }
        false
    }

    pub(crate) fn any_alias(&self) -> bool {
        self.members.values().any(|member| !member.also.is_empty())
    }

    pub(crate) fn children(&self, name: &str) -> Vec<String> {
        self.members
            .iter()
            .filter(|(_, member)| member.live && member.parent.as_deref() == Some(name))
            .map(|(child, _)| child.clone())
            .collect()
    }

    pub(crate) fn remember(&mut self, name: &str, exports: &Exports) {
        for (key, service) in &exports.services {
            let values = self.history.entry((name.to_owned(), key.clone())).or_default();
            if values.last().is_none_or(|last| last != service) {
                values.push(service.clone());
            }
        }
    }

    /// What everybody should hold of `name` when all is well.
    pub(crate) fn expected(&self, name: &str, wanted: &Exports) -> Exports {
        let mut exports = wanted.clone();
        if let Some(member) = self.members.get(name) {
            exports.services = (wanted.services.iter())
                .filter(|(key, _)| member.grant.allows(&key.namespace))
                .map(|(key, service)| (key.clone(), service.clone()))
                .collect();
        }
        exports
    }
}
