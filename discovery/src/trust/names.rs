//! How the own trust domain is called, and how one name follows another: a part of the record in the store.
//!
//! | step | believed | certificates are for | how it ends |
//! |---|---|---|---|
//! | steady | the name | the name | `start` |
//! | started | old, new | old | `switch`, or `abort` back to steady |
//! | switched | new, old | new | `finish` |
//!
//! Roots stay as they are: a name of the own trust domain is believed by the same roots as every other one of it.

use serde::{Deserialize, Serialize};
use tombolo_identity::TrustBundle;
use tombolo_registry::MeshSettings;
use tombolo_types::TrustDomain;

/// A step of a renaming.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "name")]
pub(super) enum Renaming {
    /// None: there is one name.
    #[default]
    Steady,
    /// A name is believed beside the one that certificates are made for.
    #[serde(rename_all = "camelCase")]
    Started {
        next: String,
        since_unix_ms: i64,
        by: String,
    },
    /// Certificates are made for the new name, and the old one is still believed.
    #[serde(rename_all = "camelCase")]
    Switched {
        previous: String,
        since_unix_ms: i64,
        by: String,
        /// End of the last certificate for the old name that belongs to no device, Unix seconds.
        others_until: u64,
    },
}

impl Renaming {
    /// One word.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Steady => super::STEADY,
            Self::Started { .. } => "started",
            Self::Switched { .. } => "switched",
        }
    }

    /// The name beside the one that certificates are made for.
    pub(super) fn beside(&self) -> Option<&str> {
        match self {
            Self::Steady => None,
            Self::Started { next: name, .. } | Self::Switched { previous: name, .. } => Some(name),
        }
    }

    /// When the step was made, and by whom.
    pub(super) fn made(&self) -> (i64, &str) {
        match self {
            Self::Steady => (0, ""),
            Self::Started {
                since_unix_ms, by, ..
            }
            | Self::Switched {
                since_unix_ms, by, ..
            } => (*since_unix_ms, by),
        }
    }
}

/// A name that the trust domain had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Left {
    pub(super) name: String,
    /// Until then discovery is found under it, Unix seconds.
    pub(super) until: u64,
}

/// All names. Every one in it is a valid name of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Names {
    /// That certificates are made for; none: the one that the mesh was founded with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) signing: Option<String>,
    #[serde(default)]
    pub(super) step: Renaming,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) left: Vec<Left>,
}

impl Names {
    /// True where nothing was ever renamed.
    pub(super) fn is_founding(&self) -> bool {
        *self == Self::default()
    }

    /// Forgets what is over. True if there was something.
    pub(super) fn sweep(&mut self, now_unix: u64) -> bool {
        let before = self.left.len();
        self.left.retain(|left| left.until > now_unix);
        before != self.left.len()
    }

    /// The names, of a mesh that was founded as `founding`. A name in the record that is none counts for nothing.
    pub(super) fn own(&self, founding: &TrustDomain) -> OwnNames {
        let read = |text: &str| text.parse::<TrustDomain>().ok();
        let signing = self.signing.as_deref().and_then(read);
        let signing = signing.unwrap_or_else(|| founding.clone());
        let beside = self.step.beside().and_then(read);
        let also: Vec<_> = beside.into_iter().filter(|name| *name != signing).collect();
        let mut former: Vec<TrustDomain> = Vec::new();
        for name in self.left.iter().filter_map(|left| read(&left.name)) {
            if name != signing && !also.contains(&name) && !former.contains(&name) {
                former.push(name);
            }
        }
        OwnNames {
            signing,
            also,
            former,
        }
    }
}

/// What the own trust domain is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnNames {
    /// Certificates are made for this one.
    pub signing: TrustDomain,
    /// Identities of these are believed as well.
    pub also: Vec<TrustDomain>,
    /// Whoever looks for discovery under one of these finds it.
    pub former: Vec<TrustDomain>,
}

impl OwnNames {
    /// Puts them into the settings of the mesh.
    pub fn apply(&self, settings: &mut MeshSettings) {
        settings.trust_domain = self.signing.clone();
        settings.also.clone_from(&self.also);
        settings.former.clone_from(&self.former);
    }

    /// Every name under which discovery is found, the signing one first.
    pub fn all(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.signing)
            .chain(&self.also)
            .chain(&self.former)
    }

    /// One bundle for each name that is believed, all of the roots of `bundle`.
    pub fn bundles(&self, bundle: &TrustBundle) -> Vec<TrustBundle> {
        let signing = bundle.named(self.signing.clone());
        let also = self.also.iter().map(|name| bundle.named(name.clone()));
        std::iter::once(signing.with_names(self.also.clone(), self.former.clone()))
            .chain(also)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_through_a_renaming() {
        let founding: TrustDomain = "old.example".parse().unwrap();
        let check = |names: &Names, wanted: [&str; 3]| {
            let own = names.own(&founding);
            let join = |all: &[TrustDomain]| all.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
            assert_eq!(
                [own.signing.to_string(), join(&own.also), join(&own.former)],
                wanted
            );
            let text = serde_json::to_string(names).unwrap();
            assert_eq!(serde_json::from_str::<Names>(&text).unwrap(), *names, "{text}");
        };
        let mut names = Names::default();
        assert!(names.is_founding());
        check(&names, ["old.example", "", ""]);
        let (since_unix_ms, by) = (7, "root".to_owned());
        names.step = Renaming::Started {
            next: "new.example".into(),
            since_unix_ms,
            by: by.clone(),
        };
        check(&names, ["old.example", "new.example", ""]);
        names.signing = Some("new.example".into());
        names.step = Renaming::Switched {
            previous: "old.example".into(),
            since_unix_ms,
            by: by.clone(),
            others_until: 9,
        };
        check(&names, ["new.example", "old.example", ""]);
        names.step = Renaming::Steady;
        names.left.push(Left {
            name: "old.example".into(),
            until: 100,
        });
        check(&names, ["new.example", "", "old.example"]);
        // And back again: a name is not former while it is there.
        names.step = Renaming::Started {
            next: "old.example".into(),
            since_unix_ms,
            by,
        };
        check(&names, ["new.example", "old.example", ""]);
        assert!(!names.sweep(99) && names.sweep(100) && !names.sweep(100));
        names.signing = Some("Not A Name".into());
        check(&names, ["old.example", "", ""]);
    }
}
