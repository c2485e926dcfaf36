use crate::StoreError;
use std::fmt;

/// Most bytes of a group, kind, namespace or name. Kubernetes allows 253; ServiceEntries named after hosts fit.
const NAME_LENGTH_MAX: usize = 253;

/// Names an object. Ordered by group, kind, namespace, name: the order of lists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// API group, for example `networking.istio.io`; may be empty.
    pub group: String,
    /// Kind, for example `WorkloadEntry`.
    pub kind: String,
    /// Namespace; empty for kinds that have none.
    pub namespace: String,
    /// Name within its namespace.
    pub name: String,
}

impl Key {
    /// Joins the parts; they are checked when the key is written.
    pub fn new(group: &str, kind: &str, namespace: &str, name: &str) -> Self {
        Self {
            group: group.into(),
            kind: kind.into(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }

    /// The parts, each closed by a zero byte: compares as the parts do, and every prefix of parts is a range.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let parts = [&self.group, &self.kind, &self.namespace, &self.name];
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len() + 1).sum());
        for part in parts {
            bytes.extend_from_slice(part.as_bytes());
            bytes.push(0);
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\0')?;
        let mut parts = text.split('\0');
        let key = Self::new(parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        parts.next().is_none().then_some(key)
    }

    pub(crate) fn check(&self) -> Result<(), StoreError> {
        let parts = [&self.group, &self.kind, &self.namespace, &self.name];
        if parts
            .iter()
            .any(|part| part.len() > NAME_LENGTH_MAX || part.contains('\0'))
        {
            return Err(StoreError::InvalidKey {
                key: self.clone(),
                reason: "a part is too long or holds a zero byte",
            });
        }
        if self.kind.is_empty() || self.name.is_empty() {
            return Err(StoreError::InvalidKey {
                key: self.clone(),
                reason: "kind and name may not be empty",
            });
        }
        Ok(())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// An object as the store holds it. The value is opaque bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub key: Key,
    /// UUID v4, given at creation: an object deleted and made again is another one.
    pub uid: String,
    /// Revision of its last write; of its deletion in a [`Change::Delete`].
    pub resource_version: u64,
    /// 1 at creation, one more with each write that says so (a change of what is wanted, not of its status).
    pub generation: u64,
    /// Creation, Unix milliseconds.
    pub created_unix_ms: i64,
    /// Content.
    pub value: Vec<u8>,
}

impl fmt::Debug for Stored {
    /// Without the value: it may hold what is not for logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("key", &self.key.to_string())
            .field("uid", &self.uid)
            .field("resource_version", &self.resource_version)
            .field("generation", &self.generation)
            .field("value_bytes", &self.value.len())
            .finish_non_exhaustive()
    }
}

/// One write of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Makes an object that must not exist.
    Create {
        /// Its name.
        key: Key,
        /// Content.
        value: Vec<u8>,
    },
    /// Replaces the content of an object that nobody has changed since.
    Update {
        /// Its name.
        key: Key,
        /// The version that was read; another one now is a [`StoreError::Conflict`].
        resource_version: u64,
        /// New content.
        value: Vec<u8>,
        /// True for a change of what is wanted, false for one of its status.
        bump_generation: bool,
    },
    /// Removes an object.
    Delete {
        /// Its name.
        key: Key,
        /// The version that was read, or `None` for whatever version it has.
        resource_version: Option<u64>,
    },
}

impl Write {
    /// The object it is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::Create { key, .. } | Self::Update { key, .. } | Self::Delete { key, .. } => key,
        }
    }
}

/// Which objects of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Select {
    /// Group and kind; `None` is all kinds.
    pub kind: Option<(String, String)>,
    /// Namespace; `None` is all namespaces.
    pub namespace: Option<String>,
}

impl Select {
    /// All objects of a kind.
    pub fn kind(group: &str, kind: &str) -> Self {
        Self {
            kind: Some((group.into(), kind.into())),
            namespace: None,
        }
    }

    /// Only those of a namespace.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    pub(crate) fn takes(&self, key: &Key) -> bool {
        self.kind
            .as_ref()
            .is_none_or(|(group, kind)| *group == key.group && *kind == key.kind)
            && self
                .namespace
                .as_ref()
                .is_none_or(|namespace| *namespace == key.namespace)
    }

    /// Where the selected keys can lie.
    pub(crate) fn prefix(&self) -> Vec<u8> {
        let Some((group, kind)) = &self.kind else {
            return Vec::new();
        };
        let mut prefix = [group.as_bytes(), b"\0", kind.as_bytes(), b"\0"].concat();
        if let Some(namespace) = &self.namespace {
            prefix.extend_from_slice(namespace.as_bytes());
            prefix.push(0);
        }
        prefix
    }
}

/// Which part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Most objects, at least 1 is taken.
    pub limit: usize,
    /// Start behind this key; it need not exist any more.
    pub after: Option<Key>,
}

impl Page {
    /// Everything at once.
    pub fn all() -> Self {
        Self {
            limit: usize::MAX,
            after: None,
        }
    }

    /// The first `limit` objects.
    pub fn first(limit: usize) -> Self {
        Self { limit, after: None }
    }
}

/// A page of a list, all of it of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// In the order of their keys.
    pub items: Vec<Stored>,
    /// Revision that the page was read at. To follow a list of several pages, watch from the **first** page's: what
    /// a later page shows already comes again, which a reader that replaces by key does not notice.
    pub resource_version: u64,
    /// Pass it as [`Page::after`] for the next page; `None` at the end.
    pub next: Option<Key>,
}

/// What a write did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Created or replaced.
    Put(Stored),
    /// Removed: its last content, with the revision of the removal.
    Delete(Stored),
}

impl Change {
    /// The object, whichever it was.
    pub fn stored(&self) -> &Stored {
        match self {
            Self::Put(stored) | Self::Delete(stored) => stored,
        }
    }
}

/// A write as watchers see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Revision of the write: watch from it to get what follows.
    pub resource_version: u64,
    /// What it did.
    pub change: Change,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn key_bytes_compare_as_keys(a in "[a-c.]{0,3}", b in "[a-c]{1,3}", c in "[a-c]{0,3}", d in "[a-c-]{1,3}",
                                     e in "[a-c.]{0,3}", f in "[a-c]{1,3}", g in "[a-c]{0,3}", h in "[a-c-]{1,3}") {
            let (x, y) = (Key::new(&a, &b, &c, &d), Key::new(&e, &f, &g, &h));
            prop_assert_eq!(x.cmp(&y), x.to_bytes().cmp(&y.to_bytes()));
            prop_assert_eq!(Key::from_bytes(&x.to_bytes()), Some(x.clone()));
            let select = Select::kind(&e, &f).in_namespace(&g);
            prop_assert_eq!(select.takes(&x), x.to_bytes().starts_with(&select.prefix()));
        }

        #[test]
        fn reading_a_key_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Key::from_bytes(&bytes);
        }
    }

    #[test]
    fn refused_keys() {
        for key in [
            Key::new("", "", "n", "x"),
            Key::new("", "K", "n", ""),
            Key::new("", "K", "a\0b", "x"),
            Key::new("", "K", "n", &"x".repeat(254)),
        ] {
            assert!(
                matches!(key.check(), Err(StoreError::InvalidKey { .. })),
                "{key:?}"
            );
        }
    }
}
