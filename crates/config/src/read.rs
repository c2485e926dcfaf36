use crate::{Diagnostic, Resource};
use serde_json::Value;

/// Reads a YAML stream or JSON.
///
/// # Errors
/// With every finding.
pub fn read_documents(text: &str) -> Result<Vec<Resource>, Vec<Diagnostic>> {
    let _ = text;
    todo!()
}

pub(crate) fn from_json(json: &Value) -> Result<Resource, Vec<Diagnostic>> {
    let _ = json;
    todo!()
}

pub(crate) fn from_stored(json: &Value) -> Result<Resource, Vec<Diagnostic>> {
    let _ = json;
    todo!()
}
