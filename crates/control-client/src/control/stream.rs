use super::restore::trust;
use crate::{
    ControlPath, ControlStatus, Health, Problem, Registration, State,
    ads::{Ads, Handled},
    backoff::Backoff,
    connect::{MESSAGE_BYTES_MAX, connect},
    host,
    push::{self, MetricsPush},
};
use futures_util::FutureExt as _;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_identity::{LiveIdentity, control_client_config};
use tombolo_proto::{
    envoy::config::core::v3::Node,
    type_url,
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tombolo_runtime::Publisher;
use tombolo_snapshot::{Own, Snapshot};
use tombolo_types::{Code, SpiffeId};
use tonic::{Status, Streaming, transport::Channel};

/// From the request for a stream to its first answer; a big mesh is compiled before it answers.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often is looked whether the host still has the address that the stream comes from: pings notice a move in 2.5 s,
/// and until then callers are sent to the old address.
const MOVED_EVERY: Duration = Duration::from_secs(1);
/// A stream that ended well sooner than this was not routine: the next attempt waits as after an error.
const ROUTINE_AGE_MIN: Duration = Duration::from_secs(1);
/// Where discovery says its version, in the headers of the answer.
const VERSION_HEADER: &str = "tombolo-version";
/// And what it can do beyond that, with commas between.
const FEATURES_HEADER: &str = "tombolo-features";
/// Characters of it that are looked at.
const FEATURES_MAX: usize = 1024;
/// Requests that wait for the connection: ACKs are small and discovery reads them at once.
const REQUESTS_MAX: usize = 64;
/// Responses that become one published version, if they are there already.
const COALESCED_MAX: usize = 64;
/// Refused resources kept for status.
const REJECTED_KEPT: usize = 16;

/// Why a stream ended.
enum End {
    /// The server ended it without an error: routine.
    Ended,
    /// With an error.
    Failed(Problem),
    /// The trust domain has a new name, by which discovery is to be found.
    Renamed,
}

/// An open stream, and the connection that it is on.
struct Open {
    inbound: Streaming<DeltaDiscoveryResponse>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    channel: Channel,
    /// Where it comes from.
    local: IpAddr,
}

/// Waits until the own trust domain has another name. Cancel-safe.
async fn renamed(registration: &mut watch::Receiver<Arc<Registration>>, own: &Own) {
    let other = |held: &Arc<Registration>| held.trust_domain != own.trust_domain;
    if registration.wait_for(other).await.is_err() {
        std::future::pending().await // nobody renews any more
    }
}

/// Waits until the host has no longer an address: another lease, or its link is down.
async fn moved(local: IpAddr) {
    while host::is_up(local) {
        tokio::time::sleep(MOVED_EVERY).await;
    }
}

/// The stream of discovery: opened again and again.
pub(super) struct Stream {
    pub(super) state: Arc<State>,
    pub(super) identity: Arc<LiveIdentity>,
    pub(super) snapshot: Snapshot,
    pub(super) publisher: Arc<Publisher<Snapshot>>,
    pub(super) health: watch::Receiver<Health>,
    pub(super) registration: watch::Receiver<Arc<Registration>>,
    pub(super) status: watch::Sender<ControlStatus>,
    pub(super) version: String,
    pub(super) metrics: Option<MetricsPush>,
}

impl Stream {
    /// Runs until it is dropped.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::stream();
        let mut turn = 0;
        loop {
            self.certificate().await;
            let registration = Arc::clone(&self.registration.borrow());
            let endpoint = registration.endpoints[turn % registration.endpoints.len()].clone();
            self.status
                .send_modify(|status| status.endpoint.clone_from(&endpoint));
            let opened = Instant::now();
            let mut ads = Ads::new(
                Node::default(),
                format!("{}/{}", registration.namespace, registration.workload_name),
            );
            self.rename(&registration);
            let end = self.stream(&endpoint, &registration, &mut ads).await;
            let worked = ads.is_answered();
            if worked {
                backoff.reset();
            }
            let was_connected = self.status.borrow().connected;
            let (wait, problem) = match end {
                End::Ended if worked && opened.elapsed() >= ROUTINE_AGE_MIN => (Duration::ZERO, None),
                End::Renamed => (Duration::ZERO, None),
                End::Ended => {
                    let problem = Problem::new(
                        Code::NoControlPlane,
                        format!("{endpoint} ended the stream at once"),
                    );
                    (backoff.next(rand::random()), Some(problem))
                }
                End::Failed(problem) => {
                    turn += 1;
                    (backoff.next(rand::random()), Some(problem))
                }
            };
            if let Some(problem) = &problem
                && self.status.borrow().stream_problem.as_ref() != Some(problem)
            {
                tracing::warn!(code = %problem.code, cause = problem.cause, "no control stream");
            }
            self.status.send_modify(|status| {
                status.connected = false;
                status.stream_problem = problem;
                if was_connected {
                    status.since_unix_ms = host::now_unix_ms();
                }
            });
            tokio::time::sleep(wait).await;
        }
    }

    /// The own workload under the name that its trust domain has now.
    fn rename(&mut self, registration: &Registration) {
        if self.snapshot.own().trust_domain != registration.trust_domain {
            let own = Own {
                trust_domain: registration.trust_domain.clone(),
                ..self.snapshot.own().clone()
            };
            self.snapshot.set_own(own);
            self.publish(true);
        }
    }

    /// Waits for a certificate that is in its time: discovery knows a node by it.
    async fn certificate(&self) {
        loop {
            let (current, now) = (self.identity.current(), host::now_unix());
            if current
                .identity
                .as_ref()
                .is_some_and(|c| (c.not_before()..c.not_after()).contains(&now))
            {
                return;
            }
            let mut renewed = self.registration.clone();
            renewed.mark_unchanged();
            let _ = timeout(Duration::from_secs(1), renewed.changed()).await;
        }
    }

    async fn stream(&mut self, endpoint: &str, registration: &Registration, ads: &mut Ads) -> End {
        match self.open(endpoint, registration, ads).await {
            Ok(open) => {
                let metrics = self.metrics.clone();
                tokio::select! {
                    end = self.follow(open.inbound, &open.requests, endpoint, ads) => end,
                    () = push::run(metrics.as_ref(), open.channel) => End::Ended,
                    () = moved(open.local) => End::Ended,
                }
            }
            Err(problem) => End::Failed(problem),
        }
    }

    async fn open(
        &self,
        endpoint: &str,
        registration: &Registration,
        ads: &mut Ads,
    ) -> Result<Open, Problem> {
        let discovery = SpiffeId::discovery(registration.trust_domain.clone());
        let tls = control_client_config(&self.identity, &discovery, true)
            .map_err(|error| Problem::new(Code::Unreachable, error))?;
        let connection = connect(endpoint, &registration.trust_domain, tls).await?;
        let own = format!("{}/{}", registration.namespace, registration.workload_name);
        let fresh = Ads::new(node(registration, connection.local.ip(), &self.version), own);
        let is_gateway = registration.identity == SpiffeId::gateway(registration.trust_domain.clone());
        *ads = if is_gateway { fresh.of_gateway() } else { fresh };
        let (requests, rx) = mpsc::channel(REQUESTS_MAX);
        for request in ads.start(&self.snapshot) {
            let _ = requests.try_send(request); // as many as types: they fit
        }
        let mut client = AggregatedDiscoveryServiceClient::new(connection.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX);
        let opened = timeout(
            FIRST_ANSWER_TIMEOUT,
            client.delta_aggregated_resources(ReceiverStream::new(rx)),
        )
        .await;
        let response = opened
            .map_err(|_| Problem::new(Code::Unreachable, format!("{endpoint} does not answer")))?
            .map_err(|status| stream_problem(endpoint, &status))?;
        let header = |name| {
            response
                .metadata()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        let version = header(VERSION_HEADER).unwrap_or_default();
        let features = header(FEATURES_HEADER).filter(|text| text.len() <= FEATURES_MAX);
        let path = ControlPath {
            local: connection.local.ip().to_canonical(),
            remote: connection.remote,
            features: features.map_or_else(Vec::new, |text| {
                text.split(',').map(|feature| feature.trim().to_owned()).collect()
            }),
        };
        self.status.send_modify(|status| {
            version.clone_into(&mut status.discovery_version);
            status.path = Some(path);
        });
        Ok(Open {
            inbound: response.into_inner(),
            requests,
            channel: connection.channel,
            local: connection.local.ip().to_canonical(),
        })
    }

    async fn follow(
        &mut self,
        mut inbound: Streaming<DeltaDiscoveryResponse>,
        requests: &mpsc::Sender<DeltaDiscoveryRequest>,
        endpoint: &str,
        ads: &mut Ads,
    ) -> End {
        let first_answer = tokio::time::sleep(FIRST_ANSWER_TIMEOUT);
        tokio::pin!(first_answer);
        let mut registration = self.registration.clone();
        loop {
            let health = self.health.borrow_and_update().clone();
            if let Some(report) = ads.report(&health)
                && requests.try_send(report).is_err()
            {
                return End::Failed(Problem::new(
                    Code::Unreachable,
                    format!("{endpoint} does not read"),
                ));
            }
            let message = tokio::select! {
                message = inbound.message() => message,
                Ok(()) = self.health.changed() => continue,
                // From now on it is another one that discovery knows, and discovery is found under another name.
                () = renamed(&mut registration, self.snapshot.own()) => return End::Renamed,
                () = &mut first_answer, if !ads.is_answered() => {
                    return End::Failed(Problem::new(Code::Unreachable, format!("{endpoint} does not answer")));
                }
            };
            let mut next = Some(message);
            let (mut changed, mut trust_changed, mut taken) = (false, false, 0);
            let end = loop {
                let response = match next.take() {
                    Some(Ok(Some(response))) => response,
                    Some(Ok(None)) => break Some(End::Ended),
                    Some(Err(status)) => break Some(End::Failed(stream_problem(endpoint, &status))),
                    None => break None,
                };
                let handled = ads.handle_response(response, &mut self.snapshot);
                changed |= handled.changed;
                trust_changed |= handled.changed && handled.type_url == Some(type_url::TRUST_BUNDLE);
                self.note(&handled);
                if let Some(request) = handled.request
                    && requests.try_send(request).is_err()
                {
                    break Some(End::Failed(Problem::new(
                        Code::Unreachable,
                        format!("{endpoint} does not read"),
                    )));
                }
                taken += 1;
                if taken < COALESCED_MAX {
                    next = inbound.message().now_or_never(); // what has arrived becomes one version
                }
            };
            if changed {
                self.publish(trust_changed);
            }
            self.connected(ads, changed);
            if let Some(end) = end {
                return end;
            }
        }
    }

    fn publish(&self, trust_changed: bool) {
        // Trust first: a peer of the new version must be able to prove itself.
        if trust_changed && let Some(own) = trust(&self.snapshot, &self.identity) {
            tracing::info!(
                roots = own.roots().len(),
                "the roots of this trust domain have changed"
            );
            if let Err(error) = self.state.save_roots(&own.to_pem()) {
                tracing::warn!(%error, "the new roots were not stored");
            }
        }
        self.publisher.publish(self.snapshot.clone());
    }

    fn connected(&self, ads: &Ads, changed: bool) {
        self.status.send_if_modified(|status| {
            let now = host::now_unix_ms();
            let fresh = !status.connected && ads.is_answered();
            if fresh {
                tracing::info!(endpoint = status.endpoint, "connected to discovery");
                (status.connected, status.since_unix_ms, status.stream_problem) = (true, now, None);
            }
            if changed {
                status.last_change_unix_ms = now;
            }
            let synced = !status.synced && ads.is_synced();
            status.synced |= synced;
            fresh || changed || synced
        });
    }

    fn note(&self, handled: &Handled) {
        if handled.rejected.is_empty() {
            return;
        }
        let lines: Vec<_> = handled
            .rejected
            .iter()
            .map(|r| format!("{}: {}", r.name, r.reason))
            .collect();
        tracing::warn!(
            count = lines.len(),
            first = lines[0],
            "discovery sent resources that were refused"
        );
        self.status.send_modify(|status| {
            status.rejected.extend(lines);
            let over = status.rejected.len().saturating_sub(REJECTED_KEPT);
            status.rejected.drain(..over);
        });
    }
}

fn stream_problem(endpoint: &str, status: &Status) -> Problem {
    let mut problem = Problem::from_status(status, Code::Unreachable);
    if problem.code == Code::Unreachable {
        problem.cause = format!("{endpoint}: {}", problem.cause);
    }
    problem
}

/// How this node presents itself. Discovery takes identity and device from the certificate, not from here.
///
/// Source: Istio's node ids, `<type>~<address>~<name>.<namespace>~<DNS domain>`.
fn node(registration: &Registration, local: IpAddr, version: &str) -> Node {
    let Registration {
        namespace,
        workload_name,
        ..
    } = registration;
    let mut addresses = vec![local.to_canonical()];
    addresses.extend(
        host::addresses(Some(&registration.plan))
            .into_iter()
            .filter(|a| *a != local.to_canonical()),
    );
    let addresses: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
    let fields = [
        ("NAME", workload_name.clone()),
        ("NAMESPACE", namespace.clone()),
        ("SERVICE_ACCOUNT", registration.service_account.clone()),
        ("CLUSTER_ID", registration.cluster_id.clone()),
        ("NETWORK", registration.network.clone()),
        ("TOMBOLO_VERSION", version.to_owned()),
        ("INSTANCE_IPS", addresses.join(",")),
    ];
    let fields = fields.into_iter().map(|(key, value)| {
        let kind = Some(prost_types::value::Kind::StringValue(value));
        (key.to_owned(), prost_types::Value { kind })
    });
    Node {
        id: format!(
            "tombolo~{}~{workload_name}.{namespace}~{namespace}.svc.{}",
            addresses[0], registration.mesh_domain
        ),
        metadata: Some(prost_types::Struct {
            fields: fields.collect(),
        }),
        user_agent_name: "tombolo-agent".to_owned(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_says_who_it_is() {
        let registration =
            Registration::from_proto(crate::registration::tests::message(), &["d:15012".into()]).unwrap();
        let node = node(&registration, "::ffff:10.0.0.7".parse().unwrap(), "1.2.3");
        assert_eq!(
            node.id,
            "tombolo~10.0.0.7~catalog-00000000000000ab.shop~shop.svc.mesh.internal"
        );
        let fields = node.metadata.unwrap().fields;
        let text = |key: &str| match fields[key].kind.clone() {
            Some(prost_types::value::Kind::StringValue(text)) => text,
            other => panic!("{key}: {other:?}"),
        };
        assert_eq!(text("NAME"), "catalog-00000000000000ab");
        assert_eq!(
            (text("NAMESPACE").as_str(), text("SERVICE_ACCOUNT").as_str()),
            ("shop", "catalog")
        );
        assert_eq!(text("TOMBOLO_VERSION"), "1.2.3");
        assert!(text("INSTANCE_IPS").starts_with("10.0.0.7"));
    }
}
