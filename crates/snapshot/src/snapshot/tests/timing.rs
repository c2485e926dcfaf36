//! How long the large cases take. Printed (`--nocapture`); the bounds only catch a wrong order of growth.
use super::*;
use std::{hint::black_box, time::Instant};

const WORKLOADS: usize = 100_000;
const SERVICES: usize = 1_000;

fn large(n: usize) -> xds::Resource {
    let key = format!("shop/service-{}.shop.svc.mesh.internal", n % SERVICES);
    let uid = format!(
        "Kubernetes/networking.istio.io/WorkloadEntry/shop/service-{}-{n:016x}",
        n % SERVICES
    );
    workload(&uid, |w| {
        w.services = [(
            key,
            wds::PortList {
                ports: vec![wds::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 1,
                }],
            },
        )]
        .into();
        w.addresses = vec![(n as u32 | 0x0a00_0000).to_be_bytes().to_vec()];
        w.locality = Some(wds::Locality {
            region: "eu-west".into(),
            zone: "eu-west-1".into(),
            subzone: String::new(),
        });
        w.canonical_name = format!("service-{}", n % SERVICES);
        w.canonical_revision = "latest".into();
    })
}

#[test]
fn large_worlds() {
    let resources: Vec<_> = (0..WORKLOADS).map(large).collect();
    let services = (0..SERVICES).map(|n| {
        service(&format!("shop/service-{n}.shop.svc.mesh.internal"), |s| {
            s.addresses = vec![at([240, 240, (n / 250) as u8, (n % 250 + 1) as u8])];
        })
    });
    let mut snapshot = empty();
    take(&mut snapshot, type_url::ADDRESS, services);
    let start = Instant::now();
    take(&mut snapshot, type_url::ADDRESS, resources);
    let ingest = start.elapsed();

    let updates: Vec<_> = (0..1_000).map(|n| large(n * 97)).collect();
    let start = Instant::now();
    let mut published = snapshot.clone();
    for update in updates {
        snapshot.apply(type_url::ADDRESS, vec![update], &[]);
        published = snapshot.clone();
    }
    let update = start.elapsed() / 1_000;
    assert_eq!(published.workload_count(), WORKLOADS);

    let start = Instant::now();
    let bytes = snapshot.encode();
    let encode = start.elapsed();
    let start = Instant::now();
    let read = Snapshot::decode(&bytes, AddressPlan::default(), own()).unwrap();
    let decode = start.elapsed();
    assert_eq!(read.workload_count(), WORKLOADS);

    // A service of 1,000 endpoints.
    let mut crowd = empty();
    take(
        &mut crowd,
        type_url::ADDRESS,
        [service("shop/service-0.shop.svc.mesh.internal", |_| {})],
    );
    take(
        &mut crowd,
        type_url::ADDRESS,
        (0..1_000).map(|n| large(n * SERVICES)),
    );
    let source = crowd.source();
    let start = Instant::now();
    for _ in 0..200 {
        let found = resolve(&crowd, &source, black_box(IpAddr::from([240, 240, 0, 1])), 80).unwrap();
        assert_eq!(found.candidates.len(), 1_000);
    }
    let resolving = start.elapsed() / 200;
    let found = resolve(&crowd, &source, IpAddr::from([240, 240, 0, 1]), 80).unwrap();
    let start = Instant::now();
    for seed in 0..200 {
        black_box(tombolo_destination::order(&found, &|_| 0, &|_| false, seed));
    }
    let ordering = start.elapsed() / 200;
    println!(
        "{WORKLOADS} workloads: ingest {ingest:?}, one update and publish {update:?}, encode {encode:?} \
         ({} MB), decode {decode:?}; 1,000 endpoints: resolve {resolving:?}, order {ordering:?}",
        bytes.len() / 1_000_000,
    );
    assert!(
        ingest.as_secs() < 10 && update.as_millis() < 5,
        "{ingest:?} {update:?}"
    );
}
