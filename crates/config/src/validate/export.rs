use super::{Findings, names};
use crate::{Kind, Metadata, NamespaceSpec, Object, ServiceExportSpec, annotation::GLOBAL};
use tombolo_types::{check_label, reserved_namespace};

pub(super) fn service_export(findings: &mut Findings, object: &Object<ServiceExportSpec>) {
    findings.not_reserved(Kind::ServiceExport, &object.metadata.namespace);
    // It is the name of a service, and that is one label of its host name.
    findings.check("metadata.name", check_label("service", &object.metadata.name));
    for (field, map) in [
        ("spec.exportedLabels", &object.spec.exported_labels),
        ("spec.exportedAnnotations", &object.spec.exported_annotations),
    ] {
        if !map.is_empty() {
            findings.warn(field, "is kept, and not passed on to other clusters");
        }
    }
}

pub(super) fn namespace(findings: &mut Findings, object: &Object<NamespaceSpec>) {
    let metadata = &object.metadata;
    global_label(findings, metadata);
    if crate::exports(metadata) == Some(true) && reserved_namespace(&metadata.name) {
        findings.error(
            names::key_path("metadata.labels", GLOBAL),
            format!("{} is reserved: nothing of it is exported", metadata.name),
        );
    }
}

/// The label that exports.
pub(super) fn global_label(findings: &mut Findings, metadata: &Metadata) {
    if let Some(value) = metadata.labels.get(GLOBAL)
        && value != "true"
        && value != "false"
    {
        let reason = format!("{value:.80?} is neither \"true\" nor \"false\": nothing is exported");
        findings.warn(names::key_path("metadata.labels", GLOBAL), reason);
    }
}

#[cfg(test)]
mod tests {
    use crate::{Resource, validate::tests::findings_with};
    use serde_json::json;

    #[test]
    fn service_exports() {
        let check = |name: &str, namespace: &str, spec: serde_json::Value, expected: &[&str]| {
            let found = findings_with("svcex", json!({"name": name, "namespace": namespace}), spec);
            assert_eq!(found, expected, "{name}");
        };
        check("catalog", "shop", json!({}), &[]);
        check(
            "a.b",
            "kube-system",
            json!({"exportedLabels": {"a": "b"}}),
            &[
                "metadata.namespace: kube-system is reserved: no ServiceExport may be there",
                "metadata.name: service \"a.b\": use lower case letters, digits and '-', starting and ending with a \
                 letter or digit",
                "warning: spec.exportedLabels: is kept, and not passed on to other clusters",
            ],
        );
        check(
            "a",
            "shop",
            json!({"exportedLables": {}}),
            &["spec.exportedLables: unknown field; did you mean exportedLabels?"],
        );
    }

    #[test]
    fn a_namespace_is_in_no_namespace() {
        let check = |metadata, expected: &[&str]| {
            assert_eq!(findings_with("ns", metadata, json!({})), expected);
        };
        check(
            json!({"name": "shop", "labels": {"istio.io/global": "true"}}),
            &[],
        );
        check(json!({"name": "shop", "namespace": "shop"}), &[]);
        check(
            json!({"name": "shop", "namespace": "bank"}),
            &["metadata.namespace: a Namespace is in no namespace: leave it out"],
        );
        check(
            json!({"name": "kube-system", "labels": {"istio.io/global": "true"}}),
            &["metadata.labels[\"istio.io/global\"]: kube-system is reserved: nothing of it is exported"],
        );
        check(
            json!({"name": "shop", "labels": {"istio.io/global": "yes"}}),
            &[
                "warning: metadata.labels[\"istio.io/global\"]: \"yes\" is neither \"true\" nor \"false\": nothing is \
               exported",
            ],
        );
    }

    #[test]
    fn what_kubernetes_writes_is_read_and_comes_back() {
        // As `kubectl get -o yaml` prints them.
        let text = "
apiVersion: v1
kind: Namespace
metadata:
  creationTimestamp: \"2026-01-01T00:00:00Z\"
  labels: {istio.io/global: \"true\", kubernetes.io/metadata.name: shop}
  name: shop
  resourceVersion: \"7\"
spec: {finalizers: [kubernetes]}
status: {phase: Active}
---
apiVersion: multicluster.x-k8s.io/v1alpha1
kind: ServiceExport
metadata: {name: catalog, namespace: shop}
";
        let read = crate::read_documents(text).unwrap();
        assert_eq!(read[0].title(), "Namespace shop");
        assert_eq!((read[0].namespace(), read[0].name()), ("shop", "shop"));
        assert_eq!(read[1].title(), "ServiceExport shop/catalog");
        for resource in read {
            let json = resource.to_json();
            assert_eq!(Resource::from_stored(&json), Ok(resource));
        }
    }
}
