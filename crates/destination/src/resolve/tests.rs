use super::*;
use crate::{
    GatewayAddress, GatewayTarget,
    fixture::{World, changed, port, service, source, vip, workload},
};
use proptest::prelude::*;

mod networks;

/// Resolves port 80 of the service with these endpoints and gives `uid-n@rank -> address` lines, or the reject.
fn run(service: Service, workloads: Vec<Workload>, port: u16) -> Vec<String> {
    let world = World::new(service, workloads);
    match resolve(&world, &source(), vip(), port) {
        Ok(found) => found
            .candidates
            .iter()
            .map(|one| {
                format!(
                    "{}@{} {} x{}",
                    one.workload.uid, one.rank, one.address, one.weight
                )
            })
            .collect(),
        Err(reject) => vec![format!("{:?} {}", reject.class, reject.reason)],
    }
}

/// Checks what one endpoint, changed, gives at port 80.
fn check(what: &str, change: impl FnOnce(&mut Workload), expected: &str) {
    assert_eq!(run(service(), vec![changed(1, change)], 80), [expected], "{what}");
}

#[test]
fn one_endpoint() {
    const NONE: &str = "UpstreamUnhealthy no_healthy_endpoint";
    const ELSEWHERE: &str = "UpstreamUnhealthy no_valid_destination";
    let key = service().key;
    check("as it is", |_| {}, "uid-1@0 10.0.0.1:8080 x1");
    check(
        "own port map",
        |w| _ = w.services.insert(key.clone(), vec![port(80, 9090)]),
        "uid-1@0 10.0.0.1:9090 x1",
    );
    check(
        "map of other port",
        |w| _ = w.services.insert(key.clone(), vec![port(81, 9090)]),
        "uid-1@0 10.0.0.1:8080 x1",
    );
    check(
        "map without target",
        |w| _ = w.services.insert(key.clone(), vec![port(80, 0)]),
        "uid-1@0 10.0.0.1:8080 x1",
    );
    check("capacity", |w| w.capacity = 7, "uid-1@0 10.0.0.1:8080 x7");
    check("capacity 0", |w| w.capacity = 0, NONE);
    check("unhealthy", |w| w.healthy = false, NONE);
    check("no address", |w| w.addresses.clear(), NONE);
    check("no endpoint", |w| w.services.clear(), NONE);
    check("no identity", |w| w.service_account = "Not A Name".into(), NONE);
    check("other network", |w| w.network = "far".into(), ELSEWHERE);
    let gateway = |w: &mut Workload| {
        w.network = "far".into();
        let address = NetworkAddress {
            network: "far".into(),
            address: vip(),
        };
        w.gateway = Some(GatewayAddress {
            target: GatewayTarget::Address(address),
            hbone_port: 15008,
        });
    };
    check("a gateway that nobody knows", gateway, ELSEWHERE);
    check(
        "unhealthy in another network",
        |w| (w.network, w.healthy) = ("far".into(), false),
        NONE,
    );
    let (v4, v6): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap());
    check(
        "IPv6 only",
        |w| w.addresses = vec![v6],
        "uid-1@0 [fd00::1]:8080 x1",
    );
    check(
        "family of the virtual address",
        |w| w.addresses = vec![v6, v4],
        "uid-1@0 10.0.0.1:8080 x1",
    );
}

#[test]
fn addresses_ports_and_visibility() {
    let one = || vec![workload(1)];
    assert_eq!(run(service(), one(), 82), ["NoRoute unknown_port"]);
    assert_eq!(
        run(service(), one(), 81),
        ["UpstreamUnhealthy no_healthy_endpoint"],
        "a named target port"
    );
    let mut named = workload(2);
    named.services.insert(service().key, vec![port(81, 7070)]);
    assert_eq!(
        run(service(), vec![workload(1), named], 81),
        ["uid-2@0 10.0.0.2:7070 x1"]
    );
    let elsewhere = Service {
        addresses: Vec::new(),
        ..service()
    };
    assert_eq!(run(elsewhere, one(), 80), ["NoRoute unknown_address"]);
    let mut hidden = Service {
        visibility: Visibility::Namespace,
        ..service()
    };
    assert_eq!(run(hidden.clone(), one(), 80), ["uid-1@0 10.0.0.1:8080 x1"]);
    hidden.key.namespace = "bank".into();
    assert_eq!(run(hidden, one(), 80), ["NoRoute unknown_address"]);
    let mut any_health = service();
    any_health.load_balancing.allow_unhealthy = true;
    let unhealthy = changed(1, |w| w.healthy = false);
    assert_eq!(run(any_health, vec![unhealthy], 80), ["uid-1@0 10.0.0.1:8080 x1"]);
}

/// Endpoints in order of distance from the source (`eu/eu-1/rack-1`, node "", network `net`).
fn placed() -> Vec<Workload> {
    [
        ("eu", "eu-1", "rack-1"),
        ("eu", "eu-1", "rack-2"),
        ("eu", "eu-2", "rack-1"),
        ("us", "eu-1", "rack-1"),
    ]
    .into_iter()
    .zip(1..=4)
    .map(|((region, zone, subzone), n)| {
        let locality = Locality {
            region: region.into(),
            zone: zone.into(),
            subzone: subzone.into(),
        };
        changed(n, |w| w.locality = locality)
    })
    .rev()
    .collect()
}

#[test]
fn ranks() {
    use Scope::{Cluster, Network, Node, Region, Subzone, Zone};
    // (mode, scopes, `uid@rank` in order)
    let table: [(Mode, &[Scope], &[&str]); 10] = [
        (Mode::Unspecified, &[Region], &["4@0", "3@0", "2@0", "1@0"]),
        (Mode::Passthrough, &[Region], &["4@0", "3@0", "2@0", "1@0"]),
        (Mode::Failover, &[], &["4@0", "3@0", "2@0", "1@0"]),
        (
            Mode::Failover,
            &[Region, Zone, Subzone],
            &["1@0", "2@1", "3@2", "4@3"],
        ),
        // Only leading scopes count: the fourth is in the same zone and rack by name alone.
        (Mode::Failover, &[Zone, Region], &["2@0", "1@0", "4@1", "3@2"]),
        (
            Mode::Failover,
            &[Node, Cluster, Region],
            &["3@0", "2@0", "1@0", "4@1"],
        ),
        (Mode::Failover, &[Network, Region], &["3@0", "2@0", "1@0", "4@1"]),
        (Mode::Strict, &[Region, Zone], &["2@0", "1@0"]),
        (Mode::Strict, &[Network, Subzone], &["4@0", "3@0", "1@0"]),
        (Mode::Strict, &[], &["4@0", "3@0", "2@0", "1@0"]),
    ];
    for (mode, scopes, expected) in table {
        let mut service = service();
        service.load_balancing = LoadBalancing {
            scopes: scopes.to_vec(),
            mode,
            allow_unhealthy: false,
        };
        let lines = run(service, placed(), 80);
        let short: Vec<&str> = lines
            .iter()
            .map(|line| line.strip_prefix("uid-").unwrap().split(' ').next().unwrap())
            .collect();
        assert_eq!(short, expected, "{mode:?} {scopes:?}");
    }
    let mut strict = service();
    strict.load_balancing = LoadBalancing {
        scopes: vec![Region],
        mode: Mode::Strict,
        allow_unhealthy: false,
    };
    assert_eq!(
        run(strict, placed().drain(..1).collect(), 80),
        ["UpstreamUnhealthy no_healthy_endpoint"]
    );
}

#[test]
fn a_leading_network_scope_beats_all_others() {
    let balancing = LoadBalancing {
        scopes: vec![Scope::Network, Scope::Region, Scope::Zone],
        mode: Mode::Failover,
        allow_unhealthy: false,
    };
    let distance = |network: &str, region: &str, zone: &str| {
        let locality = Locality {
            region: region.into(),
            zone: zone.into(),
            subzone: "".into(),
        };
        Scale::new(&balancing).distance(
            &source(),
            &changed(1, |w| (w.network, w.locality) = (network.into(), locality)),
        )
    };
    assert_eq!(distance("net", "eu", "eu-1"), Some(0));
    assert_eq!(distance("net", "eu", "x"), Some(1));
    assert_eq!(distance("net", "us", "x"), Some(2));
    assert_eq!(distance("far", "eu", "eu-1"), Some(3));
    assert_eq!(distance("far", "eu", "x"), Some(4));
    assert_eq!(distance("far", "us", "x"), Some(5));
}

#[test]
fn expected_identities() {
    let ids = |service: Service| {
        let world = World::new(
            service,
            [
                workload(1),
                workload(2),
                changed(3, |w| w.service_account = "other".into()),
            ],
        );
        let found = resolve(&world, &source(), vip(), 80).unwrap();
        let texts = |one: &Candidate| {
            one.expected
                .iter()
                .map(|id| id.service_account.to_string())
                .collect::<Vec<_>>()
        };
        (found.candidates.iter().map(texts).collect::<Vec<_>>(), found)
    };
    let (own, found) = ids(service());
    assert_eq!(own, [["catalog"], ["catalog"], ["other"]]);
    assert_eq!(
        found.candidates[0].workload.identity().unwrap().to_string(),
        "spiffe://mesh.example/ns/shop/sa/catalog"
    );
    let more = ["old", "catalog"].map(|sa| format!("spiffe://mesh.example/ns/shop/sa/{sa}").parse().unwrap());
    let (own, found) = ids(Service {
        subject_alt_names: more.to_vec(),
        ..service()
    });
    assert_eq!(
        own,
        [
            vec!["catalog", "old"],
            vec!["catalog", "old"],
            vec!["other", "old", "catalog"]
        ]
    );
    assert!(
        Arc::ptr_eq(&found.candidates[0].expected, &found.candidates[1].expected),
        "made once for both"
    );
}

#[test]
fn workloads_directly() {
    let world = World::new(service(), [workload(1), changed(2, |w| w.healthy = false)]);
    let at = |network: &str, n| NetworkAddress {
        network: network.into(),
        address: IpAddr::from([10, 0, 0, n]),
    };
    let found = resolve_workload(&world, &source(), &at("net", 1), 22).unwrap();
    assert_eq!(
        (
            found.address.to_string(),
            found.hbone.port(),
            found.expected.len()
        ),
        ("10.0.0.1:22".into(), 15008, 1)
    );
    let reason = |address| {
        resolve_workload(&world, &source(), &address, 22)
            .unwrap_err()
            .reason
    };
    assert_eq!(reason(at("net", 2)), "no_healthy_endpoint");
    assert_eq!(reason(at("far", 1)), "unknown_address");
    let far = World::new(service(), [changed(1, |w| w.network = "far".into())]);
    assert_eq!(
        resolve_workload(&far, &source(), &at("far", 1), 22)
            .unwrap_err()
            .reason,
        "no_valid_destination"
    );
}

fn any_workload() -> impl Strategy<Value = Workload> {
    let text = |options: &'static [&'static str]| prop::sample::select(options);
    (
        any::<u8>(),
        any::<bool>(),
        0..4u32,
        text(&["net", "far"]),
        text(&["eu", "us"]),
        text(&["eu-1", "eu-2"]),
        any::<bool>(),
    )
        .prop_map(|(n, healthy, capacity, network, region, zone, addressed)| {
            let mut one = workload(n);
            (one.healthy, one.capacity, one.network) = (healthy, capacity, network.into());
            one.locality = Locality {
                region: region.into(),
                zone: zone.into(),
                subzone: "".into(),
            };
            if !addressed {
                one.addresses.clear();
            }
            one
        })
}

proptest! {
    #[test]
    fn candidates_are_exactly_the_usable_endpoints(
        workloads in prop::collection::vec(any_workload(), 0..20),
        scopes in prop::collection::vec(prop::sample::select(vec![Scope::Network, Scope::Region, Scope::Zone]), 0..4),
        strict: bool,
        allow_unhealthy: bool,
    ) {
        let mut service = service();
        let mode = if strict { Mode::Strict } else { Mode::Failover };
        service.load_balancing = LoadBalancing { scopes: scopes.clone(), mode, allow_unhealthy };
        let near = |w: &Workload, scope: &Scope| match scope {
            Scope::Network => true,
            Scope::Region => &*w.locality.region == "eu",
            Scope::Zone | Scope::Subzone | Scope::Node | Scope::Cluster => &*w.locality.zone == "eu-1",
        };
        let usable: Vec<&Workload> = workloads.iter().filter(|w| {
            (w.healthy || allow_unhealthy) && w.capacity > 0 && &*w.network == "net" && !w.addresses.is_empty()
                && (!strict || scopes.iter().all(|scope| near(w, scope)))
        }).collect();
        let world = World::new(service, workloads.clone());
        match resolve(&world, &source(), vip(), 80) {
            Err(reject) => {
                prop_assert!(usable.is_empty());
                prop_assert_eq!(reject.class, RejectClass::UpstreamUnhealthy);
            }
            Ok(found) => {
                prop_assert_eq!(found.candidates.len(), usable.len());
                prop_assert!(found.candidates.is_sorted_by_key(|one| one.rank));
                for one in &found.candidates {
                    let matched = scopes.iter().take_while(|scope| near(&one.workload, scope)).count();
                    prop_assert_eq!(one.rank as usize, scopes.len() - matched);
                    prop_assert!(one.weight > 0 && !one.expected.is_empty());
                    prop_assert_eq!(one.address.ip(), one.hbone.ip());
                }
            }
        }
    }
}
