//! Aggregated discovery service: incremental xDS for agents, ztunnel and whoever asks for the same types.

mod demand;
mod node;
mod stream;
mod subscribers;
mod watch;

pub use subscribers::{SubscriberState, Subscribers, TypeState};

use crate::{
    address::AddressKeeper,
    caller::Authenticators,
    door::Door,
    fleet::Fleet,
    forwarders::{self, Forwarders},
    members::MemberLimits,
    metrics::Metrics,
    refusal::Refusal,
};
use std::{pin::Pin, sync::Arc};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tombolo_proto::xds::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::AggregatedDiscoveryService,
};
use tombolo_runtime::TaskGroup;
use tombolo_types::{Code, TrustDomain};
use tonic::{Request, Response, Status, Streaming, metadata::MetadataValue};

/// The service.
#[derive(Debug, Clone)]
pub struct Ads {
    pub(crate) fleet: Fleet,
    pub(crate) authenticators: Authenticators,
    pub(crate) subscribers: Subscribers,
    pub(crate) addresses: AddressKeeper,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tasks: TaskGroup,
    /// What certificates are made for: whose bundle says who holds the roots and names that are published.
    trust_domain: TrustDomain,
    members: MemberLimits,
    forwarders: Forwarders,
    demand: demand::Addresses,
}

impl Ads {
    /// Ready to be served.
    pub fn new(
        fleet: Fleet,
        authenticators: Authenticators,
        subscribers: Subscribers,
        addresses: AddressKeeper,
        metrics: Arc<Metrics>,
        door: &Door,
        tasks: TaskGroup,
    ) -> Self {
        Self {
            fleet,
            authenticators,
            subscribers,
            addresses,
            metrics,
            trust_domain: door.forwarders.trust_domain().clone(),
            tasks,
            members: door.members.clone(),
            forwarders: door.forwarders.clone(),
            demand: demand::Addresses::default(),
        }
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented(
            "this discovery serves incremental xDS only: call DeltaAggregatedResources (Envoy: api_type DELTA_GRPC)",
        ))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let link = crate::caller::link_of(&request);
        let (caller, link) = self.authenticators.identify(&link, request.metadata()).await?;
        // Before the first request is read: it may be large.
        let (id, device) = node::known(&caller)?;
        let place = self
            .members
            .stream(id, device, link.remote.map(|remote| remote.ip()))
            .map_err(|cause| Refusal::new(Code::MemberLimit, cause))?;
        // Where a gateway is, and whether its word about the source of other connections is taken from there: not through
        // another gateway or a load balancer.
        let direct = link
            .remote
            .filter(|_| link.via.is_none())
            .map(|remote| remote.ip());
        let shown = device
            .zip(direct)
            .and_then(|(device, address)| self.forwarders.shown(device, address));
        let may_forward = shown.is_some()
            && direct
                .and_then(|address| self.forwarders.find(address))
                .map(|found| found.device)
                == device;
        // One place: a response is made when the client has read the one before it.
        let (answers_tx, answers_rx) = mpsc::channel(1);
        let ads = self.clone();
        let requests = request.into_inner();
        self.tasks.spawn("ADS stream", async move {
            let _held = (place, shown);
            let tasks = ads.tasks.clone();
            let closing = answers_tx.clone();
            let ended = tokio::select! {
                ended = stream::run(ads, caller, link, requests, answers_tx) => ended,
                () = tasks.stopped() => Err(Status::unavailable("discovery is stopping")),
            };
            if let Err(status) = ended {
                // The client may have stopped reading: then the stream ends without a word.
                let _ = closing.try_send(Err(status));
            }
        });
        let answers: Self::DeltaAggregatedResourcesStream = Box::pin(ReceiverStream::new(answers_rx));
        let mut response = Response::new(answers);
        // Agents compare it with their own.
        let version = MetadataValue::from_static(env!("CARGO_PKG_VERSION"));
        response.metadata_mut().insert("tombolo-version", version);
        if may_forward {
            let features = MetadataValue::from_static(forwarders::FEATURE);
            response.metadata_mut().insert("tombolo-features", features);
        }
        Ok(response)
    }
}
