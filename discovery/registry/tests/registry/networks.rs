//! Networks, gateways, and what clusters tell each other.

use crate::support::*;
use tombolo_proto::{
    istio::workload::{WorkloadStatus, gateway_address::Destination},
    tombolo::v1::{NetworkGateways, TrustBundle},
    type_url, unpack,
};
use tombolo_registry::{
    EndpointSummary, Export, Health, ImportedGateway, ImportedVip, Imports, MeshSettings, Registry,
    ServicePort, World,
};

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

const CATALOG: &str = r#"
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

const SERVICE: &str = "shop/catalog.shop.svc.mesh.internal";

fn list(world: &World, name: &str) -> Vec<String> {
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

fn way(world: &World, uid: &str) -> String {
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

fn summary(network: &str, locality: &str, healthy: u32, capacity: u32) -> EndpointSummary {
    EndpointSummary {
        network: network.into(),
        locality: locality.into(),
        healthy,
        capacity,
    }
}

#[test]
fn exports() {
    let mut registry = registry(&format!(
        "{CATALOG}---{}",
        CATALOG.replace("shop", "bank").replace("\"true\"", "\"no\"")
    ));
    let names = |registry: &mut Registry| {
        let all = registry.exports();
        // Gateways are told the same.
        let world = registry.publish();
        let told = world.resources(type_url::EXPORTED_SERVICE).expect("a type");
        let key = |export: &Export| {
            let (name, namespace) = (&export.name, &export.namespace);
            format!("{namespace}/{name}.{namespace}.svc.mesh.internal")
        };
        assert!(told.keys().map(|name| name.to_string()).eq(all.iter().map(key)));
        all.into_iter().map(|export| export.namespace).collect::<Vec<_>>()
    };
    let only = registry.exports().remove(0);
    assert_eq!(
        only,
        Export {
            namespace: "shop".into(),
            name: "catalog".into(),
            ports: vec![ServicePort {
                name: "http".into(),
                port: 80,
                protocol: "HTTP".into()
            }],
            sans: ["away", "here", "lan"]
                .map(|name| format!("spiffe://mesh.example/ns/shop/sa/{name}"))
                .to_vec(),
            endpoints: vec![
                summary("", "", 1, 1),
                summary("", "eu/a", 1, 2),
                summary("lan", "", 1, 1)
            ],
        }
    );
    down(&mut registry, "shop", "here");
    assert_eq!(registry.exports()[0].endpoints[1], summary("", "eu/a", 0, 0));
    registry.set_health("shop", "here", Health::Healthy);
    assert_eq!(registry.exports(), [only]);

    let rules = |namespaces: &[&str]| namespaces.iter().map(|name| (*name).to_owned()).collect();
    registry.set_export_rules(rules(&["bank"]));
    assert_eq!(
        names(&mut registry),
        ["shop"],
        "the service's own word comes first"
    );
    let plain = CATALOG
        .replace("shop", "bank")
        .replace(", labels: {istio.io/global: \"true\"}", "");
    resources(&plain)
        .into_iter()
        .for_each(|resource| registry.upsert(resource));
    assert_eq!(names(&mut registry), ["bank", "shop"]);
    registry.set_export_rules(rules(&["*"]));
    assert_eq!(names(&mut registry), ["bank", "shop"]);
    registry.set_export_rules(rules(&[]));
    assert_eq!(names(&mut registry), ["shop"]);
    registry.set_imports("west", Some(west()));
    give_imported(&mut registry);
    assert_eq!(names(&mut registry), ["shop"], "nothing of others is told on");
    registry.remove(tombolo_config::Kind::ServiceEntry, "shop", "catalog");
    assert!(names(&mut registry).is_empty());
}

fn export(name: &str) -> Export {
    Export {
        namespace: "shop".into(),
        name: name.into(),
        ports: vec![
            ServicePort {
                name: "http".into(),
                port: 80,
                protocol: "HTTP".into(),
            },
            ServicePort {
                name: "dns".into(),
                port: 53,
                protocol: "UDP".into(),
            },
        ],
        sans: vec![
            format!("spiffe://west.example/ns/shop/sa/{name}"),
            // Not its own to say.
            "spiffe://mesh.example/ns/shop/sa/here".into(),
        ],
        endpoints: vec![
            summary("", "us/1", 3, 6),
            summary("~outbound", "us/1", 1, 1),
            summary("dc", "", 0, 0),
        ],
    }
}

fn root(name: &str) -> String {
    format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n")
}

fn west() -> Imports {
    let gateway = |address: &str, network: &str| ImportedGateway {
        address: address.into(),
        hbone_port: 443,
        quic_port: None,
        namespace: "tombolo-system".into(),
        service_account: "gateway".into(),
        locality: "us/1".into(),
        network: network.into(),
    };
    Imports {
        trust_domain: "west.example".parse().expect("a trust domain"),
        roots_pem: root("west"),
        shares_trust_domain: false,
        mesh_domain: String::new(),
        stale: false,
        gateways: vec![
            gateway("198.51.100.1", ""),
            gateway("gw.west.example", "dc"),
            gateway("no name", ""),
        ],
        services: vec![export("catalog"), export("orders")],
    }
}

/// What discovery does before it publishes.
fn give_imported(registry: &mut Registry) -> Vec<ImportedVip> {
    let given = registry.allocate_imported();
    assert_eq!(
        given,
        registry.allocate_imported(),
        "repeated until it is persisted"
    );
    registry.set_imported_vips(given.clone());
    assert!(registry.allocate_imported().is_empty());
    given
}

#[test]
fn an_imported_service() {
    let mut registry = Registry::new(settings());
    registry.set_imports("west", Some(west()));
    let given = give_imported(&mut registry);
    let world = registry.publish();
    let orders = service(&world, "shop/orders.shop.svc.mesh.internal");
    assert_eq!(addresses(&orders), ["240.240.0.2", "2001:2::2"]);
    assert_eq!(
        orders.subject_alt_names,
        ["spiffe://west.example/ns/shop/sa/orders"]
    );
    assert_eq!(
        orders
            .ports
            .iter()
            .map(|port| port.service_port)
            .collect::<Vec<_>>(),
        [80]
    );
    assert!(orders.canonical);
    let near = workload(
        &world,
        "west/SplitHorizonWorkload/west/shop/orders.shop.svc.mesh.internal/us/1",
    );
    assert_eq!(
        (
            near.network.as_str(),
            near.capacity,
            near.status(),
            near.trust_domain.as_str(),
            near.hostname.as_str()
        ),
        ("west", Some(7), WorkloadStatus::Healthy, "west.example", "")
    );
    assert!(near.addresses.is_empty() && near.services.contains_key("shop/orders.shop.svc.mesh.internal"));
    assert_eq!(way(&world, &near.uid), "west/198.51.100.1:443");
    let idle = workload(
        &world,
        "west/dc/SplitHorizonWorkload/west/shop/orders.shop.svc.mesh.internal",
    );
    assert_eq!(
        (idle.network.as_str(), idle.status()),
        ("west/dc", WorkloadStatus::Unhealthy)
    );
    assert_eq!(way(&world, &idle.uid), "tombolo-system/gw.west.example:443");
    assert_eq!(list(&world, "west"), ["198.51.100.1:443 west.example/gateway us"]);
    assert_eq!(names(&world, type_url::NETWORK_GATEWAYS), ["west", "west/dc"]);
    assert_eq!(names(&world, type_url::TRUST_BUNDLE), ["west.example"]);

    // A restart: what was persisted is held, whoever comes first.
    let mut again = Registry::new(settings());
    again.set_imported_vips(given.clone());
    again.set_imports("west", Some(west()));
    assert!(again.allocate_imported().is_empty());
    assert_eq!(
        addresses(&service(&again.publish(), "shop/orders.shop.svc.mesh.internal")),
        ["240.240.0.2", "2001:2::2"]
    );

    // Nothing changes when the cluster falls silent; everything goes when it is removed.
    let stale = Imports {
        stale: true,
        ..west()
    };
    registry.set_imports("west", Some(stale));
    assert_eq!(registry.publish().version, world.version);
    registry.set_imports("west", None);
    let world = registry.publish();
    for url in [
        type_url::ADDRESS,
        type_url::NETWORK_GATEWAYS,
        type_url::TRUST_BUNDLE,
    ] {
        assert!(names(&world, url).is_empty(), "{url}");
    }
    assert_eq!(registry.unused_imported_vips().len(), 2);
    for (namespace, host) in registry.unused_imported_vips() {
        registry.drop_imported_vip(&namespace, &host);
    }
    assert!(registry.unused_imported_vips().is_empty());
}

#[test]
fn another_mesh_domain() {
    let mut registry = Registry::new(settings());
    let imports = Imports {
        mesh_domain: "west.internal".into(),
        ..west()
    };
    registry.set_imports("west", Some(imports));
    let uid = "west/SplitHorizonWorkload/west/shop/orders.shop.svc.mesh.internal/us/1";
    assert_eq!(
        workload(&registry.publish(), uid).hostname,
        "orders.shop.svc.west.internal"
    );
}

#[test]
fn a_service_here_and_there() {
    let mut registry = registry(CATALOG);
    registry.set_imports("west", Some(west()));
    registry.set_imports(
        "east",
        Some(Imports {
            trust_domain: "east.example".parse().unwrap(),
            services: vec![export("catalog")],
            ..west()
        }),
    );
    let given = give_imported(&mut registry);
    assert_eq!(
        given.len(),
        1,
        "catalog has the address of the service here: {given:?}"
    );
    let world = registry.publish();
    let catalog = service(&world, SERVICE);
    let (v4, v6) = ("240.240.0.1", "2001:2::1");
    assert_eq!(addresses(&catalog), [v4, v6, v4, v6], "in both networks");
    let id = |td: &str, name: &str| format!("spiffe://{td}/ns/shop/sa/{name}");
    assert_eq!(
        catalog.subject_alt_names,
        [
            id("mesh.example", "away"),
            id("mesh.example", "here"),
            id("mesh.example", "lan"),
            id("west.example", "catalog")
        ],
        "east says nothing that is its own"
    );
    let uid = format!("west/SplitHorizonWorkload/west/{SERVICE}/us/1");
    assert!(workload(&world, &uid).services.contains_key(SERVICE));

    registry.set_imports("west", None);
    let world = registry.publish();
    assert_eq!(service(&world, SERVICE).subject_alt_names.len(), 3);
    registry.remove(tombolo_config::Kind::ServiceEntry, "shop", "catalog");
    give_imported(&mut registry);
    let catalog = service(&registry.publish(), SERVICE);
    assert!(catalog.subject_alt_names.is_empty());
    assert_eq!(addresses(&catalog).len(), 4, "another one, in both networks");
}

#[test]
fn roots_of_other_clusters() {
    let mut registry = Registry::new(settings());
    let own = "mesh.example".parse().unwrap();
    registry.set_bundle(&own, &root("own"));
    let roots = |registry: &mut Registry, name: &str| {
        let world = registry.publish();
        let found = world.resource(type_url::TRUST_BUNDLE, name)?;
        Some(unpack::<TrustBundle>(&found.any).expect("a bundle").roots_pem)
    };
    registry.set_imports("west", Some(west()));
    let two = format!("{}{}", root("west"), root("west-2"));
    registry.set_imports(
        "west-2",
        Some(Imports {
            roots_pem: two.clone(),
            ..west()
        }),
    );
    assert_eq!(roots(&mut registry, "west.example"), Some(two));
    let ours = Imports {
        trust_domain: own,
        roots_pem: root("thief"),
        ..west()
    };
    registry.set_imports("thief", Some(ours.clone()));
    assert_eq!(
        roots(&mut registry, "mesh.example"),
        Some(root("own")),
        "not without an agreement"
    );
    registry.set_imports(
        "thief",
        Some(Imports {
            shares_trust_domain: true,
            ..ours
        }),
    );
    assert_eq!(
        roots(&mut registry, "mesh.example"),
        Some(format!("{}{}", root("own"), root("thief")))
    );
    for cluster in ["thief", "west", "west-2"] {
        registry.set_imports(cluster, None);
    }
    assert_eq!(roots(&mut registry, "mesh.example"), Some(root("own")));
    assert_eq!(roots(&mut registry, "west.example"), None);
}

/// The names of others cannot be taken for ours.
#[test]
fn names_of_clusters_and_services() {
    let mut registry = Registry::new(MeshSettings {
        network: "lan".into(),
        ..settings()
    });
    for cluster in ["", "a/b", "lan~outbound", "UP"] {
        registry.set_imports(cluster, Some(west()));
        assert!(registry.imports(cluster).is_none(), "{cluster:?}");
    }
    let odd = Imports {
        services: vec![
            export("a.b"),
            export("*"),
            Export {
                namespace: "x.y".into(),
                ..export("a")
            },
        ],
        ..west()
    };
    registry.set_imports("west", Some(odd));
    assert!(
        names(&registry.publish(), type_url::ADDRESS)
            .iter()
            .all(|name| name.starts_with("NetworkGateway"))
    );
}
