//! Reading objects: one, or many in pages; what is live is merged in.

use super::{AdminService, Call, export_conditions, find_kind, given, thing_of};
use crate::{
    conditions::{self, Condition, HEALTHY},
    fleet::Fleet,
    objects,
    refusal::Refusal,
    roles::Verb,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tombolo_config::{Kind, Resource};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_store::{Key, Page, Select};

/// Objects in one answer, whatever is asked for.
const PAGE_MAX: usize = 500;

impl AdminService {
    pub(super) async fn list_objects(
        &self,
        call: &Call,
        request: &pb::ListRequest,
    ) -> Result<pb::ListResponse, Refusal> {
        let kind = find_kind(&request.kind)?;
        let namespace = given(&request.namespace);
        let object = format!("{kind} {}/*", namespace.unwrap_or("*"));
        self.authorize(call, Verb::Read, thing_of(kind)?, namespace, &object)?;
        let select = Select {
            kind: Some((kind.group().to_owned(), kind.name().to_owned())),
            namespace: namespace.map(str::to_owned),
        };
        let limit = match request.limit as usize {
            0 => PAGE_MAX,
            limit => limit.min(PAGE_MAX),
        };
        let after = given(&request.continue_token)
            .map(|token| read_token(token, kind))
            .transpose()?;
        let listing = self
            .context
            .mesh
            .objects
            .store()
            .list(&select, Page { limit, after })
            .await?;
        let fleet = &self.context.mesh.fleet;
        let items = listing
            .items
            .iter()
            .filter_map(|stored| match objects::read(stored) {
                Ok(resource) => Some(shown(resource, fleet)),
                Err(error) => {
                    tracing::error!(%error, "an object is left out of a listing");
                    None
                }
            })
            .collect();
        let continue_token = listing.next.as_ref().map(write_token).unwrap_or_default();
        Ok(pb::ListResponse {
            items,
            continue_token,
            resource_version: listing.resource_version,
        })
    }

    pub(super) async fn get_object(
        &self,
        call: &Call,
        request: &pb::GetRequest,
    ) -> Result<pb::Object, Refusal> {
        let kind = find_kind(&request.kind)?;
        let namespace = given(&request.namespace).unwrap_or("default");
        let namespace = kind.key_namespace(namespace, &request.name);
        let title = kind.title(namespace, &request.name);
        self.authorize(call, Verb::Read, thing_of(kind)?, Some(namespace), &title)?;
        let found = self
            .context
            .mesh
            .objects
            .get(kind, namespace, &request.name)
            .await?;
        let Some(resource) = found else {
            return Err(self.object_not_found(call, kind, namespace, &request.name).await);
        };
        Ok(shown(resource, &self.context.mesh.fleet))
    }
}

/// An object as it is answered: the health of a device's entry and what became of an export are live, never from the
/// store.
pub(super) fn shown(mut resource: Resource, fleet: &Fleet) -> pb::Object {
    export_conditions::set(&mut resource, fleet);
    if resource.kind() == Kind::WorkloadEntry
        && let Some(member) = fleet
            .view()
            .member_of_entry(resource.namespace(), resource.name())
    {
        let state = member.state();
        let condition = Condition {
            kind: HEALTHY,
            status: member.is_chosen(),
            reason: state.state.into(),
            message: state.reason,
            since_unix_ms: member.since_unix_ms,
        };
        conditions::set(resource.status_mut(), &condition);
    }
    pb::Object {
        json: resource.to_json().to_string(),
    }
}

fn write_token(key: &Key) -> String {
    URL_SAFE_NO_PAD.encode(format!("{}/{}", key.namespace, key.name))
}

fn read_token(token: &str, kind: Kind) -> Result<Key, Refusal> {
    let refused = || Refusal::invalid("the continue token is damaged: list from the start");
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| refused())?;
    let text = String::from_utf8(bytes).map_err(|_| refused())?;
    let (namespace, name) = text.split_once('/').ok_or_else(refused)?;
    Ok(objects::key(kind, namespace, name))
}
