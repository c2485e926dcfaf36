//! Names and virtual addresses: overrides, headless services, instances, visibility, preference.
use super::*;

fn answer(vips: &[&str], headless: bool) -> Option<(Vec<String>, bool)> {
    Some((vips.iter().map(|&vip| vip.to_owned()).collect(), headless))
}

#[test]
fn an_override_takes_the_place_of_real_addresses() {
    let mut snapshot = empty();
    let host = "catalog.shop.svc.mesh.internal";
    let real = |s: &mut wds::Service| s.addresses = vec![at([10, 96, 0, 1])];
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [service(CATALOG, real), workload("a", |_| {})],
    );
    assert_eq!(
        named(&snapshot, host, "shop"),
        answer(&[], false),
        "never an address that leads around the mesh"
    );
    take(
        &mut snapshot,
        type_url::SERVICE_VIP,
        [vip(CATALOG, &["2001:2::7", "240.240.0.7"])],
    );
    assert_eq!(
        named(&snapshot, host, "shop"),
        answer(&["240.240.0.7", "2001:2::7"], false)
    );
    for address in ["240.240.0.7", "2001:2::7", "10.96.0.1"] {
        let found = resolve(&snapshot, &snapshot.source(), address.parse().unwrap(), 80);
        assert_eq!(
            found.unwrap().candidates[0].address.to_string(),
            "10.0.0.1:8080",
            "{address}"
        );
    }
    assert_eq!(
        snapshot.host_of("240.240.0.7".parse().unwrap()).as_deref(),
        Some(host)
    );
    assert_eq!(
        snapshot.host_of("10.96.0.1".parse().unwrap()),
        None,
        "only the mesh's own are ours to name"
    );
    remove(&mut snapshot, type_url::SERVICE_VIP, CATALOG);
    assert_eq!(named(&snapshot, host, "shop"), answer(&[], false));
    assert!(
        snapshot
            .service_by_address("240.240.0.7".parse().unwrap())
            .is_none()
    );
    // An override may come first.
    remove(&mut snapshot, type_url::ADDRESS, CATALOG);
    take(
        &mut snapshot,
        type_url::SERVICE_VIP,
        [vip(CATALOG, &["240.240.0.8"])],
    );
    assert_eq!(named(&snapshot, host, "shop"), None);
    take(&mut snapshot, type_url::ADDRESS, [service(CATALOG, real)]);
    assert_eq!(named(&snapshot, host, "shop"), answer(&["240.240.0.8"], false));
}

#[test]
fn addresses_of_another_network_are_not_found() {
    let mut snapshot = empty();
    let far = |s: &mut wds::Service| {
        s.addresses = vec![
            wds::NetworkAddress {
                network: "far".into(),
                ..at([10, 96, 0, 1])
            },
            at([240, 240, 0, 1]),
        ];
        s.addresses[1].network = "far".into();
    };
    take(&mut snapshot, type_url::ADDRESS, [service(CATALOG, far)]);
    assert!(
        snapshot
            .service_by_address("10.96.0.1".parse().unwrap())
            .is_none()
    );
    // Virtual addresses mean the same on every host of a discovery, whatever network the record names.
    assert!(
        snapshot
            .service_by_address("240.240.0.1".parse().unwrap())
            .is_some()
    );
}

/// A headless service lists the addresses of its instances, which are services of their own; each address means its
/// instance.
#[test]
fn headless_services_and_their_instances() {
    const DB: &str = "shop/db.shop.svc.mesh.internal";
    let host = "db.shop.svc.mesh.internal";
    let key = |n: u8| format!("shop/db-{n}.{host}");
    let port = wds::Port {
        service_port: 5432,
        target_port: 15432,
        app_protocol: 0,
    };
    let instance = |n: u8| {
        service(&key(n), |s| {
            (s.addresses, s.ports) = (vec![at([240, 240, 1, n])], vec![port])
        })
    };
    let endpoint = |n: u8| {
        workload(&format!("db-{n}"), |w| {
            w.addresses = vec![vec![10, 0, 0, n]];
            w.services = [DB.to_owned(), key(n)]
                .map(|key| (key, wds::PortList::default()))
                .into();
        })
    };
    let headless = service(DB, |s| (s.addresses, s.ports) = (vec![], vec![port]));
    let mut snapshot = empty();
    let resources = [headless, instance(1), instance(2), endpoint(1), endpoint(2)];
    take(&mut snapshot, type_url::ADDRESS, resources);
    take(
        &mut snapshot,
        type_url::SERVICE_VIP,
        [vip(DB, &["240.240.1.1", "240.240.1.2"])],
    );
    assert_eq!(
        named(&snapshot, host, "shop"),
        answer(&["240.240.1.1", "240.240.1.2"], true)
    );
    assert_eq!(
        named(&snapshot, &format!("db-2.{host}"), "shop"),
        answer(&["240.240.1.2"], false)
    );
    let dial = |snapshot: &Snapshot, n: u8| {
        let found = resolve(snapshot, &snapshot.source(), IpAddr::from([240, 240, 1, n]), 5432)?;
        Ok::<_, tombolo_types::Reject>(
            found
                .candidates
                .iter()
                .map(|one| one.address.to_string())
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(dial(&snapshot, 1).unwrap(), ["10.0.0.1:15432"]);
    assert_eq!(dial(&snapshot, 2).unwrap(), ["10.0.0.2:15432"]);
    assert_eq!(
        snapshot.host_of(IpAddr::from([240, 240, 1, 2])).unwrap(),
        format!("db-2.{host}")
    );

    // With one instance left both names have the same address; it still means the instance.
    remove(&mut snapshot, type_url::ADDRESS, "db-1");
    remove(&mut snapshot, type_url::ADDRESS, &key(1));
    take(&mut snapshot, type_url::SERVICE_VIP, [vip(DB, &["240.240.1.2"])]);
    assert_eq!(
        snapshot.host_of(IpAddr::from([240, 240, 1, 2])).unwrap(),
        format!("db-2.{host}")
    );
    assert_eq!(dial(&snapshot, 1).unwrap_err().reason, "unknown_address");

    // Listed by the service, but the instance is not known (yet): the service takes the call.
    remove(&mut snapshot, type_url::ADDRESS, &key(2));
    assert_eq!(dial(&snapshot, 2).unwrap(), ["10.0.0.2:15432"]);
}

#[test]
fn which_service_a_name_means() {
    let mut snapshot = empty();
    let keys = [
        "shop/api.example.org",
        "bank/api.example.org",
        "zoo/api.example.org",
    ];
    let of = |key: &str, last: u8, canonical| {
        service(key, |s| {
            (s.addresses, s.canonical) = (vec![at([240, 240, 2, last])], canonical)
        })
    };
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [of(keys[0], 1, false), of(keys[1], 2, false), of(keys[2], 3, true)],
    );
    let found =
        |snapshot: &Snapshot, namespace| named(snapshot, "api.example.org", namespace).unwrap().0.join(" ");
    assert_eq!(found(&snapshot, "shop"), "240.240.2.1");
    assert_eq!(found(&snapshot, "bank"), "240.240.2.2");
    assert_eq!(found(&snapshot, "elsewhere"), "240.240.2.3", "the canonical one");
    remove(&mut snapshot, type_url::ADDRESS, keys[2]);
    assert_eq!(
        found(&snapshot, "elsewhere"),
        "240.240.2.2",
        "the first by namespace"
    );

    // Hidden from others.
    let hidden = service(keys[1], |s| {
        s.visibility = wds::service::Visibility::Namespace.into()
    });
    take(&mut snapshot, type_url::ADDRESS, [hidden]);
    assert_eq!(found(&snapshot, "elsewhere"), "240.240.2.1");
    assert_eq!(
        snapshot
            .service_by_host("API.example.org.", "bank")
            .unwrap()
            .key
            .to_string(),
        keys[1]
    );
}

#[test]
fn names_that_are_never_answered() {
    let mut snapshot = empty();
    let vips = |s: &mut wds::Service| s.addresses = vec![at([240, 240, 0, 1])];
    // (key, client's namespace, answered)
    for (key, answered) in [
        ("shop/catalog.shop.svc.mesh.internal", true),
        ("shop/db-0.db.shop.svc.mesh.internal", true),
        // Nobody publishes below another namespace.
        ("bank/catalog.shop.svc.mesh.internal", false),
        ("bank/x.catalog.shop.svc.mesh.internal", false),
        ("bank/anything.mesh.internal", true),
        ("shop/deb.example.org", true),
        ("shop/*.example.org", true),
        ("shop/localhost", false),
        ("shop/*.org", false),
    ] {
        take(&mut snapshot, type_url::ADDRESS, [service(key, vips)]);
        let (namespace, host) = key.split_once('/').unwrap();
        assert_eq!(snapshot.find(host, namespace).is_some(), answered, "{key}");
        remove(&mut snapshot, type_url::ADDRESS, key);
    }
    assert!(snapshot.is_mesh_name("mesh.internal") && snapshot.is_mesh_name("a.b.mesh.internal"));
    assert!(!snapshot.is_mesh_name("xmesh.internal") && !snapshot.is_mesh_name("internal"));
    assert!(snapshot.find("not a name", "shop").is_none());
}

#[test]
fn wildcards_and_families() {
    let mut snapshot = empty();
    let both = |families: wds::IpFamilies, last: u8| {
        move |s: &mut wds::Service| {
            s.ip_families = families.into();
            s.addresses = vec![at([240, 240, 3, last]), at([240, 240, 3, last])];
            s.addresses[1].address = vec![0x20, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        }
    };
    let resources = [
        service("shop/*.wild.example.org", both(wds::IpFamilies::Ipv4Only, 1)),
        service("shop/*.deep.wild.example.org", both(wds::IpFamilies::Ipv6Only, 2)),
        service("shop/dual.example.org", both(wds::IpFamilies::Dual, 3)),
    ];
    take(&mut snapshot, type_url::ADDRESS, resources);
    assert_eq!(
        named(&snapshot, "*.wild.example.org", "shop"),
        answer(&["240.240.3.1"], false)
    );
    assert_eq!(
        named(&snapshot, "*.deep.wild.example.org", "shop"),
        answer(&["2001:2::2"], false)
    );
    assert_eq!(
        named(&snapshot, "dual.example.org", "shop"),
        answer(&["240.240.3.3", "2001:2::3"], false)
    );
    let key = |host| {
        snapshot
            .service_by_host(host, "shop")
            .map(|service| service.key.to_string())
    };
    assert_eq!(
        key("a.b.wild.example.org").as_deref(),
        Some("shop/*.wild.example.org")
    );
    assert_eq!(
        key("a.deep.wild.example.org").as_deref(),
        Some("shop/*.deep.wild.example.org")
    );
    assert_eq!(key("wild.example.org"), None);
    assert_eq!(
        snapshot.host_of("240.240.3.1".parse().unwrap()),
        None,
        "a wildcard is no name"
    );
}
