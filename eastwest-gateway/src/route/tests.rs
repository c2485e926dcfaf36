//! Calls against worlds that discovery's own registry has compiled.

use super::*;
use std::collections::BTreeSet;
use tombolo_config::{Kind, read_documents};
use tombolo_proto::{istio::workload as wire, pack, xds};
use tombolo_registry::{MeshSettings, Registry, World};
use tombolo_snapshot::Own;
use tombolo_types::{AddressPlan, SpiffeId};

/// Device ids of the entries below.
const AWAY: u64 = 0xa1;

const WORLD: &str = r#"
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: catalog, namespace: shop, labels: {istio.io/global: "true"}}
spec:
  hosts: [catalog.shop.svc.mesh.internal]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}, {number: 22, name: ssh, protocol: TCP}]
  workloadSelector: {labels: {app: catalog}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: ledger, namespace: shop}
spec:
  hosts: [ledger.shop.svc.mesh.internal]
  resolution: STATIC
  ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]
  workloadSelector: {labels: {app: ledger}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: away, namespace: shop, annotations: {tombolo.io/reach: outbound}}
spec: {template: {labels: {app: catalog}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: here, namespace: shop}
spec: {address: 10.0.0.1, serviceAccount: catalog, labels: {app: catalog, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: away-00000000000000a1, namespace: shop, annotations: {istio.io/autoRegistrationGroup: away}}
spec: {address: 10.0.0.1, serviceAccount: catalog, labels: {app: catalog, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: lan-1, namespace: shop}
spec: {address: 10.0.0.2, network: lan, serviceAccount: ledger, labels: {app: ledger, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: plain, namespace: shop}
spec: {address: 10.0.0.3, serviceAccount: catalog, labels: {app: catalog}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-thief, namespace: shop}
spec: {action: DENY, rules: [{from: [{source: {principals: [mesh.example/ns/shop/sa/thief]}}]}]}
"#;

struct Holding(BTreeSet<DeviceId>, Snapshot);

impl Known for Holding {
    fn has_session(&self, device: DeviceId) -> bool {
        self.0.contains(&device)
    }

    fn is_exported(&self, service: &NamespacedName) -> bool {
        self.1.is_exported(service)
    }
}

fn snapshot(edit: impl FnOnce(&mut Registry)) -> Snapshot {
    snapshot_with(edit, |_| ())
}

/// With each service changed as another control plane would say it.
fn snapshot_with(edit: impl FnOnce(&mut Registry), service: impl Fn(&mut wire::Service)) -> Snapshot {
    let settings = MeshSettings::new("mesh.example".parse().unwrap());
    let mut registry = Registry::new(settings);
    for resource in read_documents(WORLD).unwrap() {
        registry.upsert(resource);
    }
    edit(&mut registry);
    let world = registry.publish();
    let own = Own {
        namespace: "tombolo-system".into(),
        workload_name: "gateway-1".into(),
        service_account: "gateway".into(),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
        mesh_domain: "mesh.internal".into(),
        trust_domain: "mesh.example".parse().unwrap(),
    };
    let mut snapshot = Snapshot::empty(AddressPlan::default(), own);
    for url in World::TYPES {
        let resources = world.resources(url).unwrap().values();
        let resources = resources
            .filter(|_| url != tombolo_proto::type_url::EXPOSURE)
            .map(|compiled| xds::Resource {
                name: compiled.name.to_string(),
                version: compiled.version.to_string(),
                resource: Some(changed(&compiled.any, &service)),
                ..xds::Resource::default()
            });
        assert_eq!(snapshot.apply(url, resources.collect(), &[]), [], "{url}");
    }
    snapshot
}

fn changed(any: &prost_types::Any, service: &impl Fn(&mut wire::Service)) -> prost_types::Any {
    let Ok(mut address) = any.to_msg::<wire::Address>() else {
        return any.clone();
    };
    match &mut address.r#type {
        Some(wire::address::Type::Service(one)) => service(one),
        _ => return any.clone(),
    }
    pack(&address)
}

/// Where a call of `id` goes: the endpoints, or why not, and by which policy.
fn ask(world: &Snapshot, sessions: &[u64], id: &str, device: u64, authority: &str) -> String {
    ask_as(world, sessions, id, device, authority, "")
}

/// With `x-istio-source: role`.
fn ask_as(world: &Snapshot, sessions: &[u64], id: &str, device: u64, authority: &str, role: &str) -> String {
    let id: SpiffeId = format!("spiffe://{id}").parse().unwrap();
    let peer = Peer {
        ids: vec![id.clone()],
        id,
        device: Some(DeviceId(device)),
        serial: Vec::new(),
        not_after: 0,
        chain: Vec::new(),
    };
    let authority: Authority = authority.parse().unwrap();
    let call = Call {
        peer: &peer,
        remote: "192.0.2.1".parse().unwrap(),
        authority: &authority,
        role: Role::of(role.as_bytes()),
    };
    let known = Holding(sessions.iter().copied().map(DeviceId).collect(), world.clone());
    match route(world, &call, &known) {
        Ok(route) => {
            let mut ways: Vec<String> = route
                .endpoints
                .iter()
                .map(|endpoint| match endpoint.reach {
                    Reach::Dial(address) => address.to_string(),
                    Reach::Session(device) => format!("session {device}"),
                })
                .collect();
            ways.sort();
            ways.join(", ")
        }
        Err(Refused { reject, policy }) => {
            let policy = policy.map_or_else(String::new, |policy| format!(" by {policy}"));
            format!("{}{policy}", reject.reason)
        }
    }
}

const WEB: &str = "mesh.example/ns/shop/sa/web";
const CATALOG: &str = "catalog.shop.svc.mesh.internal:80";

#[test]
fn by_name_alone_and_into_its_own_network_alone() {
    let world = snapshot(|_| ());
    let web = |authority| ask(&world, &[], WEB, 1, authority);
    assert_eq!(web(CATALOG), "10.0.0.1:15008");
    for (authority, reason) in [
        ("10.0.0.1:8080", "address_not_routed"),
        ("10.0.0.1:15008", "address_not_routed"),
        ("[fd00::1]:80", "address_not_routed"),
        ("nobody.shop.svc.mesh.internal:80", "unknown_service"),
        ("bank.example:443", "unknown_service"),
        ("catalog.shop.svc.mesh.internal:15012", "unknown_port"),
        ("catalog.shop.svc.mesh.internal:22", "no_healthy_endpoint"),
        // Its endpoint is in another network: no transit.
        ("ledger.shop.svc.mesh.internal:80", "no_healthy_endpoint"),
    ] {
        assert_eq!(web(authority), reason, "{authority}");
    }
}

#[test]
fn who_may_call() {
    let world = snapshot(|registry| registry.set_revoked([DeviceId(9)].into()));
    assert_eq!(ask(&world, &[], WEB, 9, CATALOG), "device_revoked");
    let thief = ask(&world, &[], "mesh.example/ns/shop/sa/thief", 1, CATALOG);
    assert!(thief.ends_with(" by shop/no-thief"), "{thief}");
    // To others a service that is not exported is not there.
    let other = "other.example/ns/shop/sa/web";
    assert_eq!(ask(&world, &[], other, 1, CATALOG), "10.0.0.1:15008");
    let ledger = "ledger.shop.svc.mesh.internal:80";
    assert_eq!(ask(&world, &[], other, 1, ledger), "unknown_service");
    let nothing = Snapshot::empty(AddressPlan::default(), world.own().clone());
    assert_eq!(ask(&nothing, &[], WEB, 1, CATALOG), "no_policies_received");
}

#[test]
fn a_host_that_only_dials_out_by_its_session_alone() {
    let world = snapshot(|registry| registry.remove(Kind::WorkloadEntry, "shop", "here"));
    assert_eq!(ask(&world, &[], WEB, 1, CATALOG), "no_healthy_endpoint");
    assert_eq!(ask(&world, &[0xb2], WEB, 1, CATALOG), "no_healthy_endpoint");
    let way = ask(&world, &[AWAY], WEB, 1, CATALOG);
    assert_eq!(way, "session 00000000000000a1");
}

#[test]
fn a_service_is_reached_through_its_waypoint_as_the_callers_role_says() {
    let waypoint = |target: Option<wire::gateway_address::Destination>, ingress: bool| {
        let world = snapshot_with(
            |registry| {
                let documents = r#"
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: waypoint, namespace: shop}
spec: {address: 10.0.0.9, serviceAccount: waypoint, labels: {app: waypoint, networking.istio.io/tunnel: http}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: waypoint, namespace: shop}
spec:
  hosts: [waypoint.shop.svc.mesh.internal]
  resolution: STATIC
  ports: [{number: 15008, name: hbone, protocol: TCP}]
  workloadSelector: {labels: {app: waypoint}}
"#;
                for resource in read_documents(documents).unwrap() {
                    registry.upsert(resource);
                }
            },
            move |service| {
                if service.hostname.starts_with("catalog") {
                    service.waypoint = target.clone().map(|destination| wire::GatewayAddress {
                        destination: Some(destination),
                        hbone_mtls_port: 15018,
                    });
                    service.ingress_use_waypoint = ingress;
                }
            },
        );
        ["", "sidecar", "gateway", "waypoint"].map(|role| ask_as(&world, &[], WEB, 1, CATALOG, role))
    };
    let (around, through) = ("10.0.0.1:15008", "10.0.0.9:15018");
    let by_name = |name: &str| {
        Some(wire::gateway_address::Destination::Hostname(
            wire::NamespacedHostname {
                namespace: "shop".into(),
                hostname: format!("{name}.shop.svc.mesh.internal"),
            },
        ))
    };
    let by_address = |last| {
        Some(wire::gateway_address::Destination::Address(
            wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 0, 0, last],
                length: None,
            },
        ))
    };
    assert_eq!(waypoint(None, true), [around; 4]);
    let usual = [through, through, around, around];
    assert_eq!(waypoint(by_name("waypoint"), false), usual);
    assert_eq!(waypoint(by_address(9), false), usual);
    assert_eq!(
        waypoint(by_name("waypoint"), true),
        [through, through, through, around]
    );
    // Without it what it enforces would be left out.
    let none = "no_healthy_waypoint";
    assert_eq!(waypoint(by_name("nobody"), false), [none, none, around, around]);
    assert_eq!(waypoint(by_address(77), false), [none, none, around, around]);
}
