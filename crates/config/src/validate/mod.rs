use crate::{Diagnostic, Resource};
pub(crate) fn validate(resource: &Resource) -> Vec<Diagnostic> {
    let _ = resource;
    todo!()
}
