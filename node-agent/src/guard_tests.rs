use super::*;
use tombolo_authz::{Action, Clause, Match, Rule, Scope, StringMatch};
use tombolo_types::NamespacedName;

fn policy(name: &str, action: Action, matches: &[Match]) -> Policy {
    let clause = |each: &Match| Clause {
        matches: vec![each.clone()],
    };
    Policy {
        key: NamespacedName::new("shop", name),
        scope: Scope::WorkloadSelector,
        action,
        dry_run: false,
        rules: vec![Rule {
            clauses: matches.iter().map(clause).collect(),
        }],
    }
}

fn anonymous() -> Match {
    Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

fn from(allowed: &[&str], but: &[&str]) -> Match {
    let prefixes = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
    Match {
        source_ips: prefixes(allowed),
        not_source_ips: prefixes(but),
        ..Match::default()
    }
}

fn own() -> [IpAddr; 2] {
    ["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]
}

fn ask(policies: &[Policy], port: u16) -> (Option<Vec<String>>, String) {
    let found = plaintext(&policies.iter().collect::<Vec<_>>(), &own(), port);
    let allowed = found.guarded(port).map(|guarded| {
        guarded
            .allowed
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    });
    (allowed, found.why)
}

#[test]
fn strict_closes_and_its_open_ports_stay_open() {
    let closed = Some(Vec::new());
    assert_eq!(ask(&[], 8080), (None, "no policy denies plaintext".into()));
    let strict = policy("istio_converted_static_strict", Action::Deny, &[anonymous()]);
    let (allowed, why) = ask(std::slice::from_ref(&strict), 8080);
    assert_eq!(
        (allowed, why.as_str()),
        (closed.clone(), "PeerAuthentication says STRICT")
    );
    let but = Match {
        not_destination_ports: vec![8080],
        ..Match::default()
    };
    let permissive = [policy(
        "converted_peer_authentication_x",
        Action::Deny,
        &[anonymous(), but],
    )];
    assert_eq!(ask(&permissive, 8080).0, None);
    let (allowed, why) = ask(&permissive, 9090);
    assert_eq!(
        (allowed, why.as_str()),
        (closed, "PeerAuthentication shop/x says STRICT")
    );
    // Never, whatever discovery declares.
    for port in [22, 15008, 15021] {
        assert_eq!(ask(std::slice::from_ref(&strict), port).0, None, "{port}");
    }
}

#[test]
fn an_allow_policy_that_plaintext_does_not_pass_closes() {
    let principal = Match {
        principals: vec![StringMatch::Exact("mesh.example/ns/shop/sa/web".into())],
        ..Match::default()
    };
    let web = policy("web", Action::Allow, &[principal]);
    let (allowed, why) = ask(std::slice::from_ref(&web), 8080);
    assert_eq!(
        (allowed, why.as_str()),
        (Some(vec![]), "no ALLOW policy admits plaintext")
    );
    let port = Match {
        destination_ports: vec![8080],
        ..Match::default()
    };
    let policies = [web, policy("health", Action::Allow, &[port])];
    let (allowed, why) = ask(&policies, 8080);
    assert_eq!(
        (allowed, why.as_str()),
        (None, "AuthorizationPolicy shop/health admits plaintext")
    );
    assert_eq!(ask(&policies, 8081).0, Some(vec![]));
    let deny = policy("deny", Action::Deny, &[Match::default()]);
    assert!(
        ask(&[deny], 1).0.is_none(),
        "a match of nothing at all matches nothing"
    );
}

#[test]
fn addresses_that_a_policy_admits_stay_admitted_and_no_others() {
    let lan = from(&["10.0.0.0/8", "fd00::/8"], &["10.1.0.0/16"]);
    let (allowed, _) = ask(&[policy("lan", Action::Allow, &[lan])], 8080);
    let allowed = allowed.unwrap();
    let admits = |ip: &str| {
        let ip: IpAddr = ip.parse().unwrap();
        let prefixes = allowed.iter().map(|text| text.parse::<IpNet>().unwrap());
        prefixes.into_iter().any(|prefix| prefix.contains(&ip))
    };
    for (ip, expected) in [
        ("10.0.0.0", true),
        ("10.0.255.255", true),
        ("10.1.0.0", false),
        ("10.1.255.255", false),
        ("10.2.0.0", true),
        ("10.255.255.255", true),
        ("11.0.0.0", false),
        ("9.255.255.255", false),
        ("0.0.0.0", false),
        ("255.255.255.255", false),
        ("fd00::1", true),
        ("fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", true),
        ("fe00::", false),
        ("::", false),
    ] {
        assert_eq!(admits(ip), expected, "{ip} of {allowed:?}");
    }
    // The edges of the address space.
    let edge = from(&["255.255.255.255/32", "0.0.0.0/1"], &[]);
    let (allowed, _) = ask(&[policy("edge", Action::Allow, &[edge])], 8080);
    assert_eq!(allowed.unwrap(), ["0.0.0.0/1", "255.255.255.255/32"]);
    let deny = policy("deny", Action::Deny, &[from(&["192.0.2.0/24"], &[])]);
    let (allowed, why) = ask(&[deny], 8080);
    let allowed = allowed.unwrap();
    assert!(
        allowed.contains(&"::/0".to_owned()) && !allowed.is_empty(),
        "{allowed:?}"
    );
    assert_eq!(why, "AuthorizationPolicy shop/deny denies plaintext");
}

#[test]
fn a_refusal_names_the_ports_that_are_open_for_it() {
    let declared = |port, stance| DeclaredPort {
        port,
        stance,
        why: "PeerAuthentication says STRICT".into(),
    };
    let ports = vec![declared(8080, Stance::Guarded), declared(9090, Stance::Open)];
    let refused = Problem::new(
        Code::GuardRefused,
        "nft is not there; install the package nftables",
    );
    let report = shown(ports.clone(), &Err(refused.clone()), None);
    assert_eq!(
        report.ports[0].why,
        "NOT GUARDED although PeerAuthentication says STRICT"
    );
    assert_eq!(
        (report.ports[0].stance, report.ports[1].stance),
        (Stance::Unguarded, Stance::Open)
    );
    let text = report.problem.unwrap().to_string();
    assert!(
        text.starts_with("TMB0314") && text.contains("port 8080: nft is not there") && !text.contains("9090"),
        "{text}"
    );
    // What was in force is in force still.
    let before = GuardRules {
        ports: vec![GuardedPort {
            port: 8080,
            allowed: Vec::new(),
        }],
    };
    let report = shown(ports, &Err(refused.clone()), Some(&before));
    assert_eq!(report.ports[0].stance, Stance::Guarded);
    assert!(report.problem.is_some());
    assert_eq!(
        shown(Vec::new(), &Err(refused), None).problem,
        None,
        "nothing to guard"
    );
}
