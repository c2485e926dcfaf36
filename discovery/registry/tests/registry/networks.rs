//! Networks and their gateways.

use crate::{
    imported::{give_imported, west},
    support::*,
};
use tombolo_proto::{
    istio::workload::{WorkloadStatus, gateway_address::Destination},
    tombolo::v1::NetworkGateways,
    type_url, unpack,
};
use tombolo_registry::{Registry, World};

const GATEWAYS: &str = r#"
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: gw-1, namespace: tombolo-system, creationTimestamp: "2026-01-01T00:00:00Z"}
spec: {address: 10.0.0.9, serviceAccount: gateway, locality: eu/a}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: gw-2
  namespace: tombolo-system
  creationTimestamp: "2026-01-02T00:00:00Z"
  annotations: {tombolo.io/gateway-address: "gw.example.org:443,192.0.2.7:443", tombolo.io/gateway-quic-port: "443"}
spec: {address: 10.0.0.10, serviceAccount: gateway}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: gw-lan, namespace: tombolo-system}
spec: {address: 10.0.0.9, serviceAccount: gateway, network: lan}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: other, namespace: tombolo-system}
spec: {address: 10.0.0.11, serviceAccount: discovery}
"#;

pub(crate) const CATALOG: &str = r#"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: catalog, namespace: shop, labels: {istio.io/global: "true"}}
spec:
  hosts: [catalog.shop.svc.mesh.internal]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}, {number: 53, name: dns, protocol: UDP}]
  workloadSelector: {labels: {app: catalog}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: away, namespace: shop, annotations: {tombolo.io/reach: outbound}}
spec: {template: {labels: {app: catalog}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: here, namespace: shop}
spec: {address: 10.0.0.1, serviceAccount: here, locality: eu/a, weight: 2, labels: {app: catalog, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: away-1, namespace: shop, annotations: {istio.io/autoRegistrationGroup: away}}
spec: {address: 10.0.0.1, serviceAccount: away, labels: {app: catalog, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: lan-1, namespace: shop}
spec: {address: 10.0.0.1, network: lan, serviceAccount: lan, labels: {app: catalog, networking.istio.io/tunnel: http}}
"#;

pub(crate) const SERVICE: &str = "shop/catalog.shop.svc.mesh.internal";

pub(crate) fn list(world: &World, name: &str) -> Vec<String> {
    let Some(found) = world.resource(type_url::NETWORK_GATEWAYS, name) else {
        return Vec::new();
    };
    let list: NetworkGateways = unpack(&found.any).expect("a list of gateways");
    let texts = list.gateways.iter().map(|g| {
        format!(
            "{}:{}{}{} {}/{} {}",
            g.address,
            g.hbone_port,
            if g.quic_port > 0 { "+quic" } else { "" },
            if g.healthy { "" } else { " down" },
            g.trust_domain,
            g.service_account,
            g.region
        )
        .trim_end()
        .to_owned()
    });
    texts.collect()
}

pub(crate) fn way(world: &World, uid: &str) -> String {
    match workload(world, uid).network_gateway {
        None => "none".into(),
        Some(gateway) => {
            let to = match gateway.destination.expect("a gateway is somewhere") {
                Destination::Address(at) => {
                    let [a, b, c, d] = at.address[..] else {
                        panic!("{at:?}")
                    };
                    format!("{}/{a}.{b}.{c}.{d}", at.network)
                }
                Destination::Hostname(name) => format!("{}/{}", name.namespace, name.hostname),
            };
            format!("{to}:{}", gateway.hbone_mtls_port)
        }
    }
}

fn entry_uid(namespace: &str, name: &str) -> String {
    format!("Kubernetes/networking.istio.io/WorkloadEntry/{namespace}/{name}")
}

#[test]
fn gateways_of_a_network() {
    let mut registry = registry(&format!("{GATEWAYS}---{CATALOG}"));
    let world = registry.publish();
    let of_default = [
        "10.0.0.9:15008 mesh.example/gateway eu",
        "gw.example.org:443+quic mesh.example/gateway",
        "192.0.2.7:443+quic mesh.example/gateway",
    ];
    assert_eq!(list(&world, "~"), of_default);
    assert_eq!(
        list(&world, "~outbound"),
        of_default,
        "the way in to members that only dial out"
    );
    assert_eq!(list(&world, "lan"), ["10.0.0.9:15008 mesh.example/gateway"]);
    assert_eq!(
        names(&world, type_url::NETWORK_GATEWAYS),
        ["lan", "lan~outbound", "~", "~outbound"]
    );
    let record = workload(&world, "NetworkGateway//gw.example.org/443");
    assert_eq!(
        (
            record.hostname.as_str(),
            record.addresses.len(),
            record.service_account.as_str()
        ),
        ("gw.example.org", 0, "gateway")
    );
    assert_eq!(
        workload(&world, "NetworkGateway/lan/10.0.0.9/15008").addresses,
        [[10, 0, 0, 9]]
    );
    assert_eq!(way(&world, &entry_uid("shop", "here")), "/10.0.0.9:15008");
    assert_eq!(way(&world, &entry_uid("shop", "away-1")), "/10.0.0.9:15008");
    assert_eq!(way(&world, &entry_uid("shop", "lan-1")), "lan/10.0.0.9:15008");

    down(&mut registry, "tombolo-system", "gw-1");
    let world = registry.publish();
    assert_eq!(
        list(&world, "~")[0],
        "10.0.0.9:15008 down mesh.example/gateway eu"
    );
    assert_eq!(
        workload(&world, "NetworkGateway//10.0.0.9/15008").status(),
        WorkloadStatus::Unhealthy
    );
    assert_eq!(
        way(&world, &entry_uid("shop", "here")),
        "tombolo-system/gw.example.org:443",
        "the first that is healthy"
    );
    assert!(!changed(&world, type_url::ADDRESS).contains(&entry_uid("shop", "lan-1")));
    assert_eq!(
        registry
            .gateways()
            .iter()
            .filter(|gateway| gateway.healthy)
            .count(),
        3
    );

    for name in ["gw-1", "gw-2", "gw-lan"] {
        registry.remove(tombolo_config::Kind::WorkloadEntry, "tombolo-system", name);
    }
    let world = registry.publish();
    assert!(names(&world, type_url::NETWORK_GATEWAYS).is_empty());
    assert!(
        names(&world, type_url::ADDRESS)
            .iter()
            .all(|name| !name.starts_with("NetworkGateway"))
    );
    assert_eq!(way(&world, &entry_uid("shop", "here")), "none");
}

#[test]
fn members_of_other_networks() {
    let mut registry = registry(CATALOG);
    let world = registry.publish();
    let away = entry(&world, "shop", "away-1");
    assert_eq!((away.network.as_str(), away.addresses.len()), ("~outbound", 0));
    let aliases = |name: &str| {
        world
            .resource(type_url::ADDRESS, &entry_uid("shop", name))
            .unwrap()
            .aliases
            .clone()
    };
    assert_eq!(aliases("here"), ["/10.0.0.1"]);
    assert!(
        aliases("away-1").is_empty(),
        "an address behind a NAT is nobody's"
    );
    assert_eq!(aliases("lan-1"), ["lan/10.0.0.1"]);
    let id = |name: &str| format!("spiffe://mesh.example/ns/shop/sa/{name}");
    assert_eq!(
        service(&world, SERVICE).subject_alt_names,
        [id("away"), id("here"), id("lan")],
        "callers in lan meet those of here"
    );

    registry.remove(tombolo_config::Kind::WorkloadGroup, "shop", "away");
    let world = registry.publish();
    assert_eq!(entry(&world, "shop", "away-1").network, "");
    let sans = |world: &World| service(world, SERVICE).subject_alt_names;
    assert_eq!(sans(&world), [id("away"), id("here"), id("lan")]);
    registry.remove(tombolo_config::Kind::WorkloadEntry, "shop", "lan-1");
    assert!(sans(&registry.publish()).is_empty(), "nobody is elsewhere");
}

#[test]
fn a_service_has_its_address_in_every_own_network() {
    let of = |world: &World, name: &str| {
        let at = service(world, name).addresses;
        let v4 = at.iter().filter(|at| at.address.len() == 4);
        v4.map(|at| format!("{}/{}", at.network, at.address.last().unwrap()))
            .collect::<Vec<_>>()
    };
    let mut objects = resources(CATALOG);
    let mut registry = Registry::new(settings());
    registry.set_imports("west", Some(west()));
    for object in &objects {
        registry.upsert(object.clone());
    }
    give_addresses(&mut registry, &mut objects);
    give_imported(&mut registry);
    let world = registry.publish();
    let orders = "shop/orders.shop.svc.mesh.internal";
    assert_eq!(
        of(&world, SERVICE),
        ["/1", "lan/1"],
        "those of west are not ours to give"
    );
    assert_eq!(of(&world, orders), ["/2", "lan/2"]);
    let catalog = world.resource(type_url::ADDRESS, SERVICE).unwrap();
    assert!(catalog.aliases.contains(&"lan/240.240.0.1".to_owned()));
    // A network comes and goes with its members.
    let lan = |name: &str, network: &str| {
        let text = format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{address: 10.0.0.2, network: {network}}}\n"
        );
        resources(&text).remove(0)
    };
    registry.upsert(lan("one", "dc"));
    registry.upsert(lan("two", "dc"));
    let world = registry.publish();
    assert_eq!(of(&world, SERVICE), ["/1", "dc/1", "lan/1"]);
    assert_eq!(of(&world, orders), ["/2", "dc/2", "lan/2"]);
    registry.upsert(lan("one", "lan"));
    assert_eq!(of(&registry.publish(), SERVICE), ["/1", "dc/1", "lan/1"]);
    registry.remove(tombolo_config::Kind::WorkloadEntry, "shop", "two");
    assert_eq!(of(&registry.publish(), SERVICE), ["/1", "lan/1"]);
}
