//! Replays the corpus of the fuzz target `xds_decode`.
use super::*;
use prost::Message as _;

/// What the fuzz target does with its bytes.
fn replay(bytes: &[u8]) -> bool {
    let Ok(response) = xds::DeltaDiscoveryResponse::decode(bytes) else {
        return false;
    };
    let mut snapshot = empty();
    let rejected = snapshot.apply(&response.type_url, response.resources.clone(), &[]);
    let _ = view(&snapshot);
    let read = Snapshot::decode(&snapshot.encode(), AddressPlan::default(), own()).unwrap();
    assert_eq!(view(&read), view(&snapshot));
    let names: Vec<String> = snapshot.held(&response.type_url).into_keys().collect();
    assert_eq!(snapshot.apply(&response.type_url, Vec::new(), &names), []);
    assert!(snapshot.held(&response.type_url).is_empty());
    snapshot.apply(
        &response.type_url,
        response.resources,
        &response.removed_resources,
    );
    rejected.is_empty()
}

fn folder() -> std::path::PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/xds_decode").into()
}

#[test]
fn corpus() {
    let (mut files, mut good) = (0, 0);
    for entry in std::fs::read_dir(folder()).unwrap() {
        good += usize::from(replay(&std::fs::read(entry.unwrap().path()).unwrap()));
        files += 1;
    }
    assert!(files > 10 && good > 3, "{files} files, {good} of them good");
}

/// Writes the hand-made part of the corpus: one file per type and kind of damage. Run by hand after a change of messages.
#[test]
#[ignore = "writes files"]
fn write_corpus() {
    let rich = workload("Kubernetes/networking.istio.io/WorkloadEntry/shop/web-1", |w| {
        w.services = [(
            CATALOG.to_owned(),
            wds::PortList {
                ports: vec![wds::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 1,
                }],
            },
        )]
        .into();
        w.authorization_policies = vec!["shop/p".into()];
        w.locality = Some(wds::Locality {
            region: "eu".into(),
            zone: "eu-1".into(),
            subzone: "r".into(),
        });
        let destination = wds::gateway_address::Destination::Address(at([10, 0, 0, 9]));
        w.network_gateway = Some(wds::GatewayAddress {
            destination: Some(destination),
            hbone_mtls_port: 15008,
        });
        w.capacity = Some(3);
        w.hostname = "web-1.web.shop.svc.mesh.internal".into();
    });
    let balanced = service(CATALOG, |s| {
        s.load_balancing = Some(wds::LoadBalancing {
            routing_preference: vec![6, 1, 2],
            mode: 2,
            health_policy: 1,
        });
        s.subject_alt_names = vec!["spiffe://mesh.example/ns/shop/sa/catalog".into()];
        s.addresses.push(wds::NetworkAddress {
            length: Some(24),
            ..at([10, 96, 0, 0])
        });
    });
    let one = security::Match {
        principals: vec![security::StringMatch {
            match_type: Some(security::string_match::MatchType::Suffix("/sa/web".into())),
        }],
        source_ips: vec![security::Address {
            address: vec![10, 0, 0, 0],
            length: 8,
        }],
        destination_ports: vec![80, 70_000],
        ..security::Match::default()
    };
    let rules = vec![security::Rule {
        clauses: vec![security::Clause { matches: vec![one] }],
    }];
    let message = security::Authorization {
        name: "p".into(),
        namespace: "shop".into(),
        rules,
        ..Default::default()
    };
    let bundle = v1::TrustBundle {
        trust_domain: "mesh.example".into(),
        roots_pem: "-----BEGIN".into(),
        ..v1::TrustBundle::default()
    };
    let ports = vec![v1::DeclaredPort {
        port: 8080,
        loopback: false,
    }];
    let response = |type_url: &str, resources: Vec<xds::Resource>| xds::DeltaDiscoveryResponse {
        type_url: type_url.into(),
        resources,
        nonce: "1".into(),
        removed_resources: vec![CATALOG.into(), "gone".into()],
        ..xds::DeltaDiscoveryResponse::default()
    };
    let mut bad = workload("bad", |w| w.addresses = vec![vec![1, 2]]);
    bad.version.clear();
    let cases = [
        ("empty_set", response(type_url::ADDRESS, vec![])),
        (
            "addresses",
            response(type_url::ADDRESS, vec![rich.clone(), balanced]),
        ),
        (
            "good_and_bad",
            response(
                type_url::ADDRESS,
                vec![bad, rich.clone(), workload("legacy", |w| w.tunnel_protocol = 2)],
            ),
        ),
        (
            "same_name_twice",
            response(type_url::ADDRESS, vec![rich.clone(), rich.clone()]),
        ),
        (
            "wrong_name",
            response(
                type_url::ADDRESS,
                vec![xds::Resource {
                    name: "x".into(),
                    ..rich.clone()
                }],
            ),
        ),
        (
            "no_content",
            response(type_url::ADDRESS, vec![xds::Resource::default()]),
        ),
        (
            "wrong_type",
            response(type_url::AUTHORIZATION, vec![rich.clone()]),
        ),
        ("unknown_type", response("type.googleapis.com/other", vec![rich])),
        (
            "authorization",
            response(type_url::AUTHORIZATION, vec![resource("shop/p", &message)]),
        ),
        (
            "revocations",
            response(
                type_url::REVOCATIONS,
                vec![resource(
                    "devices",
                    &v1::Revocations {
                        device_ids: vec![3, 1],
                    },
                )],
            ),
        ),
        (
            "trust_bundle",
            response(type_url::TRUST_BUNDLE, vec![resource("mesh.example", &bundle)]),
        ),
        (
            "service_vip",
            response(
                type_url::SERVICE_VIP,
                vec![vip(CATALOG, &["240.240.0.7", "2001:2::7"])],
            ),
        ),
        (
            "exposure",
            response(
                type_url::EXPOSURE,
                vec![resource(
                    "shop/web-1",
                    &v1::Exposure {
                        ports,
                        all_ports: false,
                    },
                )],
            ),
        ),
    ];
    for (name, message) in cases {
        let bytes = message.encode_to_vec();
        std::fs::write(folder().join(name), &bytes).unwrap();
        std::fs::write(
            folder().join(format!("{name}_cut")),
            &bytes[..bytes.len() * 2 / 3],
        )
        .unwrap();
    }
}
