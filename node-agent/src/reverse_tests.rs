use super::*;
use std::net::IpAddr;
use tombolo_destination::Locality;
use tombolo_proto::{istio::workload as wire, pack, tombolo::v1, type_url, xds};
use tombolo_snapshot::Own;
use tombolo_types::AddressPlan;

fn gateway(n: u8) -> Gateway {
    Gateway {
        uid: format!("gateway-{n}").into(),
        address: GatewayHost::Address(IpAddr::from([192, 0, 2, n])),
        hbone_port: 443,
        quic_port: Some(443),
        expected: Arc::new([]),
        cluster: "Kubernetes".into(),
        locality: Locality::default(),
        healthy: true,
        rank: 0,
    }
}

#[tokio::test]
async fn when_a_session_is_made_anew() {
    let now = Instant::now();
    let check = |change: &dyn Fn(&mut Gateway), transport, generation, has_address, quic| {
        let (was, mut is) = (gateway(1), gateway(1));
        change(&mut is);
        judge(&Seen {
            gateway: (&was, &is),
            transport,
            generation: (3, generation),
            has_address,
            silent: false,
            quic,
            now,
        })
    };
    let again = Duration::from_secs(60);
    let quic_at = |silent_until| Quic { again, silent_until };
    let (fresh, silent, over) = (
        quic_at(None),
        quic_at(Some(now + Duration::from_secs(1))),
        quic_at(Some(now)),
    );
    let same = &|_: &mut Gateway| {};
    let (quic, tcp) = (Transport::Quic, Transport::Tcp);
    assert_eq!(check(same, quic, 3, true, fresh), None);
    assert_eq!(
        check(same, quic, 3, false, fresh),
        None,
        "QUIC moves with the host"
    );
    assert_eq!(check(same, tcp, 3, true, silent), None);
    assert_eq!(check(same, tcp, 3, true, over), Some(What::TryQuic));
    assert_eq!(
        check(&|g| g.quic_port = None, quic, 3, true, over),
        Some(What::Renew)
    );
    assert_eq!(check(same, tcp, 3, false, silent), Some(What::Ended));
    assert_eq!(
        check(same, quic, 4, true, silent),
        Some(What::Renew),
        "a new certificate"
    );
    assert_eq!(
        check(&|g| g.hbone_port = 15008, tcp, 3, true, silent),
        Some(What::Renew)
    );
    assert_eq!(
        check(&|g| g.healthy = false, tcp, 3, true, silent),
        None,
        "discovery is no witness of this"
    );
    let mut lost = gateway(1);
    lost.healthy = false;
    let back = judge(&Seen {
        gateway: (&lost, &gateway(1)),
        transport: quic,
        generation: (3, 3),
        has_address: true,
        silent: false,
        quic: silent,
        now,
    });
    assert_eq!(back, Some(What::Renew));
    let same = gateway(1);
    let unheard = |transport| {
        judge(&Seen {
            gateway: (&same, &same),
            transport,
            generation: (3, 3),
            has_address: true,
            silent: true,
            quic: fresh,
            now,
        })
    };
    assert_eq!(unheard(quic), Some(What::TryTcp));
    assert_eq!(unheard(tcp), Some(What::TryQuic), "silence is for QUIC alone");
}

#[tokio::test]
async fn a_silence_is_longer_than_a_round_trip() {
    let start = Instant::now();
    let at = |milliseconds| start + Duration::from_millis(milliseconds);
    let heard = |datagrams, milliseconds| Some((datagrams, Duration::from_millis(milliseconds)));
    let mut ears = Ears::new(start);
    assert!(!ears.is_silent(heard(3, 40), at(250)));
    assert!(!ears.is_silent(heard(3, 40), at(1500)));
    assert!(ears.is_silent(heard(3, 40), at(1750)));
    assert!(!ears.is_silent(heard(4, 40), at(2000)), "heard again");
    assert!(!ears.is_silent(heard(4, 600), at(4000)), "a long way");
    assert!(ears.is_silent(heard(4, 600), at(4250)));
    assert!(!ears.is_silent(None, at(60_000)));
}

fn resource<M: prost::Name>(name: &str, message: &M) -> xds::Resource {
    xds::Resource {
        name: name.into(),
        version: "1".into(),
        resource: Some(pack(message)),
        ..Default::default()
    }
}

fn world(network: &str, gateways: &[(&str, bool)]) -> Snapshot {
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
    let workload = wire::Workload {
        uid: "uid".into(),
        name: "webapp-1".into(),
        namespace: "shop".into(),
        service_account: "webapp".into(),
        trust_domain: "mesh.example".into(),
        network: network.into(),
        ..Default::default()
    };
    let address = wire::Address {
        r#type: Some(wire::address::Type::Workload(workload)),
    };
    assert_eq!(
        world.apply(type_url::ADDRESS, vec![resource("uid", &address)], &[]),
        []
    );
    let listed = v1::NetworkGateways {
        network: String::new(),
        gateways: gateways
            .iter()
            .map(|(uid, healthy)| v1::NetworkGateway {
                address: "192.0.2.1".into(),
                hbone_port: 443,
                trust_domain: "mesh.example".into(),
                namespace: "tombolo-system".into(),
                service_account: "gateway".into(),
                healthy: *healthy,
                uid: (*uid).into(),
                ..Default::default()
            })
            .collect(),
    };
    assert_eq!(
        world.apply(type_url::NETWORK_GATEWAYS, vec![resource("~", &listed)], &[]),
        []
    );
    world
}

#[test]
fn which_gateways_are_wanted() {
    let uids = |world: &Snapshot, held: &str| {
        let (network, gateways) = wanted(world, |uid| uid == held).unwrap();
        let uids: Vec<_> = gateways.iter().map(|one| one.uid.to_string()).collect();
        (network.map(|network| network.to_string()), uids.join(" "))
    };
    let listed = [("a", true), ("b", false), ("c", true)];
    assert_eq!(uids(&world("", &listed), ""), (None, String::new()));
    let outbound = world("~outbound", &listed);
    assert_eq!(uids(&outbound, ""), (Some(String::new()), "a c".into()));
    // A session is kept, whatever discovery thinks of the gateway.
    assert_eq!(uids(&outbound, "b"), (Some(String::new()), "a b c".into()));
    let own = outbound.own().clone();
    assert!(
        wanted(&Snapshot::empty(AddressPlan::default(), own), |_| false).is_none(),
        "not known yet"
    );
}

#[test]
fn a_host_that_nobody_can_call_says_so() {
    let mut report = Report {
        settled: true,
        ..Report::default()
    };
    assert!(report.problem().is_none(), "it can be dialled");
    report.network = Some("".into());
    assert!(
        report
            .problem()
            .unwrap()
            .cause
            .contains("no gateway of the default network")
    );
    let held = |transport| Held {
        gateway: "192.0.2.1:443".into(),
        transport,
        problem: "no answer within 3s".into(),
    };
    report.gateways.insert("a".into(), held(None));
    let problem = report.problem().unwrap();
    assert_eq!(problem.code, Code::NoReverseSession);
    assert!(problem.cause.contains("192.0.2.1:443: no answer"), "{problem}");
    report.settled = false;
    assert!(report.problem().is_none(), "it has just started");
    report.settled = true;
    report.gateways.insert("b".into(), held(Some(Transport::Quic)));
    assert!(report.problem().is_none(), "one is enough");
}
