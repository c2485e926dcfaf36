//! The fleet for operators: who is enrolled and how it stands; revoke, delete, readmit.

use super::{
    AdminService, Call, given,
    near::{nearest_vm, not_found},
};
use crate::{
    audit::sha256,
    conditions,
    enroll::expiry,
    fleet::{Member, View},
    objects,
    refusal::{Refusal, is_race},
    roles::{Thing, Verb},
};
use std::sync::Arc;
use tombolo_config::{DeviceSpec, Object, Resource, Revoked};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_types::{Code, DeviceId};

/// VMs in one answer, whatever is asked for.
const PAGE_MAX: usize = 500;
/// Characters of a reason that are kept.
const REASON_MAX: usize = 500;
/// A change that raced with another one is tried again so often.
const RACES_MAX: usize = 8;

impl AdminService {
    pub(super) fn vms(
        &self,
        call: &Call,
        request: &pb::ListVmsRequest,
    ) -> Result<pb::ListVmsResponse, Refusal> {
        let namespace = given(&request.namespace);
        self.authorize(call, Verb::Read, Thing::Vm, namespace, "Vm *")?;
        let limit = match request.limit as usize {
            0 => PAGE_MAX,
            limit => limit.min(PAGE_MAX),
        };
        let after = given(&request.continue_token)
            .map(|token| {
                token
                    .parse::<DeviceId>()
                    .map_err(|_| Refusal::invalid("the continue token is damaged"))
            })
            .transpose()?;
        let view = self.context.mesh.fleet.view();
        let start = match after {
            Some(id) => std::ops::Bound::Excluded(id),
            None => std::ops::Bound::Unbounded,
        };
        let mut members = view
            .members
            .range((start, std::ops::Bound::Unbounded))
            .filter(|(_, member)| namespace.is_none_or(|n| member.device.metadata.namespace == n));
        let page: Vec<(&DeviceId, &Arc<Member>)> = members.by_ref().take(limit).collect();
        let continue_token = match (page.last(), members.next()) {
            (Some((id, _)), Some(_)) => id.to_string(),
            _ => String::new(),
        };
        let vms = page
            .into_iter()
            .map(|(id, member)| vm_of(*id, member, &view))
            .collect();
        Ok(pb::ListVmsResponse { vms, continue_token })
    }

    /// Finds a VM and checks the right to do `verb` to it.
    async fn find_vm(
        &self,
        call: &Call,
        verb: Verb,
        vm: &str,
    ) -> Result<(DeviceId, Object<DeviceSpec>), Refusal> {
        let shown: String = vm.chars().take(300).collect();
        let view = self.context.mesh.fleet.view();
        let namespace = match view.find(vm) {
            Some((_, member)) => Some(member.device.metadata.namespace.clone()),
            None => vm.split_once('/').map(|(namespace, _)| namespace.to_owned()),
        };
        // Who may not look learns nothing from the answer, not even whether the VM exists.
        self.authorize(
            call,
            verb,
            Thing::Vm,
            namespace.as_deref(),
            &format!("Vm {shown}"),
        )?;
        let missing = || not_found(&format!("VM {shown}"), nearest_vm(&view, vm));
        let (id, member) = view.find(vm).ok_or_else(missing)?;
        let namespace = &member.device.metadata.namespace;
        let device = self
            .context
            .mesh
            .objects
            .device(namespace, &id.to_string())
            .await?
            .ok_or_else(missing)?;
        Ok((id, device))
    }

    /// Changes a device, trying again when something else changed it meanwhile.
    async fn change(
        &self,
        call: &Call,
        vm: &str,
        verb: &'static str,
        edit: impl Fn(&mut DeviceSpec) -> Result<(), Refusal>,
    ) -> Result<pb::Vm, Refusal> {
        for _ in 0..RACES_MAX {
            let (id, mut device) = self.find_vm(call, Verb::Revoke, vm).await?;
            let title = format!("Device {}/{id}", device.metadata.namespace);
            let before = sha256(&objects::value_of(&Resource::Device(device.clone())));
            if let Err(refusal) = edit(&mut device.spec) {
                self.record(call, verb, &title, (Some(before), None), Err(&refusal));
                return Err(refusal);
            }
            let after = sha256(&objects::value_of(&Resource::Device(device.clone())));
            let committed = self
                .context
                .mesh
                .objects
                .commit(vec![objects::update(&Resource::Device(device), true)])
                .await;
            match committed {
                Ok((_, version)) => {
                    self.record(call, verb, &title, (Some(before), Some(after)), Ok(()));
                    self.context.mesh.fleet.wait_for(version).await;
                    let view = self.context.mesh.fleet.view();
                    let member = view
                        .members
                        .get(&id)
                        .ok_or_else(|| Refusal::new(Code::NotFound, id))?;
                    return Ok(vm_of(id, member, &view));
                }
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::busy("this VM is being changed; try again"))
    }

    pub(super) async fn revoke(&self, call: &Call, request: &pb::RevokeVmRequest) -> Result<pb::Vm, Refusal> {
        let reason: String = request
            .reason
            .chars()
            .filter(|c| !c.is_control())
            .take(REASON_MAX)
            .collect();
        self.change(call, &request.vm, "revoke", |spec| {
            let at = tombolo_config::rfc3339(jiff::Timestamp::now().as_millisecond());
            // Revoked is revoked: the first time and reason stay.
            spec.revoked.get_or_insert(Revoked {
                at,
                reason: reason.clone(),
            });
            Ok(())
        })
        .await
    }

    pub(super) async fn readmit(&self, call: &Call, vm: &str) -> Result<pb::Vm, Refusal> {
        self.change(call, vm, "readmit", |spec| {
            if spec.revoked.is_some() {
                return Err(Refusal::new(
                    Code::DeviceRevoked,
                    "a revocation is not undone; delete the VM and enrol it again",
                ));
            }
            if !spec.clone_refused {
                return Err(Refusal::precondition(
                    "this VM was not refused as a clone: there is nothing to readmit",
                ));
            }
            spec.clone_refused = false;
            // No digest: the next renewal is taken at whatever generation it comes.
            spec.csr_digest.clear();
            Ok(())
        })
        .await
    }

    pub(super) async fn forget(&self, call: &Call, vm: &str) -> Result<(), Refusal> {
        for _ in 0..RACES_MAX {
            let (id, device) = self.find_vm(call, Verb::Delete, vm).await?;
            let title = format!("Device {}/{id}", device.metadata.namespace);
            let before = sha256(&objects::value_of(&Resource::Device(device.clone())));
            match self.context.mesh.forget(&device, "deleted by an operator").await {
                Ok(version) => {
                    self.record(call, "delete", &title, (Some(before), None), Ok(()));
                    self.context.mesh.fleet.wait_for(version).await;
                    return Ok(());
                }
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::busy("this VM is being changed; try again"))
    }

    pub(super) fn health_now(&self) -> pb::HealthResponse {
        let view = self.context.mesh.fleet.view();
        let now = jiff::Timestamp::now().as_millisecond();
        let made = |code: Code, cause: String| pb::Condition {
            r#type: code.to_string(),
            status: "True".into(),
            reason: code.to_string(),
            message: code.message(cause),
            last_transition_unix_ms: now,
        };
        let mut conditions: Vec<pb::Condition> = Vec::new();
        for network in &view.braked {
            let name = if network.is_empty() {
                "the default network".into()
            } else {
                format!("network {network}")
            };
            conditions.push(made(Code::BrakeEngaged, name));
        }
        if view.in_grace {
            conditions.push(made(Code::StartGrace, String::new()));
        }
        if let Some(step) = self.context.mesh.trust.under_way() {
            conditions.push(made(Code::TrustUnderWay, format!("it is {step}")));
        }
        if let Some(cause) = self.context.mesh.audit.problem() {
            conditions.push(made(Code::AuditFailing, cause));
        }
        let connected = view
            .members
            .values()
            .filter(|member| member.is_connected())
            .count();
        pb::HealthResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            subscribers: u32::try_from(self.context.subscribers.len()).unwrap_or(u32::MAX),
            vms_connected: u32::try_from(connected).unwrap_or(u32::MAX),
            vms: u32::try_from(view.members.len()).unwrap_or(u32::MAX),
            conditions,
            started_unix_ms: self.context.started_unix_ms,
        }
    }
}

/// A member as the API shows it.
fn vm_of(id: DeviceId, member: &Member, view: &View) -> pb::Vm {
    let (spec, state) = (&member.device.spec, member.state());
    let mut conditions = vec![pb::Condition {
        r#type: conditions::HEALTHY.into(),
        status: if member.is_chosen() {
            "True".into()
        } else {
            "False".into()
        },
        reason: state.state.into(),
        message: state.reason.clone(),
        last_transition_unix_ms: member.since_unix_ms,
    }];
    if spec.clone_refused {
        conditions.push(pb::Condition {
            r#type: "CloneRefused".into(),
            status: "True".into(),
            reason: Code::DeviceClone.to_string(),
            message: Code::DeviceClone.message(""),
            last_transition_unix_ms: 0,
        });
    }
    if member.address.is_none() {
        let status = member.entry_status.as_ref();
        conditions.extend(conditions::list(status).into_iter().map(
            |(kind, status, reason, message, since)| pb::Condition {
                r#type: kind,
                status,
                reason,
                message,
                last_transition_unix_ms: since,
            },
        ));
    }
    debug_assert!(view.members.contains_key(&id));
    pb::Vm {
        device_id: id.to_string(),
        namespace: member.device.metadata.namespace.clone(),
        name: spec.workload_entry.clone(),
        workload_group: spec.workload_group.clone(),
        service_account: spec.service_account.clone(),
        hostname: spec.hostname.clone(),
        addresses: member.address.iter().map(ToString::to_string).collect(),
        state: state.state.into(),
        reason: state.reason,
        connected: member.is_connected(),
        enrolled_unix_ms: tombolo_config::unix_ms(&spec.enrolled_at).unwrap_or_default(),
        certificate_expires_unix_ms: expiry(&spec.cert_chain)
            .and_then(|seconds| i64::try_from(seconds).ok())
            .map_or(0, |seconds| seconds * 1000),
        agent_version: spec.agent_version.clone(),
        generation: spec.generation,
        network: spec.network.clone(),
        conditions,
    }
}
