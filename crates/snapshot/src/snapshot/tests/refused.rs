//! Every reason for which a resource is refused, and that it is refused alone.
use super::*;

/// Checks that a resource is refused with a reason that contains `reason`, and that a good one beside it is taken.
fn check(type_url: &str, bad: xds::Resource, reason: &str) {
    let mut snapshot = empty();
    let name = bad.name.clone();
    let mut resources = vec![bad];
    if type_url == type_url::ADDRESS {
        resources.push(workload("good", |_| {}));
    }
    let rejected = snapshot.apply(type_url, resources, &[]);
    assert_eq!(rejected.len(), 1, "{name}: {reason}");
    assert_eq!(rejected[0].name, name);
    assert!(
        rejected[0].reason.contains(reason),
        "{name}: {:?} does not say {reason:?}",
        rejected[0].reason
    );
    assert_eq!(
        snapshot.workload_count(),
        usize::from(type_url == type_url::ADDRESS)
    );
    assert!(
        !snapshot.held(type_url).contains_key(&name),
        "{name} is not held, so that it is sent again"
    );
}

#[test]
fn workloads() {
    let bad =
        |change: fn(&mut wds::Workload), reason| check(type_url::ADDRESS, workload("bad", change), reason);
    bad(|w| w.addresses = vec![vec![1, 2]], "an address of 2 bytes");
    bad(|w| w.tunnel_protocol = 2, "LEGACY_ISTIO_MTLS");
    bad(|w| w.tunnel_protocol = 3, "unknown tunnel protocol 3");
    bad(|w| w.status = 9, "unknown status 9");
    bad(|w| w.workload_type = -1, "unknown workload type -1");
    bad(|w| w.network_mode = 5, "unknown network mode 5");
    bad(
        |w| w.application_tunnel = Some(wds::ApplicationTunnel { protocol: 7, port: 0 }),
        "application tunnel 7",
    );
    bad(
        |w| w.services = [("noslash".to_owned(), wds::PortList::default())].into(),
        "\"noslash\" has no \"/\"",
    );
    bad(
        |w| w.authorization_policies = vec!["noslash".into()],
        "\"noslash\" has no \"/\"",
    );
    bad(
        |w| w.network_gateway = Some(wds::GatewayAddress::default()),
        "gateway without destination",
    );
    bad(
        |w| w.waypoint = Some(wds::GatewayAddress::default()),
        "gateway without destination",
    );
    bad(|w| w.trust_domain = "NOT A DOMAIN".into(), "trust domain");
    let port = |service_port, target_port, app_protocol| wds::Port {
        service_port,
        target_port,
        app_protocol,
    };
    for (port, reason) in [
        (port(70_000, 1, 0), "service port 70000"),
        (port(1, 70_000, 0), "target port 70000"),
        (port(1, 1, 9), "application protocol 9"),
    ] {
        let bad = workload("bad", |w| {
            w.services = [(CATALOG.to_owned(), wds::PortList { ports: vec![port] })].into();
        });
        check(type_url::ADDRESS, bad, reason);
    }
    let mut renamed = workload("bad", |_| {});
    renamed.name = "other".into();
    check(type_url::ADDRESS, renamed, "its content is bad");
    check(type_url::ADDRESS, workload("", |_| {}), "no uid");
}

#[test]
fn services() {
    let bad = |change: fn(&mut wds::Service), reason| {
        check(type_url::ADDRESS, service("shop/bad.example.org", change), reason)
    };
    bad(|s| s.addresses[0].address = vec![], "an address of 0 bytes");
    bad(|s| s.addresses[0].length = Some(33), "an address of length 33");
    bad(|s| s.ip_families = 4, "unknown set of IP families 4");
    bad(
        |s| s.waypoint = Some(wds::GatewayAddress::default()),
        "gateway without destination",
    );
    bad(|s| s.hostname = "not a name".into(), "host name");
    bad(
        |s| s.hostname = "other.example.org".into(),
        "its content is shop/other.example.org",
    );
    let balancing = |change: fn(&mut wds::LoadBalancing), reason| {
        let mut wire = wds::LoadBalancing::default();
        change(&mut wire);
        check(
            type_url::ADDRESS,
            service("shop/bad.example.org", |s| s.load_balancing = Some(wire)),
            reason,
        );
    };
    balancing(|b| b.mode = 4, "load balancing mode 4");
    balancing(|b| b.health_policy = 2, "health policy 2");
    balancing(|b| b.routing_preference = vec![0], "routing scope 0");
    balancing(|b| b.routing_preference = vec![1, 7], "routing scope 7");
}

#[test]
fn envelopes_and_other_types() {
    let nothing = xds::Resource {
        name: "x".into(),
        ..xds::Resource::default()
    };
    check(type_url::ADDRESS, nothing.clone(), "no content");
    check(type_url::AUTHORIZATION, nothing.clone(), "no content");
    check(
        type_url::ADDRESS,
        policy("shop/p", security::Scope::Global),
        "is of type",
    );
    check(
        type_url::ADDRESS,
        resource("x", &wds::Address::default()),
        "neither a workload nor a service",
    );
    check("type.googleapis.com/other", nothing, "unknown type");
    let mut cut = workload("cut", |_| {});
    cut.resource.as_mut().unwrap().value.pop();
    check(type_url::ADDRESS, cut, "cannot be decoded");

    let authorization = |change: fn(&mut security::Authorization), reason| {
        let mut message = security::Authorization {
            name: "p".into(),
            namespace: "shop".into(),
            ..Default::default()
        };
        change(&mut message);
        check(type_url::AUTHORIZATION, resource("shop/p", &message), reason);
    };
    authorization(|p| p.scope = 3, "unknown scope 3");
    authorization(|p| p.action = 2, "unknown action 2");
    authorization(|p| p.name = "q".into(), "its content is shop/q");

    for (vip_text, reason) in [
        ("10.0.0.1", "not one that this mesh gives"),
        ("240.240.255.254", "not one that this mesh gives"),
        ("nonsense", "which is none"),
    ] {
        check(type_url::SERVICE_VIP, vip(CATALOG, &[vip_text]), reason);
    }
    let bundle = v1::TrustBundle {
        trust_domain: "a.example".into(),
        roots_pem: " ".into(),
        ..v1::TrustBundle::default()
    };
    check(type_url::TRUST_BUNDLE, resource("a.example", &bundle), "no roots");
    check(
        type_url::TRUST_BUNDLE,
        resource("b.example", &bundle),
        "its content is a.example",
    );
    check(
        type_url::EXPOSURE,
        resource("shop/other", &v1::Exposure::default()),
        "its content is shop/web-1",
    );
    let port = |port| v1::Exposure {
        ports: vec![v1::DeclaredPort {
            port,
            loopback: false,
        }],
        all_ports: false,
    };
    check(type_url::EXPOSURE, resource("shop/web-1", &port(0)), "the port 0");
    check(
        type_url::EXPOSURE,
        resource("shop/web-1", &port(65_536)),
        "the port 65536",
    );
}

#[test]
fn what_was_held_stays() {
    let mut snapshot = empty();
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [workload("a", |w| w.node = "n1".into())],
    );
    let rejected = snapshot.apply(type_url::ADDRESS, vec![workload("a", |w| w.status = 9)], &[]);
    assert_eq!(
        (rejected.len(), &*snapshot.workload("a").unwrap().node),
        (1, "n1")
    );
}

/// What other programs leave out or get wrong without harm.
#[test]
fn defaults_and_tolerance() {
    let mut snapshot = empty();
    let bare = wds::Workload {
        uid: "bare".into(),
        ..wds::Workload::default()
    };
    let bare = wds::Address {
        r#type: Some(wds::address::Type::Workload(bare)),
    };
    let lenient = service("shop/a.example.org", |s| {
        s.visibility = 9;
        s.subject_alt_names = vec!["not an id".into(), "spiffe://a/ns/b/sa/c".into()];
        s.addresses.push(wds::NetworkAddress {
            length: Some(24),
            ..at([10, 96, 0, 0])
        });
        s.addresses.push(wds::NetworkAddress {
            length: Some(32),
            ..at([10, 96, 0, 1])
        });
    });
    take(
        &mut snapshot,
        type_url::ADDRESS,
        [resource("bare", &bare), lenient],
    );
    let workload = snapshot.workload("bare").unwrap();
    assert_eq!(
        (workload.trust_domain.as_str(), &*workload.service_account),
        ("cluster.local", "default")
    );
    assert_eq!(
        (&*workload.cluster_id, workload.capacity, workload.healthy),
        ("Kubernetes", 1, true)
    );
    let service = snapshot.services().next().unwrap();
    assert_eq!(
        (
            service.subject_alt_names.len(),
            service.addresses.len(),
            service.prefixes.len()
        ),
        (1, 2, 1)
    );
    assert!(
        snapshot.find("a.example.org", "elsewhere").is_some(),
        "an unknown visibility is public"
    );
}

#[test]
fn unreadable_parts_of_a_policy_are_marked() {
    let read = |one: security::Match| {
        let clause = security::Clause { matches: vec![one] };
        let rules = vec![security::Rule {
            clauses: vec![clause],
        }];
        let message = security::Authorization {
            name: "p".into(),
            namespace: "shop".into(),
            rules,
            ..Default::default()
        };
        let mut snapshot = empty();
        take(
            &mut snapshot,
            type_url::AUTHORIZATION,
            [resource("shop/p", &message)],
        );
        snapshot.policies().next().unwrap().rules[0].clauses[0].matches[0].clone()
    };
    let address = |address: &[u8], length| security::Address {
        address: address.to_vec(),
        length,
    };
    let good = security::Match {
        source_ips: vec![address(&[10, 0, 0, 0], 8)],
        not_destination_ports: vec![22],
        namespaces: vec![security::StringMatch {
            match_type: Some(security::string_match::MatchType::Presence(())),
        }],
        ..security::Match::default()
    };
    assert!(!read(good.clone()).unreadable);
    for (what, bad) in [
        (
            "address",
            security::Match {
                source_ips: vec![address(&[1], 8)],
                ..good.clone()
            },
        ),
        (
            "length",
            security::Match {
                not_source_ips: vec![address(&[1, 2, 3, 4], 33)],
                ..good.clone()
            },
        ),
        (
            "port",
            security::Match {
                destination_ports: vec![65_536],
                ..good.clone()
            },
        ),
        (
            "text",
            security::Match {
                principals: vec![security::StringMatch::default()],
                ..good
            },
        ),
    ] {
        assert!(read(bad).unreadable, "{what}");
    }
}
