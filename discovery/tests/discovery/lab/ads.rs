//! Clients of the xDS stream.

use std::time::Duration;
use tombolo_proto::xds::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tonic::transport::Channel;

/// A delta ADS client.
pub(crate) struct Ads {
    requests: tokio::sync::mpsc::Sender<DeltaDiscoveryRequest>,
    responses: tonic::Streaming<DeltaDiscoveryResponse>,
    node: Option<tombolo_proto::envoy::config::core::v3::Node>,
}

impl Ads {
    pub(crate) async fn open(
        channel: Channel,
        node: tombolo_proto::envoy::config::core::v3::Node,
        bearer: Option<&str>,
    ) -> Self {
        let (requests, receiver) = tokio::sync::mpsc::channel(64);
        let mut request = tonic::Request::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
        if let Some(token) = bearer {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let responses = AggregatedDiscoveryServiceClient::new(channel)
            .delta_aggregated_resources(request)
            .await
            .unwrap()
            .into_inner();
        Self {
            requests,
            responses,
            node: Some(node),
        }
    }

    pub(crate) fn node_id(&mut self, id: &str) {
        if let Some(node) = &mut self.node {
            node.id = id.into();
        }
    }

    pub(crate) async fn send(&mut self, mut request: DeltaDiscoveryRequest) {
        request.node = self.node.take();
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn subscribe(&mut self, url: &str) {
        self.send(DeltaDiscoveryRequest {
            type_url: url.into(),
            ..Default::default()
        })
        .await;
    }

    /// The next response, acknowledged.
    pub(crate) async fn next(&mut self) -> Result<DeltaDiscoveryResponse, tonic::Status> {
        let response = self.unacknowledged().await?;
        self.ack(&response).await;
        Ok(response)
    }

    pub(crate) async fn unacknowledged(&mut self) -> Result<DeltaDiscoveryResponse, tonic::Status> {
        let message = tokio::time::timeout(Duration::from_secs(10), self.responses.message()).await;
        message
            .expect("a response in time")?
            .ok_or_else(|| tonic::Status::ok("end of stream"))
    }

    pub(crate) async fn ack(&mut self, response: &DeltaDiscoveryResponse) {
        let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
        let _ = self
            .requests
            .send(DeltaDiscoveryRequest {
                type_url,
                response_nonce,
                ..Default::default()
            })
            .await;
    }

    /// True if nothing comes for a while; what comes is acknowledged.
    pub(crate) async fn is_quiet_after_acks(&mut self) -> bool {
        match tokio::time::timeout(Duration::from_millis(300), self.responses.message()).await {
            Ok(message) => {
                self.ack(&message.unwrap().unwrap()).await;
                false
            }
            Err(_) => true,
        }
    }

    /// True if nothing comes for a while.
    pub(crate) async fn is_quiet(&mut self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.responses.message())
            .await
            .is_err()
    }
}
