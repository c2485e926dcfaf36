//! Resources in the store: keys, values, and reading them back with what the store keeps about them.

use std::sync::Arc;
use tombolo_config::{
    DeviceSpec, JoinTokenSpec, Kind, Object, Resource, ServiceEntrySpec, WorkloadEntrySpec, WorkloadGroupSpec,
};
use tombolo_store::{Key, Page, Select, Store, StoreError, Stored, Write};

/// Objects read at once where all are wanted.
const PAGE: usize = 1000;

/// Why an object could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObjectError {
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is stored under the key is no object of its kind.
    #[error("{key:?} in the store cannot be read: {cause}")]
    Unreadable {
        /// Which.
        key: Box<Key>,
        /// Why.
        cause: String,
    },
}

/// The key of an object.
pub fn key(kind: Kind, namespace: &str, name: &str) -> Key {
    Key::new(kind.group(), kind.name(), namespace, name)
}

/// False for what the store keeps beside resources, such as the membership of clusters.
pub fn is_resource(key: &Key) -> bool {
    Kind::of(&key.group, &key.kind).is_some()
}

/// The key of a resource.
pub fn key_of(resource: &Resource) -> Key {
    key(resource.kind(), resource.namespace(), resource.name())
}

/// The value that is stored: the object without what the store keeps beside it.
pub fn value_of(resource: &Resource) -> Vec<u8> {
    let mut bare = resource.clone();
    let metadata = bare.metadata_mut();
    (metadata.uid, metadata.resource_version) = (None, None);
    (metadata.generation, metadata.creation_timestamp) = (None, None);
    bare.to_json().to_string().into_bytes()
}

/// Reads a stored object; metadata is the store's.
///
/// # Errors
/// When the value is damaged.
pub fn read(stored: &Stored) -> Result<Resource, ObjectError> {
    let unreadable = |cause: String| ObjectError::Unreadable {
        key: Box::new(stored.key.clone()),
        cause,
    };
    let json = serde_json::from_slice(&stored.value).map_err(|e| unreadable(e.to_string()))?;
    let mut resource = Resource::from_stored(&json).map_err(|findings| {
        unreadable(
            findings
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("; "),
        )
    })?;
    let metadata = resource.metadata_mut();
    metadata.uid = Some(stored.uid.clone());
    metadata.resource_version = Some(stored.resource_version.to_string());
    metadata.generation = i64::try_from(stored.generation).ok();
    metadata.creation_timestamp = Some(tombolo_config::rfc3339(stored.created_unix_ms));
    Ok(resource)
}

/// The resource version that the store gave.
pub fn version_of(resource: &Resource) -> u64 {
    resource
        .metadata()
        .resource_version
        .as_deref()
        .and_then(|v| v.parse().ok())
        .unwrap_or_default()
}

/// A write that makes a new object.
pub fn create(resource: &Resource) -> Write {
    Write::Create {
        key: key_of(resource),
        value: value_of(resource),
    }
}

/// A write that replaces the object as it was read. `spec_changed` advances its generation.
pub fn update(resource: &Resource, spec_changed: bool) -> Write {
    Write::Update {
        key: key_of(resource),
        resource_version: version_of(resource),
        value: value_of(resource),
        bump_generation: spec_changed,
    }
}

/// A write that removes the object, if it is still as it was read.
pub fn delete(resource: &Resource) -> Write {
    Write::Delete {
        key: key_of(resource),
        resource_version: Some(version_of(resource)),
    }
}

/// The store, with resources instead of bytes. Cheap to clone.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn Store>,
}

impl std::fmt::Debug for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objects").finish_non_exhaustive()
    }
}

macro_rules! typed {
    ($($(#[$doc:meta])* $name:ident: $kind:ident($spec:ty);)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// When the store fails or holds nonsense.
        pub async fn $name(&self, namespace: &str, name: &str) -> Result<Option<Object<$spec>>, ObjectError> {
            match self.get(Kind::$kind, namespace, name).await? {
                Some(Resource::$kind(object)) => Ok(Some(object)),
                _ => Ok(None),
            }
        }
    )*};
}

impl Objects {
    /// Over a store.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// The store itself.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// One object.
    ///
    /// # Errors
    /// When the store fails or holds nonsense.
    pub async fn get(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Resource>, ObjectError> {
        self.store
            .get(&key(kind, namespace, name))
            .await?
            .as_ref()
            .map(read)
            .transpose()
    }

    typed! {
        /// A WorkloadGroup.
        workload_group: WorkloadGroup(WorkloadGroupSpec);
        /// A WorkloadEntry.
        workload_entry: WorkloadEntry(WorkloadEntrySpec);
        /// A ServiceEntry.
        service_entry: ServiceEntry(ServiceEntrySpec);
        /// A JoinToken.
        join_token: JoinToken(JoinTokenSpec);
        /// A Device.
        device: Device(DeviceSpec);
    }

    /// All objects of a kind, of one namespace or of all, and the version of the store at the start of the listing.
    /// Objects that cannot be read are logged and left out: one damaged object must not take the mesh down.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(
        &self,
        kind: Option<Kind>,
        namespace: Option<&str>,
    ) -> Result<(Vec<Resource>, u64), ObjectError> {
        let select = Select {
            kind: kind.map(|kind| (kind.group().to_owned(), kind.name().to_owned())),
            namespace: namespace.map(str::to_owned),
        };
        let (mut resources, mut version, mut after) = (Vec::new(), None, None);
        loop {
            let listing = self.store.list(&select, Page { limit: PAGE, after }).await?;
            version.get_or_insert(listing.resource_version);
            for stored in listing.items.iter().filter(|stored| is_resource(&stored.key)) {
                match read(stored) {
                    Ok(resource) => resources.push(resource),
                    Err(error) => tracing::error!(%error, "an object is left out"),
                }
            }
            match listing.next {
                Some(next) => after = Some(next),
                None => return Ok((resources, version.unwrap_or_default())),
            }
        }
    }

    /// One transaction. Returns the version that the store has when it is in.
    ///
    /// # Errors
    /// With a conflict when something was changed meanwhile: nothing is written then.
    pub async fn commit(&self, writes: Vec<Write>) -> Result<(Vec<Stored>, u64), ObjectError> {
        let stored = self.store.commit(writes).await?;
        let version = stored
            .iter()
            .map(|s| s.resource_version)
            .max()
            .unwrap_or_else(|| self.store.resource_version());
        Ok((stored, version))
    }
}
