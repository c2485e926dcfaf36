use crate::{Resource, typed};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// One difference between two objects.
#[derive(Debug, Clone, PartialEq)]
pub struct Difference {
    /// Field, for example `spec.ports[0].number`.
    pub path: String,
    /// Value in the first; `None`: not there.
    pub before: Option<Value>,
    /// Value in the second; `None`: not there.
    pub after: Option<Value>,
}

/// What differs between two objects of one kind, besides what the server writes: status, uid, resourceVersion,
/// generation and times. A version of the API is no difference. Owner references and finalizers are compared only where
/// `after` has any, since a file does not repeat them.
pub fn differences(before: &Resource, after: &Resource) -> Vec<Difference> {
    let mut found = Vec::new();
    let (before_metadata, after_metadata) = (before.metadata(), after.metadata());
    let mut before_json = own_metadata(before);
    let after_json = own_metadata(after);
    if after_metadata.owner_references.is_empty() {
        before_json.remove("ownerReferences");
    }
    if after_metadata.finalizers.is_empty() {
        before_json.remove("finalizers");
    }
    debug_assert_eq!(
        before.kind(),
        after.kind(),
        "{} {}",
        before_metadata.name,
        after_metadata.name
    );
    walk(
        "metadata",
        Some(&Value::Object(before_json)),
        Some(&Value::Object(after_json)),
        &mut found,
    );
    walk(
        "spec",
        Some(&before.spec_json()),
        Some(&after.spec_json()),
        &mut found,
    );
    found
}

/// True if applying `after` over `before` would change nothing.
pub fn unchanged(before: &Resource, after: &Resource) -> bool {
    before.kind() == after.kind() && differences(before, after).is_empty()
}

fn own_metadata(resource: &Resource) -> Map<String, Value> {
    let mut metadata = match serde_json::to_value(resource.metadata()) {
        Ok(Value::Object(metadata)) => metadata,
        Ok(_) | Err(_) => Map::new(),
    };
    metadata.retain(|key, _| {
        matches!(
            key.as_str(),
            "name" | "namespace" | "labels" | "annotations" | "ownerReferences" | "finalizers"
        )
    });
    metadata
}

fn walk(path: &str, before: Option<&Value>, after: Option<&Value>, found: &mut Vec<Difference>) {
    match (before, after) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            for key in a.keys().chain(b.keys()).collect::<BTreeSet<_>>() {
                let mut path = path.to_owned();
                typed::push_key(&mut path, key);
                walk(&path, a.get(key), b.get(key), found);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for index in 0..a.len().max(b.len()) {
                walk(&format!("{path}[{index}]"), a.get(index), b.get(index), found);
            }
        }
        _ if before == after => {}
        _ => found.push(Difference {
            path: path.to_owned(),
            before: before.cloned(),
            after: after.cloned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(metadata: Value, ports: Value) -> Resource {
        let json = json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": metadata,
            "spec": {"hosts": ["a.b"], "ports": ports}});
        Resource::from_json(&json).unwrap()
    }

    #[test]
    fn only_what_a_person_writes_is_compared() {
        let ports = json!([{"number": 80, "name": "http"}]);
        let mut stored = object(
            json!({"name": "a", "uid": "1", "resourceVersion": "7", "generation": 2, "finalizers": ["x"],
                "creationTimestamp": "2026-11-24T08:00:00Z"}),
            ports.clone(),
        );
        *stored.status_mut() = Some(json!({"addresses": []}));
        assert!(unchanged(
            &stored,
            &object(json!({"name": "a", "namespace": "default"}), ports.clone())
        ));
        let changed = object(
            json!({"name": "a", "labels": {"x/y": "z"}}),
            json!([{"number": 81, "name": "http"}, {"number": 443, "name": "tls"}]),
        );
        let found: Vec<String> = differences(&stored, &changed)
            .into_iter()
            .map(|d| d.path)
            .collect();
        assert_eq!(
            found,
            ["metadata.labels", "spec.ports[0].number", "spec.ports[1]"]
        );
    }
}
