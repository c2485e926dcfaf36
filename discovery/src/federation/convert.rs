//! Between what the registry and what federation call the same things.

use crate::fleet::Offered;
use std::{collections::BTreeSet, sync::Arc};
use tombolo_federation::{
    ExportedGateway, ExportedPort, ExportedService, Exports, Imports, Locality, Presence, ServiceName,
};
use tombolo_registry::{
    EndpointSummary, Export, ImportedGateway, Imports as RegistryImports, NetworkGateway, ServicePort,
};
use tombolo_types::{SpiffeId, networks};

fn locality(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(Arc::<str>::from);
    let mut next = || parts.next().unwrap_or_default();
    Locality {
        region: next(),
        zone: next(),
        subzone: next(),
    }
}

fn text_of(locality: &Locality) -> String {
    let Locality {
        region,
        zone,
        subzone,
    } = locality;
    let text = format!("{region}/{zone}/{subzone}");
    text.trim_end_matches('/').to_owned()
}

fn service(export: &Export) -> ExportedService {
    ExportedService {
        name: ServiceName {
            namespace: export.namespace.as_str().into(),
            name: export.name.as_str().into(),
        },
        ports: export
            .ports
            .iter()
            .map(|port| ExportedPort {
                port: port.port,
                protocol: port.protocol.as_str().into(),
                name: port.name.as_str().into(),
            })
            .collect(),
        subject_alt_names: export
            .sans
            .iter()
            .filter_map(|id| id.parse::<SpiffeId>().ok())
            .collect(),
        presences: export
            .endpoints
            .iter()
            .map(|endpoint| Presence {
                network: endpoint.network.as_str().into(),
                locality: locality(&endpoint.locality),
                healthy: endpoint.healthy,
                capacity: endpoint.capacity,
            })
            .collect(),
    }
}

fn gateway(gateway: &NetworkGateway) -> ExportedGateway {
    ExportedGateway {
        network: networks::home_of(&gateway.network).into(),
        address: gateway.address.as_str().into(),
        hbone_port: gateway.hbone_port,
        quic_port: gateway.quic_port,
        locality: locality(&gateway.locality),
    }
}

/// What this cluster exports; gateways that are lost are not offered to others.
pub(super) fn exports(offered: &Offered, mesh_domain: &str) -> Exports {
    let services = offered.services.iter().map(service);
    let gateways: BTreeSet<ExportedGateway> = offered
        .gateways
        .iter()
        .filter(|gateway| gateway.healthy)
        .map(gateway)
        .collect();
    Exports {
        services: services
            .map(|service| (service.name.clone(), Arc::new(service)))
            .collect(),
        gateways: gateways.into_iter().collect(),
        mesh_domain: mesh_domain.into(),
    }
}

/// What another cluster offers, for the registry.
pub(super) fn imports(imports: &Imports, shares_trust_domain: bool) -> RegistryImports {
    let identity = SpiffeId::gateway(imports.trust_domain.clone());
    RegistryImports {
        trust_domain: imports.trust_domain.clone(),
        also: imports.also.iter().cloned().collect(),
        former: imports.former.iter().cloned().collect(),
        roots_pem: imports.roots_pem.to_string(),
        shares_trust_domain,
        mesh_domain: imports.mesh_domain.to_string(),
        stale: imports.stale,
        gateways: imports
            .gateways
            .iter()
            .map(|gateway| ImportedGateway {
                address: gateway.address.to_string(),
                hbone_port: gateway.hbone_port,
                quic_port: gateway.quic_port,
                namespace: identity.namespace.to_string(),
                service_account: identity.service_account.to_string(),
                locality: text_of(&gateway.locality),
                network: gateway.network.to_string(),
            })
            .collect(),
        services: imports
            .services
            .values()
            .map(|service| Export {
                namespace: service.name.namespace.to_string(),
                name: service.name.name.to_string(),
                ports: service
                    .ports
                    .iter()
                    .map(|port| ServicePort {
                        name: port.name.to_string(),
                        port: port.port,
                        protocol: port.protocol.to_string(),
                    })
                    .collect(),
                sans: service
                    .subject_alt_names
                    .iter()
                    .map(ToString::to_string)
                    .collect(),
                endpoints: service
                    .presences
                    .iter()
                    .map(|presence| EndpointSummary {
                        network: presence.network.to_string(),
                        locality: text_of(&presence.locality),
                        healthy: presence.healthy,
                        capacity: presence.capacity,
                    })
                    .collect(),
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn localities_come_back_as_they_were() {
        for text in ["", "eu", "eu/a", "eu/a/rack-1", "eu//rack-1"] {
            assert_eq!(text_of(&locality(text)), text);
        }
    }
}
