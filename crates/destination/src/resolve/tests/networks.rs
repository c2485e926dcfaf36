//! Endpoints of other networks.
use super::*;
use crate::{GatewayHost, fixture::gateway, order_gateways};
use tombolo_types::TrustDomain;

/// `uid@rank xweight [network gateway,gateway authority]` of every candidate, or the reject.
fn lines(world: &World, source: &Source) -> Vec<String> {
    match resolve(world, source, vip(), 80) {
        Ok(found) => found.candidates.iter().map(line).collect(),
        Err(reject) => vec![format!("{:?} {}", reject.class, reject.reason)],
    }
}

fn line(one: &Candidate) -> String {
    let head = format!("{}@{} x{}", one.workload.uid, one.rank, one.weight);
    let Some(via) = &one.via else { return head };
    let gateways: Vec<_> = via
        .gateways
        .iter()
        .map(|gateway| gateway.address.to_string())
        .collect();
    format!(
        "{head} [{} {} {}]",
        via.network,
        gateways.join(","),
        via.authority
    )
}

fn at(region: &str, zone: &str) -> Locality {
    Locality {
        region: region.into(),
        zone: zone.into(),
        subzone: "".into(),
    }
}

/// An endpoint without address in a network.
fn far(n: u8, network: &str, change: impl FnOnce(&mut Workload)) -> Workload {
    changed(n, |w| {
        (w.network, w.addresses) = (network.into(), vec![]);
        change(w);
    })
}

fn split_horizon(network: &str, capacity: u32) -> Workload {
    let mut one = far(9, network, |_| {});
    one.uid = format!("{network}/SplitHorizonWorkload/west/shop/catalog").into();
    one.trust_domain = west();
    one.capacity = capacity;
    one
}

fn west() -> TrustDomain {
    "west.example".parse().unwrap()
}

fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().unwrap()
}

const AUTHORITY: &str = "catalog.shop.svc.mesh.internal:80";

#[test]
fn endpoints_behind_gateways_are_one_candidate_per_network_and_locality() {
    let world = World::new(
        service(),
        [
            far(3, "far", |w| w.capacity = 4),
            workload(1),
            far(2, "far", |_| {}),
            far(4, "far", |w| w.locality = at("eu", "eu-1")),
            far(5, "other", |_| {}),
            // Not in the mesh: nobody terminates an inner connection there.
            far(6, "far", |w| w.tunnel = Tunnel::None),
            far(7, "nowhere", |_| {}),
        ],
    )
    .with_gateways("far", vec![gateway(1)])
    .with_gateways("other", vec![gateway(2)]);
    assert_eq!(
        lines(&world, &source()),
        [
            "uid-1@0 x1".to_owned(),
            format!("uid-4@2 x1 [far 192.0.2.1 {AUTHORITY}]"),
            format!("uid-2@4 x5 [far 192.0.2.1 {AUTHORITY}]"),
            format!("uid-5@4 x1 [other 192.0.2.2 {AUTHORITY}]"),
        ]
    );
    let found = resolve(&world, &source(), vip(), 80).unwrap();
    assert!(
        found.candidates[1..]
            .iter()
            .all(|one| one.address.to_string() == "0.0.0.0:80"),
        "nothing to be dialled by mistake"
    );
}

#[test]
fn what_leads_nowhere() {
    let none = |world: &World, why: &str| {
        assert_eq!(
            lines(world, &source()),
            ["UpstreamUnhealthy no_valid_destination"],
            "{why}"
        )
    };
    none(&World::new(service(), [far(1, "far", |_| {})]), "no gateway");
    let gateways = |world: World| world.with_gateways("far", vec![gateway(1)]);
    none(
        &gateways(World::new(service(), [split_horizon("far", 3)])),
        "nobody could prove to be an endpoint",
    );
    let foreign = Service {
        subject_alt_names: vec![id("mesh.example/ns/shop/sa/catalog")],
        ..service()
    };
    none(
        &gateways(World::new(foreign, [split_horizon("far", 3)])),
        "only identities of another trust domain",
    );
    let nameless = far(1, "far", |w| w.service_account = "Not A Name".into());
    none(&gateways(World::new(service(), [nameless])), "no identity");
    let mut strict = service();
    strict.load_balancing = LoadBalancing {
        scopes: vec![Scope::Network],
        mode: Mode::Strict,
        allow_unhealthy: false,
    };
    assert_eq!(
        lines(&gateways(World::new(strict, [far(1, "far", |_| {})])), &source()),
        ["UpstreamUnhealthy no_healthy_endpoint"],
        "this network only"
    );
}

#[test]
fn inner_identities() {
    let spread = Service {
        subject_alt_names: vec![
            id("west.example/ns/shop/sa/catalog"),
            id("mesh.example/ns/shop/sa/old"),
        ],
        ..service()
    };
    let mut named = split_horizon("far", 3);
    named.hostname = "catalog.shop.svc.west.internal".into();
    let other = far(2, "lan", |w| w.service_account = "other".into());
    let world = World::new(spread, [named, far(1, "lan", |_| {}), other])
        .with_gateways("far", vec![gateway(1)])
        .with_gateways("lan", vec![gateway(2)]);
    let found = resolve(&world, &source(), vip(), 80).unwrap();
    let ids = |network: &str| {
        let of = |one: &&Candidate| *one.workload.network == *network;
        let one = found.candidates.iter().find(of).unwrap();
        let ids: Vec<_> = one.expected.iter().map(ToString::to_string).collect();
        (ids.join(" "), one.via.as_ref().unwrap().authority.to_string())
    };
    assert_eq!(
        ids("far"),
        (
            "spiffe://west.example/ns/shop/sa/catalog".into(),
            "catalog.shop.svc.west.internal:80".into()
        ),
        "a record of a whole service has no identity, its mesh another domain"
    );
    assert_eq!(
        ids("lan"),
        (
            "spiffe://mesh.example/ns/shop/sa/catalog spiffe://mesh.example/ns/shop/sa/other \
             spiffe://mesh.example/ns/shop/sa/old"
                .into(),
            AUTHORITY.into()
        )
    );
}

#[test]
fn nearest_first() {
    use Scope::{Network, Region, Zone};
    let everybody = || {
        [
            far(6, "us", |w| w.locality = at("us", "us-1")),
            far(5, "eu", |w| w.locality = at("eu", "eu-2")),
            far(4, "eu", |w| w.locality = at("eu", "eu-1")),
            far(3, "net~outbound", |w| w.locality = at("us", "us-1")),
            changed(2, |w| w.locality = at("us", "us-1")),
            changed(1, |w| w.locality = at("eu", "eu-1")),
        ]
    };
    let world = |mode, scopes: &[Scope]| {
        let mut service = service();
        service.load_balancing = LoadBalancing {
            scopes: scopes.to_vec(),
            mode,
            allow_unhealthy: false,
        };
        let world = World::new(service, everybody());
        ["us", "eu", "net", "net~outbound"]
            .into_iter()
            .fold(world, |world, network| {
                world.with_gateways(network, vec![gateway(1)])
            })
    };
    let short = |world: &World, source: &Source| {
        let found = resolve(world, source, vip(), 80).unwrap();
        let mut texts: Vec<_> = found
            .candidates
            .iter()
            .map(|one| {
                let via = if one.via.is_some() { "~" } else { "" };
                let name = one.workload.uid.trim_start_matches("uid-");
                (one.rank, format!("{name}{via}@{}", one.rank))
            })
            .collect();
        texts.sort();
        texts
            .into_iter()
            .map(|(_, text)| text)
            .collect::<Vec<_>>()
            .join(" ")
    };
    let default = world(Mode::Unspecified, &[]);
    assert_eq!(short(&default, &source()), "1@0 2@0 3~@0 4~@2 5~@3 6~@4");
    let outbound = Source {
        network: "net~outbound".into(),
        ..source()
    };
    assert_eq!(
        short(&default, &outbound),
        "1~@0 2~@0 3~@0 4~@2 5~@3 6~@4",
        "a member that only dials out reaches even its home by gateways"
    );
    let close = world(Mode::Failover, &[Network, Region, Zone]);
    assert_eq!(short(&close, &source()), "1@0 2@2 3~@2 4~@3 5~@4 6~@5");
    let zones = world(Mode::Failover, &[Region, Zone]);
    assert_eq!(short(&zones, &source()), "1@0 4~@0 5~@1 2@2 3~@2 6~@2");
}

/// (healthy, unhealthy) endpoints here -> does the nearest other network help?
#[test]
fn too_little_is_left_here() {
    let table = [(1, 0, false), (1, 1, false), (2, 3, true), (1, 9, true)];
    for (up, down, helped) in table {
        let near = (0..up)
            .map(workload)
            .chain((up..up + down).map(|n| changed(n, |w| w.healthy = false)));
        let near_far = far(200, "eu", |w| w.locality = at("eu", "eu-2"));
        let all = near.chain([near_far, far(201, "us", |_| {})]);
        let world = World::new(service(), all)
            .with_gateways("eu", vec![gateway(1)])
            .with_gateways("us", vec![gateway(2)]);
        let found = resolve(&world, &source(), vip(), 80).unwrap();
        let rank = |network: &str| {
            let of = |one: &&Candidate| *one.workload.network == *network;
            found.candidates.iter().find(of).unwrap().rank
        };
        assert_eq!(rank("eu") == 0, helped, "{up} up, {down} down");
        assert_eq!(rank("us"), 4);
    }
}

#[test]
fn gateways_in_order() {
    let place = |n, locality, healthy| Gateway {
        locality,
        healthy,
        ..gateway(n)
    };
    let all = vec![
        place(1, at("eu", "eu-1"), false),
        place(2, at("", ""), true),
        place(3, at("eu", "eu-2"), true),
        place(4, at("eu", "eu-1"), true),
        place(5, at("eu", "eu-1"), true),
    ];
    let world = World::new(service(), [far(1, "far", |_| {})]).with_gateways("far", all);
    let found = resolve(&world, &source(), vip(), 80).unwrap();
    let via = found.candidates[0].via.as_ref().unwrap();
    let names = |order: Vec<usize>| {
        let names = order.into_iter().map(|i| via.gateways[i].address.to_string());
        names
            .map(|name| name.replace("192.0.2.", ""))
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(names((0..5).collect()), "4 5 3 2 1");
    let is = |n: u8| move |gateway: &Gateway| *gateway.uid == *format!("gateway-{n}");
    let idle = |_: &Gateway| 0;
    assert_eq!(
        names(order_gateways(via, &|g| u32::from(is(4)(g)), &|_| false, 1)),
        "5 4 3 2 1"
    );
    assert_eq!(names(order_gateways(via, &idle, &is(5), 1)), "4 3 2 1 5");
    let first = |seed| order_gateways(via, &idle, &|_| false, seed)[0];
    let fours = (0..1000).filter(|&seed| first(seed) == 0).count();
    assert!((400..600).contains(&fours), "equal gateways share: {fours}");
}

/// istiod names one gateway in the workload and lists none.
#[test]
fn a_gateway_that_the_workload_names() {
    let named = NetworkAddress {
        network: "far".into(),
        address: IpAddr::from([192, 0, 2, 7]),
    };
    let endpoint = far(1, "far", |w| {
        w.gateway = Some(GatewayAddress {
            target: GatewayTarget::Address(named.clone()),
            hbone_port: 15010,
        });
    });
    let mut record = changed(2, |w| {
        (w.network, w.addresses) = ("far".into(), vec![named.address]);
        w.service_account = "gateway".into();
    });
    record.services.clear();
    let world = World::new(service(), [endpoint.clone(), record]);
    let found = resolve(&world, &source(), vip(), 80).unwrap();
    let gateway = &found.candidates[0].via.as_ref().unwrap().gateways[0];
    assert_eq!(
        (
            &gateway.address,
            gateway.hbone_port,
            gateway.expected[0].to_string()
        ),
        (
            &GatewayHost::Address(named.address),
            15010,
            "spiffe://mesh.example/ns/shop/sa/gateway".into()
        )
    );
    assert_eq!(
        lines(&World::new(service(), [endpoint]), &source()),
        ["UpstreamUnhealthy no_valid_destination"],
        "nobody says who the gateway is"
    );
}

fn any_endpoint() -> impl Strategy<Value = Workload> {
    (
        any::<u8>(),
        prop::bool::weighted(0.7),
        0..4u32,
        prop::sample::select(vec!["net", "net~outbound", "far", "nowhere"]),
        prop::sample::select(vec!["eu", "us", ""]),
        any::<bool>(),
        prop::sample::select(vec!["catalog", "other"]),
    )
        .prop_map(|(n, healthy, capacity, network, region, addressed, account)| {
            changed(n, |w| {
                (w.healthy, w.capacity, w.network) = (healthy, capacity, network.into());
                (w.locality, w.service_account) = (at(region, ""), account.into());
                if !addressed {
                    w.addresses.clear();
                }
            })
        })
}

proptest! {
    /// Against the plain definition: what is dialled, what it weighs, whom it may be, and that nothing comes twice.
    #[test]
    fn candidates_of_all_networks(endpoints in prop::collection::vec(any_endpoint(), 0..24), outbound: bool) {
        let network = if outbound { "net~outbound" } else { "net" };
        let source = Source { network: network.into(), ..source() };
        let usable = |w: &&Workload| w.healthy && w.capacity > 0;
        let direct = |w: &&Workload| !outbound && &*w.network == "net" && !w.addresses.is_empty();
        let behind = |w: &&Workload| match &*w.network {
            "net" => outbound,
            "net~outbound" | "far" => true,
            _ => false,
        };
        let all = || endpoints.iter().filter(usable);
        let wanted: u64 = all().filter(|w| direct(w) || behind(w)).map(|w| u64::from(w.capacity)).sum();
        let groups: std::collections::BTreeSet<_> = all().filter(behind)
            .map(|w| (w.network.to_string(), w.locality.region.to_string())).collect();
        let world = World::new(service(), endpoints.clone())
            .with_gateways("net", vec![gateway(1)])
            .with_gateways("far", vec![gateway(2)]);
        match resolve(&world, &source, vip(), 80) {
            Err(reject) => {
                prop_assert_eq!(wanted, 0);
                let elsewhere = all().any(|w| &*w.network == "nowhere");
                prop_assert_eq!(reject.reason, if elsewhere { "no_valid_destination" } else { "no_healthy_endpoint" });
            }
            Ok(found) => {
                let candidates = &found.candidates;
                prop_assert_eq!(candidates.iter().map(|one| u64::from(one.weight)).sum::<u64>(), wanted);
                prop_assert!(candidates.is_sorted_by_key(|one| one.rank));
                prop_assert_eq!(candidates.iter().filter(|one| one.via.is_some()).count(), groups.len());
                for one in candidates {
                    let near = one.workload.network.starts_with("net");
                    prop_assert!(one.rank == 0 || !near, "the own network is nearest");
                    let Some(via) = &one.via else {
                        prop_assert_eq!(one.expected.len(), 1);
                        continue;
                    };
                    prop_assert_eq!(&via.network, &one.workload.network);
                    prop_assert!(one.address.ip().is_unspecified() && !via.gateways.is_empty());
                    let members: std::collections::BTreeSet<_> = all()
                        .filter(|w| w.network == via.network && w.locality == one.workload.locality)
                        .map(|w| w.identity().unwrap().to_string()).collect();
                    let expected: std::collections::BTreeSet<_> = one.expected.iter().map(ToString::to_string).collect();
                    prop_assert_eq!(expected, members);
                }
            }
        }
    }
}

/// An endpoint for the property below: place (0 here, 1 here dialling out only, 2 and 3 elsewhere), zone, capacity,
/// healthy.
type Drawn = (u8, u8, u32, bool);

fn of(n: usize, (place, zone, capacity, healthy): Drawn) -> Workload {
    let zone = at("eu", ["eu-1", "eu-2"][usize::from(zone % 2)]);
    let n = u8::try_from(n).unwrap();
    let mut one = match place {
        0 => workload(n),
        1 => far(n, "net~outbound", |_| {}),
        2 => far(n, "eu", |_| {}),
        _ => far(n, "us", |w| w.locality = at("us", "us-1")),
    };
    if place < 3 {
        one.locality = zone;
    }
    (one.capacity, one.healthy) = (capacity, healthy);
    one
}

proptest! {
    /// Whoever is healthy can be reached, with the weight of its capacity; who is near comes first, unless too little
    /// is left here, and then near and far share by weight: what comes back bit by bit gets load bit by bit.
    #[test]
    fn the_choice_across_networks(all in prop::collection::vec((0..4u8, any::<u8>(), 0..4u32, any::<bool>()), 0..24)) {
        let workloads = all.iter().enumerate().map(|(n, drawn)| of(n, *drawn));
        let world = ["net", "eu", "us"].into_iter().fold(World::new(service(), workloads), |world, network| {
            world.with_gateways(network, vec![gateway(1)])
        });
        let usable = |drawn: &&Drawn| drawn.3 && drawn.2 > 0;
        let sum = |near: bool, usable_only: bool| -> u64 {
            let of = all.iter().filter(|one| (one.0 < 2) == near && (!usable_only || usable(one)));
            of.map(|one| u64::from(one.2)).sum()
        };
        let found = resolve(&world, &source(), vip(), 80);
        if all.iter().find(usable).is_none() {
            prop_assert!(found.is_err());
            return Ok(());
        }
        let found = found.unwrap().candidates;
        let near = |one: &&Candidate| tombolo_types::networks::home_of(&one.workload.network) == "net";
        let weight = |of: &dyn Fn(&&Candidate) -> bool| -> u64 {
            found.iter().filter(of).map(|one| u64::from(one.weight)).sum()
        };
        // Nobody is lost, nobody counts twice.
        prop_assert_eq!(weight(&near), sum(true, true));
        prop_assert_eq!(weight(&|one| !near(one)), sum(false, true));
        prop_assert!(found.iter().all(|one| one.workload.healthy && one.weight > 0));
        // One candidate per network and place behind gateways.
        let mut places: Vec<_> = found.iter().filter(|one| one.via.is_some())
            .map(|one| (&one.workload.network, &one.workload.locality.zone)).collect();
        let count = places.len();
        places.sort();
        places.dedup();
        prop_assert_eq!(count, places.len());
        // Nearest first.
        prop_assert!(found.windows(2).all(|pair| pair[0].rank <= pair[1].rank));
        let best = |of: &dyn Fn(&&Candidate) -> bool| found.iter().filter(of).map(|one| one.rank).min();
        let (near_rank, far_rank) = (best(&near), best(&|one| !near(one)));
        if let (Some(near_rank), Some(far_rank)) = (near_rank, far_rank) {
            let enough = sum(true, true) * 2 >= sum(true, false);
            prop_assert_eq!(near_rank < far_rank, enough);
            prop_assert!(near_rank <= far_rank);
        }
    }
}
