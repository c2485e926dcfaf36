//! Whole files, as users have them: Istio's unchanged, and those with slips.

use proptest::prelude::*;
use std::{fs, path::PathBuf};
use tombolo_config::{Resource, read_documents};

fn corpus() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/resource_yaml").into()
}

/// As the fuzz target `resource_yaml`, as far as this crate goes.
fn check(bytes: &[u8]) -> Option<usize> {
    let resources = read_documents(std::str::from_utf8(bytes).ok()?).ok()?;
    for resource in &resources {
        let json = resource.to_json();
        assert_eq!(Resource::from_stored(&json).as_ref(), Ok(resource), "{json}");
        assert_eq!(Resource::from_json(&json).as_ref(), Ok(resource), "{json}");
    }
    Some(resources.len())
}

#[test]
fn the_corpus_of_resource_yaml() {
    let mut files = 0;
    for file in fs::read_dir(corpus()).unwrap() {
        check(&fs::read(file.unwrap().path()).unwrap());
        files += 1;
    }
    assert!(files >= 12, "{files} files");
}

#[test]
fn files_of_istio_are_taken_unchanged() {
    for (file, objects) in [
        ("istio_workload_group.yaml", 1),
        ("istio_probes.yaml", 3),
        ("istio_service_entries.yaml", 6),
        ("istio_workload_entry_exported.yaml", 1),
        ("istio_policies.yaml", 8),
        ("tombolo.yaml", 2),
    ] {
        let text = fs::read_to_string(corpus().join(file)).unwrap();
        match read_documents(&text) {
            Ok(found) => assert_eq!(found.len(), objects, "{file}"),
            Err(found) => panic!(
                "{file}: {}",
                found
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("\n")
            ),
        }
    }
}

/// What is read is what was written: no field of the schema gets lost on the way.
#[test]
fn every_field_survives() {
    let text = fs::read_to_string(corpus().join("istio_policies.yaml")).unwrap();
    let every = text
        .split("\n---\n")
        .find(|document| document.contains("every-field"))
        .unwrap();
    let written = every.matches(':').count();
    let json = read_documents(every).unwrap()[0].to_json();
    fn keys(value: &serde_json::Value) -> usize {
        match value {
            serde_json::Value::Object(fields) => fields.len() + fields.values().map(keys).sum::<usize>(),
            serde_json::Value::Array(items) => items.iter().map(keys).sum(),
            serde_json::Value::Null
            | serde_json::Value::Bool(_)
            | serde_json::Value::Number(_)
            | serde_json::Value::String(_) => 0,
        }
    }
    // The colons that are no key: three in an address.
    assert_eq!(keys(&json), written - 3);
}

#[test]
fn slips_of_a_whole_file_are_named_at_once() {
    let text = fs::read_to_string(corpus().join("slips.yaml")).unwrap();
    let found: Vec<String> = read_documents(&text)
        .unwrap_err()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        found,
        [
            "ServiceEntry a.b/A: metadata.lables: unknown field; did you mean labels?",
            "ServiceEntry a.b/A: spec.endpoints[1]: must not be null: write a value, {}, or leave the field out",
            "document 2: ServiceEntri: kind: ServiceEntri is not a kind of this mesh; known are WorkloadGroup, \
             WorkloadEntry, ServiceEntry, AuthorizationPolicy, PeerAuthentication, ServiceExport, Namespace, JoinToken; did you mean \
             ServiceEntry?",
            "document 3: must be a mapping with apiVersion, kind, metadata and spec",
            "document 4: AuthorizationPolicy default/x: spec.rules[0]: must be a mapping, not a list",
        ]
    );
}

#[test]
fn frames() {
    let refused = |text: &str| {
        read_documents(text)
            .unwrap_err()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(
        refused("kind: ServiceEntry"),
        "ServiceEntry: apiVersion: is required"
    );
    assert_eq!(
        refused("{apiVersion: networking.istio.io/v1alpha, kind: ServiceEntry}"),
        "ServiceEntry: apiVersion: ServiceEntry has no version v1alpha; known are v1, v1beta1, v1alpha3; did you mean \
         v1alpha3?"
    );
    assert_eq!(
        refused("{apiVersion: networking.istio.io/v1, kind: PeerAuthentication}"),
        "PeerAuthentication: apiVersion: PeerAuthentication is not in networking.istio.io/v1; write \
         security.istio.io/v1"
    );
    assert_eq!(
        refused("{apiVersion: networking.istio.io/v1, kind: ServiceEntry, sepc: {}}"),
        "ServiceEntry: sepc: unknown field; did you mean spec?\nServiceEntry: spec: is required\nServiceEntry: \
         metadata.name: is required"
    );
    assert_eq!(
        refused(
            "{kind: List, items: [{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: a}, spec: \
             {addres: x}}]}"
        ),
        "WorkloadEntry default/a: items[0].spec.addres: unknown field; did you mean address?"
    );
    assert!(read_documents("").unwrap().is_empty());
}

#[test]
fn an_object_without_a_namespace_is_in_default() {
    let text = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: a}}";
    let found = read_documents(text).unwrap().remove(0);
    assert_eq!(
        (found.namespace(), found.title()),
        ("default", "PeerAuthentication default/a".to_owned())
    );
}

#[test]
fn what_was_stored_is_read_again_even_if_a_rule_has_become_stricter() {
    let json = serde_json::json!({"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": "a", "namespace": "shop"}, "spec": {}});
    assert!(Resource::from_json(&json).is_err());
    assert_eq!(Resource::from_stored(&json).unwrap().to_json(), json);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Damaged files: a piece cut out, or bytes changed.
    #[test]
    fn damaged_files_do_no_harm(file in 0..6usize, at in any::<prop::sample::Index>(), cut in 0..40usize, put in "[\\[\\]{}:,&*!|>%@`'\"a-z0-9 \n-]{0,6}") {
        let files = ["istio_workload_group.yaml", "istio_service_entries.yaml", "istio_policies.yaml", "tombolo.yaml",
            "slips.yaml", "aliases.yaml"];
        let mut text: Vec<char> = fs::read_to_string(corpus().join(files[file])).unwrap().chars().collect();
        let at = at.index(text.len());
        let end = (at + cut).min(text.len());
        text.splice(at..end, put.chars());
        check(text.into_iter().collect::<String>().as_bytes());
    }

    #[test]
    fn any_text_does_no_harm(text in "\\PC{0,200}") {
        check(text.as_bytes());
    }
}
