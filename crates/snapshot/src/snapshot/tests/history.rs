//! Random histories leave what a build from scratch gives.
use super::*;
use proptest::prelude::*;

/// A change of one resource: what it is then, or its removal.
#[derive(Debug, Clone)]
struct Change {
    type_url: &'static str,
    name: String,
    to: Option<xds::Resource>,
}

fn any_change() -> impl Strategy<Value = Change> {
    let hosts = || prop::sample::select(vec!["catalog", "other", "one.catalog"]);
    let namespace = || prop::sample::select(vec!["shop", "bank"]);
    let key = |(host, of, in_namespace): (&str, &str, &str)| {
        format!("{of}/{host}.{in_namespace}.svc.mesh.internal")
    };
    let keys = move || (hosts(), namespace(), namespace()).prop_map(key);
    let change = |type_url, name: String, to| Change {
        type_url,
        name,
        to: Some(to),
    };
    let workloads = (
        0..5u8,
        prop::collection::vec(keys(), 0..3),
        prop::option::of(keys()),
        0..4u8,
        any::<bool>(),
    )
        .prop_map(move |(n, services, instance, address, own)| {
            let uid = format!("uid-{n}");
            let to = workload(&uid, |w| {
                w.services = services
                    .into_iter()
                    .map(|key| {
                        (
                            key,
                            wds::PortList {
                                ports: vec![wds::Port {
                                    service_port: 80,
                                    target_port: 8000 + u32::from(n),
                                    app_protocol: 0,
                                }],
                            },
                        )
                    })
                    .collect();
                w.addresses = vec![vec![10, 0, 0, address]];
                if address == 3 {
                    (w.network, w.addresses) = ("far".into(), vec![]);
                }
                if let Some((namespace, hostname)) = instance.as_deref().and_then(|key| key.split_once('/')) {
                    (w.namespace, w.hostname) = (namespace.into(), hostname.into());
                }
                w.authorization_policies = vec![format!("shop/p{address}")];
                if own {
                    (w.name, w.service_account) = ("web-1".into(), "web".into());
                }
            });
            change(type_url::ADDRESS, uid, to)
        });
    let services = (keys(), 0..16u8, any::<bool>(), 0..3i32, any::<bool>()).prop_map(
        move |(key, address, headless, families, hidden)| {
            let to = service(&key, |s| {
                s.addresses = if headless {
                    vec![]
                } else {
                    vec![at([240, 240, 0, address])]
                };
                (s.ip_families, s.visibility, s.canonical) = (families, i32::from(hidden), address % 2 == 0);
            });
            change(type_url::ADDRESS, key, to)
        },
    );
    let vips = (keys(), prop::collection::vec(1..16u8, 1..3)).prop_map(move |(key, last)| {
        let texts: Vec<String> = last.iter().map(|last| format!("240.240.0.{last}")).collect();
        let to = vip(&key, &texts.iter().map(String::as_str).collect::<Vec<_>>());
        change(type_url::SERVICE_VIP, key, to)
    });
    let policies = (0..4u8, namespace(), 0..3i32).prop_map(move |(n, namespace, scope)| {
        let key = format!("{namespace}/p{n}");
        let to = policy(&key, scope.try_into().unwrap());
        change(type_url::AUTHORIZATION, key, to)
    });
    let revoked = prop::collection::vec(0..4u64, 0..3).prop_map(move |device_ids| {
        change(
            type_url::REVOCATIONS,
            "devices".into(),
            resource("devices", &v1::Revocations { device_ids }),
        )
    });
    let gateways = (
        prop::sample::select(vec!["", "far"]),
        prop::collection::vec(0..4u8, 0..3),
    )
        .prop_map(move |(network, all)| {
            let all: Vec<_> = all.into_iter().map(networks::gateway).collect();
            let to = networks::network(network, all);
            change(type_url::NETWORK_GATEWAYS, to.name.clone(), to)
        });
    let upsert =
        prop_oneof![1 => gateways, 6 => workloads, 5 => services, 4 => vips, 2 => policies, 1 => revoked];
    (upsert, prop::bool::weighted(0.3)).prop_map(|(change, removal)| {
        if removal {
            Change { to: None, ..change }
        } else {
            change
        }
    })
}

/// Applied in steps of one response for each run of changes of one type.
fn apply_all(snapshot: &mut Snapshot, changes: &[Change]) {
    for run in changes.chunk_by(|a, b| a.type_url == b.type_url && a.to.is_some() && b.to.is_some()) {
        let removed: Vec<String> = run
            .iter()
            .filter(|c| c.to.is_none())
            .map(|c| c.name.clone())
            .collect();
        let rejected = snapshot.apply(
            run[0].type_url,
            run.iter().filter_map(|c| c.to.clone()).collect(),
            &removed,
        );
        assert_eq!(rejected, []);
    }
}

proptest! {
    /// The reference: the last word on each resource, applied to nothing, in another order.
    #[test]
    fn history_leaves_no_trace(
        changes in prop::collection::vec(any_change(), 0..60),
        order in any::<u64>(),
    ) {
        let mut lived = empty();
        apply_all(&mut lived, &changes);
        let mut last: BTreeMap<(&str, &str), &xds::Resource> = BTreeMap::new();
        for change in &changes {
            match &change.to {
                Some(to) => _ = last.insert((change.type_url, &change.name), to),
                None => _ = last.remove(&(change.type_url, change.name.as_str())),
            }
        }
        let mut remaining: Vec<_> = last.into_iter().collect();
        let mut seed = order;
        for i in (1..remaining.len()).rev() {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            remaining.swap(i, (seed >> 33) as usize % (i + 1));
        }
        let mut fresh = empty();
        for ((type_url, _), to) in remaining {
            prop_assert_eq!(fresh.apply(type_url, vec![to.clone()], &[]), vec![]);
        }
        prop_assert_eq!(view(&lived), view(&fresh));
        let read = Snapshot::decode(&lived.encode(), AddressPlan::default(), own()).unwrap();
        prop_assert_eq!(view(&lived), view(&read));
    }

    /// Removing everything leaves every index empty.
    #[test]
    fn nothing_is_left_behind(changes in prop::collection::vec(any_change(), 0..40)) {
        let mut snapshot = empty();
        apply_all(&mut snapshot, &changes);
        let removals: Vec<Change> = changes.into_iter().map(|change| Change { to: None, ..change }).collect();
        apply_all(&mut snapshot, &removals);
        prop_assert_eq!(view(&snapshot), view(&empty()));
        prop_assert!(snapshot.registry.is_empty());
    }

    #[test]
    fn garbage_is_refused_alone(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        type_url in prop::sample::select(vec![
            type_url::ADDRESS, type_url::AUTHORIZATION, type_url::REVOCATIONS, type_url::TRUST_BUNDLE,
            type_url::SERVICE_VIP, type_url::EXPOSURE, "",
        ]),
        name in "[a-z/.]{0,12}",
    ) {
        let mut snapshot = empty();
        take(&mut snapshot, type_url::ADDRESS, [workload("good", |_| {})]);
        let any = prost_types::Any { type_url: type_url.into(), value: payload };
        let bad = xds::Resource { name: name.clone(), resource: Some(any), ..xds::Resource::default() };
        for rejected in snapshot.apply(type_url, vec![bad], &[name]) {
            prop_assert!(!rejected.reason.is_empty());
        }
        prop_assert!(snapshot.workload("good").is_some());
    }
}
