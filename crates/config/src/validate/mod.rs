//! What the shape of an object does not show: Istio's own validation rules, and ours.

mod export;
mod names;
mod security;
mod services;
mod tombolo;
mod workloads;

use crate::{Diagnostic, Kind, Metadata, Resource, annotation, nearest};
pub(crate) use names::PROTOCOLS;
use std::collections::BTreeMap;

/// Bytes of all annotations of an object together, as in Kubernetes.
const ANNOTATION_BYTES_MAX: usize = 256 << 10;

pub(crate) fn validate(resource: &Resource) -> Vec<Diagnostic> {
    let mut findings = Findings(Vec::new());
    metadata(&mut findings, resource.kind(), resource.metadata());
    match resource {
        Resource::WorkloadGroup(object) => workloads::workload_group(&mut findings, object),
        Resource::WorkloadEntry(object) => workloads::workload_entry(&mut findings, "spec", &object.spec),
        Resource::ServiceEntry(object) => services::service_entry(&mut findings, object),
        Resource::AuthorizationPolicy(object) => security::authorization_policy(&mut findings, object),
        Resource::PeerAuthentication(object) => security::peer_authentication(&mut findings, object),
        Resource::ServiceExport(object) => export::service_export(&mut findings, object),
        Resource::Namespace(object) => export::namespace(&mut findings, object),
        Resource::JoinToken(object) => tombolo::join_token(&mut findings, object),
        Resource::Device(object) => tombolo::device(&mut findings, object),
    }
    let title = resource.title();
    findings
        .0
        .into_iter()
        .map(|finding| finding.of(0, &title))
        .collect()
}

/// Collects findings.
pub(crate) struct Findings(Vec<Diagnostic>);

impl Findings {
    fn error(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Diagnostic::error(path, reason));
    }

    fn warn(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Diagnostic::warning(path, reason));
    }

    fn check(&mut self, path: impl Into<String>, result: Result<(), impl ToString>) {
        if let Err(reason) = result {
            self.error(path, reason.to_string());
        }
    }

    fn labels(&mut self, path: &str, labels: &BTreeMap<String, String>) {
        for (key, value) in labels {
            self.check(names::key_path(path, key), names::label_key(key));
            self.check(names::key_path(path, key), names::label_value(value));
        }
    }

    /// A namespace in which nobody becomes a workload by the ordinary way.
    fn not_reserved(&mut self, kind: Kind, namespace: &str) {
        if tombolo_types::reserved_namespace(namespace) {
            self.error(
                "metadata.namespace",
                format!("{namespace} is reserved: no {kind} may be there"),
            );
        }
    }
}

fn metadata(findings: &mut Findings, kind: Kind, metadata: &Metadata) {
    if metadata.name.is_empty() {
        findings.error("metadata.name", "is required");
    } else {
        findings.check("metadata.name", names::subdomain("name", &metadata.name));
    }
    findings.check(
        "metadata.namespace",
        tombolo_types::check_label("namespace", &metadata.namespace),
    );
    findings.labels("metadata.labels", &metadata.labels);
    let mut bytes = 0;
    for (key, value) in &metadata.annotations {
        bytes += key.len() + value.len();
        let path = names::key_path("metadata.annotations", key);
        // Annotation keys may have upper-case letters (istio.io/autoRegistrationGroup), as label keys may.
        findings.check(path.clone(), names::label_key(key));
        if key.starts_with("tombolo.io/") {
            if !annotation::OURS.contains(&key.as_str()) {
                let found = Diagnostic::warning(path, "unknown annotation, without effect");
                findings
                    .0
                    .push(found.with_nearest(nearest(key, annotation::OURS)));
                continue;
            }
            let of = match key.as_str() {
                annotation::GATEWAY_ADDRESS | annotation::GATEWAY_QUIC_PORT => Kind::WorkloadEntry,
                _ => Kind::WorkloadGroup,
            };
            if kind != of {
                findings.warn(path, format!("has an effect on a {of} only"));
            }
        }
    }
    if bytes > ANNOTATION_BYTES_MAX {
        findings.error(
            "metadata.annotations",
            format!("{bytes} bytes; at most {ANNOTATION_BYTES_MAX} are allowed"),
        );
    }
    for (index, owner) in metadata.owner_references.iter().enumerate() {
        if owner.kind.is_empty() || owner.name.is_empty() {
            findings.error(
                format!("metadata.ownerReferences[{index}]"),
                "needs kind and name",
            );
        }
    }
    if metadata.creation_timestamp.is_some() && metadata.created_unix_ms().is_none() {
        findings.error("metadata.creationTimestamp", "is not an RFC 3339 time");
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::{Diagnostic, Resource};
    use serde_json::{Value, json};

    /// Findings about an object with this spec, one per line, warnings marked.
    pub(crate) fn findings(kind: &str, spec: Value) -> Vec<String> {
        findings_with(kind, json!({"name": "x", "namespace": "shop"}), spec)
    }

    pub(crate) fn findings_with(kind: &str, metadata: Value, spec: Value) -> Vec<String> {
        let kind = crate::Kind::find(kind).unwrap_or(crate::Kind::Device);
        let json = json!({"apiVersion": kind.api_version(), "kind": kind.name(), "metadata": metadata, "spec": spec});
        let shown = |found: Vec<Diagnostic>| -> Vec<String> {
            found
                .into_iter()
                .map(|mut found| {
                    found.object.clear();
                    if found.warning {
                        format!("warning: {found}")
                    } else {
                        found.to_string()
                    }
                })
                .collect()
        };
        match Resource::from_stored(&json) {
            Ok(resource) => shown(resource.validate()),
            Err(found) => shown(found),
        }
    }

    #[test]
    fn names_and_labels() {
        let check = |metadata: Value, expected: &[&str]| {
            assert_eq!(findings_with("PeerAuthentication", metadata, json!({})), expected);
        };
        check(json!({"name": "default"}), &[]);
        check(
            json!({"name": "a.b-c.0", "namespace": "shop", "labels": {"a/b": "", "app": "A_b.c"}}),
            &[],
        );
        check(json!({}), &["metadata.name: is required"]);
        check(
            json!({"name": null, "creationTimestamp": null}),
            &["metadata.name: is required"],
        );
        check(
            json!({"name": "A", "namespace": "a.b"}),
            &[
                "metadata.name: name \"A\": use lower case letters, digits and '-', starting and ending with a letter \
                 or digit",
                "metadata.namespace: namespace \"a.b\": use lower case letters, digits and '-', starting and ending \
                 with a letter or digit",
            ],
        );
        check(
            json!({"name": "a", "labels": {"a b": "x", "ok": "-x", "x/y/z": "1"}}),
            &[
                "metadata.labels[\"a b\"]: is not a label key: [prefix/]name, a name of at most 63 letters, digits, \
                 '-', '_' and '.'",
                "metadata.labels.ok: \"-x\" is not a label value: at most 63 letters, digits, '-', '_' and '.', \
                 starting and ending with a letter or digit",
                "metadata.labels[\"x/y/z\"]: is not a label key: [prefix/]name, a name of at most 63 letters, digits, \
                 '-', '_' and '.'",
            ],
        );
        check(
            json!({"name": "a", "annotations": {"tombolo.io/node-label": "x", "tombolo.io/address-cidrs": "x"}}),
            &[
                "warning: metadata.annotations[\"tombolo.io/address-cidrs\"]: has an effect on a WorkloadGroup only",
                "warning: metadata.annotations[\"tombolo.io/node-label\"]: unknown annotation, without effect; did \
                 you mean tombolo.io/node-labels?",
            ],
        );
        check(
            json!({"name": "a", "managedFields": [{"manager": "kubectl"}], "selfLink": "/x", "uid": "1"}),
            &[],
        );
        check(
            json!({"name": "a", "lables": {}}),
            &["metadata.lables: unknown field; did you mean labels?"],
        );
        check(
            json!({"name": "a", "creationTimestamp": "yesterday"}),
            &["metadata.creationTimestamp: is not an RFC 3339 time"],
        );
    }
}
