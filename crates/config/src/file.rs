//! Typed configuration files of the programs: one YAML document, unknown keys refused.

use crate::Diagnostic;
use serde::de::DeserializeOwned;

/// Reads one document into `T`.
///
/// # Errors
/// With every unknown key and bad value, its path, and the nearest known name.
pub fn read<T: DeserializeOwned>(text: &str) -> Result<T, Vec<Diagnostic>> {
    let _ = text;
    todo!()
}
