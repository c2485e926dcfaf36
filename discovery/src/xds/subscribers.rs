//! Who is subscribed to what, for debugging and `status`.

use serde::Serialize;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// One type of one subscriber.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct TypeState {
    /// Takes everything.
    pub wildcard: bool,
    /// Names asked for.
    pub names: usize,
    /// Resources held.
    pub held: usize,
    /// A response waits for its acknowledgement.
    pub pending: bool,
    /// Version of the resource named as the own trust domain that the client has acknowledged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub own: Option<String>,
    /// Responses sent.
    pub pushes: u64,
    /// The last refusal of resources by the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_nack: Option<String>,
}

/// One subscriber.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SubscriberState {
    /// SPIFFE id.
    pub identity: String,
    /// Device, if it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Node id.
    pub node: String,
    /// Version of the client.
    pub version: String,
    /// Where it comes from.
    pub from: String,
    /// Unix ms.
    pub connected_unix_ms: i64,
    /// By type URL.
    pub types: BTreeMap<String, TypeState>,
}

/// All subscribers. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Subscribers(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    rows: BTreeMap<u64, SubscriberState>,
}

impl Subscribers {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a row, which goes when the guard is dropped.
    pub(super) fn add(&self, state: SubscriberState) -> Row {
        let mut table = self.table();
        table.next += 1;
        let id = table.next;
        table.rows.insert(id, state);
        Row {
            id,
            subscribers: self.clone(),
        }
    }

    /// All rows.
    pub fn list(&self) -> Vec<SubscriberState> {
        self.table().rows.values().cloned().collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.table().rows.len()
    }

    /// True if nobody is subscribed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One subscriber's row.
#[derive(Debug)]
pub(super) struct Row {
    id: u64,
    subscribers: Subscribers,
}

impl Row {
    /// Changes what is shown of a type.
    pub(super) fn update(&self, type_url: &str, change: impl FnOnce(&mut TypeState)) {
        if let Some(row) = self.subscribers.table().rows.get_mut(&self.id) {
            change(row.types.entry(type_url.to_owned()).or_default());
        }
    }
}

impl Drop for Row {
    fn drop(&mut self) {
        self.subscribers.table().rows.remove(&self.id);
    }
}
