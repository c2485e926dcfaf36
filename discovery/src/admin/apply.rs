//! Writing objects: a batch is one transaction, checked as a whole before anything is written.

use super::{
    AdminService, Call, find_kind, given,
    rules::{check_change, check_new_entry, check_new_token, is_of_a_device},
    show::shown,
    thing_of,
};
use crate::{
    audit::sha256,
    enroll::follow,
    objects,
    refusal::Refusal,
    roles::{Thing, Verb},
};
use std::collections::BTreeSet;
use tombolo_config::{Kind, Object, Resource, WorkloadGroupSpec};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_registry::validate_in_mesh;
use tombolo_store::Write;
use tombolo_types::{Code, reserved_namespace};

/// Objects in one batch.
const BATCH_MAX: usize = 10_000;

/// One object of a batch, checked.
struct Planned {
    before: Option<Resource>,
    after: Resource,
    outcome: &'static str,
    warnings: Vec<String>,
}

impl AdminService {
    pub(super) async fn apply_objects(
        &self,
        call: &Call,
        request: &pb::ApplyRequest,
    ) -> Result<pb::ApplyResponse, Refusal> {
        let resources = read_all(&request.objects)?;
        let mut plan = Vec::with_capacity(resources.len());
        for resource in &resources {
            let planned = self.plan(call, resource, &resources, request.create_only).await;
            if let Err(refusal) = &planned {
                self.record(call, "apply", &resource.title(), (None, None), Err(refusal));
            }
            plan.push(planned?);
        }
        if !request.dry_run {
            self.commit(call, &mut plan).await?;
        }
        let fleet = &self.context.mesh.fleet;
        let applied = plan
            .into_iter()
            .map(|planned| pb::Applied {
                object: Some(shown(planned.after, fleet)),
                outcome: planned.outcome.into(),
                warnings: planned.warnings,
            })
            .collect();
        Ok(pb::ApplyResponse { applied })
    }

    async fn plan(
        &self,
        call: &Call,
        wanted: &Resource,
        batch: &[Resource],
        create_only: bool,
    ) -> Result<Planned, Refusal> {
        let (kind, namespace, name) = (wanted.kind(), wanted.namespace(), wanted.name());
        let title = wanted.title();
        let before = self.context.mesh.objects.get(kind, namespace, name).await?;
        let verb = if before.is_some() {
            Verb::Update
        } else {
            Verb::Create
        };
        call.caller.authorize(verb, thing_of(kind)?, Some(namespace))?;
        let mut warnings: Vec<String> = wanted
            .validate()
            .iter()
            .filter(|finding| finding.warning)
            .map(ToString::to_string)
            .collect();
        let check = validate_in_mesh(wanted, &self.context.mesh.settings, &self.context.protected_hosts);
        let refused: Vec<String> = check
            .diagnostics
            .iter()
            .filter(|finding| !finding.warning)
            .map(ToString::to_string)
            .collect();
        if !refused.is_empty() {
            return Err(Refusal::new(Code::InvalidResource, refused.join("; ")));
        }
        warnings.extend(
            check
                .diagnostics
                .iter()
                .filter(|finding| finding.warning)
                .map(ToString::to_string),
        );
        if !check.needs_mesh_admin.is_empty() {
            // Whoever may read the audit log is a mesh-admin: the one right that no other role has.
            call.caller
                .authorize(Verb::Read, Thing::Audit, None)
                .map_err(|_| {
                    let hosts = check.needs_mesh_admin.join(", ");
                    Refusal::new(
                        Code::Forbidden,
                        format_args!("{title}: only a mesh-admin may publish {hosts}"),
                    )
                })?;
        }
        if let Some(before) = &before {
            if create_only {
                return Err(Refusal::new(Code::AlreadyExists, &title));
            }
            check_versions(before, wanted)?;
            check_change(before, wanted)?;
        } else {
            self.check_new(call, wanted, batch).await?;
        }
        let mut after = wanted.clone();
        let outcome = match &before {
            None => {
                *after.status_mut() = None;
                "created"
            }
            Some(before) => {
                // The status is the mesh's, never the user's.
                *after.status_mut() = before.status().cloned();
                let (kept, metadata) = (before.metadata(), after.metadata_mut());
                (metadata.uid, metadata.resource_version) = (kept.uid.clone(), kept.resource_version.clone());
                (metadata.generation, metadata.creation_timestamp) =
                    (kept.generation, kept.creation_timestamp.clone());
                metadata.owner_references.clone_from(&kept.owner_references);
                if tombolo_config::unchanged(before, &after) {
                    "unchanged"
                } else {
                    "configured"
                }
            }
        };
        Ok(Planned {
            before,
            after,
            outcome,
            warnings,
        })
    }

    async fn check_new(&self, call: &Call, wanted: &Resource, batch: &[Resource]) -> Result<(), Refusal> {
        match wanted {
            Resource::JoinToken(token) => {
                check_new_token(token, jiff::Timestamp::now().as_millisecond())?;
                let (namespace, group) = (&token.metadata.namespace, &token.spec.workload_group);
                let in_batch = batch.iter().any(|other| {
                    other.kind() == Kind::WorkloadGroup
                        && other.namespace() == namespace
                        && other.name() == group
                });
                if !in_batch
                    && self
                        .context
                        .mesh
                        .objects
                        .workload_group(namespace, group)
                        .await?
                        .is_none()
                {
                    return Err(self
                        .object_not_found(call, Kind::WorkloadGroup, namespace, group)
                        .await);
                }
                // The id is global: a token is found by it alone.
                if self
                    .context
                    .mesh
                    .fleet
                    .view()
                    .tokens
                    .contains_key(&token.metadata.name)
                {
                    return Err(Refusal::new(
                        Code::AlreadyExists,
                        format_args!("a token of id {}", token.metadata.name),
                    ));
                }
                Ok(())
            }
            Resource::WorkloadEntry(entry) => check_new_entry(entry),
            Resource::WorkloadGroup(group) if reserved_namespace(&group.metadata.namespace) => {
                Err(Refusal::new(
                    Code::Reserved,
                    format_args!("namespace {}", group.metadata.namespace),
                ))
            }
            Resource::WorkloadGroup(_)
            | Resource::ServiceEntry(_)
            | Resource::AuthorizationPolicy(_)
            | Resource::PeerAuthentication(_)
            | Resource::ServiceExport(_)
            | Resource::Namespace(_)
            | Resource::Device(_) => Ok(()),
        }
    }

    async fn commit(&self, call: &Call, plan: &mut [Planned]) -> Result<(), Refusal> {
        let changed: Vec<usize> = (0..plan.len())
            .filter(|i| plan[*i].outcome != "unchanged")
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        let write = |planned: &Planned| match &planned.before {
            None => objects::create(&planned.after),
            Some(before) => objects::update(&planned.after, before.spec_json() != planned.after.spec_json()),
        };
        let mut writes: Vec<Write> = changed.iter().map(|i| write(&plan[*i])).collect();
        for i in &changed {
            if let (Some(Resource::WorkloadGroup(before)), Resource::WorkloadGroup(after)) =
                (&plan[*i].before, &plan[*i].after)
            {
                writes.extend(self.follow_group(before, after, plan).await?);
            }
        }
        let committed = self
            .context
            .mesh
            .objects
            .commit(writes)
            .await
            .map_err(Refusal::from);
        let digest = |resource: &Resource| sha256(&objects::value_of(resource));
        for i in &changed {
            let planned = &plan[*i];
            let verb = if planned.before.is_some() {
                "update"
            } else {
                "create"
            };
            let digests = (planned.before.as_ref().map(digest), Some(digest(&planned.after)));
            self.record(
                call,
                verb,
                &planned.after.title(),
                digests,
                committed.as_ref().map(|_| ()),
            );
        }
        let (stored, version) = committed?;
        for (i, stored) in changed.into_iter().zip(&stored) {
            plan[i].after = objects::read(stored)?;
        }
        self.context.mesh.fleet.wait_for(version).await;
        Ok(())
    }

    /// The entries of a group's members, as the changed group makes them: in the same transaction.
    async fn follow_group(
        &self,
        before: &Object<WorkloadGroupSpec>,
        after: &Object<WorkloadGroupSpec>,
        plan: &[Planned],
    ) -> Result<Vec<Write>, Refusal> {
        let view = self.context.mesh.fleet.view();
        let metadata = &after.metadata;
        let mut writes = Vec::new();
        let of_group = view.members.values().filter(|member| {
            (
                &member.device.metadata.namespace,
                &member.device.spec.workload_group,
            ) == (&metadata.namespace, &metadata.name)
        });
        for member in of_group {
            let name = &member.device.spec.workload_entry;
            let in_batch = plan.iter().any(|planned| {
                planned.after.kind() == Kind::WorkloadEntry
                    && planned.after.namespace() == metadata.namespace
                    && planned.after.name() == name
            });
            if in_batch {
                continue; // what the user says of this entry goes before what the group says of all
            }
            let Some(entry) = self
                .context
                .mesh
                .objects
                .workload_entry(&metadata.namespace, name)
                .await?
            else {
                continue;
            };
            let followed = follow(before, after, &entry);
            if followed != entry {
                writes.push(objects::update(&Resource::WorkloadEntry(followed), true));
            }
        }
        Ok(writes)
    }

    pub(super) async fn delete_object(
        &self,
        call: &Call,
        request: &pb::DeleteRequest,
    ) -> Result<(), Refusal> {
        let kind = find_kind(&request.kind)?;
        let namespace = given(&request.namespace).unwrap_or("default");
        let namespace = kind.key_namespace(namespace, &request.name);
        let title = kind.title(namespace, &request.name);
        self.authorize(call, Verb::Delete, thing_of(kind)?, Some(namespace), &title)?;
        let result = self
            .delete_checked(call, (kind, namespace, &request.name), request.dry_run)
            .await;
        let before = result
            .as_ref()
            .ok()
            .map(|resource| sha256(&objects::value_of(resource)));
        if !request.dry_run || result.is_err() {
            self.record(
                call,
                "delete",
                &title,
                (before, None),
                result.as_ref().map(|_| ()),
            );
        }
        result.map(drop)
    }

    async fn delete_checked(
        &self,
        call: &Call,
        (kind, namespace, name): (Kind, &str, &str),
        dry_run: bool,
    ) -> Result<Resource, Refusal> {
        let mesh = &self.context.mesh;
        let title = kind.title(namespace, name);
        let found = mesh.objects.get(kind, namespace, name).await?;
        let Some(resource) = found else {
            return Err(self.object_not_found(call, kind, namespace, name).await);
        };
        match &resource {
            Resource::WorkloadGroup(_) => {
                let view = mesh.fleet.view();
                let members = view.members.values().filter(|member| {
                    member.device.metadata.namespace == namespace && member.device.spec.workload_group == name
                });
                let count = members.count();
                if count > 0 {
                    return Err(Refusal::precondition(format_args!(
                        "{title} has {count} members. Next: tombolo vm list -n {namespace}, then tombolo vm delete each"
                    )));
                }
            }
            Resource::WorkloadEntry(entry)
                if is_of_a_device(entry) && mesh.fleet.view().member_of_entry(namespace, name).is_some() =>
            {
                return Err(Refusal::precondition(format_args!(
                    "{title} belongs to an enrolled device. Next: tombolo vm delete {namespace}/{name}"
                )));
            }
            Resource::WorkloadEntry(_)
            | Resource::ServiceEntry(_)
            | Resource::AuthorizationPolicy(_)
            | Resource::PeerAuthentication(_)
            | Resource::ServiceExport(_)
            | Resource::Namespace(_)
            | Resource::JoinToken(_)
            | Resource::Device(_) => {}
        }
        if !dry_run {
            let (_, version) = mesh.objects.commit(vec![objects::delete(&resource)]).await?;
            // A deletion has no version of its own in the answer: the store's is at or past it.
            mesh.fleet
                .wait_for(version.max(mesh.objects.store().resource_version()))
                .await;
        }
        Ok(resource)
    }
}

/// Reads a batch strictly; every finding of every object is named at once.
fn read_all(given: &[pb::Object]) -> Result<Vec<Resource>, Refusal> {
    if given.len() > BATCH_MAX {
        return Err(Refusal::invalid(format_args!(
            "at most {BATCH_MAX} objects in one batch"
        )));
    }
    let (mut resources, mut findings, mut seen) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (index, object) in given.iter().enumerate() {
        let json: serde_json::Value = match serde_json::from_str(&object.json) {
            Ok(json) => json,
            Err(error) => {
                findings.push(format!("object {}: {error}", index + 1));
                continue;
            }
        };
        let (kind, namespace) = (json["kind"].as_str(), json["metadata"]["namespace"].as_str());
        if let (Some(kind @ ("WorkloadGroup" | "JoinToken")), Some(namespace)) = (kind, namespace)
            && reserved_namespace(namespace)
        {
            // A code of its own: this is not a slip of the pen.
            return Err(Refusal::new(
                Code::Reserved,
                format_args!("no {kind} may be in {namespace}"),
            ));
        }
        match Resource::from_json(&json) {
            Ok(resource) if resource.kind().is_internal() => {
                findings.push(format!(
                    "{}: this kind is written by discovery alone",
                    resource.title()
                ));
            }
            Ok(resource) => {
                if !seen.insert(resource.title()) {
                    findings.push(format!("{} is there twice", resource.title()));
                }
                resources.push(resource);
            }
            Err(found) => findings.extend(
                found
                    .iter()
                    .filter(|finding| !finding.warning)
                    .map(ToString::to_string),
            ),
        }
    }
    if findings.is_empty() {
        Ok(resources)
    } else {
        Err(Refusal::new(Code::InvalidResource, findings.join("; ")))
    }
}

/// A version or uid that the user wrote must be that of the object as it is.
fn check_versions(before: &Resource, wanted: &Resource) -> Result<(), Refusal> {
    let (is, asked) = (before.metadata(), wanted.metadata());
    let conflict = |what: &str| Refusal::new(Code::Conflict, format_args!("{}: {what}", wanted.title()));
    if asked.resource_version.is_some() && asked.resource_version != is.resource_version {
        return Err(conflict("metadata.resourceVersion is not the present one"));
    }
    if asked.uid.is_some() && asked.uid != is.uid {
        return Err(conflict(
            "metadata.uid is that of another object: it was deleted and made again",
        ));
    }
    Ok(())
}
