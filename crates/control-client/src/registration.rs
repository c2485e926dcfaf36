use serde::{Deserialize, Serialize};
use tombolo_proto::tombolo::v1;
use tombolo_types::{AddressPlan, AddressPlanError, DeviceId, SpiffeId, TrustDomain};

/// What a node knows about itself, as discovery said at enrolment or at the last renewal. Every field is checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Device id.
    pub device: DeviceId,
    /// Identity of the workload.
    pub identity: SpiffeId,
    /// Name of the WorkloadEntry.
    pub workload_name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// WorkloadGroup.
    pub workload_group: String,
    /// Trust domain.
    pub trust_domain: TrustDomain,
    /// Names that the trust domain has or had beside it.
    pub other_names: Vec<TrustDomain>,
    /// Cluster id.
    pub cluster_id: String,
    /// Network; empty is the default one.
    pub network: String,
    /// Mesh domain, for example `mesh.internal`.
    pub mesh_domain: String,
    /// VIP prefixes.
    pub plan: AddressPlan,
    /// `host:port` of discovery, in order of preference; at least one.
    pub endpoints: Vec<String>,
    /// Of the registration.
    pub generation: u64,
    /// Names under which the workload is reachable.
    pub hostnames: Vec<String>,
    /// The WorkloadGroup's probe as JSON; empty: none.
    pub probe_json: String,
}

/// Why a registration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    /// Not JSON of this shape.
    #[error("not a registration: {0}")]
    Json(#[from] serde_json::Error),
    /// Made by a newer version.
    #[error("its format is {0}, this version reads 1")]
    Version(u32),
    /// Device id.
    #[error(transparent)]
    Device(#[from] tombolo_types::ParseDeviceIdError),
    /// A name.
    #[error(transparent)]
    Name(#[from] tombolo_types::NameError),
    /// VIP prefixes.
    #[error(transparent)]
    Plan(#[from] AddressPlanError),
    /// Something that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
}

const FORMAT: u32 = 1;

#[derive(Deserialize)]
struct Format {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    device_id: String,
    workload_name: String,
    namespace: String,
    service_account: String,
    workload_group: String,
    trust_domain: String,
    cluster_id: String,
    network: String,
    mesh_domain: String,
    vip_prefixes: Vec<String>,
    discovery_endpoints: Vec<String>,
    generation: u64,
    hostnames: Vec<String>,
    probe_json: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    other_names: Vec<String>,
}

impl Registration {
    /// Checks what discovery sent. Without endpoints in it, `endpoints` (those that answered) are kept.
    ///
    /// # Errors
    /// When a field is missing or not of its form.
    pub fn from_proto(message: v1::Registration, endpoints: &[String]) -> Result<Self, RegistrationError> {
        let trust_domain: TrustDomain = message.trust_domain.parse()?;
        let identity = SpiffeId::new(trust_domain.clone(), &message.namespace, &message.service_account)?;
        let missing = |value: &str, what| {
            if value.is_empty() {
                Err(RegistrationError::Missing(what))
            } else {
                Ok(())
            }
        };
        missing(&message.workload_name, "workload_name")?;
        missing(&message.mesh_domain, "mesh_domain")?;
        let endpoints = match message.discovery_endpoints {
            sent if sent.is_empty() => endpoints.to_vec(),
            sent => sent,
        };
        missing(
            endpoints.first().map_or("", String::as_str),
            "discovery_endpoints",
        )?;
        Ok(Self {
            device: message.device_id.parse()?,
            identity,
            workload_name: message.workload_name,
            namespace: message.namespace,
            service_account: message.service_account,
            workload_group: message.workload_group,
            trust_domain,
            other_names: message
                .other_names
                .iter()
                .map(|name| name.parse())
                .collect::<Result<_, _>>()?,
            cluster_id: message.cluster_id,
            network: message.network,
            mesh_domain: message.mesh_domain,
            plan: AddressPlan::from_prefixes(&message.vip_prefixes)?,
            endpoints,
            generation: message.generation,
            hostnames: message.hostnames,
            probe_json: message.probe_json,
        })
    }

    /// Who this node is, as the snapshot wants it.
    pub fn own(&self) -> tombolo_snapshot::Own {
        tombolo_snapshot::Own {
            namespace: self.namespace.as_str().into(),
            workload_name: self.workload_name.as_str().into(),
            service_account: self.service_account.as_str().into(),
            network: self.network.as_str().into(),
            cluster_id: self.cluster_id.as_str().into(),
            mesh_domain: self.mesh_domain.as_str().into(),
            trust_domain: self.trust_domain.clone(),
        }
    }

    /// True for a name that the trust domain has or had.
    pub fn is_name(&self, trust_domain: &TrustDomain) -> bool {
        *trust_domain == self.trust_domain || self.other_names.contains(trust_domain)
    }

    /// The file form.
    pub fn to_json(&self) -> String {
        let file = File {
            format: FORMAT,
            device_id: self.device.to_string(),
            workload_name: self.workload_name.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
            workload_group: self.workload_group.clone(),
            trust_domain: self.trust_domain.to_string(),
            cluster_id: self.cluster_id.clone(),
            network: self.network.clone(),
            mesh_domain: self.mesh_domain.clone(),
            vip_prefixes: self.plan.prefixes().to_vec(),
            discovery_endpoints: self.endpoints.clone(),
            generation: self.generation,
            hostnames: self.hostnames.clone(),
            probe_json: self.probe_json.clone(),
            other_names: self.other_names.iter().map(ToString::to_string).collect(),
        };
        serde_json::to_string_pretty(&file).unwrap_or_default() + "\n"
    }

    /// Reads the file form.
    ///
    /// # Errors
    /// When it is damaged or newer.
    pub fn from_json(text: &str) -> Result<Self, RegistrationError> {
        // The number first: what else is in the file is the newer version's business.
        let Format { format } = serde_json::from_str(text)?;
        if format != FORMAT {
            return Err(RegistrationError::Version(format));
        }
        let file: File = serde_json::from_str(text)?;
        let message = v1::Registration {
            device_id: file.device_id,
            workload_name: file.workload_name,
            namespace: file.namespace,
            service_account: file.service_account,
            workload_group: file.workload_group,
            trust_domain: file.trust_domain,
            cluster_id: file.cluster_id,
            network: file.network,
            mesh_domain: file.mesh_domain,
            vip_prefixes: file.vip_prefixes,
            discovery_endpoints: file.discovery_endpoints,
            generation: file.generation,
            hostnames: file.hostnames,
            probe_json: file.probe_json,
            other_names: file.other_names,
        };
        Self::from_proto(message, &[])
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn message() -> v1::Registration {
        v1::Registration {
            device_id: "00000000000000ab".into(),
            workload_name: "catalog-00000000000000ab".into(),
            namespace: "shop".into(),
            service_account: "catalog".into(),
            workload_group: "catalog".into(),
            trust_domain: "mesh.example".into(),
            cluster_id: "Kubernetes".into(),
            network: String::new(),
            mesh_domain: "mesh.internal".into(),
            vip_prefixes: vec!["10.240.0.0/16".into()],
            discovery_endpoints: vec![],
            generation: 1,
            hostnames: vec!["catalog.shop.svc.mesh.internal".into()],
            probe_json: String::new(),
            other_names: vec!["old.example".into()],
        }
    }

    #[test]
    fn file_form_keeps_everything() {
        let registration = Registration::from_proto(message(), &["d:15012".into()]).unwrap();
        assert_eq!(
            registration.identity.to_string(),
            "spiffe://mesh.example/ns/shop/sa/catalog"
        );
        assert_eq!(
            Registration::from_json(&registration.to_json()).unwrap(),
            registration
        );
    }

    #[test]
    fn incomplete_ones_are_refused() {
        assert!(
            Registration::from_proto(message(), &[]).is_err(),
            "nowhere to connect to"
        );
        let spoil: [fn(&mut v1::Registration); 5] = [
            |m| m.device_id.clear(),
            |m| m.namespace = "Shop".into(),
            |m| m.trust_domain.clear(),
            |m| m.workload_name.clear(),
            |m| m.vip_prefixes = vec!["0.0.0.0/0".into()],
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut bad = message();
            spoil(&mut bad);
            assert!(Registration::from_proto(bad, &["d:1".into()]).is_err(), "{i}");
        }
        let newer = Registration::from_proto(message(), &["d:1".into()])
            .unwrap()
            .to_json()
            .replace("\"format\": 1", "\"format\": 2");
        assert!(matches!(
            Registration::from_json(&newer),
            Err(RegistrationError::Version(2))
        ));
    }
}
