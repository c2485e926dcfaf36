use super::*;
use std::collections::BTreeMap;
use tombolo_destination::resolve;
use tombolo_proto::pack;

mod corpus;
mod history;
pub(crate) mod networks;
mod refused;
mod timing;
mod virtual_addresses;

pub(crate) fn own() -> Own {
    Own {
        namespace: "shop".into(),
        workload_name: "web-1".into(),
        service_account: "web".into(),
        network: "net".into(),
        cluster_id: "Kubernetes".into(),
        mesh_domain: "mesh.internal".into(),
        trust_domain: "mesh.example".parse().unwrap(),
    }
}

pub(crate) fn empty() -> Snapshot {
    Snapshot::empty(AddressPlan::default(), own())
}

pub(crate) fn resource<M: prost::Name>(name: &str, message: &M) -> xds::Resource {
    xds::Resource {
        name: name.into(),
        version: format!("v-{name}"),
        resource: Some(pack(message)),
        ..xds::Resource::default()
    }
}

pub(crate) fn workload(uid: &str, change: impl FnOnce(&mut wds::Workload)) -> xds::Resource {
    let mut wire = wds::Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "shop".into(),
        service_account: "catalog".into(),
        trust_domain: "mesh.example".into(),
        network: "net".into(),
        addresses: vec![vec![10, 0, 0, 1]],
        tunnel_protocol: wds::TunnelProtocol::Hbone.into(),
        services: [(CATALOG.to_owned(), wds::PortList::default())].into(),
        ..wds::Workload::default()
    };
    change(&mut wire);
    resource(
        uid,
        &wds::Address {
            r#type: Some(wds::address::Type::Workload(wire)),
        },
    )
}

pub(crate) const CATALOG: &str = "shop/catalog.shop.svc.mesh.internal";

pub(crate) fn service(key: &str, change: impl FnOnce(&mut wds::Service)) -> xds::Resource {
    let (namespace, hostname) = key.split_once('/').unwrap();
    let mut wire = wds::Service {
        name: hostname.split('.').next().unwrap().into(),
        namespace: namespace.into(),
        hostname: hostname.into(),
        ports: vec![wds::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        addresses: vec![at([240, 240, 0, 1])],
        ..wds::Service::default()
    };
    change(&mut wire);
    resource(
        key,
        &wds::Address {
            r#type: Some(wds::address::Type::Service(wire)),
        },
    )
}

pub(crate) fn at(address: [u8; 4]) -> wds::NetworkAddress {
    wds::NetworkAddress {
        network: "net".into(),
        address: address.to_vec(),
        length: None,
    }
}

fn vip(key: &str, vips: &[&str]) -> xds::Resource {
    let (namespace, hostname) = key.split_once('/').unwrap();
    let vips = vips.iter().map(|&vip| vip.to_owned()).collect();
    resource(
        key,
        &v1::ServiceVip {
            namespace: namespace.into(),
            hostname: hostname.into(),
            vips,
        },
    )
}

fn policy(key: &str, scope: security::Scope) -> xds::Resource {
    let (namespace, name) = key.split_once('/').unwrap();
    let message = security::Authorization {
        name: name.into(),
        namespace: namespace.into(),
        scope: scope.into(),
        ..security::Authorization::default()
    };
    resource(key, &message)
}

/// Applies resources of one type, all of which must be good.
fn take(snapshot: &mut Snapshot, type_url: &str, resources: impl IntoIterator<Item = xds::Resource>) {
    assert_eq!(snapshot.apply(type_url, resources.into_iter().collect(), &[]), []);
}

fn remove(snapshot: &mut Snapshot, type_url: &str, name: &str) {
    assert_eq!(snapshot.apply(type_url, Vec::new(), &[name.to_owned()]), []);
}

/// The uids of the endpoints of a service.
fn endpoints(snapshot: &Snapshot, key: &str) -> Vec<String> {
    let mut uids = Vec::new();
    snapshot.endpoints(&key.parse().unwrap(), &mut |workload| {
        uids.push(workload.uid.to_string())
    });
    uids
}

fn named(snapshot: &Snapshot, host: &str, namespace: &str) -> Option<(Vec<String>, bool)> {
    snapshot.find(host, namespace).map(|found| {
        let v4 = found.v4.iter().map(ToString::to_string);
        (
            v4.chain(found.v6.iter().map(ToString::to_string)).collect(),
            found.headless,
        )
    })
}

#[test]
fn an_upsert_replaces_a_workload_entirely() {
    const OTHER: &str = "shop/other.shop.svc.mesh.internal";
    let mut snapshot = empty();
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a", |_| {}), workload("b", |w| w.addresses[0][3] = 2)],
    );
    assert_eq!(
        endpoints(&snapshot, CATALOG),
        ["a", "b"],
        "before the service is there"
    );
    let before = snapshot.clone();
    let change = |w: &mut wds::Workload| {
        w.services = [(OTHER.to_owned(), wds::PortList::default())].into();
        w.addresses = vec![vec![10, 0, 0, 9]];
    };
    take(&mut snapshot, type_url::ADDRESS, [workload("a", change)]);
    assert_eq!(
        (endpoints(&snapshot, CATALOG), endpoints(&snapshot, OTHER)),
        (vec!["b".into()], vec!["a".into()])
    );
    let at = |n| NetworkAddress {
        network: "net".into(),
        address: IpAddr::from([10, 0, 0, n]),
    };
    assert!(snapshot.workload_by_address(&at(1)).is_none());
    assert_eq!(&*snapshot.workload_by_address(&at(9)).unwrap().uid, "a");
    assert_eq!(
        endpoints(&before, CATALOG),
        ["a", "b"],
        "a reader's version does not change"
    );
    assert!(before.version() < snapshot.version());

    take(&mut snapshot, type_url::ADDRESS, [service(CATALOG, |_| {})]);
    let found = resolve(&snapshot, &snapshot.source(), IpAddr::from([240, 240, 0, 1]), 80).unwrap();
    assert_eq!(found.candidates[0].address.to_string(), "10.0.0.2:8080");
    remove(&mut snapshot, type_url::ADDRESS, "b");
    remove(&mut snapshot, type_url::ADDRESS, CATALOG);
    assert!(endpoints(&snapshot, CATALOG).is_empty() && snapshot.service_count() == 0);
    remove(&mut snapshot, type_url::ADDRESS, "never/was/there");
}

#[test]
fn workloads_at_one_address() {
    let mut snapshot = empty();
    let at = NetworkAddress {
        network: "net".into(),
        address: IpAddr::from([10, 0, 0, 1]),
    };
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [
            workload("b", |_| {}),
            workload("a", |_| {}),
            workload("c", |_| {}),
        ],
    );
    let found = |snapshot: &Snapshot| {
        snapshot
            .workload_by_address(&at)
            .map(|workload| workload.uid.to_string())
    };
    assert_eq!(found(&snapshot).as_deref(), Some("a"));
    remove(&mut snapshot, type_url::ADDRESS, "a");
    assert_eq!(found(&snapshot).as_deref(), Some("b"));
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("b", |w| w.network = "far".into())],
    );
    assert_eq!(found(&snapshot).as_deref(), Some("c"));
    remove(&mut snapshot, type_url::ADDRESS, "c");
    assert_eq!(found(&snapshot), None);
}

#[test]
fn unhealthy_endpoints_are_known_but_not_chosen() {
    let mut snapshot = empty();
    let unhealthy = |w: &mut wds::Workload| w.status = wds::WorkloadStatus::Unhealthy.into();
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a", unhealthy), service(CATALOG, |_| {})],
    );
    let vip = IpAddr::from([240, 240, 0, 1]);
    let reason = resolve(&snapshot, &snapshot.source(), vip, 80).unwrap_err();
    assert_eq!(
        (reason.reason, endpoints(&snapshot, CATALOG)),
        ("no_healthy_endpoint", vec!["a".to_owned()])
    );
    let allow_all = |s: &mut wds::Service| {
        let health_policy = wds::load_balancing::HealthPolicy::AllowAll.into();
        s.load_balancing = Some(wds::LoadBalancing {
            health_policy,
            ..wds::LoadBalancing::default()
        });
    };
    take(&mut snapshot, type_url::ADDRESS, [service(CATALOG, allow_all)]);
    assert_eq!(
        resolve(&snapshot, &snapshot.source(), vip, 80)
            .unwrap()
            .candidates
            .len(),
        1
    );
}

#[test]
fn the_own_record() {
    let mut snapshot = empty();
    let own = |w: &mut wds::Workload| {
        (w.name, w.service_account, w.node) = ("web-1".into(), "web".into(), "n1".into());
        w.locality = Some(wds::Locality {
            region: "eu".into(),
            ..wds::Locality::default()
        });
    };
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a", |w| w.name = "web-1".into())],
    );
    assert!(snapshot.own_workload().is_none(), "another service account");
    assert_eq!(
        (&*snapshot.source().node, &*snapshot.source().network),
        ("", "net")
    );
    take(&mut snapshot, type_url::ADDRESS, [workload("a", own)]);
    assert_eq!(&*snapshot.own_workload().unwrap().uid, "a");
    assert_eq!(
        (&*snapshot.source().node, &*snapshot.source().locality.region),
        ("n1", "eu")
    );
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a", |w| w.namespace = "bank".into())],
    );
    assert!(snapshot.own_workload().is_none());
}

#[test]
fn policies_of_a_workload() {
    use security::Scope::{Global, Namespace, WorkloadSelector};
    let mut snapshot = empty();
    assert!(!snapshot.policies_synced() && !snapshot.addresses_synced());
    take(
        &mut snapshot,
        type_url::AUTHORIZATION,
        [
            policy("istio-system/all", Global),
            policy("shop/ours", Namespace),
            policy("bank/theirs", Namespace),
            policy("shop/selected", WorkloadSelector),
            policy("shop/unselected", WorkloadSelector),
        ],
    );
    assert!(snapshot.policies_synced() && !snapshot.addresses_synced());
    let names = |w: &mut wds::Workload| {
        w.authorization_policies = vec!["shop/selected".into(), "shop/late".into()];
    };
    take(&mut snapshot, type_url::ADDRESS, [workload("a", names)]);
    let applied = |snapshot: &Snapshot| {
        let workload = snapshot.workload("a").unwrap();
        let mut keys: Vec<String> = snapshot
            .policies_for(workload)
            .iter()
            .map(|p| p.key.to_string())
            .collect();
        keys.sort();
        keys.join(" ")
    };
    assert_eq!(applied(&snapshot), "istio-system/all shop/ours shop/selected");
    let missing: Vec<_> = snapshot
        .missing_policies(snapshot.workload("a").unwrap())
        .map(ToString::to_string)
        .collect();
    assert_eq!(missing, ["shop/late"]);
    // A policy whose scope changes leaves its old scope.
    take(
        &mut snapshot,
        type_url::AUTHORIZATION,
        [policy("shop/late", Global), policy("istio-system/all", Namespace)],
    );
    remove(&mut snapshot, type_url::AUTHORIZATION, "shop/ours");
    assert_eq!(applied(&snapshot), "shop/late shop/late shop/selected");
    assert_eq!((snapshot.policy_count(), snapshot.policies().count()), (5, 5));
}

#[test]
fn revocations_bundles_and_exposure() {
    let mut snapshot = empty();
    let revoked = |ids: &[u64]| {
        resource(
            "devices",
            &v1::Revocations {
                device_ids: ids.to_vec(),
            },
        )
    };
    take(&mut snapshot, type_url::REVOCATIONS, [revoked(&[9, 3, 7])]);
    assert!(snapshot.is_revoked(DeviceId(3)) && !snapshot.is_revoked(DeviceId(4)));
    take(&mut snapshot, type_url::REVOCATIONS, [revoked(&[4])]);
    assert!(
        !snapshot.is_revoked(DeviceId(3)) && snapshot.is_revoked(DeviceId(4)),
        "the set is replaced"
    );
    remove(&mut snapshot, type_url::REVOCATIONS, "devices");
    assert!(!snapshot.is_revoked(DeviceId(4)));

    let bundle = |td: &str, pem: &str| {
        resource(
            td,
            &v1::TrustBundle {
                trust_domain: td.into(),
                roots_pem: pem.into(),
                ..v1::TrustBundle::default()
            },
        )
    };
    take(
        &mut snapshot,
        type_url::TRUST_BUNDLE,
        [bundle("b.example", "B"), bundle("a.example", "A")],
    );
    let bundles: Vec<_> = snapshot
        .trust_bundles()
        .map(|(td, pem)| format!("{td}={pem}"))
        .collect();
    assert_eq!(bundles, ["a.example=A", "b.example=B"]);
    remove(&mut snapshot, type_url::TRUST_BUNDLE, "a.example");
    assert_eq!(snapshot.trust_bundles().count(), 1);

    let declared = v1::DeclaredPort {
        port: 8080,
        loopback: true,
    };
    let exposure = v1::Exposure {
        ports: vec![declared],
        all_ports: false,
    };
    take(
        &mut snapshot,
        type_url::EXPOSURE,
        [resource("shop/web-1", &exposure)],
    );
    assert_eq!(
        snapshot.exposure().unwrap().ports,
        [ExposedPort {
            port: 8080,
            loopback: true
        }]
    );
    remove(&mut snapshot, type_url::EXPOSURE, "shop/web-2");
    assert!(snapshot.exposure().is_some());
    remove(&mut snapshot, type_url::EXPOSURE, "shop/web-1");
    assert!(snapshot.exposure().is_none());
}

#[test]
fn held_versions() {
    let mut snapshot = empty();
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a/b/c", |_| {}), service(CATALOG, |_| {})],
    );
    take(
        &mut snapshot,
        type_url::AUTHORIZATION,
        [policy("shop/p", security::Scope::Global)],
    );
    let expect = |names: &[&str]| {
        names
            .iter()
            .map(|&name| (name.to_owned(), format!("v-{name}")))
            .collect::<HashMap<_, _>>()
    };
    assert_eq!(snapshot.held(type_url::ADDRESS), expect(&["a/b/c", CATALOG]));
    assert_eq!(snapshot.held(type_url::AUTHORIZATION), expect(&["shop/p"]));
    assert_eq!(snapshot.held(type_url::SERVICE_VIP), expect(&[]));
    assert_eq!(snapshot.held("unknown"), expect(&[]));
}

/// Everything that readers can see of a snapshot, as text.
pub(crate) fn view(snapshot: &Snapshot) -> String {
    let mut lines = Vec::new();
    for workload in snapshot.workloads() {
        lines.push(format!("workload {workload:?}"));
        for &address in &workload.addresses {
            let at = NetworkAddress {
                network: workload.network.clone(),
                address,
            };
            lines.push(format!(
                "at {at} {:?}",
                snapshot.workload_by_address(&at).map(|found| &found.uid)
            ));
        }
        for key in workload.services.keys() {
            lines.push(format!(
                "endpoints {key} {:?}",
                endpoints(snapshot, &key.to_string())
            ));
        }
        lines.push(format!(
            "policies of {} {:?}",
            workload.uid,
            snapshot.policies_for(workload)
        ));
        if !workload.hostname.is_empty() {
            lines.push(format!(
                "instance {:?}",
                named(snapshot, &workload.hostname, "shop")
            ));
        }
    }
    for service in snapshot.services() {
        lines.push(format!("service {service:?} {:?}", snapshot.vips(&service.key)));
        for namespace in ["shop", "bank", ""] {
            lines.push(format!(
                "named {:?}",
                named(snapshot, service.hostname.as_str(), namespace)
            ));
        }
    }
    for last in 0..16 {
        let vip = IpAddr::from([240, 240, 0, last]);
        let found = snapshot.service_by_address(vip);
        lines.push(format!(
            "by {vip} {:?} {:?}",
            found.map(|service| &service.key),
            snapshot.host_of(vip)
        ));
        let candidates = resolve(snapshot, &snapshot.source(), vip, 80).map(|found| {
            found
                .candidates
                .iter()
                .map(|one| (one.workload.uid.clone(), one.address, one.via.clone()))
                .collect::<Vec<_>>()
        });
        lines.push(format!("resolve {candidates:?}"));
    }
    lines.push(format!("networks {:?}", snapshot.networks().collect::<Vec<_>>()));
    lines.push(format!(
        "own {:?}",
        snapshot.own_workload().map(|workload| &workload.uid)
    ));
    lines.push(format!(
        "{:?} {:?}",
        snapshot.exposure(),
        snapshot.trust_bundles().collect::<Vec<_>>()
    ));
    for type_url in [
        type_url::ADDRESS,
        type_url::AUTHORIZATION,
        type_url::SERVICE_VIP,
        type_url::REVOCATIONS,
        type_url::NETWORK_GATEWAYS,
        type_url::EXPORTED_SERVICE,
    ] {
        let held: BTreeMap<_, _> = snapshot.held(type_url).into_iter().collect();
        lines.push(format!("held {held:?}"));
    }
    lines.sort();
    lines.dedup();
    lines.join("\n")
}
