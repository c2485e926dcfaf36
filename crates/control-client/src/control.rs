use crate::{
    ControlStatus, Health, Problem, Registration, State,
    ads::{Ads, Handled},
    backoff::Backoff,
    certificates::Certificates,
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
use tombolo_identity::{
    Current, LiveIdentity, TrustBundle, WorkloadIdentity, control_client_config, still_trusted,
};
use tombolo_proto::{
    envoy::config::core::v3::Node,
    type_url,
    xds::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
};
use tombolo_runtime::{Publisher, Reader, TaskGroup};
use tombolo_snapshot::Snapshot;
use tombolo_types::{Code, SpiffeId};
use tonic::{Status, Streaming, transport::Channel};

/// Changes are written to disk so soon, and then at most so often: a restart without discovery goes by what is there, a
/// policy that has just come among it.
const PERSIST_DEBOUNCE_MIN: Duration = Duration::from_millis(50);
/// A churn of thousands of endpoints is a few writes: writing takes at most an eighth of the time.
const PERSIST_DEBOUNCE_MAX: Duration = Duration::from_secs(1);
/// A snapshot that the disk did not take is written again.
const PERSIST_RETRY: Duration = Duration::from_secs(2);
/// From the request for a stream to its first answer; a big mesh is compiled before it answers.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often is looked whether the host still has the address that the stream comes from: pings notice a move in 2.5 s,
/// and until then callers are sent to the old address.
const MOVED_EVERY: Duration = Duration::from_secs(1);
/// A stream that ended well sooner than this was not routine: the next attempt waits as after an error.
const ROUTINE_AGE_MIN: Duration = Duration::from_secs(1);
/// Where discovery says its version, in the headers of the answer.
const VERSION_HEADER: &str = "tombolo-version";
/// Requests that wait for the connection: ACKs are small and discovery reads them at once.
const REQUESTS_MAX: usize = 64;
/// Responses that become one published version, if they are there already.
const COALESCED_MAX: usize = 64;
/// For a write that is under way.
const RETIRE_MAX: Duration = Duration::from_secs(2);
/// Refused resources kept for status.
const REJECTED_KEPT: usize = 16;

/// What was on disk.
#[derive(Debug)]
pub struct Restored {
    /// Who this node is.
    pub registration: Registration,
    /// Its certificate, if it is readable, and the roots of its trust domain and of others.
    pub identity: Arc<LiveIdentity>,
    /// The last snapshot, or an empty one.
    pub snapshot: Snapshot,
    /// Unix milliseconds of the stored snapshot; 0: there was none.
    pub snapshot_unix_ms: i64,
    /// What had to be set aside or will be got anew.
    pub problems: Vec<Problem>,
}

/// Reads everything that an agent needs to serve without discovery; `None` while the host is not enrolled.
///
/// # Errors
/// When the registration or the roots cannot be read. A bad snapshot is set aside and a bad certificate renewed.
pub fn restore(state: &State) -> Result<Option<Restored>, Problem> {
    let Some(registration) = state.registration()? else {
        return Ok(None);
    };
    let mut problems = Vec::new();
    for path in state.close_exposed()? {
        problems.push(Problem::new(Code::StateExposed, path.display()));
    }
    let roots = state.roots()?.unwrap_or_default();
    let own = TrustBundle::from_pem(registration.trust_domain.clone(), &roots)
        .map_err(|error| Problem::new(Code::StateLost, format!("roots.pem: {error}")))?;
    let identity = match state.identity() {
        Ok(None) => Err("it is not there; it will be renewed".to_owned()),
        Ok(Some((chain, key))) => WorkloadIdentity::from_pem(&chain, &key).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let identity = identity
        .map_err(|cause| {
            let kept = state.set_aside_identity();
            let kept = kept.map_or_else(|_| String::new(), |kept| format!("; kept as {}", kept.display()));
            problems.push(Problem::new(
                Code::StateCorrupt,
                format!("identity.pem: {cause}{kept}"),
            ));
        })
        .ok()
        .map(Arc::new);
    let mut live = LiveIdentity::new(identity, vec![Arc::new(own)]);
    let empty = || Snapshot::empty(registration.plan, registration.own());
    let mut snapshot_unix_ms = state.snapshot_unix_ms();
    let snapshot = match state.snapshot()? {
        None => empty(),
        Some(bytes) => Snapshot::decode(&bytes, registration.plan, registration.own()).or_else(|error| {
            snapshot_unix_ms = 0;
            let kept = state.set_aside_snapshot()?;
            problems.push(Problem::new(
                Code::StateCorrupt,
                format!("snapshot.bin: {error}; kept as {}", kept.display()),
            ));
            Ok::<_, Problem>(empty())
        })?,
    };
    trust(&snapshot, &live);
    if let Some(cause) = foreign(&live.current(), &registration) {
        let kept = state.set_aside_identity();
        let kept = kept.map_or_else(|_| String::new(), |kept| format!("; kept as {}", kept.display()));
        problems.push(Problem::new(
            Code::StateCorrupt,
            format!("identity.pem: {cause}; it will be renewed{kept}"),
        ));
        live = LiveIdentity::new(None, live.current().bundles.clone());
    }
    Ok(Some(Restored {
        registration,
        identity: live,
        snapshot,
        snapshot_unix_ms,
        problems,
    }))
}

/// Why the certificate on disk is not this node's: nobody would believe it, and it would not be renewed before its half
/// life. One that has only expired is its own.
fn foreign(current: &Current, registration: &Registration) -> Option<String> {
    let held = current.identity.as_ref()?;
    if *held.id() != registration.identity {
        return Some(format!("it is of {}", held.id()));
    }
    let known = still_trusted(current, held.chain(), host::now_unix());
    (!known).then(|| "it is of a root that this mesh does not have".to_owned())
}

/// Puts the bundles of a snapshot into force. The own trust domain always keeps one: an empty or damaged set, from
/// wherever, must not make the node distrust everybody and itself. Returns the own bundle if it changed.
fn trust(snapshot: &Snapshot, live: &LiveIdentity) -> Option<Arc<TrustBundle>> {
    let own = &snapshot.own().trust_domain;
    let held = live.current();
    let mut bundles = Vec::new();
    for (trust_domain, pem) in snapshot.trust_bundles() {
        match TrustBundle::from_pem(trust_domain.clone(), pem) {
            Ok(bundle) if !bundle.roots().is_empty() => bundles.push(Arc::new(bundle)),
            Ok(_) => tracing::warn!(%trust_domain, "a trust bundle without roots is passed over"),
            Err(error) => tracing::warn!(%trust_domain, %error, "a trust bundle is passed over"),
        }
    }
    let new = bundles
        .iter()
        .find(|bundle| bundle.trust_domain() == own)
        .cloned();
    if new.is_none() {
        bundles.extend(held.bundle(own).cloned());
    }
    let same = bundles.len() == held.bundles.len()
        && bundles.iter().all(|new| {
            held.bundle(new.trust_domain())
                .is_some_and(|old| old.roots() == new.roots())
        });
    if same {
        return None;
    }
    let changed = new.filter(|new| held.bundle(own).is_none_or(|old| old.roots() != new.roots()));
    live.set_bundles(bundles);
    changed
}

/// What a control client works on.
#[derive(Debug)]
pub struct Inputs {
    /// The state directory.
    pub state: Arc<State>,
    /// From [`restore`].
    pub registration: Registration,
    /// From [`restore`]; certificate and bundles are replaced in it.
    pub identity: Arc<LiveIdentity>,
    /// Where each new version of the world goes; its present value is where the client starts.
    pub publisher: Arc<Publisher<Snapshot>>,
    /// The other end of it.
    pub world: Reader<Snapshot>,
    /// What is reported about the application.
    pub health: watch::Receiver<Health>,
    /// Version of the program, for the node's metadata.
    pub version: String,
    /// Metrics for discovery to show to a scraper; none: nothing is pushed.
    pub metrics: Option<MetricsPush>,
}

/// A running control client: stream, certificate and snapshot file, each a task of the group.
#[derive(Debug, Clone)]
pub struct Control {
    status: watch::Receiver<ControlStatus>,
    registration: watch::Receiver<Arc<Registration>>,
    /// What writes to the state directory.
    writers: TaskGroup,
    stream: TaskGroup,
}

/// Takes a snapshot of a process that has taken over from this one, in its own encoding: policies, revocations and
/// trust bundles come into force for what is still open here.
///
/// # Errors
/// When this version cannot read it.
pub fn follow(
    bytes: &[u8],
    publisher: &Publisher<Snapshot>,
    identity: &LiveIdentity,
    registration: &Registration,
) -> Result<(), Problem> {
    let snapshot = Snapshot::decode(bytes, registration.plan, registration.own()).map_err(|error| {
        Problem::new(
            Code::StateCorrupt,
            format!("a snapshot of the running agent: {error}"),
        )
    })?;
    trust(&snapshot, identity);
    publisher.publish(snapshot);
    Ok(())
}

impl Control {
    /// Starts it. It runs until the group stops, whatever discovery does.
    pub fn run(inputs: Inputs, tasks: &TaskGroup) -> Self {
        Self::run_when(inputs, watch::channel(true).1, tasks)
    }

    /// Starts it once `go` is true: until then another process has the state directory, and what it renews meanwhile is
    /// read again.
    pub fn run_when(inputs: Inputs, go: watch::Receiver<bool>, tasks: &TaskGroup) -> Self {
        let Inputs {
            state,
            registration,
            identity,
            publisher,
            world,
            health,
            version,
            metrics,
        } = inputs;
        let (status_tx, status) = watch::channel(ControlStatus::default());
        let (registration_tx, registration) = watch::channel(Arc::new(registration));
        let certificates = Certificates {
            state: Arc::clone(&state),
            live: Arc::clone(&identity),
            registration: registration_tx,
            status: status_tx.clone(),
        };
        let stream = Stream {
            snapshot: Snapshot::clone(&publisher.load()),
            state: Arc::clone(&state),
            identity,
            publisher,
            health,
            registration: registration.clone(),
            status: status_tx.clone(),
            version,
            metrics,
        };
        let (writers, streams) = (tasks.child("state writers"), tasks.child("control stream"));
        let (gate, waited) = (go.clone(), !*go.borrow());
        writers.spawn_until_stopped("certificate renewal", async move {
            if opened(gate).await {
                if waited {
                    certificates.read_again();
                }
                certificates.run().await;
            }
        });
        let gate = go.clone();
        streams.spawn_until_stopped("control stream", async move {
            if opened(gate).await {
                stream.run().await;
            }
        });
        let stop = writers.token();
        writers.spawn("snapshot file", async move {
            let stopped = stop.clone();
            if stop.run_until_cancelled(opened(go)).await == Some(true) {
                persist(state, world, status_tx, async move { stopped.cancelled().await }).await;
            }
        });
        Self {
            status,
            registration,
            writers,
            stream: streams,
        }
    }

    /// Writes nothing more to the state directory: it is another process's from now on. The stream stays, so that
    /// discovery never sees this node without one.
    pub async fn retire(&self) {
        self.writers.stop();
        self.writers.drain(RETIRE_MAX).await;
    }

    /// Ends the stream.
    pub fn close_stream(&self) {
        self.stream.stop();
    }

    /// How the node stands with discovery.
    pub fn status(&self) -> ControlStatus {
        self.status.borrow().clone()
    }

    /// Wakes on each change of the status.
    pub fn watch_status(&self) -> watch::Receiver<ControlStatus> {
        self.status.clone()
    }

    /// The registration as of the last renewal.
    pub fn registration(&self) -> Arc<Registration> {
        Arc::clone(&self.registration.borrow())
    }

    /// Wakes on each change of the registration.
    pub fn watch_registration(&self) -> watch::Receiver<Arc<Registration>> {
        self.registration.clone()
    }
}

/// Waits for the gate; false if it never opens.
async fn opened(mut go: watch::Receiver<bool>) -> bool {
    go.wait_for(|go| *go).await.is_ok()
}

/// Writes the snapshot after changes, and what is left to write when the group stops.
async fn persist(
    state: Arc<State>,
    mut world: Reader<Snapshot>,
    status: watch::Sender<ControlStatus>,
    stop: impl Future<Output = ()>,
) {
    let mut stop = std::pin::pin!(stop);
    let (mut stopped, mut failed) = (false, false);
    let mut debounce = PERSIST_DEBOUNCE_MIN;
    while !stopped {
        tokio::select! {
            changed = world.changed() => stopped = changed.is_none(),
            () = tokio::time::sleep(PERSIST_RETRY), if failed => {}
            () = &mut stop => return,
        }
        if !stopped {
            tokio::select! {
                () = tokio::time::sleep(debounce) => {}
                () = &mut stop => stopped = true,
            }
        }
        let (snapshot, state) = (world.load(), Arc::clone(&state));
        let began = Instant::now();
        let saved = tokio::task::spawn_blocking(move || state.save_snapshot(&snapshot.encode())).await;
        debounce = (began.elapsed() * 8).clamp(PERSIST_DEBOUNCE_MIN, PERSIST_DEBOUNCE_MAX);
        let problem = saved.ok().and_then(Result::err).map(|error| {
            let text = "the snapshot is not stored, and a restart without discovery would serve an older one";
            Problem::new(error.problem().code, format!("{text}: {error}"))
        });
        if let Some(problem) = &problem
            && !failed
        {
            tracing::warn!("{problem}");
        }
        failed = problem.is_some();
        status.send_if_modified(|status| {
            let changed = status.snapshot_problem != problem;
            status.snapshot_problem = problem;
            changed
        });
    }
}

/// Why a stream ended.
enum End {
    /// The server ended it without an error: routine.
    Ended,
    /// With an error.
    Failed(Problem),
}

/// An open stream, and the connection that it is on.
struct Open {
    inbound: Streaming<DeltaDiscoveryResponse>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    channel: Channel,
    /// Where it comes from.
    local: IpAddr,
}

/// Waits until the host has no longer an address: another lease, or its link is down.
async fn moved(local: IpAddr) {
    while host::is_up(local) {
        tokio::time::sleep(MOVED_EVERY).await;
    }
}

struct Stream {
    state: Arc<State>,
    identity: Arc<LiveIdentity>,
    snapshot: Snapshot,
    publisher: Arc<Publisher<Snapshot>>,
    health: watch::Receiver<Health>,
    registration: watch::Receiver<Arc<Registration>>,
    status: watch::Sender<ControlStatus>,
    version: String,
    metrics: Option<MetricsPush>,
}

impl Stream {
    async fn run(mut self) {
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
            let end = self.stream(&endpoint, &registration, &mut ads).await;
            let worked = ads.is_answered();
            if worked {
                backoff.reset();
            }
            let was_connected = self.status.borrow().connected;
            let (wait, problem) = match end {
                End::Ended if worked && opened.elapsed() >= ROUTINE_AGE_MIN => (Duration::ZERO, None),
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
        let version = response.metadata().get(VERSION_HEADER);
        let version = version
            .and_then(|version| version.to_str().ok())
            .unwrap_or_default();
        self.status
            .send_modify(|status| version.clone_into(&mut status.discovery_version));
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
