use super::{name::nearest_host, *};
use std::{sync::Arc, time::Duration};
use tombolo_dataplane::{CallError, GatewayTry, ProbeResult};
use tombolo_destination::resolve;
use tombolo_proto::{istio::security, istio::workload as wire, pack, tombolo::v1, type_url, xds::Resource};
use tombolo_snapshot::{Own, Snapshot};
use tombolo_tunnel::{OpenError, ThroughError, TlsError};
use tombolo_types::{AddressPlan, SpiffeId};

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

fn workload_record(name: &str) -> wire::Workload {
    let uid = format!("Kubernetes/networking.istio.io/WorkloadEntry/shop/{name}");
    let ports = wire::PortList {
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
    };
    wire::Workload {
        uid,
        name: name.into(),
        namespace: "shop".into(),
        trust_domain: "mesh.example".into(),
        service_account: "catalog".into(),
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        services: [(format!("shop/{HOST}"), ports)].into_iter().collect(),
        cluster_id: "Kubernetes".into(),
        authorization_policies: vec![],
        ..Default::default()
    }
}

fn as_resource(workload: wire::Workload) -> Resource {
    let uid = workload.uid.clone();
    resource(
        &uid,
        &wire::Address {
            r#type: Some(wire::address::Type::Workload(workload)),
        },
    )
}

fn workload(name: &str, address: &str, healthy: bool) -> Resource {
    let mut workload = workload_record(name);
    workload.addresses = vec![bytes(address)];
    if !healthy {
        workload.status = wire::WorkloadStatus::Unhealthy.into();
    }
    as_resource(workload)
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
fn a_slip_of_a_name_is_answered_with_the_name() {
    let world = world(vec![], vec![]);
    let meant = |host: &str| nearest_host(&world, host);
    for slip in [
        "catlog.shop.svc.mesh.internal",
        "catlog",
        "catalog.shpo.svc.mesh.internal",
        "catalog.elsewhere.svc.mesh.internal",
    ] {
        assert_eq!(meant(slip).as_deref(), Some(HOST), "{slip}");
    }
    for other in ["nothing.shop.svc.mesh.internal", "example.org", ""] {
        assert_eq!(meant(other), None, "{other}");
    }
}

#[test]
fn endpoints_that_are_names_are_no_endpoints() {
    let named = |name: &str| {
        let mut workload = workload_record(name);
        (workload.addresses, workload.hostname) = (vec![], format!("{name}.example.org"));
        as_resource(workload)
    };
    let here = || Ok(vec![vip()]);
    let names = world(vec![named("db-1"), named("db-2")], vec![]);
    assert_eq!(hops(&names, HOST, 80, here()), "ok ok ok TMB0410");
    let mixed = vec![named("db-1"), workload("catalog-1", "10.0.0.1", true)];
    assert_eq!(hops(&world(mixed, vec![]), HOST, 80, here()), "ok ok ok ok");
    let sick = vec![named("db-1"), workload("catalog-1", "10.0.0.1", false)];
    assert_eq!(hops(&world(sick, vec![]), HOST, 80, here()), "ok ok ok TMB0405");
}

#[test]
fn a_name_that_is_not_known_may_be_of_another_cluster() {
    let next = |world: &Snapshot, host: &str| {
        let mut walk = Walk::default();
        name(&mut walk, world, host, &Ok(vec![]), None);
        walk.hops[0].finding.clone().unwrap().next
    };
    let bundle = |trust_domain: &str| {
        let bundle = v1::TrustBundle {
            trust_domain: trust_domain.into(),
            roots_pem: "-".into(),
            ..v1::TrustBundle::default()
        };
        resource(trust_domain, &bundle)
    };
    let mut world = world(vec![], vec![]);
    let ledger = "ledger.bank.svc.mesh.internal";
    world.apply(type_url::TRUST_BUNDLE, vec![bundle("mesh.example")], &[]);
    assert!(!next(&world, ledger).contains("exported"));
    world.apply(type_url::TRUST_BUNDLE, vec![bundle("other.example")], &[]);
    assert!(next(&world, ledger).contains("exported"));
    for host in ["ledger.example", "catlog.shop.svc.mesh.internal"] {
        assert!(!next(&world, host).contains("exported"), "{host}");
    }
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
    let timeout = || CallError::from(OpenError::Timeout(Duration::from_secs(1)));
    let direct = |error: OpenError| Err(CallError::from(error));
    let words = |outcomes: Vec<Result<(), CallError>>| {
        let result = |outcome| ProbeResult {
            candidate: candidate.clone(),
            outcome,
            peer: Some(peer.clone()),
            gateways: vec![],
        };
        judged(&world, &outcomes.into_iter().map(result).collect::<Vec<_>>()).0
    };
    assert_eq!(words(vec![Ok(())]), "skipped ok ok");
    assert_eq!(words(vec![Err(timeout()), Ok(())]), "skipped ok ok");
    assert_eq!(words(vec![Err(timeout())]), "skipped TMB0406 skipped");
    assert_eq!(
        words(vec![direct(OpenError::Status(503)), Err(timeout())]),
        "skipped ok TMB0408"
    );
    assert_eq!(words(vec![direct(OpenError::Status(401))]), "skipped ok TMB0404");
    assert_eq!(
        words(vec![direct(OpenError::Tls(TlsError::NoIdentity))]),
        "skipped TMB0303 skipped"
    );
    let wrong = tombolo_identity::PeerRefusal::WrongIdentity {
        expected: vec![peer.clone()],
        seen: vec![],
    };
    assert_eq!(
        words(vec![
            Err(timeout()),
            direct(OpenError::Tls(TlsError::Peer(wrong)))
        ]),
        "skipped TMB0407 skipped"
    );
    assert_eq!(words(vec![]), "skipped TMB0406 skipped");
}

/// The last three hops, and the cause and next step of the broken one.
fn judged(world: &Snapshot, results: &[ProbeResult]) -> (String, String) {
    let mut walk = Walk {
        hops: vec![Hop::default(); 4],
        broken: false,
    };
    peers(&mut walk, world, results);
    let answer = walk.finish();
    let word = |hop: &Hop| {
        hop.finding
            .as_ref()
            .map_or(hop.result.clone(), |finding| finding.code.clone())
    };
    let words: Vec<_> = answer.hops[4..].iter().map(word).collect();
    let broken = answer.hops.iter().find_map(|hop| hop.finding.clone());
    assert_eq!(answer.reachable, broken.is_none());
    let said = broken.map_or_else(
        || answer.hops[4].detail.clone(),
        |finding| format!("{} {}", finding.cause, finding.next),
    );
    (words.join(" "), said)
}

#[test]
fn the_gateway_and_the_endpoint_behind_it_are_told_apart() {
    let mut far = workload_record("catalog-1");
    far.network = "west".into();
    let mut world = world(vec![as_resource(far)], vec![]);
    assert_eq!(
        hops(&world, HOST, 80, Ok(vec![vip()])),
        "ok ok ok ok TMB0411",
        "no gateway is known"
    );
    let gateway = |n: u8| v1::NetworkGateway {
        address: format!("192.0.2.{n}"),
        hbone_port: 443,
        trust_domain: "mesh.example".into(),
        namespace: "tombolo-system".into(),
        service_account: "gateway".into(),
        healthy: true,
        uid: format!("gateway-{n}"),
        ..v1::NetworkGateway::default()
    };
    let ways = v1::NetworkGateways {
        network: "west".into(),
        gateways: vec![gateway(1), gateway(2)],
    };
    let rejected = world.apply(type_url::NETWORK_GATEWAYS, vec![resource("west", &ways)], &[]);
    assert!(rejected.is_empty());
    assert_eq!(hops(&world, HOST, 80, Ok(vec![vip()])), "ok ok ok ok");
    let destination = resolve(&world, &world.source(), vip(), 80).unwrap();
    let timeout = || OpenError::Timeout(Duration::from_secs(1));
    use ThroughError::{Endpoint, Gateway};
    let check = |outcomes: &[Result<(), ThroughError>]| {
        let gateways = outcomes.iter().enumerate().map(|(n, outcome)| GatewayTry {
            uid: format!("gateway-{n}").into(),
            gateway: format!("192.0.2.{}:443", n + 1).into(),
            outcome: outcome.clone(),
        });
        let last = outcomes.last().unwrap().clone();
        let result = ProbeResult {
            candidate: destination.candidates[0].clone(),
            outcome: last.map_err(CallError::Through),
            peer: None,
            gateways: gateways.collect(),
        };
        judged(&world, &[result])
    };
    let unreachable = [Err(Gateway(timeout())), Err(Gateway(timeout()))];
    let (words, said) = check(&unreachable);
    assert_eq!(words, "TMB0411 skipped skipped");
    for part in [
        "network west",
        "192.0.2.1:443: no answer",
        "192.0.2.2:443: no answer",
    ] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let (words, said) = check(&[Err(Gateway(OpenError::Status(503)))]);
    assert_eq!(words, "TMB0412 skipped skipped");
    assert!(said.contains("journalctl -u tombolo-gateway"), "{said}");
    assert_eq!(
        check(&[Err(Gateway(OpenError::Status(401)))]).0,
        "TMB0404 skipped skipped"
    );
    // The second one leads there: what breaks is behind it.
    let behind = |error| [Err(Gateway(timeout())), Err(Endpoint(error))];
    assert_eq!(check(&behind(OpenError::Status(401))).0, "ok ok TMB0404");
    assert_eq!(check(&behind(OpenError::Status(503))).0, "ok ok TMB0408");
    let (words, said) = check(&behind(timeout()));
    assert_eq!(words, "ok TMB0406 skipped");
    assert!(said.contains(&format!("{HOST}:80 in network west")), "{said}");
    let (words, said) = check(&[Err(Gateway(timeout())), Ok(())]);
    assert_eq!(words, "ok ok ok");
    assert!(said.contains("192.0.2.2:443: passes the call on"), "{said}");
}

#[test]
fn long_lists_are_cut() {
    assert_eq!(list(1..=3), "1, 2, 3");
    assert_eq!(list(1..=8), "1, 2, 3, 4, 5 and 3 more");
}

/// STRICT, as discovery sends it, for everybody in the namespace shop.
fn strict() -> Resource {
    let rule = security::Rule {
        clauses: vec![security::Clause {
            matches: vec![security::Match {
                not_principals: vec![security::StringMatch {
                    match_type: Some(security::string_match::MatchType::Presence(())),
                }],
                ..Default::default()
            }],
        }],
    };
    let policy = security::Authorization {
        name: "converted_peer_authentication_default".into(),
        namespace: "shop".into(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        rules: vec![rule],
        ..Default::default()
    };
    resource("shop/converted_peer_authentication_default", &policy)
}

#[test]
fn the_guard_is_named_where_plaintext_is_refused() {
    let strict = world(vec![workload("catalog-1", "10.0.0.1", true)], vec![strict()]);
    let open = world(vec![workload("catalog-1", "10.0.0.1", true)], vec![]);
    let address: IpAddr = "10.0.0.1".parse().unwrap();
    let judged = |world: &Snapshot, outcome: plain::Outcome| {
        let mut walk = Walk::default();
        walk.skip("an address was given");
        let plain = plain::Plain::find(world, address, 8080).unwrap();
        plain.judge(&mut walk, world, &outcome);
        let answer = walk.finish();
        let broken = answer.hops.iter().find_map(|hop| hop.finding.clone());
        (answer.reachable, broken.map(|f| (f.code, f.cause, f.next)))
    };
    let (reachable, found) = judged(&strict, Err("refused".into()));
    let (code, cause, next) = found.unwrap();
    assert!(!reachable && code == "TMB0413", "{code}");
    for part in [
        "PeerAuthentication shop/default says STRICT",
        "guard of catalog-1",
        "8080",
    ] {
        assert!(cause.contains(part), "{part}: {cause}");
    }
    assert_eq!(next, format!("Call it by its name: {HOST}:80"));
    // Not guarded there: it is said, and it is reachable.
    assert_eq!(judged(&strict, Ok(())), (true, None));
    assert_eq!(judged(&open, Ok(())), (true, None));
    let (_, found) = judged(&open, Err("refused".into()));
    assert_eq!(found.unwrap().0, "TMB0408");
    assert!(plain::Plain::find(&open, "10.0.0.9".parse().unwrap(), 80).is_none());
}

#[test]
fn an_endpoint_that_only_dials_out_needs_a_session() {
    let mut far = workload_record("catalog-1");
    far.network = "~outbound".into();
    let mut world = world(vec![as_resource(far)], vec![]);
    let ways = v1::NetworkGateways {
        network: "~outbound".into(),
        gateways: vec![v1::NetworkGateway {
            address: "192.0.2.1".into(),
            hbone_port: 443,
            trust_domain: "mesh.example".into(),
            namespace: "tombolo-system".into(),
            service_account: "gateway".into(),
            healthy: true,
            uid: "gateway-1".into(),
            ..v1::NetworkGateway::default()
        }],
    };
    let ways = vec![resource("~outbound", &ways)];
    assert!(world.apply(type_url::NETWORK_GATEWAYS, ways, &[]).is_empty());
    let destination = resolve(&world, &world.source(), vip(), 80).unwrap();
    let result = |error: fn() -> OpenError| ProbeResult {
        candidate: destination.candidates[0].clone(),
        outcome: Err(CallError::Through(ThroughError::Gateway(error()))),
        peer: None,
        gateways: vec![GatewayTry {
            uid: "gateway-1".into(),
            gateway: "192.0.2.1:443".into(),
            outcome: Err(ThroughError::Gateway(error())),
        }],
    };
    let (words, said) = judged(&world, &[result(|| OpenError::Status(503))]);
    assert_eq!(words, "TMB0412 skipped skipped");
    for part in ["192.0.2.1:443", "session", "tombolo status"] {
        assert!(said.contains(part), "{part}: {said}");
    }
}
