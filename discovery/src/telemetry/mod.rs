//! Metrics of members that nobody can scrape: pushed over the control connection, kept in memory, shown to a scraper.
//!
//! A member writes its own and no other's: whose a push is, is in the certificate of its connection.

mod exposition;
mod pushed;
mod targets;

pub use pushed::{EXPOSITION_MAX, PushedMetrics};
pub use targets::{PAGES, http_sd, page};

use crate::{
    caller::{Authenticators, Caller},
    fleet::Fleet,
    metrics::Metrics,
    refusal::Refusal,
};
use pushed::Content;
use std::{sync::Arc, time::Instant};
use tombolo_proto::tombolo::v1::{PushMetricsRequest, PushMetricsResponse, telemetry_server::Telemetry};
use tombolo_types::Code;
use tonic::{Request, Response, Status};

/// Bytes of a request that are read at all: what is a little too long is refused with a code, the rest by gRPC.
pub const REQUEST_MAX: usize = 2 * EXPOSITION_MAX;

/// The service.
#[derive(Debug, Clone)]
pub struct TelemetryService {
    /// What is kept.
    pub pushed: PushedMetrics,
    /// Who calls.
    pub authenticators: Authenticators,
    /// Who is a member.
    pub fleet: Fleet,
    /// Counters.
    pub metrics: Arc<Metrics>,
}

impl TelemetryService {
    async fn push(&self, request: Request<PushMetricsRequest>) -> Result<bool, Refusal> {
        let (caller, link) = self.authenticators.caller(&request).await?;
        let Caller::Workload {
            device: Some(device), ..
        } = caller
        else {
            return Err(Refusal::new(
                Code::Forbidden,
                format_args!("{caller} is not an enrolled device: only those push metrics"),
            ));
        };
        let view = self.fleet.view();
        if !view.members.contains_key(&device) {
            return Err(Refusal::new(Code::DeviceUnknown, device));
        }
        let now = Instant::now();
        self.pushed.sweep(&view, now);
        let request = request.into_inner();
        let content = if request.unchanged {
            Content::Unchanged
        } else {
            Content::Text(request.exposition)
        };
        self.pushed.push(device, content, now).map_err(|refused| {
            let refusal = Refusal::new(
                Code::MetricsRefused,
                format_args!("device {device}: {}", refused.cause),
            );
            if refused.first {
                tracing::warn!(%device, from = link.from_where(), "{refusal}");
            }
            refusal
        })
    }
}

#[tonic::async_trait]
impl Telemetry for TelemetryService {
    async fn push_metrics(
        &self,
        request: Request<PushMetricsRequest>,
    ) -> Result<Response<PushMetricsResponse>, Status> {
        let result = self.push(request).await;
        self.metrics.pushed(result.is_ok());
        Ok(Response::new(PushMetricsResponse { resend: result? }))
    }
}
