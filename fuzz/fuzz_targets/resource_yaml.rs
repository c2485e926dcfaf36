//! Text that claims to be resources never panics; what is accepted survives a round trip and can be compiled.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tombolo_config::{Resource, read_documents};
use tombolo_registry::{MeshSettings, Registry, validate_in_mesh};

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(resources) = read_documents(text) else { return };
    let settings = MeshSettings::new("mesh.example".parse().expect("a trust domain"));
    let mut registry = Registry::new(settings.clone());
    for resource in resources {
        let stored = Resource::from_stored(&resource.to_json()).expect("what was accepted is readable");
        assert_eq!(stored, resource);
        let _ = validate_in_mesh(&resource, &settings, &[]);
        registry.upsert(resource);
    }
    let _ = registry.allocate();
    let _ = registry.publish();
});
