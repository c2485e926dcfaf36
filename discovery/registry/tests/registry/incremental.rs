//! Whatever the history, the world is that of a registry to which only the present was told.

use crate::support::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_config::{Kind, Resource};
use tombolo_registry::{
    Allocation, EndpointSummary, Export, Health, ImportedGateway, ImportedVip, Imports, Registry,
    ServicePort, World,
};

/// Hosts that services claim, and instances of the first.
const HOSTS: [&str; 5] = [
    "h.example.org",
    "n1.h.example.org",
    "endpoint-0.h.example.org",
    "i.example.org",
    "a.shop.svc.mesh.internal",
];
const NAMESPACES: [&str; 4] = ["shop", "bank", "istio-system", "tombolo-system"];
/// Clusters that tell about themselves.
const CLUSTERS: [&str; 2] = ["east", "west"];

#[derive(Debug, Clone)]
enum Step {
    Put(Value),
    Remove(Kind, usize, usize),
    Health(usize, usize, bool),
    Allocate,
    Imports(usize, Option<Imports>),
    ExportRule(Option<usize>),
    /// A ServiceExport, or a Namespace.
    RemoveExport(usize, bool),
    /// `a` of a namespace is refused by the other clusters.
    Refused(Option<usize>),
    AllocateImported,
    DropUnused,
    /// A status written by somebody else, or restored: this address for this host.
    Claim(Kind, usize, usize, usize, u8),
}

fn metadata(namespace: usize, name: &str, year: usize, extra: Value) -> Value {
    let mut metadata = json!({"namespace": NAMESPACES[namespace], "name": name});
    if year > 0 {
        metadata["creationTimestamp"] = json!(format!("202{year}-01-01T00:00:00Z"));
    }
    if let (Value::Object(metadata), Value::Object(extra)) = (&mut metadata, extra) {
        metadata.extend(extra);
    }
    metadata
}

fn object(kind: Kind, metadata: Value, spec: Value) -> Value {
    json!({"apiVersion": kind.api_version(), "kind": kind.name(), "metadata": metadata, "spec": spec})
}

fn labels() -> impl Strategy<Value = Value> {
    prop_oneof![
        1 => Just(json!({})),
        4 => Just(json!({"app": "a"})),
        1 => Just(json!({"app": "b"})),
        2 => Just(json!({"app": "a", "tier": "x"})),
        1 => Just(json!({"tier": "x"})),
    ]
}

/// Most happens in one namespace, so that it meets.
fn namespace() -> impl Strategy<Value = usize> {
    prop_oneof![4 => Just(0), 1 => Just(1)]
}

fn policy_namespace() -> impl Strategy<Value = usize> {
    prop_oneof![3 => Just(0), 1 => Just(1), 2 => Just(2)]
}

/// Names are few, so that objects replace, shadow and select each other.
fn name() -> impl Strategy<Value = usize> {
    0..3usize
}

fn name_of(kind: Kind, name: usize) -> String {
    // An entry "n1" of a headless host "h" makes "n1.h", which is a host that some service claims, too.
    format!("{}{name}", if kind == Kind::WorkloadEntry { "n" } else { "o" })
}

fn group() -> impl Strategy<Value = Value> {
    (namespace(), name(), 0..3u32, any::<bool>(), any::<bool>()).prop_map(
        |(ns, name, port, all, outbound)| {
            let mut annotations = json!({"annotations": {"tombolo.io/deliver-all-ports": all.to_string()}});
            if outbound {
                annotations["annotations"]["tombolo.io/reach"] = json!("outbound");
            }
            object(
                Kind::WorkloadGroup,
                metadata(ns, &name_of(Kind::WorkloadGroup, name), 0, annotations),
                json!({"template": {"ports": {"http": 8080 + port}}}),
            )
        },
    )
}

fn entry_step() -> impl Strategy<Value = Value> {
    (namespace(), name(), 0..4usize, labels(), labels(), prop::option::of(0..3usize), any::<bool>(), 0..3u32, network()).prop_map(
        |(ns, name, year, labels, own, group, checked, port, network)| {
            let mut annotations = json!({"proxy.istio.io/health-checks-enabled": checked.to_string()});
            if port > 0 {
                annotations["networking.istio.io/tunnel"] = json!("http");
            }
            if let Some(group) = group {
                annotations["istio.io/autoRegistrationGroup"] = json!(name_of(Kind::WorkloadGroup, group));
            }
            object(
                Kind::WorkloadEntry,
                metadata(ns, &name_of(Kind::WorkloadEntry, name), year, json!({"labels": own, "annotations": annotations})),
                json!({"address": format!("10.0.0.{}", name + 1), "labels": labels, "ports": {"http": 8080 + port},
                    "network": network, "serviceAccount": format!("sa{port}")}),
            )
        },
    )
}

fn network() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "", "lan"])
}

fn gateway_step() -> impl Strategy<Value = Value> {
    let address = prop::sample::select(vec!["", "gw.example.org:443", "gw.example.org:443,192.0.2.1"]);
    (name(), 0..4usize, network(), address, prop::bool::weighted(0.8)).prop_map(
        |(name, year, network, address, gateway)| {
            let account = if gateway { "gateway" } else { "other" };
            object(
                Kind::WorkloadEntry,
                metadata(3, &name_of(Kind::WorkloadEntry, name), year, json!({"annotations": {"tombolo.io/gateway-address": address}})),
                json!({"address": format!("10.0.1.{}", name + 1), "network": network, "serviceAccount": account}),
            )
        },
    )
}

fn imports() -> impl Strategy<Value = Option<Imports>> {
    let export = || {
        (
            prop::sample::select(vec!["a", "b"]),
            80..82u16,
            0..3u32,
            network(),
            prop::sample::select(vec!["", "eu/1"]),
        )
            .prop_map(|(name, port, healthy, network, locality)| Export {
                namespace: "shop".into(),
                name: name.into(),
                ports: vec![ServicePort {
                    name: "http".into(),
                    port,
                    protocol: "HTTP".into(),
                }],
                sans: vec![format!(
                    "spiffe://{}.example/ns/shop/sa/a",
                    if port == 80 { "west" } else { "mesh" }
                )],
                endpoints: vec![EndpointSummary {
                    network: network.into(),
                    locality: locality.into(),
                    healthy,
                    capacity: healthy,
                }],
            })
    };
    let gateway = || {
        (network(), 1..3u8).prop_map(|(network, n)| ImportedGateway {
            address: format!("198.51.100.{n}"),
            hbone_port: 443,
            quic_port: None,
            namespace: "tombolo-system".into(),
            service_account: "gateway".into(),
            locality: String::new(),
            network: network.into(),
        })
    };
    let domain = prop::sample::select(vec!["west.example", "mesh.example"]);
    let one = (
        domain,
        0..3u8,
        any::<bool>(),
        prop::sample::select(vec!["", "west.internal"]),
        prop::sample::subsequence(vec!["next.example", "west.example"], 0..2),
        prop::collection::vec(gateway(), 0..3),
        prop::collection::vec(export(), 0..3),
    )
        .prop_map(
            |(domain, root, shares, mesh_domain, also, gateways, services)| Imports {
                trust_domain: domain.parse().expect("a trust domain"),
                also: also
                    .iter()
                    .map(|name| name.parse().expect("a trust domain"))
                    .collect(),
                former: Vec::new(),
                roots_pem: format!("-----BEGIN CERTIFICATE-----\n{root}\n-----END CERTIFICATE-----\n"),
                shares_trust_domain: shares,
                mesh_domain: mesh_domain.into(),
                stale: root == 2,
                gateways,
                services,
            },
        );
    prop::option::weighted(0.8, one)
}

fn service_step() -> impl Strategy<Value = Value> {
    let hosts = prop::sample::subsequence(HOSTS.to_vec(), 1..3);
    let shape = 0..6usize;
    (namespace(), name(), 0..4usize, hosts, labels(), any::<bool>(), shape, 0..2u32).prop_map(
        |(ns, name, year, hosts, labels, headless, shape, port)| {
            let mut spec = json!({"hosts": hosts, "ports": [{"number": 80 + port, "name": "http", "protocol": "HTTP"}],
                "resolution": "STATIC"});
            match shape {
                0 => spec["endpoints"] = json!([{"address": "10.9.0.1", "labels": labels}, {"address": "10.9.0.2", "network": "lan"}]),
                1 => spec["resolution"] = json!("DNS"),
                2 => spec["resolution"] = json!("NONE"),
                _ => spec["workloadSelector"] = json!({"labels": labels}),
            }
            if shape == 3 {
                spec["addresses"] = json!(["192.0.2.1"]);
            }
            if shape == 4 {
                spec["exportTo"] = json!([if port == 0 { "~" } else { "." }]);
            }
            let mut labels = json!({"labels": {"networking.istio.io/enable-autoallocate-ip": (!headless).to_string()}});
            if shape == 5 {
                labels["labels"]["istio.io/global"] = json!((port == 0).to_string());
            }
            object(Kind::ServiceEntry, metadata(ns, &name_of(Kind::ServiceEntry, name), year, labels), spec)
        },
    )
}

fn policy_step() -> impl Strategy<Value = Value> {
    (
        policy_namespace(),
        name(),
        labels(),
        prop::sample::select(vec!["ALLOW", "DENY", "AUDIT"]),
    )
        .prop_map(|(ns, name, labels, action)| {
            object(
                Kind::AuthorizationPolicy,
                metadata(ns, &name_of(Kind::AuthorizationPolicy, name), 0, json!({})),
                json!({"selector": {"matchLabels": labels}, "action": action, "rules": [{}]}),
            )
        })
}

fn peer_step() -> impl Strategy<Value = Value> {
    let mode = || prop::sample::select(vec!["UNSET", "STRICT", "PERMISSIVE", "DISABLE"]);
    (
        policy_namespace(),
        name(),
        0..4usize,
        labels(),
        mode(),
        prop::option::of(mode()),
    )
        .prop_map(|(ns, name, year, labels, mode, port)| {
            let mut spec = json!({"mtls": {"mode": mode}});
            if labels != json!({}) {
                spec["selector"] = json!({"matchLabels": labels});
                if let Some(port) = port {
                    spec["portLevelMtls"] = json!({"80": {"mode": port}});
                }
            }
            object(
                Kind::PeerAuthentication,
                metadata(ns, &name_of(Kind::PeerAuthentication, name), year, json!({})),
                spec,
            )
        })
}

/// A ServiceExport of `a.shop`, or of a name that nobody has; labels of namespaces.
fn export_step() -> impl Strategy<Value = Value> {
    (namespace(), any::<bool>(), prop::option::of(any::<bool>())).prop_map(|(ns, known, global)| match global
    {
        None => object(
            Kind::ServiceExport,
            metadata(ns, if known { "a" } else { "o0" }, 0, json!({})),
            json!({}),
        ),
        Some(global) => {
            let labels = json!({"istio.io/global": global.to_string()});
            let metadata = json!({"name": NAMESPACES[ns], "labels": if known { labels } else { json!({}) }});
            object(Kind::Namespace, metadata, json!({}))
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let kinds = vec![
        Kind::WorkloadGroup,
        Kind::WorkloadEntry,
        Kind::ServiceEntry,
        Kind::AuthorizationPolicy,
        Kind::PeerAuthentication,
    ];
    prop_oneof![
        1 => group().prop_map(Step::Put),
        4 => entry_step().prop_map(Step::Put),
        4 => service_step().prop_map(Step::Put),
        2 => policy_step().prop_map(Step::Put),
        2 => peer_step().prop_map(Step::Put),
        4 => (prop::sample::select(kinds), policy_namespace(), name()).prop_map(|(kind, ns, name)| Step::Remove(kind, ns, name)),
        2 => (namespace(), name(), any::<bool>()).prop_map(|(ns, name, up)| Step::Health(ns, name, up)),
        2 => Just(Step::Allocate),
        2 => gateway_step().prop_map(Step::Put),
        1 => (name(), any::<bool>()).prop_map(|(name, up)| Step::Health(3, name, up)),
        1 => name().prop_map(|name| Step::Remove(Kind::WorkloadEntry, 3, name)),
        2 => (0..CLUSTERS.len(), imports()).prop_map(|(cluster, imports)| Step::Imports(cluster, imports)),
        1 => prop::option::of(0..2usize).prop_map(Step::ExportRule),
        2 => export_step().prop_map(Step::Put),
        1 => (namespace(), any::<bool>()).prop_map(|(ns, service)| Step::RemoveExport(ns, service)),
        1 => prop::option::of(namespace()).prop_map(Step::Refused),
        1 => Just(Step::AllocateImported),
        1 => Just(Step::DropUnused),
        2 => (prop::bool::ANY, namespace(), name(), 0..HOSTS.len(), 1..4u8).prop_map(|(entry, ns, name, host, vip)| {
            Step::Claim(if entry { Kind::WorkloadEntry } else { Kind::ServiceEntry }, ns, name, host, vip)
        }),
    ]
}

type Key = (Kind, String, String);

#[derive(Default)]
struct Model {
    objects: BTreeMap<Key, Resource>,
    health: BTreeMap<(String, String), Health>,
    imports: BTreeMap<&'static str, Imports>,
    imported_vips: BTreeSet<ImportedVip>,
    rules: BTreeSet<String>,
    refused: BTreeMap<(Arc<str>, Arc<str>), String>,
}

fn contents(world: &World) -> BTreeMap<(&'static str, String), (String, Vec<String>)> {
    let all = World::TYPES.into_iter().flat_map(|type_url| {
        world
            .resources(type_url)
            .into_iter()
            .flatten()
            .map(move |(name, compiled)| {
                (
                    (type_url, name.to_string()),
                    (compiled.version.to_string(), compiled.aliases.clone()),
                )
            })
    });
    all.collect()
}

fn apply(registry: &mut Registry, model: &mut Model, step: Step) {
    match step {
        Step::Put(json) => {
            let mut resource = Resource::from_json(&json).unwrap_or_else(|found| panic!("{found:?}"));
            let key = (
                resource.kind(),
                resource.namespace().to_owned(),
                resource.name().to_owned(),
            );
            // As a store does: a status outlives an update.
            if let Some(before) = model.objects.get(&key) {
                *resource.status_mut() = before.status().cloned();
            }
            registry.upsert(resource.clone());
            model.objects.insert(key, resource);
        }
        Step::Remove(kind, namespace, name) => {
            let (namespace, name) = (NAMESPACES[namespace].to_owned(), name_of(kind, name));
            registry.remove(kind, &namespace, &name);
            if kind == Kind::WorkloadEntry {
                model.health.remove(&(namespace.clone(), name.clone()));
            }
            model.objects.remove(&(kind, namespace, name));
        }
        Step::Health(namespace, name, up) => {
            let (namespace, name) = (
                NAMESPACES[namespace].to_owned(),
                name_of(Kind::WorkloadEntry, name),
            );
            let health = if up {
                Health::Healthy
            } else {
                Health::Unhealthy { reason: "x".into() }
            };
            registry.set_health(&namespace, &name, health.clone());
            model.health.insert((namespace, name), health);
        }
        Step::Allocate => {
            let allocations = registry.allocate();
            assert_eq!(
                allocations,
                registry.allocate(),
                "an allocation is repeated until it is persisted"
            );
            for allocation in allocations {
                let key = (
                    allocation.kind,
                    allocation.namespace.clone(),
                    allocation.name.clone(),
                );
                let object = model
                    .objects
                    .get_mut(&key)
                    .expect("an allocation is for an object that is there");
                allocation.persist(object);
                registry.upsert(object.clone());
            }
            assert!(registry.allocate().is_empty(), "what was persisted needs no more");
        }
        Step::Imports(cluster, imports) => {
            registry.set_imports(CLUSTERS[cluster], imports.clone());
            match imports {
                Some(imports) => _ = model.imports.insert(CLUSTERS[cluster], imports),
                None => _ = model.imports.remove(CLUSTERS[cluster]),
            }
        }
        Step::ExportRule(namespace) => {
            model.rules = namespace
                .map(|namespace| NAMESPACES[namespace].to_owned())
                .into_iter()
                .collect();
            registry.set_export_rules(model.rules.clone());
        }
        Step::RemoveExport(namespace, service) => {
            let namespace = NAMESPACES[namespace];
            let (kind, name) = if service {
                (Kind::ServiceExport, "a")
            } else {
                (Kind::Namespace, namespace)
            };
            registry.remove(kind, namespace, name);
            model
                .objects
                .remove(&(kind, namespace.to_owned(), name.to_owned()));
        }
        Step::Refused(namespace) => {
            let refused = namespace.map(|ns| ((NAMESPACES[ns].into(), "a".into()), "x".to_owned()));
            model.refused = refused.into_iter().collect();
            registry.set_refused_exports(model.refused.clone());
        }
        Step::AllocateImported => {
            let given = registry.allocate_imported();
            assert_eq!(given, registry.allocate_imported());
            for vip in &given {
                model
                    .imported_vips
                    .retain(|known| (&known.namespace, &known.host) != (&vip.namespace, &vip.host));
            }
            model.imported_vips.extend(given.clone());
            registry.set_imported_vips(given);
            assert!(
                registry.allocate_imported().is_empty(),
                "what was persisted needs no more"
            );
        }
        Step::DropUnused => {
            for (namespace, host) in registry.unused_imported_vips() {
                registry.drop_imported_vip(&namespace, &host);
                model
                    .imported_vips
                    .retain(|known| (&known.namespace, &known.host) != (&namespace, &host));
            }
        }
        Step::Claim(kind, namespace, name, host, vip) => {
            let key = (kind, NAMESPACES[namespace].to_owned(), name_of(kind, name));
            let Some(object) = model.objects.get_mut(&key) else {
                return;
            };
            // An entry claims for its own instance names.
            let host = if kind == Kind::WorkloadEntry {
                format!("{}.{}", key.2, HOSTS[0])
            } else {
                HOSTS[host].to_owned()
            };
            let allocation = Allocation {
                kind,
                namespace: key.1.clone(),
                name: key.2.clone(),
                host,
                v4: Some([240, 240, 0, vip].into()),
                v6: None,
            };
            allocation.persist(object);
            registry.upsert(object.clone());
        }
    }
}

fn from_scratch(model: &Model, reversed: bool) -> Registry {
    let mut registry = Registry::new(settings());
    let mut objects: Vec<&Resource> = model.objects.values().collect();
    if reversed {
        objects.reverse();
    }
    objects
        .into_iter()
        .cloned()
        .for_each(|resource| registry.upsert(resource));
    for ((namespace, name), health) in &model.health {
        registry.set_health(namespace, name, health.clone());
    }
    let mut imports: Vec<_> = model.imports.iter().collect();
    if reversed {
        imports.reverse();
        registry.set_imported_vips(model.imported_vips.clone());
    }
    for (cluster, imports) in imports {
        registry.set_imports(cluster, Some(imports.clone()));
    }
    registry.set_imported_vips(model.imported_vips.clone());
    registry.set_export_rules(model.rules.clone());
    registry.set_refused_exports(model.refused.clone());
    registry
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_world_depends_on_the_present_alone(steps in prop::collection::vec((step(), prop::bool::weighted(0.8)), 1..60)) {
        let (mut registry, mut model) = (Registry::new(settings()), Model::default());
        for (step, publish) in steps {
            let described = format!("{step:?}");
            apply(&mut registry, &mut model, step);
            if publish {
                let incremental = contents(&registry.publish());
                let (exports, gateways) = (registry.exports(), registry.gateways());
                for reversed in [false, true] {
                    let mut scratch = from_scratch(&model, reversed);
                    prop_assert_eq!(&incremental, &contents(&scratch.publish()), "after {}", described);
                    prop_assert_eq!(&exports, &scratch.exports(), "after {}", described);
                    prop_assert_eq!(&gateways, &scratch.gateways(), "after {}", described);
                }
            }
        }
    }

    /// No virtual address is ever published for two services.
    #[test]
    fn an_address_stands_for_one_service(steps in prop::collection::vec(step(), 1..60)) {
        let (mut registry, mut model) = (Registry::new(settings()), Model::default());
        for step in steps {
            apply(&mut registry, &mut model, step);
            let world = registry.publish();
            let mut seen = BTreeMap::new();
            for (name, compiled) in world.resources(tombolo_proto::type_url::ADDRESS).into_iter().flatten() {
                for alias in compiled.aliases.iter().filter(|alias| alias.starts_with("/240.240.") || alias.starts_with("/2001:2:")) {
                    let before = seen.insert(alias.clone(), name.clone());
                    prop_assert!(before.is_none(), "{alias} of {name} and {before:?}");
                }
            }
        }
    }
}
