//! A response of the control plane, whatever its bytes, never panics; what was taken of it survives the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use tombolo_destination::resolve;
use tombolo_proto::xds::DeltaDiscoveryResponse;
use tombolo_snapshot::{Own, Snapshot};
use tombolo_types::AddressPlan;

fn own() -> Own {
    Own {
        namespace: "shop".into(),
        workload_name: "web-1".into(),
        service_account: "web".into(),
        network: "net".into(),
        cluster_id: "Kubernetes".into(),
        mesh_domain: "mesh.internal".into(),
        trust_domain: "mesh.example".parse().expect("a valid name"),
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(response) = DeltaDiscoveryResponse::decode(bytes) else { return };
    let mut snapshot = Snapshot::empty(AddressPlan::default(), own());
    snapshot.apply(&response.type_url, response.resources.clone(), &[]);
    for service in snapshot.services() {
        for vip in snapshot.vips(&service.key) {
            for port in &service.ports {
                let _ = resolve(&snapshot, &snapshot.source(), vip, port.service_port);
            }
        }
        let _ = snapshot.service_by_host(service.hostname.as_str(), "shop");
    }
    let read = Snapshot::decode(&snapshot.encode(), AddressPlan::default(), own()).expect("our own bytes");
    assert_eq!(read.held(&response.type_url), snapshot.held(&response.type_url));
    let names: Vec<String> = snapshot.held(&response.type_url).into_keys().collect();
    snapshot.apply(&response.type_url, Vec::new(), &names);
    assert!(snapshot.held(&response.type_url).is_empty());
    snapshot.apply(&response.type_url, response.resources, &response.removed_resources);
});
