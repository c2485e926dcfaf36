//! Conditions in the status of an object, as Kubernetes writes them.

use serde_json::{Map, Value, json};

/// Condition of a WorkloadEntry: is it chosen.
pub const HEALTHY: &str = "Healthy";
/// Condition of a WorkloadEntry: its address is held by another live member.
pub const ADDRESS_CONFLICT: &str = "AddressConflict";
/// Condition of a WorkloadEntry: its address was not taken yet.
pub const ADDRESS_PENDING: &str = "AddressPending";

const CANDIDATES: &str = "addressCandidates";

/// A condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Type.
    pub kind: &'static str,
    /// True or false.
    pub status: bool,
    /// One word, or a code.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Unix ms.
    pub since_unix_ms: i64,
}

fn object(status: &mut Option<Value>) -> &mut Map<String, Value> {
    if !matches!(status, Some(Value::Object(_))) {
        *status = Some(Value::Object(Map::new()));
    }
    match status {
        Some(Value::Object(map)) => map,
        _ => unreachable!("it was made an object just above"),
    }
}

/// Adds or replaces a condition; the time of an unchanged one is kept.
pub fn set(status: &mut Option<Value>, condition: &Condition) {
    let map = object(status);
    let list = map.entry("conditions").or_insert_with(|| json!([]));
    let Value::Array(list) = list else { return };
    let word = if condition.status { "True" } else { "False" };
    let mut since = tombolo_config::rfc3339(condition.since_unix_ms);
    list.retain(|old| {
        let same = old["type"] == condition.kind;
        if same
            && old["status"] == word
            && let Some(time) = old["lastTransitionTime"].as_str()
        {
            time.clone_into(&mut since);
        }
        !same
    });
    list.push(json!({
        "type": condition.kind,
        "status": word,
        "reason": condition.reason,
        "message": condition.message,
        "lastTransitionTime": since,
    }));
}

/// Removes a condition.
pub fn clear(status: &mut Option<Value>, kind: &str) {
    if let Some(Value::Array(list)) = status.as_mut().and_then(|status| status.get_mut("conditions")) {
        list.retain(|old| old["type"] != kind);
    }
}

/// All conditions as `(type, status, reason, message, Unix ms)`.
pub fn list(status: Option<&Value>) -> Vec<(String, String, String, String, i64)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let Some(Value::Array(list)) = status.and_then(|status| status.get("conditions")) else {
        return Vec::new();
    };
    list.iter()
        .map(|c| {
            let since = c["lastTransitionTime"]
                .as_str()
                .and_then(tombolo_config::unix_ms)
                .unwrap_or_default();
            (
                text(&c["type"]),
                text(&c["status"]),
                text(&c["reason"]),
                text(&c["message"]),
                since,
            )
        })
        .collect()
}

/// Addresses that wait for a dial-back.
pub fn candidates(status: Option<&Value>) -> Vec<std::net::IpAddr> {
    let Some(Value::Array(list)) = status.and_then(|status| status.get(CANDIDATES)) else {
        return Vec::new();
    };
    list.iter()
        .filter_map(|value| value.as_str()?.parse().ok())
        .collect()
}

/// Sets them; none removes the field.
pub fn set_candidates(status: &mut Option<Value>, addresses: &[std::net::IpAddr]) {
    if addresses.is_empty() {
        if let Some(Value::Object(map)) = status {
            map.remove(CANDIDATES);
        }
        return;
    }
    let list = addresses
        .iter()
        .map(|address| json!(address.to_string()))
        .collect();
    object(status).insert(CANDIDATES.into(), Value::Array(list));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_keep_their_time_and_their_neighbours() {
        let mut status = Some(json!({ "addresses": [{ "value": "240.240.0.1" }] }));
        let mut condition = Condition {
            kind: HEALTHY,
            status: false,
            reason: "Suspect".into(),
            message: "x".into(),
            since_unix_ms: 1_000,
        };
        set(&mut status, &condition);
        condition.since_unix_ms = 2_000;
        condition.message = "y".into();
        set(&mut status, &condition);
        assert_eq!(
            list(status.as_ref()),
            [(
                "Healthy".into(),
                "False".into(),
                "Suspect".into(),
                "y".into(),
                1_000,
            )]
        );
        condition.status = true;
        set(&mut status, &condition);
        assert_eq!(list(status.as_ref())[0].4, 2_000);
        set_candidates(&mut status, &["10.0.0.1".parse().unwrap()]);
        assert_eq!(candidates(status.as_ref()).len(), 1);
        set_candidates(&mut status, &[]);
        clear(&mut status, HEALTHY);
        assert_eq!(
            status,
            Some(json!({ "addresses": [{ "value": "240.240.0.1" }], "conditions": [] }))
        );
    }
}
