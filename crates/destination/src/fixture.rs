//! A small world for the tests of this crate.
use crate::{Gateway, GatewayHost, Index, Locality, PortMap, Service, Source, Tunnel, Workload};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};
use tombolo_types::{NamespacedName, NetworkAddress};

/// Every address belongs to the one service.
pub(crate) struct World {
    pub(crate) service: Arc<Service>,
    pub(crate) workloads: Vec<Arc<Workload>>,
    pub(crate) gateways: BTreeMap<&'static str, Vec<Gateway>>,
}

pub(crate) fn vip() -> IpAddr {
    IpAddr::from([240, 240, 0, 1])
}

/// `shop/catalog.shop.svc.mesh.internal`, port 80 served at 8080, port 81 where each endpoint says.
pub(crate) fn service() -> Service {
    let mut service = Service::new("shop", "catalog.shop.svc.mesh.internal".parse().unwrap());
    service.addresses = vec![NetworkAddress {
        network: "net".into(),
        address: vip(),
    }];
    service.ports = [(80, 8080), (81, 0)]
        .map(|(service_port, target_port)| port(service_port, target_port))
        .to_vec();
    service
}

pub(crate) fn port(service_port: u16, target_port: u16) -> PortMap {
    PortMap {
        service_port,
        target_port,
        app_protocol: crate::AppProtocol::Tcp,
    }
}

/// Endpoint `10.0.0.<n>` of the service in `net`, healthy, account `catalog`.
pub(crate) fn workload(n: u8) -> Workload {
    let mut workload = Workload::new(
        format!("uid-{n}"),
        "mesh.example".parse().unwrap(),
        "shop",
        "catalog",
    );
    workload.addresses = vec![IpAddr::from([10, 0, 0, n])];
    workload.network = "net".into();
    workload.tunnel = Tunnel::Hbone;
    workload.services = BTreeMap::from([(service().key, Vec::new())]);
    workload
}

/// A workload with a change.
pub(crate) fn changed(n: u8, change: impl FnOnce(&mut Workload)) -> Workload {
    let mut one = workload(n);
    change(&mut one);
    one
}

/// Gateway `192.0.2.<n>`, healthy, of cluster `west`.
pub(crate) fn gateway(n: u8) -> Gateway {
    Gateway {
        uid: format!("gateway-{n}").into(),
        address: GatewayHost::Address(IpAddr::from([192, 0, 2, n])),
        hbone_port: 15008,
        quic_port: None,
        expected: vec![tombolo_types::SpiffeId::gateway("west.example".parse().unwrap())].into(),
        cluster: "west".into(),
        locality: Locality::default(),
        healthy: true,
        rank: 0,
    }
}

pub(crate) fn source() -> Source {
    Source {
        network: "net".into(),
        namespace: "shop".into(),
        cluster_id: "Kubernetes".into(),
        node: "".into(),
        locality: Locality {
            region: "eu".into(),
            zone: "eu-1".into(),
            subzone: "rack-1".into(),
        },
    }
}

impl World {
    pub(crate) fn new(service: Service, workloads: impl IntoIterator<Item = Workload>) -> Self {
        Self {
            service: Arc::new(service),
            workloads: workloads.into_iter().map(Arc::new).collect(),
            gateways: BTreeMap::new(),
        }
    }

    pub(crate) fn with_gateways(mut self, network: &'static str, gateways: Vec<Gateway>) -> Self {
        self.gateways.insert(network, gateways);
        self
    }
}

impl Index for World {
    fn service_by_address(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.service
            .addresses
            .iter()
            .any(|own| own.address == address)
            .then_some(&self.service)
    }
    fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>> {
        Some(&self.service).filter(|service| service.key == *key)
    }
    fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.workloads
            .iter()
            .find(|w| w.network == address.network && w.addresses.contains(&address.address))
    }
    fn endpoints(&self, key: &NamespacedName, each: &mut dyn FnMut(&Arc<Workload>)) {
        self.workloads
            .iter()
            .filter(|workload| workload.services.contains_key(key))
            .for_each(each);
    }
    fn gateways(&self, network: &str) -> &[Gateway] {
        self.gateways.get(network).map_or(&[], Vec::as_slice)
    }
}
