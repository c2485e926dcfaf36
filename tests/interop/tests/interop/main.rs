//! Other implementations, unmodified, as peers of ours: Envoy as HBONE client and server, ztunnel as both and as a client
//! of our discovery and CA, within a network and across networks.
//!
//! Envoy comes from its package registry (`make setup`); ztunnel is run where `TOMBOLO_ZTUNNEL` names one.

mod double_hbone;
mod envoy;
mod envoy_networks;
mod site;
mod wire;
mod ztunnel;
mod ztunnel_clusters;
mod ztunnel_networks;

use anyhow::Result;
use std::time::Duration;
use tombolo_testkit::{Host, Mesh};

/// The service of the `catalog` group.
const CATALOG: &str = "catalog.shop.svc.mesh.internal";
/// Longest wait for something that takes a second on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// A WorkloadEntry as an operator writes it for a peer that is not one of our agents.
fn entry(mesh: &Mesh, name: &str, host: &Host, service_account: &str) -> Result<()> {
    mesh.apply(&format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {name}\n  namespace: shop\n  labels: {{app: {service_account}, networking.istio.io/tunnel: http}}\n\
         spec:\n  address: {}\n  serviceAccount: {service_account}\n  ports: {{http: 8080}}\n",
        host.ipv4()
    ))
    .map(drop)
}

/// First IPv4 VIP of a service.
fn vip(mesh: &Mesh, service: &str) -> Result<String> {
    let json = mesh.tombolo(&format!("get se {service} -n shop -o json"))?;
    json.split('"')
        .find(|word| word.starts_with("240.240."))
        .map(str::to_owned)
        .ok_or_else(|| anyhow::anyhow!("no VIP in {json}"))
}
