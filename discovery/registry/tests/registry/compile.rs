use crate::support::*;
use std::{collections::BTreeSet, sync::Arc};
use tombolo_config::Kind;
use tombolo_proto::{
    istio::{
        security::{Action, Scope},
        workload::{
            AppProtocol, PortList, TunnelProtocol, WorkloadStatus, load_balancing, service::Visibility,
        },
    },
    tombolo::v1::{DeclaredPort, Revocations, TrustBundle},
    type_url, unpack,
};
use tombolo_registry::{Health, MeshSettings, Registry, Subscriber};
use tombolo_types::DeviceId;

const CATALOG: &str = "
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: catalog, namespace: shop}
spec:
  metadata: {labels: {app: catalog, version: v1}}
  template: {ports: {http: 8080, admin: 9000, ssh: 22, hbone: 15008}, serviceAccount: catalog}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: catalog, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}
spec:
  hosts: [catalog.shop.svc.mesh.internal]
  location: MESH_INTERNAL
  resolution: STATIC
  workloadSelector: {labels: {app: catalog}}
  ports:
  - {number: 80, name: http, protocol: HTTP, targetPort: 8081}
  - {number: 5432, name: pg, protocol: TCP}
  - {number: 53, name: dns, protocol: UDP}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata:
  name: catalog-1
  namespace: shop
  labels: {networking.istio.io/tunnel: http, app: catalog}
  annotations: {istio.io/autoRegistrationGroup: catalog}
spec:
  address: 10.0.0.1
  labels: {app: overridden, version: v1}
  ports: {http: 8080}
  locality: eu/eu-1/a
  weight: 3
  serviceAccount: catalog
";

fn ports(list: &PortList) -> Vec<(u32, u32, AppProtocol)> {
    list.ports
        .iter()
        .map(|port| (port.service_port, port.target_port, port.app_protocol()))
        .collect()
}

#[test]
fn an_enrolled_vm_and_its_service() {
    let world = registry(CATALOG).publish();
    let found = entry(&world, "shop", "catalog-1");
    assert_eq!(
        (found.name.as_str(), found.namespace.as_str()),
        ("catalog-1", "shop")
    );
    assert_eq!(found.addresses, [vec![10, 0, 0, 1]]);
    assert_eq!(
        (found.service_account.as_str(), found.trust_domain.as_str()),
        ("catalog", "mesh.example")
    );
    assert_eq!(
        (found.cluster_id.as_str(), found.network.as_str()),
        ("Kubernetes", "")
    );
    assert_eq!(
        (found.tunnel_protocol(), found.native_tunnel),
        (TunnelProtocol::Hbone, true)
    );
    assert_eq!(
        (found.canonical_name.as_str(), found.canonical_revision.as_str()),
        ("catalog", "v1")
    );
    assert_eq!(found.workload_name, "catalog");
    assert_eq!(
        (found.status(), found.capacity),
        (WorkloadStatus::Healthy, Some(3))
    );
    let locality = found.locality.unwrap();
    assert_eq!(
        [&locality.region[..], &locality.zone, &locality.subzone],
        ["eu", "eu-1", "a"]
    );
    assert_eq!(found.services.len(), 1);
    // The entry's own port of that name wins over the target port; UDP is left out.
    assert_eq!(
        ports(&found.services["shop/catalog.shop.svc.mesh.internal"]),
        [(80, 8080, AppProtocol::Http11), (5432, 5432, AppProtocol::Tcp)]
    );

    let found = service(&world, "shop/catalog.shop.svc.mesh.internal");
    assert_eq!(addresses(&found), ["240.240.0.1", "2001:2::1"]);
    assert_eq!(
        ports(&PortList {
            ports: found.ports.clone()
        }),
        [(80, 8081, AppProtocol::Http11), (5432, 5432, AppProtocol::Tcp)]
    );
    assert!(found.canonical && found.load_balancing.is_none() && found.visibility() == Visibility::Public);
    assert!(names(&world, type_url::SERVICE_VIP).is_empty());

    let aliases = |name: &str| world.resource(type_url::ADDRESS, name).unwrap().aliases.clone();
    assert_eq!(
        aliases("Kubernetes/networking.istio.io/WorkloadEntry/shop/catalog-1"),
        ["/10.0.0.1"]
    );
    assert_eq!(
        aliases("shop/catalog.shop.svc.mesh.internal"),
        ["/240.240.0.1", "/2001:2::1"]
    );
}

#[test]
fn only_declared_ports_are_exposed() {
    let yaml = CATALOG.replace(
        "namespace: shop}\nspec:\n  metadata",
        "namespace: shop, annotations: {OPTIONS}}\nspec:\n  metadata",
    );
    let of = |options: &str| {
        let world = registry(&yaml.replace("OPTIONS", options)).publish();
        let name = Subscriber {
            namespace: "shop",
            workload: "catalog-1",
        }
        .exposure_name();
        let found = exposure(&world, &name);
        (
            found
                .ports
                .iter()
                .map(|DeclaredPort { port, loopback }| (*port, *loopback))
                .collect::<Vec<_>>(),
            found.all_ports,
        )
    };
    // 9000 by the group, 8080 by both, 5432 by the service; never 22 or 15008.
    assert_eq!(of(""), (vec![(5432, false), (8080, false), (9000, false)], false));
    assert_eq!(
        of("tombolo.io/deliver-loopback: '9000,7777'"),
        (vec![(5432, false), (8080, false), (9000, true)], false)
    );
    assert_eq!(
        of("tombolo.io/deliver-loopback: '9000,7777,22', tombolo.io/deliver-all-ports: 'true'"),
        (
            vec![(5432, false), (7777, true), (8080, false), (9000, true)],
            true
        )
    );
    // A service of another namespace declares nothing.
    let elsewhere = yaml.replace("OPTIONS", "").replace(
        "name: catalog, namespace: shop, creation",
        "name: catalog, namespace: bank, creation",
    );
    let world = registry(&elsewhere).publish();
    assert_eq!(
        exposure(&world, "shop/catalog-1")
            .ports
            .iter()
            .map(|p| p.port)
            .collect::<Vec<_>>(),
        [8080, 9000]
    );
}

#[test]
fn health_comes_from_the_owner_else_from_the_status() {
    let status = |annotations: &str, status: &str| {
        let yaml = format!(
            "{{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {{name: a, namespace: shop, \
             annotations: {{{annotations}}}}}, spec: {{address: 10.0.0.1}}, status: {{conditions: [{status}]}}}}"
        );
        entry(&registry(&yaml).publish(), "shop", "a").status()
    };
    let checked = "proxy.istio.io/health-checks-enabled: 'true'";
    assert_eq!(status("", ""), WorkloadStatus::Healthy);
    assert_eq!(status(checked, ""), WorkloadStatus::Unhealthy);
    assert_eq!(
        status(checked, "{type: Healthy, status: 'True'}"),
        WorkloadStatus::Healthy
    );
    assert_eq!(
        status("", "{type: Healthy, status: 'False'}"),
        WorkloadStatus::Unhealthy
    );

    let mut registry = registry(CATALOG);
    let first = registry.publish();
    down(&mut registry, "shop", "catalog-1");
    let second = registry.publish();
    assert_eq!(
        entry(&second, "shop", "catalog-1").status(),
        WorkloadStatus::Unhealthy
    );
    assert_eq!(second.version, first.version + 1);
    assert_eq!(
        changed(&second, type_url::ADDRESS),
        ["Kubernetes/networking.istio.io/WorkloadEntry/shop/catalog-1"]
    );
    assert!(changed(&second, type_url::AUTHORIZATION).is_empty());
    // The world that a reader holds does not change.
    assert_eq!(
        entry(&first, "shop", "catalog-1").status(),
        WorkloadStatus::Healthy
    );
    registry.set_health("shop", "catalog-1", Health::Healthy);
    let third = registry.publish();
    assert_eq!(
        entry(&third, "shop", "catalog-1").status(),
        WorkloadStatus::Healthy
    );
    assert!(Arc::ptr_eq(&third, &registry.publish()), "nothing changed");
    // Health does not outlive its entry.
    down(&mut registry, "shop", "catalog-1");
    registry.remove(Kind::WorkloadEntry, "shop", "catalog-1");
    resources(CATALOG)
        .into_iter()
        .for_each(|resource| registry.upsert(resource));
    assert_eq!(
        entry(&registry.publish(), "shop", "catalog-1").status(),
        WorkloadStatus::Healthy
    );
}

#[test]
fn own_addresses_are_kept_and_agents_get_another() {
    let world = registry(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: db, namespace: shop}
spec:
  hosts: [db.example.org]
  addresses: [192.0.2.7, 198.51.100.0/24]
  resolution: STATIC
  exportTo: ['.']
  subjectAltNames: [spiffe://mesh.example/ns/shop/sa/db, db.example.org]
  ports: [{number: 5432, name: pg, protocol: TCP}]
  endpoints: [{address: 10.0.0.5}, {address: 10.0.0.5, ports: {pg: 6432}, network: n2, labels: {networking.istio.io/tunnel: http}}]
",
    )
    .publish();
    let found = service(&world, "shop/db.example.org");
    assert_eq!(addresses(&found), ["192.0.2.7", "198.51.100.0/24"]);
    assert_eq!(found.visibility(), Visibility::Namespace);
    assert_eq!(
        found.subject_alt_names,
        ["db", "default"].map(|account| format!("spiffe://mesh.example/ns/shop/sa/{account}")),
        "the endpoint in another network is met through a gateway"
    );
    assert_eq!(
        service_vip(&world, "shop/db.example.org").vips,
        ["240.240.0.1", "2001:2::1"]
    );
    let uid = "Kubernetes/networking.istio.io/ServiceEntry/shop/db/10.0.0.5";
    assert_eq!(
        ports(&workload(&world, uid).services["shop/db.example.org"]),
        [(5432, 5432, AppProtocol::Tcp)]
    );
    let second = workload(&world, &format!("{uid}#1"));
    assert_eq!(
        ports(&second.services["shop/db.example.org"]),
        [(5432, 6432, AppProtocol::Tcp)]
    );
    assert_eq!(
        (second.network.as_str(), second.tunnel_protocol()),
        ("n2", TunnelProtocol::Hbone)
    );
}

#[test]
fn resolutions() {
    let of = |spec: &str| {
        registry(&format!(
            "{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: a, namespace: shop}}, spec: {spec}}}"
        ))
        .publish()
    };
    let world = of("{hosts: [a.example.org, '*.b.example.org'], resolution: NONE}");
    let found = service(&world, "shop/a.example.org");
    assert!(addresses(&found).is_empty());
    assert_eq!(
        found.load_balancing.unwrap().mode(),
        load_balancing::Mode::Passthrough
    );
    assert!(addresses(&service(&world, "shop/*.b.example.org")).is_empty());

    let world =
        of("{hosts: [a.example.org], resolution: DNS, ports: [{number: 443, name: tls, protocol: TLS}]}");
    let found = workload(
        &world,
        "Kubernetes/networking.istio.io/ServiceEntry/shop/a/a.example.org",
    );
    assert_eq!(
        (found.hostname.as_str(), found.addresses.len()),
        ("a.example.org", 0)
    );
    assert_eq!(addresses(&service(&world, "shop/a.example.org")).len(), 2);

    let world =
        of("{hosts: [a.example.org], resolution: STATIC, exportTo: ['~'], endpoints: [{address: 10.0.0.1}]}");
    assert!(names(&world, type_url::ADDRESS).is_empty());
}

const HEADLESS: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: db, namespace: shop, labels: {networking.istio.io/enable-autoallocate-ip: 'false'}}
spec:
  hosts: [db.shop.svc.mesh.internal]
  resolution: STATIC
  workloadSelector: {labels: {app: db}}
  ports: [{number: 5432, name: pg, protocol: TCP}]
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db-a, namespace: shop, creationTimestamp: '2026-01-02T00:00:00Z'}
spec: {address: 10.0.0.1, labels: {app: db}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: db-b, namespace: shop, creationTimestamp: '2026-01-01T00:00:00Z'}
spec: {address: 10.0.0.2, labels: {app: db}}
";

#[test]
fn each_endpoint_of_a_headless_service_has_a_name_and_an_address() {
    let mut registry = registry(HEADLESS);
    let world = registry.publish();
    assert!(addresses(&service(&world, "shop/db.shop.svc.mesh.internal")).is_empty());
    // The older entry was given its address first.
    let a = service(&world, "shop/db-a.db.shop.svc.mesh.internal");
    let b = service(&world, "shop/db-b.db.shop.svc.mesh.internal");
    assert_eq!(addresses(&a), ["240.240.0.2", "2001:2::2"]);
    assert_eq!(addresses(&b), ["240.240.0.1", "2001:2::1"]);
    assert_eq!(a.ports.len(), 1);
    assert_eq!(
        entry(&world, "shop", "db-a").services.keys().collect::<Vec<_>>(),
        [
            "shop/db-a.db.shop.svc.mesh.internal",
            "shop/db.shop.svc.mesh.internal"
        ]
    );
    assert_eq!(
        registry.hostnames("shop", "db-a"),
        ["db-a.db.shop.svc.mesh.internal", "db.shop.svc.mesh.internal"]
    );
    let list = |world: &tombolo_registry::World| service_vip(world, "shop/db.shop.svc.mesh.internal").vips;
    assert_eq!(
        list(&world),
        ["240.240.0.1", "240.240.0.2", "2001:2::1", "2001:2::2"]
    );
    down(&mut registry, "shop", "db-b");
    assert_eq!(list(&registry.publish()), ["240.240.0.2", "2001:2::2"]);
    down(&mut registry, "shop", "db-a");
    assert_eq!(
        list(&registry.publish()).len(),
        4,
        "none is healthy: all are named"
    );
    registry.remove(Kind::WorkloadEntry, "shop", "db-a");
    let world = registry.publish();
    assert_eq!(list(&world), ["240.240.0.1", "2001:2::1"]);
    assert!(
        !names(&world, type_url::ADDRESS)
            .iter()
            .any(|name| name.contains("db-a"))
    );

    let world = crate::support::registry(&HEADLESS.split("---").next().unwrap().replace(
        "workloadSelector: {labels: {app: db}}",
        "endpoints: [{address: 10.0.0.7}]",
    ))
    .publish();
    assert_eq!(
        addresses(&service(&world, "shop/endpoint-0.db.shop.svc.mesh.internal")).len(),
        2
    );
    assert_eq!(list(&world), ["240.240.0.1", "2001:2::1"]);
    assert_eq!(
        workload(
            &world,
            "Kubernetes/networking.istio.io/ServiceEntry/shop/db/10.0.0.7"
        )
        .services
        .len(),
        2
    );
}

#[test]
fn the_oldest_owns_a_host_of_its_namespace_and_is_canonical() {
    let make = |name: &str, namespace: &str, year: u32, port: u32| {
        let yaml = format!(
            "{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}, namespace: {namespace}, \
             creationTimestamp: '{year}-01-01T00:00:00Z'}}, spec: {{hosts: [x.example.org], resolution: STATIC, \
             workloadSelector: {{labels: {{app: a}}}}, ports: [{{number: {port}, name: p, protocol: TCP}}]}}}}"
        );
        resources(&yaml).remove(0)
    };
    let mut registry = Registry::new(settings());
    let mut all = vec![
        make("young", "shop", 2026, 1),
        make("old", "shop", 2025, 2),
        make("oldest", "bank", 2024, 3),
    ];
    all.extend(resources(
        "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: e, namespace: shop}, \
         spec: {address: 10.0.0.1, labels: {app: a}}}",
    ));
    all.iter().cloned().for_each(|resource| registry.upsert(resource));
    give_addresses(&mut registry, &mut all);
    let world = registry.publish();
    let port = |world: &tombolo_registry::World| {
        let (found, at) = (service(world, "shop/x.example.org"), entry(world, "shop", "e"));
        assert_eq!(
            found.ports[0].service_port,
            at.services["shop/x.example.org"].ports[0].service_port
        );
        (found.ports[0].service_port, found.canonical)
    };
    assert_eq!(port(&world), (2, false));
    assert!(service(&world, "bank/x.example.org").canonical);
    assert_eq!(
        registry.shadowed_hosts("shop", "young"),
        [("x.example.org".to_owned(), "old".to_owned())]
    );
    registry.remove(Kind::ServiceEntry, "bank", "oldest");
    assert_eq!(port(&registry.publish()), (2, true));
    registry.remove(Kind::ServiceEntry, "shop", "old");
    give_addresses(&mut registry, &mut all);
    let world = registry.publish();
    assert_eq!(port(&world), (1, true));
    // The new owner has an address of its own, never one of the old one's.
    assert_eq!(
        addresses(&service(&world, "shop/x.example.org")),
        ["240.240.0.3", "2001:2::3"]
    );
}

#[test]
fn a_disputed_address_stays_with_the_older_object() {
    let make = |name: &str, year: u32| {
        let yaml = format!(
            "{{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {{name: {name}, namespace: shop, \
             creationTimestamp: '{year}-01-01T00:00:00Z'}}, spec: {{hosts: [{name}.example.org], resolution: STATIC, \
             ports: []}}, status: {{addresses: [{{value: 240.240.0.9, host: {name}.example.org}}, \
             {{value: 10.0.0.1, host: {name}.example.org}}]}}}}"
        );
        resources(&yaml).remove(0)
    };
    let mut registry = Registry::new(settings());
    let mut all = vec![make("young", 2026), make("old", 2025)];
    all.iter().cloned().for_each(|resource| registry.upsert(resource));
    let of = |registry: &mut Registry, name: &str| {
        addresses(&service(&registry.publish(), &format!("shop/{name}.example.org")))
    };
    // 10.0.0.1 is none of the mesh's addresses.
    assert_eq!(of(&mut registry, "old"), ["240.240.0.9"]);
    assert!(of(&mut registry, "young").is_empty());
    let asked = registry.allocate();
    assert_eq!(
        asked,
        registry.allocate(),
        "the same answer until it is persisted"
    );
    give_addresses(&mut registry, &mut all);
    assert!(registry.allocate().is_empty());
    assert_eq!(of(&mut registry, "young"), ["240.240.0.10", "2001:2::2"]);
    assert_eq!(of(&mut registry, "old"), ["240.240.0.9", "2001:2::1"]);
}

#[test]
fn what_hangs_on_no_object() {
    let mut registry = Registry::new(MeshSettings {
        default_deny: true,
        ..settings()
    });
    registry.set_revoked(BTreeSet::from([DeviceId(2), DeviceId(1)]));
    registry.set_bundle(&"mesh.example".parse().unwrap(), "PEM");
    let world = registry.publish();
    let deny = policy(&world, "istio-system/tombolo-default-deny");
    assert_eq!(
        (deny.scope(), deny.action(), deny.rules.len()),
        (Scope::Global, Action::Allow, 0)
    );
    let revoked: Revocations =
        unpack(&world.resource(type_url::REVOCATIONS, "devices").unwrap().any).unwrap();
    assert_eq!(revoked.device_ids, [1, 2]);
    let bundle: TrustBundle = unpack(
        &world
            .resource(type_url::TRUST_BUNDLE, "mesh.example")
            .unwrap()
            .any,
    )
    .unwrap();
    assert_eq!(bundle.roots_pem, "PEM");
    registry.set_bundle(&"mesh.example".parse().unwrap(), "");
    assert!(names(&registry.publish(), type_url::TRUST_BUNDLE).is_empty());
    assert!(world.resources("type.googleapis.com/unknown").is_none());
}

#[test]
fn payloads_and_versions_are_the_same_in_every_process() {
    let world = registry(CATALOG).publish();
    let found = world
        .resource(type_url::ADDRESS, "shop/catalog.shop.svc.mesh.internal")
        .unwrap();
    // Versions outlive processes: clients name them when they come back.
    assert_eq!(&*found.version, "9aa855eba1315cd8");
    assert_eq!(found.any.type_url, type_url::ADDRESS);
}
