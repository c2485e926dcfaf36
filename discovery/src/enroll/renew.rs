//! Renewing: at half life, and after any absence. The device key alone is the credential.

use super::{Act, Context, RACES_MAX, server_time};
use crate::{
    audit::sha256,
    listener::Link,
    objects,
    refusal::{Refusal, is_race},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use tombolo_config::{DeviceSpec, Object, Resource, WorkloadGroupSpec};
use tombolo_identity::{proof, verify_device_signature};
use tombolo_proto::tombolo::v1 as pb;
use tombolo_types::{Code, DeviceId, TrustDomain};

/// How far a device may be ahead of the store: more renewals than a backup can miss. Whoever has a copy of the device key
/// could otherwise use up all generations, and not even a readmission would bring the device back.
const LEAP_MAX: u64 = 1_000_000;

/// What a generation in a request means for what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A new certificate; the stored generation becomes this one.
    Advance(u64),
    /// The last answer was lost: the same certificate again.
    Repeat,
    /// Another key at a used generation: another copy of the device was here first.
    Clone,
}

/// Decides. An empty digest is a device that an operator readmitted: its present copy is taken at any generation, and
/// the stored one moves past all that were ever given out, so that the other copy is the clone from now on.
fn step(device: &DeviceSpec, generation: u64, key_digest: &str) -> Step {
    if device.csr_digest.is_empty() {
        let most = device.generation.saturating_add(LEAP_MAX);
        return Step::Advance(device.generation.max(generation.min(most)).saturating_add(1));
    }
    if generation > device.generation {
        return if generation - device.generation > LEAP_MAX {
            Step::Clone
        } else {
            Step::Advance(generation)
        };
    }
    // The same key is the same copy: after a readmission it may not know yet which generation it was given.
    if key_digest == device.csr_digest {
        Step::Repeat
    } else {
        Step::Clone
    }
}

impl Context {
    /// Finds the device and checks that its key signed.
    pub(super) async fn prove(
        &self,
        device_id: &str,
        signature: &[u8],
        message: impl FnOnce(DeviceId) -> Vec<u8>,
        act: &mut Act,
    ) -> Result<(DeviceId, Object<DeviceSpec>), Refusal> {
        let shown: String = device_id.chars().take(32).collect();
        let unknown = || Refusal::new(Code::DeviceUnknown, format_args!("device {shown:?}"));
        let id: DeviceId = device_id.parse().map_err(|_| unknown())?;
        act.object = format!("Device {id}");
        let view = self.fleet.view();
        let Some(member) = view.members.get(&id) else {
            // Deleted by an operator, and remembered until its certificates have expired.
            return Err(if view.revoked.contains(&id) {
                Refusal::new(Code::DeviceRevoked, format_args!("device {id} was deleted"))
            } else {
                unknown()
            });
        };
        let namespace = member.device.metadata.namespace.clone();
        let device = self
            .objects
            .device(&namespace, &id.to_string())
            .await?
            .ok_or_else(unknown)?;
        let public = STANDARD
            .decode(&device.spec.public_key)
            .map_err(|_| Refusal::internal("the stored device key is damaged"))?;
        verify_device_signature(&public, &message(id), signature).map_err(|_| {
            Refusal::new(
                Code::TokenProof,
                format_args!("the signature is not that of device {id}"),
            )
        })?;
        act.who = format!("device {id}");
        act.object = format!("Device {namespace}/{id}");
        if let Some(revoked) = &device.spec.revoked {
            return Err(Refusal::new(
                Code::DeviceRevoked,
                format_args!("device {id}, at {}: {}", revoked.at, revoked.reason),
            ));
        }
        Ok((id, device))
    }

    pub(super) async fn renew(
        &self,
        link: &Link,
        request: &pb::RenewRequest,
        act: &mut Act,
    ) -> Result<pb::RenewResponse, Refusal> {
        let exporter = Self::exporter(link)?;
        for _ in 0..RACES_MAX {
            let message = |id| proof::renew(&exporter, id, request.generation, &request.csr);
            let (id, device) = self
                .prove(&request.device_id, &request.device_signature, message, act)
                .await?;
            let (_, entry) = self.parts(&device).await?;
            let group = self
                .objects
                .workload_group(&device.metadata.namespace, &device.spec.workload_group)
                .await?
                .unwrap_or_else(|| {
                    Object::<WorkloadGroupSpec>::new(entry.metadata.clone(), WorkloadGroupSpec::default())
                });
            let certified = self.certify(
                &request.csr,
                &device.metadata.namespace,
                &device.spec.service_account,
                id,
            )?;
            let mut renewed = device.clone();
            let chain = match step(&device.spec, request.generation, &certified.key_digest) {
                Step::Repeat
                    if is_fresh(&device.spec.cert_chain)
                        && self.is_of_signing_name(&device.spec.cert_chain) =>
                {
                    device.spec.cert_chain.clone()
                }
                // The answer was lost so long ago that its certificate has expired, or is of a name that the trust domain
                // had then: a new one for the same key.
                Step::Repeat => {
                    renewed.spec.cert_chain.clone_from(&certified.chain);
                    certified.chain
                }
                Step::Advance(generation) => {
                    renewed.spec.generation = generation;
                    renewed.spec.csr_digest = certified.key_digest;
                    renewed.spec.cert_chain.clone_from(&certified.chain);
                    renewed.spec.clone_refused = false;
                    certified.chain
                }
                Step::Clone => {
                    self.note_clone(device).await?;
                    return Err(Refusal::new(
                        Code::DeviceClone,
                        format_args!(
                            "device {id} has used generation {} with another key",
                            request.generation
                        ),
                    ));
                }
            };
            if let Some(hello) = &request.hello {
                renewed.spec.agent_version = hello.version.chars().take(64).collect();
            }
            if renewed != device {
                act.before = Some(sha256(&objects::value_of(&Resource::Device(device))));
                act.after = Some(sha256(&objects::value_of(&Resource::Device(renewed.clone()))));
                let write = objects::update(&Resource::Device(renewed.clone()), true);
                match self.objects.commit(vec![write]).await {
                    Ok((_, version)) => self.fleet.wait_for(version).await,
                    Err(error) if is_race(&error) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(pb::RenewResponse {
                registration: Some(self.registration(id, &renewed.spec, &group, &entry).await?),
                cert_chain: chain,
                server_time_unix_ms: server_time(),
                warnings: Vec::new(),
            });
        }
        Err(Refusal::busy(
            "this device renews several times at once; try again",
        ))
    }

    /// Marks the device, so that `vm list` shows that a person is needed.
    async fn note_clone(&self, mut device: Object<DeviceSpec>) -> Result<(), Refusal> {
        if device.spec.clone_refused {
            return Ok(());
        }
        device.spec.clone_refused = true;
        match self
            .objects
            .commit(vec![objects::update(&Resource::Device(device), false)])
            .await
        {
            Err(error) if !is_race(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// True if the leaf has most of its life before it: a repeat soon after a lost answer.
fn is_fresh(chain: &[String]) -> bool {
    let now = u64::try_from(server_time() / 1000).unwrap_or_default();
    expiry(chain).is_some_and(|not_after| not_after > now + 60)
}

/// When a chain's leaf expires, in Unix seconds.
pub(crate) fn expiry(chain: &[String]) -> Option<u64> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let der = CertificateDer::from_pem_slice(chain.first()?.as_bytes()).ok()?;
    Some(tombolo_identity::peer_of(&[der]).ok()?.not_after)
}

/// Of which trust domain a chain's leaf is.
pub(crate) fn trust_domain_of(chain: &[String]) -> Option<TrustDomain> {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let der = CertificateDer::from_pem_slice(chain.first()?.as_bytes()).ok()?;
    Some(tombolo_identity::peer_of(&[der]).ok()?.id.trust_domain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations() {
        let device = |generation, digest: &str| DeviceSpec {
            generation,
            csr_digest: digest.into(),
            ..DeviceSpec::default()
        };
        for (stored, digest, asked, key, want) in [
            (3, "k3", 4, "k4", Step::Advance(4)),
            (3, "k3", 3, "k3", Step::Repeat), // the answer was lost
            (3, "k3", 3, "other", Step::Clone),
            (3, "k3", 2, "k2", Step::Clone),      // a restored disk
            (3, "k3", 2, "k3", Step::Repeat),     // readmitted at 2, and the answer was lost
            (3, "k3", 9, "k9", Step::Advance(9)), // our store was restored from a backup
            (3, "", 2, "k2", Step::Advance(4)),   // readmitted: the other copy, at 3 or 4, is the clone now
            (3, "", 4, "k4", Step::Advance(5)),
            (3, "k3", u64::MAX, "k9", Step::Clone),
            (3, "", u64::MAX, "k9", Step::Advance(3 + LEAP_MAX + 1)),
        ] {
            assert_eq!(
                step(&device(stored, digest), asked, key),
                want,
                "{stored} {digest} {asked} {key}"
            );
        }
    }
}
