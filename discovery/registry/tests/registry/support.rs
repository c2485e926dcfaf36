use std::sync::Arc;
use tombolo_config::{Resource, read_documents};
use tombolo_proto::{
    istio::{
        security::Authorization,
        workload::{Service, Workload, address::Type},
    },
    tombolo::v1::{Exposure, ServiceVip},
    type_url, unpack,
};
use tombolo_registry::{Health, MeshSettings, Registry, World};

pub(crate) fn settings() -> MeshSettings {
    MeshSettings::new("mesh.example".parse().expect("a trust domain"))
}

pub(crate) fn resources(yaml: &str) -> Vec<Resource> {
    read_documents(yaml).unwrap_or_else(|found| panic!("{found:?}"))
}

/// A registry that holds these documents, addresses given and persisted.
pub(crate) fn registry(yaml: &str) -> Registry {
    let mut registry = Registry::new(settings());
    let mut all = resources(yaml);
    all.iter().cloned().for_each(|resource| registry.upsert(resource));
    give_addresses(&mut registry, &mut all);
    registry
}

/// What discovery does before it publishes.
pub(crate) fn give_addresses(registry: &mut Registry, objects: &mut [Resource]) {
    for allocation in registry.allocate() {
        let object = objects
            .iter_mut()
            .find(|object| {
                object.kind() == allocation.kind
                    && object.namespace() == allocation.namespace
                    && object.name() == allocation.name
            })
            .expect("an allocation is for an object that is there");
        allocation.persist(object);
        registry.upsert(object.clone());
    }
}

pub(crate) fn down(registry: &mut Registry, namespace: &str, entry: &str) {
    registry.set_health(
        namespace,
        entry,
        Health::Unhealthy {
            reason: "gone".into(),
        },
    );
}

pub(crate) fn workload(world: &World, uid: &str) -> Workload {
    match address(world, uid) {
        Type::Workload(workload) => workload,
        Type::Service(service) => panic!("{service:?}"),
    }
}

pub(crate) fn entry(world: &World, namespace: &str, name: &str) -> Workload {
    workload(
        world,
        &format!("Kubernetes/networking.istio.io/WorkloadEntry/{namespace}/{name}"),
    )
}

pub(crate) fn service(world: &World, name: &str) -> Service {
    match address(world, name) {
        Type::Service(service) => service,
        Type::Workload(workload) => panic!("{workload:?}"),
    }
}

fn address(world: &World, name: &str) -> Type {
    let address: tombolo_proto::istio::workload::Address = get(world, type_url::ADDRESS, name);
    address.r#type.expect("an address is a workload or a service")
}

pub(crate) fn policy(world: &World, name: &str) -> Authorization {
    get(world, type_url::AUTHORIZATION, name)
}

pub(crate) fn exposure(world: &World, name: &str) -> Exposure {
    get(world, type_url::EXPOSURE, name)
}

pub(crate) fn service_vip(world: &World, name: &str) -> ServiceVip {
    get(world, type_url::SERVICE_VIP, name)
}

fn get<M: prost::Message + Default>(world: &World, type_url: &str, name: &str) -> M {
    let found = world.resource(type_url, name);
    unpack(
        &found
            .unwrap_or_else(|| panic!("{name} in {:?}", names(world, type_url)))
            .any,
    )
    .expect("a message of this type")
}

pub(crate) fn names(world: &World, type_url: &str) -> Vec<String> {
    world
        .resources(type_url)
        .into_iter()
        .flat_map(|resources| resources.keys())
        .map(ToString::to_string)
        .collect()
}

pub(crate) fn changed(world: &Arc<World>, type_url: &str) -> Vec<String> {
    world.changed(type_url).iter().map(ToString::to_string).collect()
}

/// Addresses in text, with `/length` for a prefix.
pub(crate) fn addresses(service: &Service) -> Vec<String> {
    let text = |address: &tombolo_proto::istio::workload::NetworkAddress| {
        let ip: std::net::IpAddr = match <[u8; 4]>::try_from(&address.address[..]) {
            Ok(v4) => v4.into(),
            Err(_) => <[u8; 16]>::try_from(&address.address[..])
                .expect("4 or 16 bytes")
                .into(),
        };
        match address.length {
            Some(length) => format!("{ip}/{length}"),
            None => ip.to_string(),
        }
    };
    service.addresses.iter().map(text).collect()
}
