//! Gateways and what lies behind them.
use super::*;
use tombolo_destination::{GatewayHost, resolve_workload};

pub(crate) fn gateway(n: u8) -> v1::NetworkGateway {
    v1::NetworkGateway {
        address: format!("192.0.2.{n}"),
        hbone_port: 443,
        trust_domain: "west.example".into(),
        namespace: "tombolo-system".into(),
        service_account: "gateway".into(),
        cluster_id: "west".into(),
        healthy: n != 2,
        uid: format!("gateway-{n}"),
        ..v1::NetworkGateway::default()
    }
}

pub(crate) fn network(network: &str, gateways: Vec<v1::NetworkGateway>) -> xds::Resource {
    let name = if network.is_empty() { "~" } else { network };
    resource(
        name,
        &v1::NetworkGateways {
            network: network.into(),
            gateways,
        },
    )
}

pub(crate) fn exported(namespace: &str, hostname: &str) -> xds::Resource {
    resource(
        &format!("{namespace}/{hostname}"),
        &v1::ExportedService {
            namespace: namespace.into(),
            hostname: hostname.into(),
        },
    )
}

#[test]
fn what_is_exported() {
    let (mut snapshot, host) = (empty(), "catalog.shop.svc.mesh.internal");
    let key = NamespacedName::new("shop", host);
    assert!(!snapshot.is_exported(&key));
    take(
        &mut snapshot,
        type_url::EXPORTED_SERVICE,
        [exported("shop", host)],
    );
    assert!(snapshot.is_exported(&key));
    let misnamed = xds::Resource {
        name: "shop/other.shop.svc.mesh.internal".into(),
        ..exported("bank", "other.bank.svc.mesh.internal")
    };
    assert_eq!(
        snapshot
            .apply(type_url::EXPORTED_SERVICE, vec![misnamed], &[])
            .len(),
        1
    );
    assert_eq!(snapshot.held(type_url::EXPORTED_SERVICE).len(), 1);
    remove(&mut snapshot, type_url::EXPORTED_SERVICE, &key.to_string());
    assert!(!snapshot.is_exported(&key));
}

#[test]
fn gateways_of_a_network() {
    let mut snapshot = empty();
    let named = v1::NetworkGateway {
        address: "Gw.west.Example".into(),
        hbone_port: 0,
        quic_port: 443,
        ..gateway(1)
    };
    take(
        &mut snapshot,
        type_url::NETWORK_GATEWAYS,
        [
            network("", vec![gateway(1)]),
            network("far", vec![named, gateway(2)]),
        ],
    );
    let [first, second] = snapshot.gateways("far") else {
        panic!("{:?}", snapshot.gateways("far"))
    };
    assert_eq!(
        (&first.address, first.hbone_port, first.quic_port),
        (
            &GatewayHost::Hostname("gw.west.example".parse().unwrap()),
            15008,
            Some(443)
        )
    );
    assert_eq!(
        first.expected[0].to_string(),
        "spiffe://west.example/ns/tombolo-system/sa/gateway"
    );
    assert_eq!(
        (second.healthy, second.hbone_port, second.quic_port),
        (false, 443, None)
    );
    assert_eq!(snapshot.gateways("").len(), 1);
    assert_eq!(snapshot.held(type_url::NETWORK_GATEWAYS).len(), 2);
    remove(&mut snapshot, type_url::NETWORK_GATEWAYS, "~");
    assert!(snapshot.gateways("").is_empty() && snapshot.gateways("far").len() == 2);

    let bad = |change: fn(&mut v1::NetworkGateway)| {
        let mut bad = gateway(1);
        change(&mut bad);
        network("far", vec![gateway(3), bad])
    };
    let bad = vec![
        bad(|g| g.address = "-".into()),
        bad(|g| g.hbone_port = 70_000),
        bad(|g| g.service_account = String::new()),
        resource("far", &v1::NetworkGateways::default()),
    ];
    assert_eq!(snapshot.apply(type_url::NETWORK_GATEWAYS, bad, &[]).len(), 4);
    assert_eq!(snapshot.gateways("far").len(), 2, "what was held stays");
}

/// The record alone says that a member only dials out: then even its home network is behind gateways.
#[test]
fn a_member_that_only_dials_out() {
    let mut snapshot = empty();
    let own = |network: &str| {
        let network = network.to_owned();
        workload("own", |w| {
            (w.name, w.service_account) = ("web-1".into(), "web".into());
            (w.network, w.addresses, w.services) = (network, vec![], [].into());
        })
    };
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [
            service(CATALOG, |s| s.addresses = vec![at([240, 240, 0, 1])]),
            workload("a", |w| {
                let list = w.services.get_mut(CATALOG).unwrap();
                list.ports.push(wds::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 0,
                });
            }),
            own("net"),
        ],
    );
    take(
        &mut snapshot,
        type_url::NETWORK_GATEWAYS,
        [network("net", vec![gateway(2), gateway(1)])],
    );
    let via = |snapshot: &Snapshot| {
        let found = resolve(snapshot, &snapshot.source(), [240, 240, 0, 1].into(), 80).unwrap();
        let [only] = &found.candidates[..] else {
            panic!("{found:?}")
        };
        only.via.as_ref().map(|via| {
            let gateways: Vec<_> = via.gateways.iter().map(|g| g.uid.to_string()).collect();
            (via.authority.to_string(), gateways)
        })
    };
    assert_eq!(via(&snapshot), None);
    take(&mut snapshot, type_url::ADDRESS, [own("net~outbound")]);
    let expected = ["gateway-1", "gateway-2"].map(str::to_owned).to_vec();
    assert_eq!(
        via(&snapshot),
        Some(("catalog.shop.svc.mesh.internal:80".into(), expected))
    );
    let at = NetworkAddress {
        network: "net".into(),
        address: IpAddr::from([10, 0, 0, 1]),
    };
    let refused = resolve_workload(&snapshot, &snapshot.source(), &at, 8080).unwrap_err();
    assert_eq!(refused.reason, "no_valid_destination");
}
