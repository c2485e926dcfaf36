use crate::mix;
use std::sync::Arc;
use tombolo_destination::{Service, Workload};

/// A persistent hash map whose hashes are the same in every process.
pub(crate) type Map<K, V> = imbl::GenericHashMap<K, V, mix::State, imbl::shared_ptr::DefaultSharedPtr>;

/// Those who claim one address or name, the rightful first. Nearly always one.
#[derive(Debug, Clone)]
pub(crate) enum Claims<T> {
    One(T),
    /// Sorted, at least two.
    Many(Arc<[T]>),
}

impl<T: Ord + Clone> Claims<T> {
    pub(crate) fn all(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    pub(crate) fn first(&self) -> &T {
        &self.all()[0]
    }

    /// Adds a claim, in place of an equal one.
    fn add(&mut self, claim: T) {
        if matches!(self, Self::One(one) if *one == claim) {
            *self = Self::One(claim);
            return;
        }
        let mut all: Vec<T> = self
            .all()
            .iter()
            .filter(|other| **other != claim)
            .cloned()
            .collect();
        let at = all.partition_point(|other| *other < claim);
        all.insert(at, claim);
        *self = Self::of(all);
    }

    /// None: nobody is left.
    fn without(&self, claim: &T) -> Option<Self> {
        let left: Vec<T> = self
            .all()
            .iter()
            .filter(|other| *other != claim)
            .cloned()
            .collect();
        (!left.is_empty()).then(|| Self::of(left))
    }

    fn of(mut all: Vec<T>) -> Self {
        if all.len() == 1 {
            Self::One(all.remove(0))
        } else {
            Self::Many(all.into())
        }
    }
}

/// Adds a claim to a key.
pub(crate) fn claim<K, T>(map: &mut Map<K, Claims<T>>, key: K, claim: T)
where
    K: std::hash::Hash + Eq + Clone,
    T: Ord + Clone,
{
    match map.get_mut(&key) {
        Some(claims) => claims.add(claim),
        None => _ = map.insert(key, Claims::One(claim)),
    }
}

/// Takes a claim from a key.
pub(crate) fn release<K, T>(map: &mut Map<K, Claims<T>>, key: &K, claim: &T)
where
    K: std::hash::Hash + Eq + Clone,
    T: Ord + Clone,
{
    let Some(claims) = map.get_mut(key) else { return };
    match claims.without(claim) {
        Some(left) => *claims = left,
        None => _ = map.remove(key),
    }
}

/// A workload that sorts by its uid.
#[derive(Debug, Clone)]
pub(crate) struct ByUid(pub(crate) Arc<Workload>);

impl Ord for ByUid {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.uid.cmp(&other.0.uid)
    }
}

/// A service that claims a virtual address. Smaller is more rightful: an address that belongs to one instance of a
/// headless service is listed by the service too, and means the instance.
#[derive(Debug, Clone)]
pub(crate) struct ByRight {
    /// How many addresses of the family the service has.
    pub(crate) siblings: usize,
    /// The address comes from an override, not from the service itself.
    pub(crate) overridden: bool,
    pub(crate) service: Arc<Service>,
}

impl Ord for ByRight {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let key = |one: &Self| (one.siblings, one.overridden, !one.service.canonical);
        key(self)
            .cmp(&key(other))
            .then_with(|| self.service.key.cmp(&other.service.key))
    }
}

/// A service that sorts by its key: its namespace, where claims are for one host name.
#[derive(Debug, Clone)]
pub(crate) struct ByKey(pub(crate) Arc<Service>);

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.key.cmp(&other.0.key)
    }
}

macro_rules! equal_by_order {
    ($($type:ty),*) => {$(
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.cmp(other).is_eq()
            }
        }
        impl Eq for $type {}
        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }
    )*};
}
equal_by_order!(ByUid, ByRight, ByKey);
