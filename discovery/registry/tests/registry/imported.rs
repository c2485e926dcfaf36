//! What clusters tell each other: exports of this one, and what others say of themselves.

use crate::{
    networks::{CATALOG, SERVICE, list, way},
    support::*,
};
use tombolo_proto::{istio::workload::WorkloadStatus, tombolo::v1::TrustBundle, type_url, unpack};
use tombolo_registry::{
    EndpointSummary, Export, Health, ImportedGateway, ImportedVip, Imports, MeshSettings, Registry,
    ServicePort,
};
use tombolo_types::TrustDomain;

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

pub(crate) fn west() -> Imports {
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
        also: Vec::new(),
        former: Vec::new(),
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
pub(crate) fn give_imported(registry: &mut Registry) -> Vec<ImportedVip> {
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

fn domains(names: &[&str]) -> Vec<TrustDomain> {
    let parsed = names.iter().map(|name| name.parse().expect("a trust domain"));
    parsed.collect()
}

fn bundles(registry: &mut Registry) -> Vec<String> {
    let world = registry.publish();
    let all = world.resources(type_url::TRUST_BUNDLE).into_iter().flatten();
    let texts = all.map(|(name, found)| {
        let TrustBundle {
            trust_domain,
            roots_pem,
            also,
            former,
        } = unpack(&found.any).expect("a bundle");
        assert_eq!(**name, *trust_domain);
        let roots: Vec<&str> = roots_pem.lines().filter(|line| !line.starts_with('-')).collect();
        format!(
            "{trust_domain} by {} also {also:?} former {former:?}",
            roots.join("+")
        )
    });
    texts.collect()
}

/// While another cluster renames its trust domain it has two names, and each identity of it is the same under both.
#[test]
fn a_cluster_renames_its_trust_domain() {
    let mut registry = Registry::new(settings());
    registry.set_bundle(&"mesh.example".parse().unwrap(), &root("own"));
    registry.set_imports("west", Some(west()));
    give_imported(&mut registry);
    let own = "mesh.example by own also [] former []";
    assert_eq!(
        bundles(&mut registry),
        [own, "west.example by west also [] former []"]
    );
    let orders = "shop/orders.shop.svc.mesh.internal";
    let id = |name: &str| format!("spiffe://{name}/ns/shop/sa/orders");
    // It has heard that both are its names, and makes certificates for the old one still.
    let renames = |name: &str, also: &[&str], former: &[&str], said: &str| {
        let services = west().services.into_iter().map(|service| Export {
            sans: service
                .sans
                .iter()
                .map(|id| id.replace("west.example", said))
                .collect(),
            ..service
        });
        Imports {
            trust_domain: name.parse().expect("a trust domain"),
            also: domains(also),
            former: domains(former),
            services: services.collect(),
            ..west()
        }
    };
    registry.set_imports(
        "west",
        Some(renames("west.example", &["new.example"], &[], "west.example")),
    );
    assert_eq!(
        bundles(&mut registry),
        [
            own,
            "new.example by west also [] former []",
            r#"west.example by west also ["new.example"] former []"#
        ]
    );
    let world = registry.publish();
    assert_eq!(
        service(&world, orders).subject_alt_names,
        [id("new.example"), id("west.example")]
    );
    // For the new one.
    registry.set_imports(
        "west",
        Some(renames("new.example", &["west.example"], &[], "new.example")),
    );
    let world = registry.publish();
    assert_eq!(
        service(&world, orders).subject_alt_names,
        [id("new.example"), id("west.example")],
        "its endpoints follow one by one"
    );
    assert_eq!(list(&world, "west"), ["198.51.100.1:443 new.example/gateway us"]);
    // The old one is over: it lets nobody in, and what it let in runs on.
    registry.set_imports(
        "west",
        Some(renames("new.example", &[], &["west.example"], "new.example")),
    );
    assert_eq!(
        bundles(&mut registry),
        [own, r#"new.example by west also [] former ["west.example"]"#]
    );
    let world = registry.publish();
    assert_eq!(service(&world, orders).subject_alt_names, [id("new.example")]);
    // Another cluster has the name now.
    registry.set_imports("heir", Some(west()));
    assert_eq!(
        bundles(&mut registry),
        [
            own,
            "new.example by west also [] former []",
            "west.example by west also [] former []"
        ]
    );
}

/// No name of ours, or one that we are about to have, is another cluster's by its own word.
#[test]
fn our_names_are_not_theirs() {
    let mut registry = Registry::new(MeshSettings {
        also: domains(&["next.example"]),
        ..settings()
    });
    registry.set_bundle(&"mesh.example".parse().unwrap(), &root("own"));
    let thief = Imports {
        also: domains(&["mesh.example", "next.example"]),
        former: domains(&["mesh.example"]),
        ..west()
    };
    registry.set_imports("west", Some(thief.clone()));
    let ours = [
        r#"mesh.example by own also ["next.example"] former []"#,
        "next.example by own also [] former []",
    ];
    let mut all = ours.to_vec();
    all.push("west.example by west also [] former []");
    assert_eq!(bundles(&mut registry), all);
    let first = Imports {
        trust_domain: "next.example".parse().unwrap(),
        also: domains(&["west.example"]),
        ..thief
    };
    registry.set_imports("west", Some(first));
    assert_eq!(bundles(&mut registry), all);
}

/// Others hear of our endpoints by the name that certificates are made for.
#[test]
fn exports_have_one_name() {
    let catalog = CATALOG.replace(
        "resolution: STATIC",
        "resolution: STATIC\n  subjectAltNames: [spiffe://old.example/ns/shop/sa/x, spiffe://else.example/ns/shop/sa/x]",
    );
    let mut registry = Registry::new(MeshSettings {
        also: domains(&["old.example"]),
        ..settings()
    });
    resources(&catalog)
        .into_iter()
        .for_each(|resource| registry.upsert(resource));
    let sans = registry.exports().remove(0).sans;
    assert_eq!(
        sans,
        ["away", "here", "lan", "x"].map(|name| format!("spiffe://mesh.example/ns/shop/sa/{name}"))
    );
}
