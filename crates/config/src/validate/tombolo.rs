use super::{Findings, names};
use crate::{DeviceSpec, JoinTokenSpec, Kind, Object, unix_ms};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use tombolo_types::DeviceId;

/// Devices that one token may enrol; a fleet is more than one token.
const USES_MAX: u32 = 100_000;

pub(super) fn join_token(findings: &mut Findings, object: &Object<JoinTokenSpec>) {
    let spec = &object.spec;
    findings.not_reserved(Kind::JoinToken, &object.metadata.namespace);
    if BASE64_STANDARD.decode(&spec.public_key).map(|key| key.len()) != Ok(32) {
        findings.error("spec.publicKey", "is not 32 bytes in base64");
    }
    findings.check(
        "spec.workloadGroup",
        names::subdomain("workload group", &spec.workload_group),
    );
    if !(1..=USES_MAX).contains(&spec.uses) {
        findings.error(
            "spec.uses",
            format!("{} is not between 1 and {USES_MAX}", spec.uses),
        );
    }
    if unix_ms(&spec.expires).is_none() {
        findings.error("spec.expires", "is not an RFC 3339 time");
    }
    for (index, cidr) in spec.cidr.iter().enumerate() {
        findings.check(format!("spec.cidr[{index}]"), names::ip_or_cidr(cidr));
    }
}

pub(super) fn device(findings: &mut Findings, object: &Object<DeviceSpec>) {
    findings.check(
        "metadata.name",
        object.metadata.name.parse::<DeviceId>().map(|_| ()),
    );
    if BASE64_STANDARD
        .decode(&object.spec.public_key)
        .map_or(true, |key| key.is_empty())
    {
        findings.error("spec.publicKey", "is not base64");
    }
}

#[cfg(test)]
mod tests {
    use crate::validate::tests::{findings, findings_with};
    use serde_json::json;

    #[test]
    fn tokens() {
        let key = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let good = json!({"publicKey": key, "workloadGroup": "g", "uses": 1, "expires": "2026-11-24T08:00:00Z",
            "cidr": ["10.0.0.0/8"]});
        assert!(findings("jt", good.clone()).is_empty());
        assert_eq!(
            findings_with("jt", json!({"name": "x", "namespace": "tombolo-system"}), good),
            ["metadata.namespace: tombolo-system is reserved: no JoinToken may be there"]
        );
        assert_eq!(
            findings(
                "jt",
                json!({"publicKey": "AAAA", "workloadGroup": "", "uses": 0, "expires": "soon", "cidr": ["x"]})
            ),
            [
                "spec.publicKey: is not 32 bytes in base64",
                "spec.workloadGroup: workload group is empty",
                "spec.uses: 0 is not between 1 and 100000",
                "spec.expires: is not an RFC 3339 time",
                "spec.cidr[0]: \"x\" is not an IP address or CIDR",
            ]
        );
    }
}
