use crate::is_default;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// A resource of one kind: what Kubernetes calls an object.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Object<S> {
    /// `group/version` as it was written.
    pub api_version: String,
    /// Kind as in YAML.
    pub kind: String,
    /// Name, labels, and what the store keeps about it.
    pub metadata: Metadata,
    /// What the user wants.
    pub spec: S,
    /// What the mesh says about it; free of a schema.
    pub status: Option<Value>,
}

/// Kubernetes' object metadata, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Metadata {
    /// DNS subdomain, unique per kind and namespace.
    #[serde(default, skip_serializing_if = "is_default")]
    pub name: String,
    /// DNS label; `default` where none was written.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// For selection.
    #[serde(default, skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    /// For everything else.
    #[serde(default, skip_serializing_if = "is_default")]
    pub annotations: BTreeMap<String, String>,
    /// Given by the store; another one after delete and create.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Given by the store at each write; for compare-and-swap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource_version: Option<String>,
    /// Advanced by each change of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    /// RFC 3339; only in objects from Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<String>,
    /// Seconds; only in objects from Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_grace_period_seconds: Option<i64>,
    /// Objects that it belongs to.
    #[serde(default, skip_serializing_if = "is_default")]
    pub owner_references: Vec<OwnerReference>,
    /// Kept as written.
    #[serde(default, skip_serializing_if = "is_default")]
    pub finalizers: Vec<String>,
    /// Read, so that exported objects apply, and forgotten.
    #[serde(default, skip_serializing)]
    pub(crate) managed_fields: Option<Value>,
    /// Read and forgotten, as `managed_fields`.
    #[serde(default, skip_serializing)]
    pub(crate) self_link: Option<Value>,
    /// Read and forgotten: names are never made up here.
    #[serde(default, skip_serializing)]
    pub(crate) generate_name: Option<Value>,
}

fn default_namespace() -> String {
    "default".to_owned()
}

impl Metadata {
    /// With a name and a namespace, all else empty.
    pub fn named(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            ..Self::default()
        }
    }

    /// Forgets what is read only so that it is not refused.
    pub(crate) fn without_ignored(self) -> Self {
        Self {
            managed_fields: None,
            self_link: None,
            generate_name: None,
            ..self
        }
    }

    /// When it was created, in milliseconds since 1970; `None` if it says nothing or nonsense.
    pub fn created_unix_ms(&self) -> Option<i64> {
        self.creation_timestamp.as_deref().and_then(crate::unix_ms)
    }
}

/// An object that another one belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct OwnerReference {
    /// `group/version` of the owner.
    pub api_version: String,
    /// Its kind.
    pub kind: String,
    /// Its name, in the same namespace.
    pub name: String,
    /// Its uid.
    #[serde(default, skip_serializing_if = "is_default")]
    pub uid: String,
    /// The one that manages it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controller: Option<bool>,
    /// As in Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_owner_deletion: Option<bool>,
}
