//! Objects that are applied.

use super::SHOP;
use serde_json::{Value, json};

pub(crate) fn object(api_version: &str, kind: &str, name: &str, spec: Value) -> Value {
    json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": name, "namespace": SHOP }, "spec": spec })
}

/// A WorkloadGroup whose nodes may claim 10.0.0.0/8.
pub(crate) fn group(name: &str) -> Value {
    let mut group = object(
        "networking.istio.io/v1",
        "WorkloadGroup",
        name,
        json!({
            "template": { "serviceAccount": name, "labels": { "app": name }, "ports": { "http": 8080 } },
        }),
    );
    group["metadata"]["annotations"] = json!({ "tombolo.io/address-cidrs": "10.0.0.0/8" });
    group
}

pub(crate) fn service(name: &str) -> Value {
    object(
        "networking.istio.io/v1",
        "ServiceEntry",
        name,
        json!({
            "hosts": [format!("{name}.{SHOP}.svc.mesh.internal")],
            "location": "MESH_INTERNAL", "resolution": "STATIC",
            "ports": [{ "number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080 }],
            "workloadSelector": { "labels": { "app": name } },
        }),
    )
}

pub(crate) fn policy(name: &str) -> Value {
    object(
        "security.istio.io/v1",
        "AuthorizationPolicy",
        name,
        json!({
            "action": "ALLOW",
            "rules": [{ "from": [{ "source": { "namespaces": ["shop"] } }] }],
        }),
    )
}
