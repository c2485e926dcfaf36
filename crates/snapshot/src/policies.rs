use crate::resource::Held;
use imbl::OrdMap;
use std::sync::Arc;
use tombolo_authz::{Policy, Scope};
use tombolo_destination::Workload;
use tombolo_types::NamespacedName;

type ByKey = OrdMap<NamespacedName, Arc<Policy>>;

/// Policies by key and by scope.
#[derive(Debug, Clone, Default)]
pub(crate) struct Policies {
    held: OrdMap<NamespacedName, Arc<Held<Policy>>>,
    global: ByKey,
    by_namespace: OrdMap<Arc<str>, ByKey>,
}

impl Policies {
    pub(crate) fn held(&self) -> &OrdMap<NamespacedName, Arc<Held<Policy>>> {
        &self.held
    }

    pub(crate) fn upsert(&mut self, held: Arc<Held<Policy>>) {
        let policy = held.item.clone();
        let key = policy.key.clone();
        self.remove(&key);
        match policy.scope {
            Scope::Global => _ = self.global.insert(key.clone(), policy),
            Scope::Namespace => {
                let of = self.by_namespace.entry(key.namespace.clone()).or_default();
                of.insert(key.clone(), policy);
            }
            Scope::WorkloadSelector => {}
        }
        self.held.insert(key, held);
    }

    pub(crate) fn remove(&mut self, key: &NamespacedName) {
        let Some(old) = self.held.remove(key) else { return };
        match old.item.scope {
            Scope::Global => _ = self.global.remove(key),
            Scope::Namespace => {
                if let Some(of) = self.by_namespace.get_mut(&key.namespace) {
                    of.remove(key);
                    if of.is_empty() {
                        self.by_namespace.remove(&key.namespace);
                    }
                }
            }
            Scope::WorkloadSelector => {}
        }
    }

    /// Those of its namespace, global ones, and those that it names; a name that is not held gives nothing.
    pub(crate) fn of(&self, workload: &Workload) -> Vec<&Arc<Policy>> {
        let of_namespace = self
            .by_namespace
            .get(&workload.namespace)
            .into_iter()
            .flat_map(OrdMap::values);
        let named = workload
            .policies
            .iter()
            .filter_map(|key| self.held.get(key))
            .map(|held| &held.item);
        of_namespace.chain(self.global.values()).chain(named).collect()
    }
}
