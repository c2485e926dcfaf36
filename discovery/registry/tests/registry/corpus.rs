//! Replays the corpus of the fuzz target `resource_yaml`: what is accepted can be compiled, and decoded again.

use crate::support::settings;
use std::fs;
use tombolo_config::read_documents;
use tombolo_proto::{istio, type_url, unpack};
use tombolo_registry::{Registry, validate_in_mesh};

#[test]
fn the_corpus_of_resource_yaml() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/resource_yaml");
    let mut registry = Registry::new(settings());
    let mut accepted = 0;
    for file in fs::read_dir(folder).unwrap() {
        let Ok(text) = fs::read_to_string(file.unwrap().path()) else {
            continue;
        };
        for resource in read_documents(&text).unwrap_or_default() {
            let _ = validate_in_mesh(&resource, registry.settings(), &[]);
            registry.upsert(resource);
            accepted += 1;
        }
    }
    assert!(accepted >= 20, "{accepted} resources");
    registry.allocate();
    let world = registry.publish();
    for (name, compiled) in world.resources(type_url::ADDRESS).unwrap() {
        assert!(
            unpack::<istio::workload::Address>(&compiled.any)
                .unwrap()
                .r#type
                .is_some(),
            "{name}"
        );
    }
    for (name, compiled) in world.resources(type_url::AUTHORIZATION).unwrap() {
        let policy: istio::security::Authorization = unpack(&compiled.any).unwrap();
        assert_eq!(**name, format!("{}/{}", policy.namespace, policy.name));
    }
}
