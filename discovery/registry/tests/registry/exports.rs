//! Who says that a service is exported, in which order, and what is told about it.

use crate::support::*;
use std::{collections::BTreeMap, sync::Arc};
use tombolo_config::Kind;
use tombolo_proto::type_url;
use tombolo_registry::{ExportState, ExportVerdict, ExportedBy, Imports, Registry, ServicePort};

fn service_entry(namespace: &str, name: &str, labels: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n\
         metadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
         spec:\n  hosts: [{name}.{namespace}.svc.mesh.internal]\n  resolution: STATIC\n  \
         ports: [{{number: 80, name: http, protocol: HTTP}}]\n  \
         workloadSelector: {{labels: {{app: x}}}}\n{spec}"
    )
}

fn service_export(namespace: &str, name: &str) -> String {
    format!(
        "apiVersion: multicluster.x-k8s.io/v1alpha1\nkind: ServiceExport\n\
         metadata: {{name: {name}, namespace: {namespace}}}\n"
    )
}

fn namespace(name: &str, global: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{istio.io/global: '{global}'}}}}\n"
    )
}

fn put(registry: &mut Registry, yaml: &str) {
    resources(yaml)
        .into_iter()
        .for_each(|resource| registry.upsert(resource));
}

/// Names that are offered, and those that gateways are told.
fn offered(registry: &mut Registry) -> (Vec<String>, Vec<String>) {
    let all = registry.exports().into_iter();
    let offered = all.map(|export| format!("{}.{}", export.name, export.namespace));
    let offered = offered.collect();
    let world = registry.publish();
    let told = world.resources(type_url::EXPORTED_SERVICE).expect("a type");
    let short = |name: &Arc<str>| {
        let (_, host) = name.split_once('/').expect("namespace/hostname");
        host.trim_end_matches(".svc.mesh.internal").to_owned()
    };
    (offered, told.keys().map(short).collect())
}

fn check(registry: &mut Registry, expected: &[&str]) {
    let (offered, told) = offered(registry);
    assert_eq!(offered, expected);
    assert_eq!(told, expected);
}

fn state(registry: &Registry, kind: Kind, namespace: &str, name: &str) -> Option<ExportState> {
    let key = (kind, Arc::from(namespace), Arc::from(name));
    registry.export_states().remove(&key)
}

fn word(registry: &Registry, kind: Kind, name: &str) -> String {
    match state(registry, kind, "shop", name).map(|state| state.verdict) {
        None => "-".into(),
        Some(ExportVerdict::Exported(by)) => format!("{by:?}"),
        Some(ExportVerdict::Invalid { reason, .. }) => reason.into(),
        Some(ExportVerdict::Refused(why)) => why,
    }
}

#[test]
fn what_is_written_nearest_to_the_service_comes_first() {
    let mut registry = registry(&service_entry("shop", "a", "", ""));
    check(&mut registry, &[]);
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "-");

    registry.set_export_rules(["*".to_owned()].into());
    check(&mut registry, &["a.shop"]);
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "Settings");

    put(&mut registry, &namespace("shop", "false"));
    check(&mut registry, &[]);
    put(&mut registry, &namespace("shop", "true"));
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "Namespace");
    check(&mut registry, &["a.shop"]);

    put(&mut registry, &namespace("shop", "false"));
    put(&mut registry, &service_export("shop", "a"));
    check(&mut registry, &["a.shop"]);
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "ServiceExport");
    assert_eq!(word(&registry, Kind::ServiceExport, "a"), "ServiceExport");

    put(
        &mut registry,
        &service_entry("shop", "a", "istio.io/global: 'false'", ""),
    );
    check(&mut registry, &[]);
    assert_eq!(word(&registry, Kind::ServiceExport, "a"), "LabelForbids");
    put(
        &mut registry,
        &service_entry("shop", "a", "istio.io/global: 'true'", ""),
    );
    check(&mut registry, &["a.shop"]);
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "Label");

    // Its author shows it to some namespaces only: nobody overrides that.
    let hidden = service_entry("shop", "a", "istio.io/global: 'true'", "  exportTo: ['.']\n");
    put(&mut registry, &hidden);
    check(&mut registry, &[]);
    assert_eq!(word(&registry, Kind::ServiceEntry, "a"), "NotPublic");
    assert_eq!(word(&registry, Kind::ServiceExport, "a"), "NotPublic");

    put(&mut registry, &service_entry("shop", "a", "", ""));
    registry.remove(Kind::ServiceExport, "shop", "a");
    check(&mut registry, &[]);
    registry.remove(Kind::Namespace, "shop", "shop");
    check(&mut registry, &["a.shop"]);
}

#[test]
fn a_service_export_is_of_a_name_not_of_an_object() {
    let two = service_entry("shop", "a", "", "").replace(
        "hosts: [a.shop.svc.mesh.internal]",
        "hosts: [a.shop.svc.mesh.internal, b.shop.svc.mesh.internal, a.example.org]",
    );
    let mut registry = registry(&two);
    put(&mut registry, &service_export("shop", "b"));
    check(&mut registry, &["b.shop"]);
    put(&mut registry, &service_export("shop", "c"));
    check(&mut registry, &["b.shop"]);
    assert_eq!(word(&registry, Kind::ServiceExport, "c"), "NoService");
    // It comes later.
    put(&mut registry, &service_entry("shop", "c", "", ""));
    check(&mut registry, &["b.shop", "c.shop"]);
    // A service of another namespace is not meant, whoever writes its name.
    put(&mut registry, &service_export("bank", "b"));
    check(&mut registry, &["b.shop", "c.shop"]);
    registry.remove(Kind::ServiceEntry, "shop", "a");
    check(&mut registry, &["c.shop"]);
    assert_eq!(word(&registry, Kind::ServiceExport, "b"), "NoService");
    put(
        &mut registry,
        &service_entry("shop", "odd", "istio.io/global: 'true'", "")
            .replace("odd.shop.svc.mesh.internal", "x.example.org"),
    );
    assert_eq!(word(&registry, Kind::ServiceEntry, "odd"), "NoName");
}

#[test]
fn what_the_set_refuses_is_offered_on_and_told_to_no_gateway() {
    let mut registry = registry(&service_entry("shop", "a", "istio.io/global: 'true'", ""));
    put(&mut registry, &service_export("shop", "a"));
    check(&mut registry, &["a.shop"]);
    let refused = BTreeMap::from([(("shop".into(), "a".into()), "TMB0716 x".to_owned())]);
    registry.set_refused_exports(refused);
    assert_eq!(offered(&mut registry), (vec!["a.shop".to_owned()], vec![]));
    for kind in [Kind::ServiceEntry, Kind::ServiceExport] {
        assert_eq!(word(&registry, kind, "a"), "TMB0716 x");
    }
    registry.set_refused_exports(BTreeMap::new());
    check(&mut registry, &["a.shop"]);
}

#[test]
fn other_ports_elsewhere_are_a_conflict() {
    let mut registry = registry(&service_entry("shop", "a", "istio.io/global: 'true'", ""));
    let mut theirs = registry.exports();
    let mut said = |port: u16, name: &str, protocol: &str| {
        theirs[0].ports = vec![ServicePort {
            name: name.into(),
            port,
            protocol: protocol.into(),
        }];
        let imports = Imports {
            trust_domain: "west.example".parse().expect("a trust domain"),
            also: Vec::new(),
            former: Vec::new(),
            roots_pem: String::new(),
            shares_trust_domain: false,
            mesh_domain: String::new(),
            stale: false,
            gateways: vec![],
            services: theirs.clone(),
        };
        registry.set_imports("west", Some(imports));
        let state = state(&registry, Kind::ServiceEntry, "shop", "a").expect("it is exported");
        assert_eq!(state.verdict, ExportVerdict::Exported(ExportedBy::Label));
        state.conflict
    };
    assert_eq!(said(80, "http", "http"), None);
    assert_eq!(said(81, "admin", "HTTP"), None, "one more port is no conflict");
    for (port, name, protocol) in [(81, "http", "HTTP"), (80, "http", "GRPC"), (80, "web", "TCP")] {
        let conflict = said(port, name, protocol).unwrap_or_default();
        assert!(conflict.contains("west"), "{port} {name} {protocol}: {conflict}");
    }
}
