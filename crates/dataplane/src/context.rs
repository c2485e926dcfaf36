use crate::{Settings, endpoints::Endpoints, flows::Flows, through::GatewayNames};
use http::HeaderValue;
use std::sync::{Arc, atomic::AtomicBool};
use tombolo_destination::Workload;
use tombolo_runtime::Reader;
use tombolo_snapshot::{Own, Snapshot};
use tombolo_telemetry::{AccessLog, Metrics};
use tombolo_tunnel::{Baggage, Pool};
use tombolo_types::AddressPlan;

/// What both directions share.
pub(crate) struct Context {
    pub(crate) world: Reader<Snapshot>,
    pub(crate) own: Own,
    pub(crate) plan: AddressPlan,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) access: AccessLog,
    pub(crate) settings: Settings,
    pub(crate) flows: Flows,
    pub(crate) endpoints: Endpoints,
    pub(crate) pool: Pool,
    pub(crate) gateway_names: GatewayNames,
    /// Another process goes on: what is not open yet is begun anew there.
    pub(crate) handed_over: AtomicBool,
}

/// What is said of a workload to the other end.
pub(crate) fn baggage(workload: Option<&Workload>) -> Option<HeaderValue> {
    let workload = workload?;
    Baggage {
        cluster: workload.cluster_id.to_string(),
        namespace: workload.namespace.to_string(),
        workload: workload.workload_name.to_string(),
        service: workload.canonical_name.to_string(),
        revision: workload.canonical_revision.to_string(),
        region: workload.locality.region.to_string(),
        zone: workload.locality.zone.to_string(),
    }
    .to_header()
}
