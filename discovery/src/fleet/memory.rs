//! What is remembered of members over a restart of discovery: a small file beside the store. Heartbeats and health
//! never go into the store.

use super::{Report, liveness::Remembered};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::Path};

/// Of one member.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MemberMemory {
    #[serde(flatten)]
    pub(super) liveness: Remembered,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) report: Option<Report>,
}

/// Of all, by device id as text.
pub(super) type Memory = BTreeMap<String, MemberMemory>;

/// Reads the file. It is a cache: missing or damaged is as good as empty.
pub(super) fn read(path: &Path) -> Memory {
    let Ok(text) = std::fs::read_to_string(path) else {
        return Memory::new();
    };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        tracing::warn!(%error, path = %path.display(), "what was remembered of members is unreadable and forgotten");
        Memory::new()
    })
}

/// Writes the file.
pub(super) fn write(path: &Path, memory: &Memory) {
    let text = serde_json::to_string(memory).unwrap_or_default();
    if let Err(error) = crate::files::write_secret(path, text.as_bytes()) {
        tracing::warn!(%error, path = %path.display(), "what is known of members cannot be remembered");
    }
}
