//! Leaving: the device deregisters itself.

use super::{Act, Context, RACES_MAX, server_time};
use crate::{
    listener::Link,
    objects,
    refusal::{Refusal, is_race},
};
use tombolo_config::{DeviceSpec, Object, Resource, Revoked};
use tombolo_identity::proof;
use tombolo_proto::tombolo::v1 as pb;
use tombolo_store::Write;

/// What is left of a device that is gone: its id stays refused until its last certificate has expired.
pub(crate) fn tombstone(device: &Object<DeviceSpec>, reason: &str) -> Resource {
    let spec = DeviceSpec {
        workload_group: device.spec.workload_group.clone(),
        service_account: device.spec.service_account.clone(),
        revoked: Some(device.spec.revoked.clone().unwrap_or_else(|| Revoked {
            at: tombolo_config::rfc3339(server_time()),
            reason: reason.into(),
        })),
        ..DeviceSpec::default()
    };
    Resource::Device(Object {
        spec,
        ..device.clone()
    })
}

impl Context {
    pub(super) async fn leave(
        &self,
        link: &Link,
        request: &pb::LeaveRequest,
        act: &mut Act,
    ) -> Result<(), Refusal> {
        let exporter = Self::exporter(link)?;
        for _ in 0..RACES_MAX {
            let message = |id| proof::leave(&exporter, id);
            let (id, device) = self
                .prove(&request.device_id, &request.device_signature, message, act)
                .await?;
            match self.forget(&device, "it left the mesh").await {
                Ok(version) => {
                    self.fleet.wait_for(version).await;
                    tracing::info!(device = %id, "left");
                    return Ok(());
                }
                Err(error) if is_race(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Refusal::busy("this device is being changed; try again"))
    }

    /// Removes a device and its WorkloadEntry in one transaction.
    pub(crate) async fn forget(
        &self,
        device: &Object<DeviceSpec>,
        reason: &str,
    ) -> Result<u64, objects::ObjectError> {
        let mut writes: Vec<Write> = vec![objects::update(&tombstone(device, reason), true)];
        let namespace = &device.metadata.namespace;
        if let Some(entry) = self
            .objects
            .workload_entry(namespace, &device.spec.workload_entry)
            .await?
        {
            writes.push(objects::delete(&Resource::WorkloadEntry(entry)));
        }
        Ok(self.objects.commit(writes).await?.1)
    }
}
