//! What federation keeps: membership and invites in the store, imports and the member key in files of their own.

use crate::{files, objects::ObjectError};
use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};
use tombolo_federation::{Ed25519, Grant, Invite, MemberKey, Saved, Write as FederationWrite};
use tombolo_store::{Key, Page, Select, Store, StoreError, Write};
use tombolo_types::check_label;
use zeroize::Zeroizing;

const GROUP: &str = "federation.tombolo.io";
const STATE: &str = "FederationState";
const INVITE: &str = "ClusterInvite";
const NAMESPACE: &str = "tombolo-system";
/// Objects read at once.
const PAGE: usize = 500;
/// Invites at once, used and expired ones too.
pub(super) const INVITES_MAX: usize = 1000;

/// An invite as it is stored. The secret half was never here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ClusterInvite {
    /// Ed25519, base64.
    pub public_key: String,
    /// The one cluster that may use it.
    pub cluster: String,
    /// The trust domain that this cluster must have.
    pub trust_domain: String,
    /// What it may export; `*` alone: every namespace that is not reserved.
    pub namespaces: Vec<String>,
    /// It may admit others.
    #[serde(default)]
    pub may_admit: bool,
    /// Its trust domain may be that of another member that says the same.
    #[serde(default)]
    pub share_trust_domain: bool,
    /// Unix milliseconds.
    pub expires_unix_ms: i64,
    /// Who made it.
    pub created_by: String,
    /// The member key that used it, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
}

fn key_of(text: &str) -> Option<MemberKey> {
    MemberKey::try_from(STANDARD.decode(text).ok()?.as_slice()).ok()
}

impl ClusterInvite {
    /// As the core takes it; `None` for one that is damaged.
    pub(super) fn to_core(&self, id: [u8; 16]) -> Option<Invite> {
        Some(Invite {
            id,
            public_key: key_of(&self.public_key)?,
            cluster: self.cluster.as_str().into(),
            trust_domain: self.trust_domain.parse().ok()?,
            namespaces: Grant::from_list(self.namespaces.iter().map(String::as_str)).ok()?,
            may_admit: self.may_admit,
            share_trust_domain: self.share_trust_domain,
            expires_unix_ms: self.expires_unix_ms,
            used_by: match &self.used_by {
                Some(text) => Some(key_of(text)?),
                None => None,
            },
        })
    }
}

pub(super) fn hex(id: &[u8; 16]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn state_key(name: &str) -> Key {
    Key::new(GROUP, STATE, NAMESPACE, name)
}

fn invite_key(name: &str) -> Key {
    Key::new(GROUP, INVITE, NAMESPACE, name)
}

/// The one writer of what federation keeps.
pub(super) struct Keeper {
    store: Arc<dyn Store>,
    dir: PathBuf,
    /// Version of each value that is stored, by its key.
    versions: BTreeMap<String, u64>,
}

impl Keeper {
    /// Over the store and a folder, which is made.
    pub(super) fn open(store: Arc<dyn Store>, dir: &Path) -> io::Result<Self> {
        if !dir.exists() {
            files::make_private_dir(dir)?;
        }
        Ok(Self {
            store,
            dir: dir.into(),
            versions: BTreeMap::new(),
        })
    }

    /// The key of this member: made at the first call, apart from the CA, and never leaves the file.
    pub(super) fn member_key(&self) -> io::Result<Ed25519> {
        let path = self.dir.join("member.key");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let text = Zeroizing::new(text);
                let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(io::Error::other)?);
                let seed: Zeroizing<[u8; 32]> = Zeroizing::new(
                    bytes
                        .as_slice()
                        .try_into()
                        .map_err(|_| io::Error::other("it is no member key"))?,
                );
                Ok(Ed25519::from_seed(&seed))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut seed = Zeroizing::new([0; 32]);
                SystemRandom::new()
                    .fill(&mut *seed)
                    .map_err(|_| io::Error::other("the operating system gives no randomness"))?;
                let text = Zeroizing::new(STANDARD.encode(*seed));
                files::write_secret(&path, text.as_bytes())?;
                Ok(Ed25519::from_seed(&seed))
            }
            Err(error) => Err(error),
        }
    }

    async fn all(&self, kind: &str) -> Result<Vec<tombolo_store::Stored>, StoreError> {
        let (mut items, mut after) = (Vec::new(), None);
        let select = Select::kind(GROUP, kind);
        loop {
            let listing = self.store.list(&select, Page { limit: PAGE, after }).await?;
            items.extend(listing.items);
            match listing.next {
                Some(next) => after = Some(next),
                None => return Ok(items),
            }
        }
    }

    /// Everything that the core starts from.
    pub(super) async fn load(&mut self) -> Result<Saved, StoreError> {
        let mut saved = Saved::new();
        self.versions.clear();
        for stored in self.all(STATE).await? {
            self.versions
                .insert(stored.key.name.clone(), stored.resource_version);
            saved.insert(stored.key.name, stored.value);
        }
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(cluster) = name.strip_suffix(".imports")
                && let Ok(value) = fs::read(entry.path())
            {
                saved.insert(format!("imports/{cluster}"), value);
            }
        }
        Ok(saved)
    }

    /// One transaction; several writes of one key are the last of them.
    pub(super) async fn commit(&mut self, writes: &[FederationWrite]) -> Result<(), ObjectError> {
        let mut values: BTreeMap<&str, Option<&Vec<u8>>> = BTreeMap::new();
        let mut made = Vec::new();
        for write in writes {
            match write {
                FederationWrite::Put { key, value } => drop(values.insert(key, Some(value))),
                FederationWrite::Delete { key } => drop(values.insert(key, None)),
                FederationWrite::InviteUsed { id, key } => {
                    let name = hex(id);
                    let stored = self.store.get(&invite_key(&name)).await?;
                    let stored = stored.ok_or_else(|| StoreError::NotFound(invite_key(&name)))?;
                    let mut invite = read_invite(&stored)?;
                    invite.used_by = Some(STANDARD.encode(key.0));
                    made.push(Write::Update {
                        key: stored.key,
                        resource_version: stored.resource_version,
                        value: value_of(&invite),
                        bump_generation: true,
                    });
                }
            }
        }
        for (name, value) in &values {
            let key = state_key(name);
            match (value, self.versions.get(*name)) {
                (Some(value), Some(version)) => made.push(Write::Update {
                    key,
                    resource_version: *version,
                    value: (*value).clone(),
                    bump_generation: true,
                }),
                (Some(value), None) => made.push(Write::Create {
                    key,
                    value: (*value).clone(),
                }),
                (None, Some(_)) => made.push(Write::Delete {
                    key,
                    resource_version: None,
                }),
                (None, None) => {}
            }
        }
        if made.is_empty() {
            return Ok(());
        }
        for stored in self.store.commit(made).await? {
            if stored.key.kind != STATE {
                continue;
            }
            if values.get(stored.key.name.as_str()) == Some(&None) {
                self.versions.remove(&stored.key.name);
            } else {
                self.versions.insert(stored.key.name, stored.resource_version);
            }
        }
        Ok(())
    }

    /// Puts back what was loaded before, as one transaction.
    pub(super) async fn restore(&mut self, saved: &Saved) -> Result<(), ObjectError> {
        let is_state = |key: &&String| !key.starts_with("imports/");
        let puts = saved
            .iter()
            .filter(|(key, _)| is_state(key))
            .map(|(key, value)| FederationWrite::Put {
                key: key.clone(),
                value: value.clone(),
            });
        let gone = self.versions.keys().filter(|key| !saved.contains_key(*key));
        let deletes = gone.map(|key| FederationWrite::Delete { key: key.clone() });
        let writes: Vec<FederationWrite> = puts.chain(deletes).collect();
        self.commit(&writes).await
    }

    /// Where the imports of a cluster are kept; `None` for what is no name.
    pub(super) fn imports_path(&self, cluster: &str) -> Option<PathBuf> {
        check_label("cluster", cluster).ok()?;
        Some(self.dir.join(format!("{cluster}.imports")))
    }

    pub(super) async fn invite(&self, id: &[u8; 16]) -> Result<Option<ClusterInvite>, ObjectError> {
        self.store
            .get(&invite_key(&hex(id)))
            .await?
            .as_ref()
            .map(read_invite)
            .transpose()
    }

    /// All invites by their ids; damaged ones are left out.
    pub(super) async fn invites(&self) -> Result<Vec<(String, ClusterInvite)>, ObjectError> {
        let stored = self.all(INVITE).await?;
        let read = stored
            .into_iter()
            .filter_map(|stored| Some((stored.key.name.clone(), read_invite(&stored).ok()?)));
        Ok(read.collect())
    }

    pub(super) async fn add_invite(&self, id: &[u8; 16], invite: &ClusterInvite) -> Result<(), ObjectError> {
        let write = Write::Create {
            key: invite_key(&hex(id)),
            value: value_of(invite),
        };
        self.store.commit(vec![write]).await?;
        Ok(())
    }

    pub(super) async fn delete_invite(&self, name: &str) -> Result<(), ObjectError> {
        let write = Write::Delete {
            key: invite_key(name),
            resource_version: None,
        };
        self.store.commit(vec![write]).await?;
        Ok(())
    }
}

fn value_of(invite: &ClusterInvite) -> Vec<u8> {
    serde_json::to_vec(invite).unwrap_or_default() // strings, numbers and flags only
}

fn read_invite(stored: &tombolo_store::Stored) -> Result<ClusterInvite, ObjectError> {
    serde_json::from_slice(&stored.value).map_err(|error| ObjectError::Unreadable {
        key: Box::new(stored.key.clone()),
        cause: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use tombolo_federation::Crypto as _;
    use tombolo_store::{RedbStore, StoreOptions};

    fn put(key: &str, value: &[u8]) -> FederationWrite {
        FederationWrite::Put {
            key: key.into(),
            value: value.into(),
        }
    }

    #[tokio::test]
    async fn what_was_committed_is_loaded_and_restored() {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("store.redb"), StoreOptions::default()).unwrap();
        let mut keeper = Keeper::open(store, &dir.path().join("federation")).unwrap();
        keeper
            .commit(&[put("self", b"1"), put("record/a/b", b"1"), put("self", b"2")])
            .await
            .unwrap();
        let before = keeper.load().await.unwrap();
        assert_eq!((before.len(), before["self"].as_slice()), (2, b"2".as_slice()));
        let delete = FederationWrite::Delete {
            key: "record/a/b".into(),
        };
        keeper
            .commit(&[put("self", b"3"), delete, put("record/c/d", b"1")])
            .await
            .unwrap();
        keeper.restore(&before).await.unwrap();
        assert_eq!(keeper.load().await.unwrap(), before);
    }

    #[test]
    fn the_member_key_is_made_once_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = RedbStore::open(&dir.path().join("store.redb"), StoreOptions::default()).unwrap();
        let folder = dir.path().join("federation");
        let key = || {
            Keeper::open(store.clone(), &folder)
                .unwrap()
                .member_key()
                .unwrap()
                .public_key()
        };
        assert_eq!(key(), key());
        let mode = fs::metadata(folder.join("member.key"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::write(folder.join("member.key"), "x").unwrap();
        assert!(
            Keeper::open(store.clone(), &folder)
                .unwrap()
                .member_key()
                .is_err()
        );
    }
}
