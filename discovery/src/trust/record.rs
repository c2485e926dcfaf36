//! How far a rotation is: one value in the store. A step is made when this value is written, and not before.

use super::names::Names;
use crate::{objects::ObjectError, state::StateDir};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, sync::Arc};
use tombolo_ca::{Authority, CaError, Publication};
use tombolo_store::{Key, Store, Write};
use tombolo_types::TrustDomain;

const GROUP: &str = "trust.tombolo.io";
const KIND: &str = "TrustState";
const NAMESPACE: &str = "tombolo-system";
const NAME: &str = "own";
/// Form of the value.
const VERSION: u32 = 1;
/// The folder that `init` makes.
const FIRST: &str = "ca";

/// The step that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "name")]
pub(super) enum Step {
    /// None: one root signs and is believed.
    #[default]
    Steady,
    /// A new root is believed beside the one that signs.
    #[serde(rename_all = "camelCase")]
    Started {
        /// Folder of the new one.
        next: String,
        since_unix_ms: i64,
        by: String,
    },
    /// The new root signs, the old one is still believed.
    #[serde(rename_all = "camelCase")]
    Switched {
        /// Folder of the old one.
        previous: String,
        since_unix_ms: i64,
        by: String,
        /// End of the last certificate of the old root that belongs to no device, Unix seconds.
        others_until: u64,
    },
}

impl Step {
    /// One word.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Steady => super::STEADY,
            Self::Started { .. } => "started",
            Self::Switched { .. } => "switched",
        }
    }
}

/// A certificate that is kept until a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Kept {
    pub(super) pem: String,
    /// Unix seconds.
    pub(super) until: u64,
}

/// Everything that is remembered of the own trust.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Record {
    pub(super) version: u32,
    /// Folder of the CA that signs, below the state folder.
    pub(super) signing: String,
    pub(super) step: Step,
    /// The signing certificate as earlier roots signed it, the newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) crosses: Vec<Kept>,
    /// Roots that let nobody in any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) retired: Vec<Kept>,
    /// End of the last certificate of the signing CA that belongs to no device, rounded up. Unix seconds.
    #[serde(default)]
    pub(super) others_until: u64,
    /// How the trust domain is called, where it was renamed or is being so.
    #[serde(default, skip_serializing_if = "Names::is_founding")]
    pub(super) names: Names,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            version: VERSION,
            signing: FIRST.into(),
            step: Step::Steady,
            crosses: Vec::new(),
            retired: Vec::new(),
            others_until: 0,
            names: Names::default(),
        }
    }
}

/// Why the record cannot be put into force.
#[derive(Debug, thiserror::Error)]
pub(super) enum RecordError {
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error("the state of trust in the store is of version {0}, this discovery understands {VERSION}")]
    Version(u32),
}

impl Record {
    /// The text of certificates that are still kept.
    fn kept(list: &[Kept], now_unix: u64) -> String {
        let live = list.iter().filter(|kept| kept.until > now_unix);
        live.map(|kept| kept.pem.as_str()).collect()
    }

    /// Forgets what is kept no longer. True if there was something.
    pub(super) fn sweep(&mut self, now_unix: u64) -> bool {
        let before = self.crosses.len() + self.retired.len();
        self.crosses.retain(|kept| kept.until > now_unix);
        self.retired.retain(|kept| kept.until > now_unix);
        let names = self.names.sweep(now_unix);
        names || before != self.crosses.len() + self.retired.len()
    }
}

/// Where CAs and the record are.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) store: Arc<dyn Store>,
    pub(super) state: StateDir,
    /// The name that the mesh was founded with, and keys of it were made for.
    pub(super) founding: TrustDomain,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

fn key() -> Key {
    Key::new(GROUP, KIND, NAMESPACE, NAME)
}

impl Place {
    /// A folder of a CA.
    pub(super) fn folder(&self, name: &str) -> PathBuf {
        self.state.path().join(name)
    }

    /// A CA as it was founded.
    pub(super) fn authority(&self, name: &str) -> Result<Authority, CaError> {
        Authority::open(&self.folder(name), &self.founding)
    }

    /// The record, and its version in the store; where there is none, that of a mesh that never changed its root.
    pub(super) async fn load(&self) -> Result<(Record, Option<u64>), RecordError> {
        let Some(stored) = self.store.get(&key()).await.map_err(ObjectError::from)? else {
            return Ok((Record::default(), None));
        };
        let unreadable = |error: serde_json::Error| ObjectError::Unreadable {
            key: Box::new(key()),
            cause: error.to_string(),
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(&stored.value).map_err(unreadable)?;
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let record = serde_json::from_slice(&stored.value).map_err(unreadable)?;
        Ok((record, Some(stored.resource_version)))
    }

    /// Writes the record over the one of `version`. Returns the new version.
    pub(super) async fn save(&self, record: &Record, version: Option<u64>) -> Result<u64, ObjectError> {
        let value = serde_json::to_vec(record).unwrap_or_default(); // texts and numbers only
        let write = match version {
            None => Write::Create { key: key(), value },
            Some(resource_version) => Write::Update {
                key: key(),
                resource_version,
                value,
                bump_generation: true,
            },
        };
        let stored = self.store.commit(vec![write]).await?;
        Ok(stored.first().map_or(0, |stored| stored.resource_version))
    }

    /// The CA that signs, publishing what the record says.
    pub(super) fn open(&self, record: &Record, now_unix: u64) -> Result<Authority, CaError> {
        let roots_of = |name: &str| self.authority(name).map(|other| other.roots_pem().to_owned());
        let roots_pem = match &record.step {
            Step::Steady => String::new(),
            Step::Started { next, .. } => roots_of(next)?,
            Step::Switched { previous, .. } => roots_of(previous)?,
        };
        let names = record.names.own(&self.founding);
        self.authority(&record.signing)?.publishing(&Publication {
            roots_pem,
            retired_pem: Record::kept(&record.retired, now_unix),
            crosses_pem: Record::kept(&record.crosses, now_unix),
            trust_domain: Some(names.signing),
            other_names: [names.also, names.former].concat(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_forgets() {
        let kept = |until| Kept {
            pem: format!("{until}"),
            until,
        };
        let mut record = Record {
            step: Step::Switched {
                previous: "ca".into(),
                since_unix_ms: 7,
                by: "uid 0".into(),
                others_until: 9,
            },
            crosses: vec![kept(100), kept(50)],
            retired: vec![kept(60)],
            ..Record::default()
        };
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record, "{text}");
        assert_eq!(Record::kept(&record.crosses, 50), "100");
        assert!(record.sweep(60) && !record.sweep(60));
        assert_eq!((record.crosses.len(), record.retired.len()), (1, 0));
        let steady = serde_json::to_string(&Record::default()).unwrap();
        assert_eq!(
            serde_json::from_str::<Record>(&steady).unwrap(),
            Record::default()
        );
    }
}
