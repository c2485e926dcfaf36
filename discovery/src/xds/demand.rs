//! Finding resources for subscribers that ask by name or address instead of taking everything.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};
use tombolo_proto::{
    istio::workload::{Address, address::Type},
    type_url, unpack,
};
use tombolo_registry::{Compiled, Resources};

/// Resolves a demanded name.
pub(super) trait Demand {
    /// What the name leads to: the resource itself first, then what a client needs with it.
    fn find(&mut self, world: &Resources, name: &str) -> Vec<Arc<Compiled>>;
}

/// By resource name alone: every type but addresses.
pub(super) struct ByName;

impl Demand for ByName {
    fn find(&mut self, world: &Resources, name: &str) -> Vec<Arc<Compiled>> {
        world.get(name).map(Arc::clone).into_iter().collect()
    }
}

/// Names by address (`<network>/<ip>`) and the endpoints of each service; made for one world, shared by all who ask.
#[derive(Debug, Default)]
struct Index {
    by_alias: HashMap<String, Arc<str>>,
    endpoints: HashMap<String, Vec<Arc<str>>>,
}

/// Builds the index when somebody asks, once per world.
#[derive(Debug, Clone, Default)]
pub(super) struct Addresses(Arc<Mutex<Option<Made>>>);

/// The world that an index was made for, and the index.
type Made = (Resources, Arc<Index>);

impl Addresses {
    fn index(&self, world: &Resources) -> Arc<Index> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_for, index)) = &*slot
            && made_for.ptr_eq(world)
        {
            return Arc::clone(index);
        }
        let mut index = Index::default();
        for (name, compiled) in world {
            for alias in &compiled.aliases {
                index.by_alias.insert(alias.clone(), Arc::clone(name));
            }
            debug_assert_eq!(compiled.any.type_url, type_url::ADDRESS);
            if let Ok(Address {
                r#type: Some(Type::Workload(workload)),
            }) = unpack::<Address>(&compiled.any)
            {
                for service in workload.services.keys() {
                    index
                        .endpoints
                        .entry(service.clone())
                        .or_default()
                        .push(Arc::clone(name));
                }
            }
        }
        let index = Arc::new(index);
        *slot = Some((world.clone(), Arc::clone(&index)));
        index
    }
}

impl Demand for Addresses {
    fn find(&mut self, world: &Resources, name: &str) -> Vec<Arc<Compiled>> {
        let index = self.index(world);
        let primary = world
            .get(name)
            .or_else(|| index.by_alias.get(name).and_then(|alias| world.get(alias)));
        let Some(primary) = primary else { return Vec::new() };
        // A service is of no use without its endpoints, and the client does not ask for those.
        let endpoints = index
            .endpoints
            .get(&*primary.name)
            .into_iter()
            .flatten()
            .filter_map(|name| world.get(name));
        std::iter::once(primary)
            .chain(endpoints)
            .map(Arc::clone)
            .collect()
    }
}
