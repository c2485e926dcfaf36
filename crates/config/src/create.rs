use crate::{
    Diagnostic, Location, Metadata, Object, Resolution, Resource, ServiceEntrySpec, WorkloadEntrySpec,
    WorkloadGroupSpec, annotation,
    networking::{GroupMetadata, ServicePort, WorkloadSelector},
    object::OwnerReference,
    validate::PROTOCOLS,
};
use std::{collections::BTreeMap, str::FromStr};

/// What `tombolo workload-group create` is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewWorkloadGroup {
    /// Name of the group and of its service.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account; empty: `default`.
    pub service_account: String,
    /// Ports in the order given.
    pub ports: Vec<NewPort>,
    /// Labels of the entries, beside `app`.
    pub labels: BTreeMap<String, String>,
    /// Network id; empty: the mesh's own.
    pub network: String,
    /// For example `mesh.internal`.
    pub mesh_domain: String,
    /// The service is exported to joined clusters.
    pub exported: bool,
    /// The VMs only dial out: they are called through the gateways of their network.
    pub outbound_only: bool,
}

/// A port as it is typed: `http=80:8080` is name, port of the service, port on the VM; `http=8080` uses one number for
/// both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewPort {
    /// Name; its first word tells the protocol, as in Istio.
    pub name: String,
    /// What clients connect to.
    pub service_port: u16,
    /// What the application listens on.
    pub target_port: u16,
}

impl FromStr for NewPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused =
            || format!("{text:?} is not NAME=PORT or NAME=SERVICE_PORT:VM_PORT, for example http=80:8080");
        let port = |text: &str| match text.parse::<u16>() {
            Ok(port) if port > 0 && text.bytes().all(|b| b.is_ascii_digit()) => Ok(port),
            _ => Err(refused()),
        };
        let (name, numbers) = text.split_once('=').ok_or_else(refused)?;
        tombolo_types::check_label("port name", name).map_err(|error| error.to_string())?;
        let (service, target) = numbers.split_once(':').unwrap_or((numbers, numbers));
        Ok(Self {
            name: name.to_owned(),
            service_port: port(service)?,
            target_port: port(target)?,
        })
    }
}

impl NewPort {
    /// By the first word of the name: `http`, `http-web`, `grpc`; TCP for anything else.
    fn protocol(&self) -> String {
        let word = if self.name.starts_with("grpc-web") {
            "grpc-web"
        } else {
            self.name.split('-').next().unwrap_or("")
        };
        let known = PROTOCOLS.iter().find(|known| known.eq_ignore_ascii_case(word));
        known.copied().unwrap_or("TCP").to_owned()
    }
}

impl NewWorkloadGroup {
    /// The two objects that it stands for: the WorkloadGroup, and a ServiceEntry that gives its VMs the name
    /// `<name>.<namespace>.svc.<mesh domain>` at once.
    ///
    /// # Errors
    /// With what validation refuses in either.
    pub fn objects(&self) -> Result<(Object<WorkloadGroupSpec>, Object<ServiceEntrySpec>), Vec<Diagnostic>> {
        tombolo_types::check_label("name", &self.name)
            .map_err(|error| vec![Diagnostic::error("metadata.name", error.to_string())])?;
        let mut labels = self.labels.clone();
        // The selector must find what the group makes, whatever `app` the caller wished for.
        let app = labels
            .entry("app".to_owned())
            .or_insert_with(|| self.name.clone())
            .clone();
        let group = WorkloadGroupSpec {
            metadata: GroupMetadata {
                labels,
                annotations: BTreeMap::new(),
            },
            template: WorkloadEntrySpec {
                ports: self
                    .ports
                    .iter()
                    .map(|port| (port.name.clone(), port.target_port.into()))
                    .collect(),
                service_account: self.service_account.clone(),
                network: self.network.clone(),
                ..WorkloadEntrySpec::default()
            },
            probe: None,
        };
        let service = ServiceEntrySpec {
            hosts: vec![format!(
                "{}.{}.svc.{}",
                self.name, self.namespace, self.mesh_domain
            )],
            ports: self
                .ports
                .iter()
                .map(|port| ServicePort {
                    number: port.service_port.into(),
                    protocol: port.protocol(),
                    name: port.name.clone(),
                    target_port: if port.target_port == port.service_port {
                        0
                    } else {
                        port.target_port.into()
                    },
                })
                .collect(),
            location: Location::MeshInternal,
            resolution: Resolution::Static,
            workload_selector: Some(WorkloadSelector {
                labels: BTreeMap::from([("app".to_owned(), app)]),
            }),
            ..ServiceEntrySpec::default()
        };
        let metadata = || Metadata::named(&self.namespace, &self.name);
        let (mut group, mut service) = (
            Object::<WorkloadGroupSpec>::new(metadata(), group),
            Object::<ServiceEntrySpec>::new(metadata(), service),
        );
        if self.outbound_only {
            let annotations = &mut group.metadata.annotations;
            annotations.insert(annotation::REACH.to_owned(), "outbound".to_owned());
        }
        if self.exported {
            let labels = &mut service.metadata.labels;
            labels.insert(annotation::GLOBAL.to_owned(), "true".to_owned());
        }
        let mut refused = Resource::from(group.clone()).validate();
        refused.extend(Resource::from(service.clone()).validate());
        refused.retain(|finding| !finding.warning);
        if refused.is_empty() {
            Ok((group, service))
        } else {
            Err(refused)
        }
    }
}

/// What a registration adds to its group's template.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NewWorkloadEntry {
    /// Name of the entry.
    pub name: String,
    /// Address; empty if none is accepted yet.
    pub address: String,
    /// Network of the node; empty: the template's.
    pub network: String,
    /// Labels that the node was allowed to set.
    pub labels: BTreeMap<String, String>,
}

impl Object<WorkloadGroupSpec> {
    /// The WorkloadEntry of one of its VMs, made as istiod makes it: the template, with labels of template, group and
    /// node over each other; owned by the group; marked as taking HBONE.
    ///
    /// Source: Istio pilot/pkg/autoregistration (workloadEntryFromGroup).
    pub fn entry(&self, new: &NewWorkloadEntry) -> Object<WorkloadEntrySpec> {
        let mut spec = self.spec.template.clone();
        spec.address.clone_from(&new.address);
        if !new.network.is_empty() {
            spec.network.clone_from(&new.network);
        }
        spec.labels.extend(self.spec.metadata.labels.clone());
        spec.labels.extend(new.labels.clone());
        let mut metadata = Metadata::named(&self.metadata.namespace, &new.name);
        metadata.labels.clone_from(&spec.labels);
        metadata
            .labels
            .insert(annotation::TUNNEL.to_owned(), "http".to_owned());
        metadata.annotations.clone_from(&self.spec.metadata.annotations);
        metadata.annotations.insert(
            annotation::AUTO_REGISTRATION_GROUP.to_owned(),
            self.metadata.name.clone(),
        );
        metadata.owner_references = vec![OwnerReference {
            api_version: self.api_version.clone(),
            kind: self.kind.clone(),
            name: self.metadata.name.clone(),
            uid: self.metadata.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        }];
        Object::<WorkloadEntrySpec>::new(metadata, spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn typed_ports() {
        let read = |text: &str| text.parse::<NewPort>();
        let port = |name: &str, service_port, target_port| NewPort {
            name: name.into(),
            service_port,
            target_port,
        };
        assert_eq!(read("http=80:8080"), Ok(port("http", 80, 8080)));
        assert_eq!(read("http=8080"), Ok(port("http", 8080, 8080)));
        for bad in [
            "",
            "http",
            "http=",
            "http=0",
            "http=80:",
            "=80",
            "http=80:0",
            "http=+80",
            "HTTP=80",
            "a=1:2:3",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        for (name, protocol) in [
            ("http", "HTTP"),
            ("http-web", "HTTP"),
            ("grpc-web", "GRPC-WEB"),
            ("pg", "TCP"),
            ("tls", "TLS"),
        ] {
            assert_eq!(port(name, 1, 1).protocol(), protocol);
        }
    }

    #[test]
    fn a_group_and_its_service() {
        let new = NewWorkloadGroup {
            name: "catalog".into(),
            namespace: "shop".into(),
            service_account: "catalog".into(),
            ports: vec!["http=80:8080".parse().unwrap(), "admin=9000".parse().unwrap()],
            labels: BTreeMap::from([("version".into(), "v1".into())]),
            network: String::new(),
            mesh_domain: "mesh.internal".into(),
            exported: false,
            outbound_only: false,
        };
        let (group, service) = new.objects().unwrap();
        assert_eq!(
            Resource::from(group.clone()).to_json(),
            json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadGroup",
                "metadata": {"name": "catalog", "namespace": "shop"},
                "spec": {"metadata": {"labels": {"app": "catalog", "version": "v1"}},
                    "template": {"ports": {"http": 8080, "admin": 9000}, "serviceAccount": "catalog"}}})
        );
        assert_eq!(
            Resource::from(service).to_json(),
            json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
                "metadata": {"name": "catalog", "namespace": "shop"},
                "spec": {"hosts": ["catalog.shop.svc.mesh.internal"], "location": "MESH_INTERNAL",
                    "resolution": "STATIC", "workloadSelector": {"labels": {"app": "catalog"}},
                    "ports": [{"number": 80, "targetPort": 8080, "name": "http", "protocol": "HTTP"},
                        {"number": 9000, "name": "admin", "protocol": "TCP"}]}})
        );
        let entry = group.entry(&NewWorkloadEntry {
            name: "catalog-00abcdef01234567".into(),
            address: "10.0.0.1".into(),
            network: "n1".into(),
            labels: BTreeMap::from([("version".into(), "v2".into())]),
        });
        assert!(Resource::from(entry.clone()).validate().is_empty());
        assert_eq!(entry.spec.labels["version"], "v2");
        assert_eq!(entry.metadata.labels["networking.istio.io/tunnel"], "http");
        assert_eq!(
            entry.metadata.annotations["istio.io/autoRegistrationGroup"],
            "catalog"
        );
        assert_eq!(
            (entry.spec.address.as_str(), entry.spec.network.as_str()),
            ("10.0.0.1", "n1")
        );

        let (behind_nat, exported) = NewWorkloadGroup {
            exported: true,
            outbound_only: true,
            ..new.clone()
        }
        .objects()
        .unwrap();
        assert_eq!(behind_nat.metadata.annotations["tombolo.io/reach"], "outbound");
        assert_eq!(exported.metadata.labels["istio.io/global"], "true");

        let reserved = NewWorkloadGroup {
            namespace: "istio-system".into(),
            ..new.clone()
        };
        assert!(reserved.objects().unwrap_err()[0].reason.contains("reserved"));
        assert!(
            NewWorkloadGroup {
                name: "a.b".into(),
                ..new
            }
            .objects()
            .is_err()
        );
    }
}
