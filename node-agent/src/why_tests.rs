use super::*;
use tombolo_proto::{istio::security, istio::workload as wire, pack, type_url, xds::Resource};
use tombolo_snapshot::Own;
use tombolo_types::AddressPlan;

const HOST: &str = "catalog.shop.svc.mesh.internal";
const VIP: &str = "240.240.0.1";

fn resource<M: prost::Name>(name: &str, message: &M) -> Resource {
    Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(pack(message)),
        ..Default::default()
    }
}

fn bytes(address: &str) -> Vec<u8> {
    match address.parse().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn workload(name: &str, address: &str, healthy: bool) -> Resource {
    let uid = format!("Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}");
    let ports = wire::PortList {
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
    };
    let workload = wire::Workload {
        uid: uid.clone(),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![bytes(address)],
        trust_domain: "mesh.example".into(),
        service_account: "catalog".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        status: if healthy {
            wire::WorkloadStatus::Healthy
        } else {
            wire::WorkloadStatus::Unhealthy
        }
        .into(),
        services: [(format!("shop/{HOST}"), ports)].into_iter().collect(),
        cluster_id: "Kubernetes".into(),
        authorization_policies: vec![],
        ..Default::default()
    };
    resource(
        &uid,
        &wire::Address {
            r#type: Some(wire::address::Type::Workload(workload)),
        },
    )
}

fn service() -> Resource {
    let service = wire::Service {
        name: "catalog".into(),
        namespace: "shop".into(),
        hostname: HOST.into(),
        addresses: vec![wire::NetworkAddress {
            network: String::new(),
            address: bytes(VIP),
            length: None,
        }],
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        ..Default::default()
    };
    resource(
        &format!("shop/{HOST}"),
        &wire::Address {
            r#type: Some(wire::address::Type::Service(service)),
        },
    )
}

/// Denies everybody in the namespace shop.
fn deny() -> Resource {
    let policy = security::Authorization {
        name: "no-webapp".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![security::Rule::default()],
        ..Default::default()
    };
    resource("shop/no-webapp", &policy)
}

fn world(workloads: Vec<Resource>, policies: Vec<Resource>) -> Snapshot {
    let own = Own {
        namespace: "shop".into(),
        workload_name: "webapp-1".into(),
        service_account: "webapp".into(),
        network: "".into(),
        cluster_id: "Kubernetes".into(),
        mesh_domain: "mesh.internal".into(),
        trust_domain: "mesh.example".parse().unwrap(),
    };
    let mut world = Snapshot::empty(AddressPlan::default(), own);
    let mut resources = workloads;
    resources.push(service());
    assert!(world.apply(type_url::ADDRESS, resources, &[]).is_empty());
    assert!(world.apply(type_url::AUTHORIZATION, policies, &[]).is_empty());
    world
}

fn vip() -> IpAddr {
    VIP.parse().unwrap()
}

/// Hops as "result:code" words, of everything before the probe.
fn hops(world: &Snapshot, host: &str, port: u16, resolved: Result<Vec<IpAddr>, String>) -> String {
    let mut walk = Walk::default();
    let me: SpiffeId = "spiffe://mesh.example/ns/shop/sa/webapp".parse().unwrap();
    if let Some(vip) = name(&mut walk, world, host, &resolved, None)
        && let Some(service) = virtual_address(&mut walk, world, vip, port)
    {
        let endpoints = Endpoints::of(world, &service, vip, port);
        policy(&mut walk, world, Some(&me), &endpoints);
        if !walk.broken {
            usable(&mut walk, &endpoints);
        }
    }
    let word = |hop: &Hop| match &hop.finding {
        Some(finding) => finding.code.clone(),
        None => hop.result.clone(),
    };
    walk.hops.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_first_broken_hop_is_named() {
    let good = || {
        vec![
            workload("catalog-1", "10.0.0.1", true),
            workload("catalog-2", "10.0.0.2", false),
        ]
    };
    let sick = || vec![workload("catalog-2", "10.0.0.2", false)];
    let here = || Ok(vec![vip()]);
    let elsewhere = || Ok(vec!["192.0.2.1".parse().unwrap()]);
    let no = || Err("Name or service not known".to_owned());
    let plain = world(good(), vec![]);
    assert_eq!(hops(&plain, HOST, 80, here()), "ok ok ok ok");
    assert_eq!(hops(&plain, VIP, 80, Ok(vec![])), "skipped ok ok ok");
    assert_eq!(
        hops(&plain, "catalog", 80, here()),
        "ok ok ok ok",
        "completed by the host's search list"
    );
    assert_eq!(
        hops(&plain, "nothing.shop.svc.mesh.internal", 80, no()),
        "TMB0401"
    );
    assert_eq!(hops(&plain, "example.org", 80, elsewhere()), "TMB0401");
    assert_eq!(hops(&plain, HOST, 80, no()), "TMB0402");
    assert_eq!(hops(&plain, HOST, 80, elsewhere()), "TMB0402");
    assert_eq!(hops(&plain, HOST, 81, here()), "ok TMB0403");
    assert_eq!(hops(&plain, "240.240.0.77", 80, Ok(vec![])), "skipped TMB0401");
    assert_eq!(
        hops(&world(good(), vec![deny()]), HOST, 80, here()),
        "ok ok TMB0404"
    );
    assert_eq!(hops(&world(sick(), vec![]), HOST, 80, here()), "ok ok ok TMB0405");
    assert_eq!(
        hops(&world(sick(), vec![deny()]), HOST, 80, here()),
        "ok ok TMB0404",
        "a policy is named before health"
    );
    assert_eq!(
        hops(&world(vec![], vec![]), HOST, 80, here()),
        "ok ok skipped TMB0405"
    );
}

#[test]
fn a_policy_is_named_with_the_command_that_shows_it() {
    let world = world(vec![workload("catalog-1", "10.0.0.1", true)], vec![deny()]);
    let service = Arc::clone(world.service_by_address(vip()).unwrap());
    let endpoints = Endpoints::of(&world, &service, vip(), 80);
    let mut walk = Walk::default();
    policy(&mut walk, &world, None, &endpoints);
    let finding = walk.hops[0].finding.clone().unwrap();
    assert!(finding.cause.contains("shop/no-webapp"), "{finding:?}");
    assert!(
        finding.next.contains("tombolo get ap -n shop no-webapp"),
        "{finding:?}"
    );
}

#[test]
fn what_endpoints_answer() {
    let world = world(vec![workload("catalog-1", "10.0.0.1", true)], vec![]);
    let destination = resolve(&world, &world.source(), vip(), 80).unwrap();
    let candidate = destination.candidates[0].clone();
    let peer: SpiffeId = "spiffe://mesh.example/ns/shop/sa/catalog".parse().unwrap();
    let timeout = || OpenError::Timeout(Duration::from_secs(1));
    let words = |outcomes: Vec<Result<(), OpenError>>| {
        let results: Vec<_> = outcomes
            .into_iter()
            .map(|outcome| ProbeResult {
                candidate: candidate.clone(),
                outcome,
                peer: Some(peer.clone()),
            })
            .collect();
        let mut walk = Walk {
            hops: vec![Hop::default(); 4],
            broken: false,
        };
        peers(&mut walk, &world, &results);
        let answer = walk.finish();
        let word = |hop: &Hop| {
            hop.finding
                .as_ref()
                .map_or(hop.result.clone(), |finding| finding.code.clone())
        };
        format!(
            "{} {} {}",
            word(&answer.hops[4]),
            word(&answer.hops[5]),
            answer.reachable
        )
    };
    assert_eq!(words(vec![Ok(())]), "ok ok true");
    assert_eq!(words(vec![Err(timeout()), Ok(())]), "ok ok true");
    assert_eq!(words(vec![Err(timeout())]), "TMB0406 skipped false");
    assert_eq!(
        words(vec![Err(OpenError::Status(503)), Err(timeout())]),
        "ok TMB0408 false"
    );
    assert_eq!(words(vec![Err(OpenError::Status(401))]), "ok TMB0404 false");
    assert_eq!(
        words(vec![Err(OpenError::Tls(TlsError::NoIdentity))]),
        "TMB0303 skipped false"
    );
    let wrong = tombolo_identity::PeerRefusal::WrongIdentity {
        expected: vec![peer.clone()],
        seen: vec![],
    };
    assert_eq!(
        words(vec![Err(timeout()), Err(OpenError::Tls(TlsError::Peer(wrong)))]),
        "TMB0407 skipped false"
    );
    assert_eq!(words(vec![]), "TMB0406 skipped false");
}

#[test]
fn long_lists_are_cut() {
    assert_eq!(list(1..=3), "1, 2, 3");
    assert_eq!(list(1..=8), "1, 2, 3, 4, 5 and 3 more");
}
