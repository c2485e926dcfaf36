//! Random policies, decided word by word by the definition.
use super::*;
use proptest::prelude::*;

fn any_match() -> impl Strategy<Value = Match> {
    let text = prop_oneof![
        Just(exact("shop")),
        Just(exact("td/ns/shop/sa/web")),
        Just(StringMatch::Prefix("td".into())),
        Just(StringMatch::Suffix("k".into())),
        Just(StringMatch::Presence)
    ];
    let texts = || prop::collection::vec(text.clone(), 0..2);
    let ports = || prop::collection::vec(prop_oneof![Just(80u16), Just(8080)], 0..2);
    (
        texts(),
        texts(),
        texts(),
        texts(),
        ports(),
        ports(),
        any::<bool>(),
    )
        .prop_map(
            |(
                namespaces,
                not_namespaces,
                principals,
                not_principals,
                destination_ports,
                not_destination_ports,
                u,
            )| Match {
                namespaces,
                not_namespaces,
                principals,
                not_principals,
                destination_ports,
                not_destination_ports,
                unreadable: u,
                ..Match::default()
            },
        )
}

fn any_policies() -> impl Strategy<Value = Vec<Policy>> {
    let clause = prop::collection::vec(any_match(), 0..3).prop_map(|matches| Clause { matches });
    let rule = prop::collection::vec(clause, 0..3).prop_map(|clauses| Rule { clauses });
    let one = (prop::collection::vec(rule, 0..3), any::<bool>(), any::<bool>()).prop_map(
        |(rules, deny, dry_run)| {
            let action = if deny { Action::Deny } else { Action::Allow };
            Policy {
                dry_run,
                ..policy("p", action, rules)
            }
        },
    );
    prop::collection::vec(one, 0..5)
}

/// The definition, word by word: what [`decide`] must equal.
fn reference(policies: &[Policy], caller: Option<&str>) -> bool {
    let text = |wanted: &StringMatch, text: &str| match wanted {
        StringMatch::Exact(w) => text == &**w,
        StringMatch::Prefix(w) => text.starts_with(&**w),
        StringMatch::Suffix(w) => text.ends_with(&**w),
        StringMatch::Presence => !text.is_empty(),
    };
    let namespace = caller.map_or("", |id| id.split('/').nth(2).unwrap());
    let match_holds = |action: Action, m: &Match| {
        if m.unreadable && (action == Action::Allow || m.is_empty()) {
            return action == Action::Deny;
        }
        let principal = |wanted: &StringMatch| caller.is_some_and(|id| text(wanted, id));
        !m.is_empty()
            && (m.namespaces.is_empty() || m.namespaces.iter().any(|w| text(w, namespace)))
            && m.not_namespaces.iter().all(|w| !text(w, namespace))
            && (m.principals.is_empty() || m.principals.iter().any(principal))
            && !m.not_principals.iter().any(principal)
            && (m.destination_ports.is_empty() || m.destination_ports.contains(&8080))
            && !m.not_destination_ports.contains(&8080)
    };
    let holds = |policy: &Policy| {
        policy.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| {
                clause.matches.is_empty() || clause.matches.iter().any(|m| match_holds(policy.action, m))
            })
        })
    };
    let of = |action| policies.iter().filter(move |p| !p.dry_run && p.action == action);
    if of(Action::Deny).any(holds) {
        return false;
    }
    of(Action::Allow).next().is_none() || of(Action::Allow).any(holds)
}

proptest! {
    #[test]
    fn equals_the_definition(policies in any_policies(), caller in 0..3usize) {
        prop_assert_eq!(verdict(&policies, CALLERS[caller]).verdict.is_allow(), reference(&policies, CALLERS[caller]));
    }

    #[test]
    fn order_of_policies_does_not_matter(policies in any_policies().prop_shuffle(), caller in 0..3usize) {
        let reversed: Vec<Policy> = policies.iter().rev().cloned().collect();
        let (a, b) = (verdict(&policies, CALLERS[caller]), verdict(&reversed, CALLERS[caller]));
        prop_assert_eq!(a.verdict.is_allow(), b.verdict.is_allow());
        prop_assert_eq!(a.dry_run.map(|v| v.is_allow()), b.dry_run.map(|v| v.is_allow()));
    }

    #[test]
    fn enforcing_dry_run_gives_what_was_reported(policies in any_policies(), caller in 0..3usize) {
        let decision = verdict(&policies, CALLERS[caller]);
        let enforced: Vec<Policy> = policies.into_iter().map(|p| Policy { dry_run: false, ..p }).collect();
        let expected = decision.dry_run.unwrap_or(decision.verdict).is_allow();
        prop_assert_eq!(verdict(&enforced, CALLERS[caller]).verdict.is_allow(), expected);
    }
}
