//! Aggregated discovery service: incremental xDS for agents, ztunnel and whoever asks for the same types.

mod demand;
mod node;
mod stream;
mod subscribers;
mod watch;

pub use subscribers::{SubscriberState, Subscribers, TypeState};

use crate::{address::AddressKeeper, caller::Authenticators, fleet::Fleet, metrics::Metrics};
use std::{pin::Pin, sync::Arc};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tombolo_proto::xds::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::AggregatedDiscoveryService,
};
use tombolo_runtime::TaskGroup;
use tonic::{Request, Response, Status, Streaming};

/// The service.
#[derive(Debug, Clone)]
pub struct Ads {
    pub(crate) fleet: Fleet,
    pub(crate) authenticators: Authenticators,
    pub(crate) subscribers: Subscribers,
    pub(crate) addresses: AddressKeeper,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tasks: TaskGroup,
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
        tasks: TaskGroup,
    ) -> Self {
        Self {
            fleet,
            authenticators,
            subscribers,
            addresses,
            metrics,
            tasks,
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
        node::known(&caller)?;
        // One place: a response is made when the client has read the one before it.
        let (answers_tx, answers_rx) = mpsc::channel(1);
        let ads = self.clone();
        let requests = request.into_inner();
        self.tasks.spawn("ADS stream", async move {
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
        Ok(Response::new(Box::pin(ReceiverStream::new(answers_rx))))
    }
}
