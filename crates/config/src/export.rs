//! What says that other clusters may call a service: `multicluster.x-k8s.io` ServiceExport, and labels.

use crate::{Metadata, annotation::GLOBAL, is_default};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Says by its being there that the service of its name and namespace may be called from other clusters.
///
/// Source: sigs.k8s.io/mcs-api v1alpha1 ServiceExportSpec.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct ServiceExportSpec {
    /// Labels for the importing side; kept, and not passed on.
    #[serde(default, skip_serializing_if = "is_default")]
    pub exported_labels: BTreeMap<String, String>,
    /// Annotations for the importing side; kept, and not passed on.
    #[serde(default, skip_serializing_if = "is_default")]
    pub exported_annotations: BTreeMap<String, String>,
}

/// Of a namespace only the labels mean something here.
///
/// Source: k8s.io/api core/v1 NamespaceSpec.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct NamespaceSpec {
    /// Kept as written.
    #[serde(default, skip_serializing_if = "is_default")]
    pub finalizers: Vec<String>,
}

/// What the label [`GLOBAL`] of a ServiceEntry or a Namespace says about export; `None` without the label. A value that
/// is not `"true"` exports nothing.
pub fn exports(metadata: &Metadata) -> Option<bool> {
    metadata.labels.get(GLOBAL).map(|value| value == "true")
}
