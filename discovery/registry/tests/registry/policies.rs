//! Which policies hold for a workload.

use crate::support::*;
use tombolo_config::Kind;
use tombolo_proto::{
    istio::security::{Action, Scope},
    type_url,
};
use tombolo_registry::Registry;

const POLICIES: &str = "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: e, namespace: shop, labels: {app: a}}
spec: {address: 10.0.0.1}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: by-label, namespace: shop}
spec: {selector: {matchLabels: {app: a}}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: others, namespace: shop}
spec: {selector: {matchLabels: {app: b}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: mesh-label, namespace: istio-system}
spec: {selector: {matchLabels: {app: a}}, action: DENY, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: elsewhere, namespace: bank}
spec: {selector: {matchLabels: {app: a}}}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: custom, namespace: shop}
spec: {selector: {matchLabels: {app: a}}, action: CUSTOM, provider: {name: x}, rules: [{}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: wide, namespace: shop}
spec: {}
";

#[test]
fn policies_are_named_by_whom_they_select() {
    let mut registry = registry(POLICIES);
    let world = registry.publish();
    assert_eq!(
        entry(&world, "shop", "e").authorization_policies,
        ["istio-system/mesh-label", "shop/by-label"]
    );
    assert_eq!(
        names(&world, type_url::AUTHORIZATION),
        [
            "bank/elsewhere",
            "istio-system/istio_converted_static_strict",
            "istio-system/mesh-label",
            "shop/by-label",
            "shop/others",
            "shop/wide"
        ]
    );
    assert_eq!(policy(&world, "shop/wide").scope(), Scope::Namespace);
    registry.remove(Kind::AuthorizationPolicy, "istio-system", "mesh-label");
    let world = registry.publish();
    assert_eq!(
        entry(&world, "shop", "e").authorization_policies,
        ["shop/by-label"]
    );
    assert_eq!(
        changed(&world, type_url::AUTHORIZATION),
        ["istio-system/mesh-label"]
    );
}

#[test]
fn the_effective_peer_authentication() {
    let pa = |name: &str, namespace: &str, year: u32, spec: &str| {
        let yaml = format!(
            "{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{name: {name}, namespace: \
             {namespace}, creationTimestamp: '{year}-01-01T00:00:00Z'}}, spec: {spec}}}"
        );
        resources(&yaml).remove(0)
    };
    let strict = ["istio-system/istio_converted_static_strict"];
    let converted = ["shop/converted_peer_authentication_w"];
    let mut registry = Registry::new(settings());
    resources(POLICIES)
        .into_iter()
        .take(1)
        .for_each(|resource| registry.upsert(resource));
    let mut step = |change: Result<tombolo_config::Resource, (&str, &str)>, expected: &[&str]| {
        match change {
            Ok(resource) => registry.upsert(resource),
            Err((namespace, name)) => registry.remove(Kind::PeerAuthentication, namespace, name),
        }
        let world = registry.publish();
        assert_eq!(entry(&world, "shop", "e").authorization_policies, expected);
        let converted = names(&world, type_url::AUTHORIZATION)
            .into_iter()
            .filter(|name| name.contains("authentication_"));
        (converted.count(), world)
    };
    step(
        Ok(pa("m", "istio-system", 2025, "{mtls: {mode: STRICT}}")),
        &strict,
    );
    step(
        Ok(pa("younger", "istio-system", 2026, "{mtls: {mode: PERMISSIVE}}")),
        &strict,
    );
    step(Ok(pa("n", "shop", 2026, "{mtls: {mode: PERMISSIVE}}")), &[]);
    step(Ok(pa("n", "shop", 2026, "{}")), &strict);
    let selects = "selector: {matchLabels: {app: a}}";
    step(
        Ok(pa(
            "w",
            "shop",
            2026,
            &format!("{{{selects}, mtls: {{mode: DISABLE}}}}"),
        )),
        &[],
    );
    // UNSET inherits STRICT: all but port 80.
    let open = format!("{{{selects}, portLevelMtls: {{80: {{mode: PERMISSIVE}}}}}}");
    let (count, world) = step(Ok(pa("w", "shop", 2026, &open)), &converted);
    assert_eq!(count, 1);
    let found = policy(&world, converted[0]);
    assert_eq!(
        (found.action(), found.scope()),
        (Action::Deny, Scope::WorkloadSelector)
    );
    assert_eq!(found.rules[0].clauses[1].matches[0].not_destination_ports, [80]);
    // The namespace turns permissive: nothing is left of it.
    let (count, _) = step(Ok(pa("n", "shop", 2026, "{mtls: {mode: PERMISSIVE}}")), &[]);
    assert_eq!(count, 0);
    let closed = format!("{{{selects}, portLevelMtls: {{80: {{mode: STRICT}}}}}}");
    let (_, world) = step(Ok(pa("w", "shop", 2026, &closed)), &converted);
    assert_eq!(
        policy(&world, converted[0]).rules[0].clauses[1].matches[0].destination_ports,
        [80]
    );
    // The older of two that select the same wins.
    step(
        Ok(pa(
            "older",
            "shop",
            2025,
            &format!("{{{selects}, mtls: {{mode: STRICT}}}}"),
        )),
        &strict,
    );
    step(Err(("shop", "older")), &converted);
    step(Err(("shop", "w")), &[]);
    // A selector in the root namespace selects nobody.
    step(
        Ok(pa(
            "r",
            "istio-system",
            2024,
            &format!("{{{selects}, mtls: {{mode: STRICT}}}}"),
        )),
        &[],
    );
    step(Err(("shop", "n")), &strict);
    step(Err(("istio-system", "m")), &[]);
}
