use super::*;
use crate::{Clause, Match, Rule, Scope, ServiceAccountMatch, StringMatch};

mod definition;

fn id(text: &str) -> SpiffeId {
    format!("spiffe://{text}").parse().unwrap()
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn account(namespace: &str, name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch {
        namespace: namespace.into(),
        service_account: name.into(),
    }
}

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
    Policy {
        key: format!("ns/{name}").parse().unwrap(),
        scope: Scope::Global,
        action,
        dry_run: false,
        rules,
    }
}

/// One rule with one clause with these alternatives.
fn one_clause(matches: Vec<Match>) -> Vec<Rule> {
    vec![Rule {
        clauses: vec![Clause { matches }],
    }]
}

fn one_match(one: Match) -> Vec<Rule> {
    one_clause(vec![one])
}

/// The callers of the tables: nobody, and two identities that differ in everything.
const CALLERS: [Option<&str>; 3] = [None, Some("td/ns/shop/sa/web"), Some("other/ns/bank/sa/teller")];

/// Verdict for a caller at 10.0.0.1 (second identity: 10.0.1.1) towards 10.9.0.1:8080.
fn verdict(policies: &[Policy], caller: Option<&str>) -> Decision {
    let source = caller.map(id);
    let source_ip = if caller == CALLERS[2] {
        [10, 0, 1, 1]
    } else {
        [10, 0, 0, 1]
    };
    decide_with_dry_run(
        policies.iter(),
        &Connection {
            source: source.as_ref(),
            source_ip: IpAddr::from(source_ip),
            destination_ip: IpAddr::from([10, 9, 0, 1]),
            destination_port: 8080,
        },
    )
}

/// Checks a match for the three callers in an ALLOW policy, where a hit lets in, and in a DENY policy, where it refuses.
fn check(what: &str, one: Match, expected: [bool; 3]) {
    for (caller, hit) in CALLERS.into_iter().zip(expected) {
        let allow = [policy("p", Action::Allow, one_match(one.clone()))];
        assert_eq!(
            verdict(&allow, caller).verdict.is_allow(),
            hit,
            "ALLOW {what} for {caller:?}"
        );
        let deny = [policy("p", Action::Deny, one_match(one.clone()))];
        assert_eq!(
            !verdict(&deny, caller).verdict.is_allow(),
            hit,
            "DENY {what} for {caller:?}"
        );
    }
}

#[test]
fn fields() {
    use StringMatch::{Prefix, Presence, Suffix};
    let net = |text: &str| vec![text.parse().unwrap()];
    let d = Match::default;
    check("nothing", d(), [false, false, false]);

    check(
        "namespaces",
        Match {
            namespaces: vec![exact("shop")],
            ..d()
        },
        [false, true, false],
    );
    check(
        "two namespaces",
        Match {
            namespaces: vec![exact("x"), exact("bank")],
            ..d()
        },
        [false, false, true],
    );
    check(
        "namespace prefix",
        Match {
            namespaces: vec![Prefix("sh".into())],
            ..d()
        },
        [false, true, false],
    );
    check(
        "namespace suffix",
        Match {
            namespaces: vec![Suffix("nk".into())],
            ..d()
        },
        [false, false, true],
    );
    check(
        "namespace present",
        Match {
            namespaces: vec![Presence],
            ..d()
        },
        [false, true, true],
    );
    // Nobody's namespace is "": an empty text, prefix or suffix fits it.
    check(
        "namespace empty",
        Match {
            namespaces: vec![exact("")],
            ..d()
        },
        [true, false, false],
    );
    check(
        "namespace empty prefix",
        Match {
            namespaces: vec![Prefix("".into())],
            ..d()
        },
        [true, true, true],
    );
    check(
        "namespace empty suffix",
        Match {
            namespaces: vec![Suffix("".into())],
            ..d()
        },
        [true, true, true],
    );
    check(
        "not namespaces",
        Match {
            not_namespaces: vec![exact("shop")],
            ..d()
        },
        [true, false, true],
    );
    check(
        "not present",
        Match {
            not_namespaces: vec![Presence],
            ..d()
        },
        [true, false, false],
    );

    let web = "td/ns/shop/sa/web";
    check(
        "principals",
        Match {
            principals: vec![exact(web)],
            ..d()
        },
        [false, true, false],
    );
    check(
        "with spiffe://",
        Match {
            principals: vec![exact(&format!("spiffe://{web}"))],
            ..d()
        },
        [false; 3],
    );
    check(
        "principal prefix",
        Match {
            principals: vec![Prefix("td/".into())],
            ..d()
        },
        [false, true, false],
    );
    check(
        "principal suffix",
        Match {
            principals: vec![Suffix("/sa/teller".into())],
            ..d()
        },
        [false, false, true],
    );
    check(
        "principal present",
        Match {
            principals: vec![Presence],
            ..d()
        },
        [false, true, true],
    );
    check(
        "principal empty",
        Match {
            principals: vec![exact("")],
            ..d()
        },
        [false, false, false],
    );
    check(
        "principal empty prefix",
        Match {
            principals: vec![Prefix("".into())],
            ..d()
        },
        [false, true, true],
    );
    check(
        "not principals",
        Match {
            not_principals: vec![exact(web)],
            ..d()
        },
        [true, false, true],
    );
    check(
        "plaintext",
        Match {
            not_principals: vec![Presence],
            ..d()
        },
        [true, false, false],
    );

    // Whatever the trust domain.
    check(
        "accounts",
        Match {
            service_accounts: vec![account("bank", "teller")],
            ..d()
        },
        [false, false, true],
    );
    check(
        "namespace of account",
        Match {
            service_accounts: vec![account("shop", "teller")],
            ..d()
        },
        [false; 3],
    );
    check(
        "not accounts",
        Match {
            not_service_accounts: vec![account("shop", "web")],
            ..d()
        },
        [true, false, true],
    );

    check(
        "source",
        Match {
            source_ips: net("10.0.0.0/24"),
            ..d()
        },
        [true, true, false],
    );
    check(
        "not source",
        Match {
            not_source_ips: net("10.0.0.1/32"),
            ..d()
        },
        [false, false, true],
    );
    check(
        "source in the other family",
        Match {
            source_ips: net("::/0"),
            ..d()
        },
        [false; 3],
    );
    check(
        "destination",
        Match {
            destination_ips: net("10.9.0.1/32"),
            ..d()
        },
        [true; 3],
    );
    check(
        "not destination",
        Match {
            not_destination_ips: net("10.9.0.0/16"),
            ..d()
        },
        [false; 3],
    );
    check(
        "ports",
        Match {
            destination_ports: vec![80, 8080],
            ..d()
        },
        [true; 3],
    );
    check(
        "other port",
        Match {
            destination_ports: vec![80],
            ..d()
        },
        [false; 3],
    );
    check(
        "not ports",
        Match {
            not_destination_ports: vec![8080],
            ..d()
        },
        [false; 3],
    );
    check(
        "not other port",
        Match {
            not_destination_ports: vec![80],
            ..d()
        },
        [true; 3],
    );

    let both = Match {
        namespaces: vec![Presence],
        source_ips: net("10.0.0.0/24"),
        ..d()
    };
    check("fields are AND", both, [false, true, false]);
    let both = Match {
        namespaces: vec![Presence],
        not_namespaces: vec![exact("shop")],
        ..d()
    };
    check("positive and negative", both, [false, false, true]);
}

#[test]
fn shape_of_rules() {
    let hit = || Match {
        namespaces: vec![exact("shop")],
        ..Match::default()
    };
    let miss = || Match {
        namespaces: vec![exact("nowhere")],
        ..Match::default()
    };
    let rule = |clauses: Vec<Vec<Match>>| Rule {
        clauses: clauses.into_iter().map(|matches| Clause { matches }).collect(),
    };
    // (what, rules, matches)
    let table = [
        ("no rules match nothing", vec![], false),
        (
            "a rule without clauses matches everything",
            vec![rule(vec![])],
            true,
        ),
        ("a clause without matches holds", vec![rule(vec![vec![]])], true),
        (
            "a clause of one empty match fails",
            vec![rule(vec![vec![Match::default()]])],
            false,
        ),
        (
            "an empty match is skipped",
            vec![rule(vec![vec![Match::default(), hit()]])],
            true,
        ),
        ("matches are OR", vec![rule(vec![vec![miss(), hit()]])], true),
        (
            "clauses are AND",
            vec![rule(vec![vec![hit()], vec![miss()]])],
            false,
        ),
        (
            "clauses are AND, both hold",
            vec![rule(vec![vec![hit()], vec![hit()]])],
            true,
        ),
        (
            "rules are OR",
            vec![rule(vec![vec![miss()]]), rule(vec![vec![hit()]])],
            true,
        ),
    ];
    for (what, rules, expected) in table {
        let allow = [policy("p", Action::Allow, rules.clone())];
        assert_eq!(
            verdict(&allow, CALLERS[1]).verdict.is_allow(),
            expected,
            "ALLOW {what}"
        );
        let deny = [policy("p", Action::Deny, rules)];
        assert_eq!(
            verdict(&deny, CALLERS[1]).verdict.is_allow(),
            !expected,
            "DENY {what}"
        );
    }
}

#[test]
fn order_and_reasons() {
    let everything = || vec![Rule::default()];
    let named = |name: &str| Some(format!("ns/{name}").parse().unwrap());
    let allowed = |policy| Verdict::Allow { policy };
    let (allow_all, allow_none) = (
        policy("allow", Action::Allow, everything()),
        policy("none", Action::Allow, Vec::new()),
    );
    let (deny_all, deny_none) = (
        policy("deny", Action::Deny, everything()),
        policy("no-op", Action::Deny, Vec::new()),
    );
    let denied = Verdict::Deny {
        policy: named("deny"),
        reason: Verdict::DENIED,
    };
    let not_allowed = Verdict::Deny {
        policy: None,
        reason: Verdict::NOT_ALLOWED,
    };
    // (policies, verdict)
    let table = [
        (vec![], allowed(None)),
        (vec![&allow_all], allowed(named("allow"))),
        (vec![&allow_none], not_allowed.clone()),
        (vec![&allow_none, &allow_all], allowed(named("allow"))),
        (vec![&deny_none], allowed(None)),
        (vec![&deny_all], denied.clone()),
        (vec![&allow_all, &deny_all], denied.clone()),
        (vec![&deny_all, &allow_all], denied),
        (vec![&deny_none, &allow_none], not_allowed),
    ];
    for (policies, expected) in table {
        let owned: Vec<Policy> = policies.into_iter().cloned().collect();
        assert_eq!(verdict(&owned, CALLERS[1]).verdict, expected, "{owned:?}");
    }
}

/// `STRICT` with one `PERMISSIVE` port, as istiod converts a PeerAuthentication.
#[test]
fn strict_but_one_port() {
    let strict = |port| {
        let plaintext = Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        };
        let not_port = Match {
            not_destination_ports: vec![port],
            ..Match::default()
        };
        let clauses = vec![
            Clause {
                matches: vec![plaintext],
            },
            Clause {
                matches: vec![not_port],
            },
        ];
        [policy("strict", Action::Deny, vec![Rule { clauses }])]
    };
    assert!(!verdict(&strict(9090), None).verdict.is_allow());
    assert!(verdict(&strict(8080), None).verdict.is_allow());
    assert!(verdict(&strict(9090), CALLERS[1]).verdict.is_allow());
}

#[test]
fn dry_run_only_reports() {
    let dry = |mut policy: Policy| {
        policy.dry_run = true;
        policy
    };
    let everything = || vec![Rule::default()];
    let deny = policy("deny", Action::Deny, everything());
    let allow = policy("allow", Action::Allow, everything());
    let allow_none = policy("none", Action::Allow, Vec::new());
    // (policies, allowed, would be allowed)
    let table = [
        (vec![dry(deny.clone())], true, Some(false)),
        (vec![allow.clone(), dry(deny.clone())], true, Some(false)),
        (vec![dry(allow_none.clone())], true, Some(false)),
        (vec![dry(allow.clone())], true, None),
        (vec![allow_none, dry(allow)], false, Some(true)),
        (vec![deny.clone(), dry(deny)], false, None),
    ];
    for (policies, allowed, would) in table {
        let decision = verdict(&policies, CALLERS[1]);
        assert_eq!(decision.verdict.is_allow(), allowed, "{policies:?}");
        assert_eq!(
            decision.dry_run.map(|verdict| verdict.is_allow()),
            would,
            "{policies:?}"
        );
    }
}

#[test]
fn unreadable_parts_never_weaken() {
    let unreadable = Match {
        unreadable: true,
        ..Match::default()
    };
    let rest = Match {
        namespaces: vec![exact("shop")],
        unreadable: true,
        ..Match::default()
    };
    let allowed =
        |action, one: &Match, caller| verdict(&[policy("p", action, one_match(one.clone()))], caller);
    for caller in CALLERS {
        assert!(
            !allowed(Action::Allow, &unreadable, caller).verdict.is_allow(),
            "{caller:?}"
        );
        assert!(
            !allowed(Action::Allow, &rest, caller).verdict.is_allow(),
            "{caller:?}"
        );
        assert!(
            !allowed(Action::Deny, &unreadable, caller).verdict.is_allow(),
            "{caller:?}"
        );
    }
    assert!(!allowed(Action::Deny, &rest, CALLERS[1]).verdict.is_allow());
    assert!(allowed(Action::Deny, &rest, CALLERS[2]).verdict.is_allow());
}

#[test]
fn mapped_ipv4_is_ipv4() {
    let net = vec!["10.0.0.0/24".parse().unwrap()];
    let policies = [policy(
        "p",
        Action::Deny,
        one_match(Match {
            source_ips: net,
            ..Match::default()
        }),
    )];
    let connection = Connection {
        source: None,
        source_ip: "::ffff:10.0.0.9".parse().unwrap(),
        destination_ip: "::ffff:10.9.0.1".parse().unwrap(),
        destination_port: 1,
    };
    assert!(!decide(policies.iter(), &connection).is_allow());
}
