use crate::support::*;
use std::time::{Duration, Instant};
use tombolo_config::{Metadata, Object, Resource, ServiceEntrySpec, WorkloadEntrySpec};
use tombolo_proto::type_url;
use tombolo_registry::Registry;

const WORKLOADS: usize = 100_000;
const SERVICES: usize = 1_000;

fn entry_of(number: usize, version: &str) -> Resource {
    let spec = WorkloadEntrySpec {
        address: format!("10.{}.{}.{}", number >> 16 & 255, number >> 8 & 255, number & 255),
        labels: [
            ("app".to_owned(), format!("app-{}", number % SERVICES)),
            ("version".to_owned(), version.to_owned()),
        ]
        .into(),
        ..WorkloadEntrySpec::default()
    };
    Object::<WorkloadEntrySpec>::new(Metadata::named("shop", format!("e-{number}")), spec).into()
}

fn service_of(number: usize) -> Resource {
    let json = serde_json::json!({"hosts": [format!("app-{number}.shop.svc.mesh.internal")], "resolution": "STATIC",
        "workloadSelector": {"labels": {"app": format!("app-{number}")}},
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}]});
    let spec = serde_json::from_value(json).expect("a ServiceEntry");
    Object::<ServiceEntrySpec>::new(Metadata::named("shop", format!("app-{number}")), spec).into()
}

/// One change among 100,000 workloads costs what one workload costs. The limit is ten times what was measured in an
/// unoptimised build, so that only a cost which grows with the mesh can break it.
#[test]
fn one_change_among_many_is_cheap() {
    let mut registry = Registry::new(settings());
    let mut services: Vec<Resource> = (0..SERVICES).map(service_of).collect();
    services
        .iter()
        .cloned()
        .for_each(|service| registry.upsert(service));
    (0..WORKLOADS).for_each(|number| registry.upsert(entry_of(number, "v1")));
    give_addresses(&mut registry, &mut services);
    let started = Instant::now();
    let first = registry.publish();
    println!("first publish of {WORKLOADS} workloads: {:?}", started.elapsed());
    assert_eq!(
        first.resources(type_url::ADDRESS).unwrap().len(),
        WORKLOADS + SERVICES
    );

    let mut times: Vec<Duration> = (0..200)
        .map(|round| {
            let change = entry_of(round * 37, "v2");
            let started = Instant::now();
            registry.upsert(change);
            let world = registry.publish();
            let took = started.elapsed();
            assert_eq!(world.changed(type_url::ADDRESS).len(), 1);
            took
        })
        .collect();
    times.sort_unstable();
    println!(
        "upsert and publish of one: median {:?}, worst {:?}",
        times[100], times[199]
    );
    assert!(times[100] < Duration::from_millis(1), "median {:?}", times[100]);

    let started = Instant::now();
    down(&mut registry, "shop", "e-5");
    registry.publish();
    println!("one turns unhealthy: {:?}", started.elapsed());
}
