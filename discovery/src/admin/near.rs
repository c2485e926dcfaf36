//! What was probably meant by a name that is not there. Who may not read learns nothing: the name is then refused bare.

use super::{AdminService, Call};
use crate::{
    fleet::View,
    refusal::Refusal,
    roles::{Thing, Verb},
};
use tombolo_config::{Diagnostic, Kind, nearest};
use tombolo_store::{Page, Select};
use tombolo_types::Code;

/// Names that are compared: a slip is answered as fast in a mesh of any size.
const COMPARED_MAX: usize = 2000;

/// The refusal of a name that is not there.
pub(super) fn not_found(title: &str, meant: Option<String>) -> Refusal {
    Refusal::new(Code::NotFound, Diagnostic::error("", title).with_nearest(meant))
}

impl AdminService {
    /// The refusal of an object that is not there, with the nearest name of its kind in its namespace.
    pub(super) async fn object_not_found(
        &self,
        call: &Call,
        kind: Kind,
        namespace: &str,
        name: &str,
    ) -> Refusal {
        let title = kind.title(namespace, name);
        let readable = Thing::of_kind(kind.name())
            .is_some_and(|thing| call.caller.authorize(Verb::Read, thing, Some(namespace)).is_ok());
        if !readable {
            return not_found(&title, None);
        }
        let select = Select {
            kind: Some((kind.group().to_owned(), kind.name().to_owned())),
            namespace: (!kind.is_cluster_scoped()).then(|| namespace.to_owned()),
        };
        let page = Page {
            limit: COMPARED_MAX,
            after: None,
        };
        // A store that fails has no suggestion to make; the name is not there all the same.
        let listing = self.context.mesh.objects.store().list(&select, page).await;
        let meant = listing
            .ok()
            .and_then(|listing| nearest(name, listing.items.iter().map(|stored| stored.key.name.as_str())));
        not_found(&title, meant)
    }
}

/// The member that was probably meant: of the same namespace, or of any by its bare name.
pub(super) fn nearest_vm(view: &View, vm: &str) -> Option<String> {
    let entries = || view.by_entry.keys();
    match vm.split_once('/') {
        Some((namespace, name)) => {
            let there = entries().filter(|(of, _)| of == namespace);
            nearest(name, there.take(COMPARED_MAX).map(|(_, entry)| entry.as_str()))
                .map(|entry| format!("{namespace}/{entry}"))
        }
        None => entries()
            .find(|(_, entry)| entry == vm)
            .map(|(namespace, entry)| format!("{namespace}/{entry}")),
    }
}
