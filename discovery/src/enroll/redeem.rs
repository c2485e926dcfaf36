//! Redeeming a join token.

use super::{
    Act, Certified, Context, RACES_MAX, entry,
    gateway::{check_purpose, claim, is_gateway_group},
    server_time,
};
use crate::{
    address::{choose, cidrs_of, place},
    audit::sha256,
    listener::Link,
    objects,
    refusal::{Refusal, is_race},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use std::net::IpAddr;
use tombolo_config::{
    DeviceSpec, JoinTokenSpec, JoinTokenStatus, Kind, Metadata, Object, Resource, WorkloadEntrySpec,
    WorkloadGroupSpec,
};
use tombolo_identity::{proof, verify_device_signature, verify_join_signature};
use tombolo_proto::tombolo::v1 as pb;
use tombolo_types::{Code, DeviceId, reserved_namespace};

/// The generation that an enrolment gives; renewals count on from it.
pub(super) const FIRST_GENERATION: u64 = 1;
/// Addresses that a node may claim at once.
const ADDRESSES_MAX: usize = 32;
/// Characters of a host name that are kept.
const HOSTNAME_MAX: usize = 253;

/// An enrolled device, new or found again.
struct Enrolled {
    id: DeviceId,
    device: Object<DeviceSpec>,
    entry: Object<WorkloadEntrySpec>,
    chain: Vec<String>,
    warnings: Vec<String>,
    version: u64,
}

impl Context {
    pub(super) async fn enroll(
        &self,
        link: &Link,
        request: &pb::EnrollRequest,
        act: &mut Act,
    ) -> Result<pb::EnrollResponse, Refusal> {
        let exporter = Self::exporter(link)?;
        let token_id: [u8; 16] = request
            .token_id
            .as_slice()
            .try_into()
            .map_err(|_| Refusal::new(Code::TokenMalformed, "the token id is not 16 bytes"))?;
        let token_name: String = token_id.iter().map(|b| format!("{b:02x}")).collect();
        act.object = format!("JoinToken {token_name}");
        let mut raced = None;
        for _ in 0..RACES_MAX {
            let token = self.find_token(&token_name).await?;
            act.object = format!("JoinToken {}/{token_name}", token.metadata.namespace);
            self.verify(request, &exporter, &token_id, &token)?;
            let key_digest = sha256(&request.device_public_key);
            act.who = format!("device key {}", &key_digest[..16]);
            let group = self
                .objects
                .workload_group(&token.metadata.namespace, &token.spec.workload_group)
                .await?
                .ok_or_else(|| {
                    Refusal::new(
                        Code::NotFound,
                        format_args!(
                            "the token's WorkloadGroup {} was deleted",
                            token.spec.workload_group
                        ),
                    )
                })?;
            match self.redeem(link, request, &token, &group, &key_digest, act).await {
                Ok(enrolled) => {
                    self.fleet.wait_for(enrolled.version).await;
                    let registration = self
                        .registration(enrolled.id, &enrolled.device.spec, &group, &enrolled.entry)
                        .await?;
                    return Ok(pb::EnrollResponse {
                        registration: Some(registration),
                        cert_chain: enrolled.chain,
                        server_time_unix_ms: server_time(),
                        warnings: enrolled.warnings,
                    });
                }
                Err(Attempt::Refused(refusal)) => return Err(refusal),
                Err(Attempt::Raced(refusal)) => raced = Some(refusal),
            }
        }
        Err(raced.unwrap_or_else(|| Refusal::busy("many hosts enrol at once; try again")))
    }

    /// What may still be done with a token. Its id is 16 random bytes: who names one holds the token.
    pub(super) async fn token_facts(&self, token_id: &[u8]) -> Option<pb::TokenFacts> {
        let token_id: [u8; 16] = token_id.try_into().ok()?;
        let name: String = token_id.iter().map(|b| format!("{b:02x}")).collect();
        let token = self.find_token(&name).await.ok()?;
        let status: JoinTokenStatus = token
            .status
            .and_then(|status| serde_json::from_value(status).ok())
            .unwrap_or_default();
        let time = |text: &str| tombolo_config::unix_ms(text).unwrap_or_default();
        Some(pb::TokenFacts {
            uses: token.spec.uses,
            used: u32::try_from(status.used.len()).unwrap_or(u32::MAX),
            created_unix_ms: token.metadata.creation_timestamp.as_deref().map_or(0, time),
            expires_unix_ms: time(&token.spec.expires),
        })
    }

    async fn find_token(&self, name: &str) -> Result<Object<JoinTokenSpec>, Refusal> {
        let unknown = || Refusal::new(Code::TokenUnknown, format_args!("token {name}"));
        let namespace = self.fleet.view().tokens.get(name).cloned().ok_or_else(unknown)?;
        self.objects
            .join_token(&namespace, name)
            .await?
            .ok_or_else(unknown)
    }

    /// Both proofs of possession, over the session's exporter.
    fn verify(
        &self,
        request: &pb::EnrollRequest,
        exporter: &[u8; 32],
        token_id: &[u8; 16],
        token: &Object<JoinTokenSpec>,
    ) -> Result<(), Refusal> {
        let message = proof::enroll(exporter, token_id, &request.device_public_key, &request.csr);
        let public = STANDARD
            .decode(&token.spec.public_key)
            .map_err(|_| Refusal::internal("the stored token is damaged"))?;
        verify_join_signature(&public, &message, &request.token_signature)
            .map_err(|_| Refusal::new(Code::TokenProof, "the token's signature does not fit"))?;
        verify_device_signature(&request.device_public_key, &message, &request.device_signature)
            .map_err(|_| Refusal::new(Code::TokenProof, "the device key's signature does not fit"))
    }

    async fn redeem(
        &self,
        link: &Link,
        request: &pb::EnrollRequest,
        token: &Object<JoinTokenSpec>,
        group: &Object<WorkloadGroupSpec>,
        key_digest: &str,
        act: &mut Act,
    ) -> Result<Enrolled, Attempt> {
        let namespace = &token.metadata.namespace;
        let gateway = is_gateway_group(&self.settings.trust_domain, group);
        if reserved_namespace(namespace) && !gateway {
            return Err(Refusal::new(Code::Reserved, format_args!("namespace {namespace}")).into());
        }
        check_purpose(gateway, request.gateway.as_ref(), &group.metadata.name)?;
        let status: JoinTokenStatus = token
            .status
            .clone()
            .map(serde_json::from_value)
            .transpose()
            .ok()
            .flatten()
            .unwrap_or_default();
        let used_by_this_key = status.used.iter().any(|digest| digest == key_digest);
        let public_key = STANDARD.encode(&request.device_public_key);
        let mut known = self.find_by_key(&public_key).await?;
        if known.is_none() && used_by_this_key {
            // The same call twice at once: the view is about to show what the first one did.
            self.fleet.wait_for(self.objects.store().resource_version()).await;
            known = self.find_by_key(&public_key).await?;
        }
        if let Some(known) = &known {
            if known.spec.revoked.is_some() {
                return Err(Refusal::new(
                    Code::DeviceRevoked,
                    format_args!("device {}", known.metadata.name),
                )
                .into());
            }
            if (&known.metadata.namespace, &known.spec.workload_group)
                != (namespace, &token.spec.workload_group)
            {
                let held = format!("{}/{}", known.metadata.namespace, known.spec.workload_group);
                return Err(Refusal::new(
                    Code::AlreadyEnrolled,
                    format_args!("its device key is enrolled in {held}"),
                )
                .into());
            }
            if used_by_this_key && known.spec.generation == FIRST_GENERATION {
                return self.answer_again(request, known.clone(), act).await;
            }
        }
        check_token(link, token, &status)?;
        // Another device used it up, or this one did and has renewed since: then the copy that asks is not it.
        if status.used.len() >= usize::try_from(token.spec.uses).unwrap_or(usize::MAX) {
            return Err(match known {
                Some(known) if used_by_this_key => Refusal::new(
                    Code::DeviceClone,
                    format_args!("device {} has renewed since it enrolled", known.metadata.name),
                ),
                _ => Refusal::new(
                    Code::TokenSpent,
                    format_args!("all {} uses are taken by other hosts", token.spec.uses),
                ),
            }
            .into());
        }
        let mut writes = vec![objects::update(&spend(token, status, key_digest), false)];
        let enrolled = match known {
            // A new token in the hands of a device that is enrolled: its operator vouches for this copy.
            Some(known) => self.enroll_again(request, known, &mut writes).await?,
            None => {
                self.enroll_new(link, request, namespace, group, public_key, &mut writes)
                    .await?
            }
        };
        act.object = format!("Device {namespace}/{}", enrolled.id);
        act.after = Some(sha256(&objects::value_of(&Resource::Device(
            enrolled.device.clone(),
        ))));
        let (_, version) = self.objects.commit(writes).await.map_err(|error| {
            if is_race(&error) {
                Attempt::Raced(error.into())
            } else {
                Attempt::Refused(error.into())
            }
        })?;
        tracing::info!(device = %enrolled.id, entry = enrolled.device.spec.workload_entry, %namespace, "enrolled");
        Ok(Enrolled { version, ..enrolled })
    }

    /// A device by its key: the view first, and the store where a race may hide it.
    async fn find_by_key(&self, public_key: &str) -> Result<Option<Object<DeviceSpec>>, Refusal> {
        let view = self.fleet.view();
        let found = view
            .members
            .values()
            .find(|member| member.device.spec.public_key == public_key);
        match found {
            Some(member) => {
                let metadata = &member.device.metadata;
                Ok(self.objects.device(&metadata.namespace, &metadata.name).await?)
            }
            None => Ok(None),
        }
    }

    /// The same key with the token that it used: the answer was lost. The same device, no use burnt.
    async fn answer_again(
        &self,
        request: &pb::EnrollRequest,
        mut device: Object<DeviceSpec>,
        act: &mut Act,
    ) -> Result<Enrolled, Attempt> {
        let (id, entry) = self.parts(&device).await?;
        act.object = format!("Device {}/{id}", device.metadata.namespace);
        let Certified { chain, key_digest } = self.certify(
            &request.csr,
            &device.metadata.namespace,
            &device.spec.service_account,
            id,
        )?;
        if key_digest == device.spec.csr_digest && self.is_of_signing_name(&device.spec.cert_chain) {
            let chain = device.spec.cert_chain.clone();
            return Ok(Enrolled {
                id,
                device,
                entry,
                chain,
                warnings: Vec::new(),
                version: 0,
            });
        }
        (device.spec.csr_digest, device.spec.cert_chain) = (key_digest, chain.clone());
        let write = objects::update(&Resource::Device(device.clone()), true);
        let (_, version) = self.objects.commit(vec![write]).await.map_err(|error| {
            if is_race(&error) {
                Attempt::Raced(error.into())
            } else {
                Attempt::Refused(error.into())
            }
        })?;
        Ok(Enrolled {
            id,
            device,
            entry,
            chain,
            warnings: Vec::new(),
            version,
        })
    }

    async fn enroll_again(
        &self,
        request: &pb::EnrollRequest,
        mut device: Object<DeviceSpec>,
        writes: &mut Vec<tombolo_store::Write>,
    ) -> Result<Enrolled, Attempt> {
        let (id, mut entry) = self.parts(&device).await?;
        let certified = self.certify(
            &request.csr,
            &device.metadata.namespace,
            &device.spec.service_account,
            id,
        )?;
        let spec = &mut device.spec;
        spec.generation += 1;
        (spec.csr_digest, spec.cert_chain) = (certified.key_digest, certified.chain.clone());
        spec.clone_refused = false;
        spec.agent_version = version_of(request);
        writes.push(objects::update(&Resource::Device(device.clone()), true));
        if let Some(claims) = &request.gateway
            && claim(&mut entry, claims, &self.settings.plan)?
        {
            writes.push(objects::update(&Resource::WorkloadEntry(entry.clone()), true));
        }
        Ok(Enrolled {
            id,
            device,
            entry,
            chain: certified.chain,
            warnings: Vec::new(),
            version: 0,
        })
    }

    async fn enroll_new(
        &self,
        link: &Link,
        request: &pb::EnrollRequest,
        namespace: &str,
        group: &Object<WorkloadGroupSpec>,
        public_key: String,
        writes: &mut Vec<tombolo_store::Write>,
    ) -> Result<Enrolled, Attempt> {
        let view = self.fleet.view();
        let id = loop {
            let id = DeviceId(rand::random());
            if id.0 != 0 && !view.members.contains_key(&id) && !view.revoked.contains(&id) {
                break id;
            }
        };
        let now = tombolo_config::rfc3339(server_time());
        let (mut entry, mut warnings) = entry::make(group, id, &request.labels, &now);
        if let Some(claims) = &request.gateway {
            claim(&mut entry, claims, &self.settings.plan)?;
        }
        let certified = self.certify(&request.csr, namespace, &entry.spec.service_account, id)?;
        let claimed: Vec<IpAddr> = request
            .addresses
            .iter()
            .take(ADDRESSES_MAX)
            .filter_map(|text| text.trim().parse().ok())
            .collect();
        let network = if entry.spec.network.is_empty() {
            &self.settings.network
        } else {
            &entry.spec.network
        };
        let source = link.source_of_node(network, &claimed);
        let choice = choose(source, &claimed, &cidrs_of(group), &self.settings.plan);
        let placed = place(&self.objects, &view, &mut entry, &choice, &self.settings.network)
            .await
            .map_err(Refusal::from)?;
        warnings.extend(placed.warnings);
        writes.extend(placed.evicted);
        let network = if entry.spec.network.is_empty() {
            &self.settings.network
        } else {
            &entry.spec.network
        };
        let hostname = request
            .hostname
            .chars()
            .filter(|c| !c.is_control())
            .take(HOSTNAME_MAX)
            .collect();
        let spec = DeviceSpec {
            public_key,
            workload_group: group.metadata.name.clone(),
            service_account: entry.spec.service_account.clone(),
            workload_entry: entry.metadata.name.clone(),
            network: network.clone(),
            hostname,
            generation: FIRST_GENERATION,
            csr_digest: certified.key_digest,
            cert_chain: certified.chain.clone(),
            enrolled_at: now,
            agent_version: version_of(request),
            ..DeviceSpec::default()
        };
        let device = Object::<DeviceSpec>::new(Metadata::named(namespace, id.to_string()), spec);
        writes.push(objects::create(&Resource::Device(device.clone())));
        writes.push(objects::create(&Resource::WorkloadEntry(entry.clone())));
        Ok(Enrolled {
            id,
            device,
            entry,
            chain: certified.chain,
            warnings,
            version: 0,
        })
    }

    /// Id and WorkloadEntry of a device.
    pub(super) async fn parts(
        &self,
        device: &Object<DeviceSpec>,
    ) -> Result<(DeviceId, Object<WorkloadEntrySpec>), Refusal> {
        let id = device.metadata.name.parse().map_err(Refusal::internal)?;
        let entry = self
            .objects
            .workload_entry(&device.metadata.namespace, &device.spec.workload_entry)
            .await?;
        let missing = || {
            Refusal::new(
                Code::NotFound,
                format_args!("{} {}", Kind::WorkloadEntry, device.spec.workload_entry),
            )
        };
        Ok((id, entry.ok_or_else(missing)?))
    }
}

/// How a try ended without an enrolment.
enum Attempt {
    Refused(Refusal),
    /// Something changed meanwhile; the next try sees it.
    Raced(Refusal),
}

impl From<Refusal> for Attempt {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

fn version_of(request: &pb::EnrollRequest) -> String {
    request
        .hello
        .as_ref()
        .map(|hello| hello.version.chars().take(64).collect())
        .unwrap_or_default()
}

/// Life and source of a token.
fn check_token(link: &Link, token: &Object<JoinTokenSpec>, status: &JoinTokenStatus) -> Result<(), Refusal> {
    let expires = tombolo_config::unix_ms(&token.spec.expires).unwrap_or_default();
    if expires <= server_time() {
        let used = status.used.len();
        return Err(Refusal::new(
            Code::TokenExpired,
            format_args!(
                "it ended at {} ({used} of {} uses taken)",
                token.spec.expires, token.spec.uses
            ),
        ));
    }
    if !token.spec.cidr.is_empty() {
        let source = link.remote.map(|remote| remote.ip().to_canonical());
        let inside = |text: &String| {
            let cidr = text
                .parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            cidr.is_ok_and(|cidr| source.is_some_and(|source| cidr.contains(&source)))
        };
        if !token.spec.cidr.iter().any(inside) {
            let shown = source.map_or_else(|| "an unknown address".into(), |source| source.to_string());
            return Err(Refusal::new(
                Code::TokenSource,
                format_args!("{shown} is not in {}", token.spec.cidr.join(", ")),
            ));
        }
    }
    Ok(())
}

/// The token with one use more.
fn spend(token: &Object<JoinTokenSpec>, mut status: JoinTokenStatus, key_digest: &str) -> Resource {
    status.used.push(key_digest.to_owned());
    let mut token = token.clone();
    token.status = serde_json::to_value(&status).ok();
    Resource::JoinToken(token)
}
