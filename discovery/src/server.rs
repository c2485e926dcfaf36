//! Discovery as a whole: opens the state, starts every part, and stops them in order.

use crate::{
    address::AddressKeeper,
    admin::{AdminContext, AdminService, socket},
    audit::Audit,
    bearer::Bearer,
    caller::{Authenticators, Mtls},
    certificate::{self, ServerNames},
    config::Config,
    door::Door,
    enroll::{Context, EnrollmentService},
    federation::{self, FederationConfig, FederationService},
    fleet::{self, Fleet, OwnerConfig},
    forwarders::Forwarders,
    http::Shown,
    init::make_runtime_dir,
    istio_ca::CertificateService,
    limits::Limits,
    listener,
    members::MemberLimits,
    metrics::Metrics,
    nameless::CountCalls,
    objects::Objects,
    state::{self, StateDir},
    telemetry::{PushedMetrics, REQUEST_MAX, TelemetryService},
    trust::{self, TrustConfig},
    xds::{Ads, Subscribers},
};
use anyhow::{Context as _, Result};
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tombolo_ca::TtlLimits;
use tombolo_federation::limits::MESSAGE_BYTES_MAX;
use tombolo_identity::{LiveIdentity, federated_server_config};
use tombolo_proto::{
    istio::v1::auth::istio_certificate_service_server::IstioCertificateServiceServer,
    tombolo::{
        admin::v1::admin_server::AdminServer,
        federation::v1::federation_server::FederationServer,
        v1::{enrollment_server::EnrollmentServer, telemetry_server::TelemetryServer},
    },
    xds::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
};
use tombolo_runtime::{Drained, TaskGroup, http};
use tombolo_store::{RedbStore, Store, StoreOptions};
use tombolo_types::{Code, TrustDomain};
use tonic::transport::Server;
use tower::util::MapFutureLayer;

/// PING on every connection: a VM that lost its power is noticed within two of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
/// A PING that is not answered in this time ends the connection. It only makes a suspect, so it may be short.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(750);
/// Calls and streams of one connection at once.
const STREAMS_PER_CONNECTION: u32 = 32;
/// Bytes of the headers of one request; a bearer token is about 1 KiB.
const HEADERS_MAX: u32 = 32 * 1024;
/// Bytes of an ADS request: on a reconnect a client names everything it has, about 100 bytes each.
const ADS_REQUEST_MAX: usize = 16 << 20;
/// Bytes of a request of somebody who has shown nothing yet.
const ENROLL_REQUEST_MAX: usize = 256 << 10;
/// Bytes of a batch from an operator.
const ADMIN_REQUEST_MAX: usize = 64 << 20;
/// How long a stop waits for calls to end.
const DRAIN: Duration = Duration::from_secs(5);

/// A discovery that serves. Stop it with [`Running::stop`].
#[derive(Debug)]
pub struct Running {
    /// Where ADS, certificates and enrolment are served.
    pub address: SocketAddr,
    /// Where metrics and debug are served, if they are.
    pub debug_address: Option<SocketAddr>,
    /// Where readiness is served, if it is.
    pub readiness_address: Option<SocketAddr>,
    /// The fleet, for tests and embedding.
    pub fleet: Fleet,
    /// What certificates are made for.
    pub trust_domain: TrustDomain,
    again: Arc<Notify>,
    ready: Arc<AtomicBool>,
    front: TaskGroup,
    back: TaskGroup,
}

impl Running {
    /// Waits until what it stands on has changed: it is to be stopped, and started anew. Cancel-safe.
    pub async fn outdated(&self) {
        self.again.notified().await;
    }

    /// Stops accepting, ends streams, waits for calls, then stops the owner and closes the store.
    pub async fn stop(self) -> Drained {
        self.ready.store(false, Ordering::Relaxed);
        self.front.stop();
        let drained = self.front.drain(DRAIN).await;
        self.back.stop();
        match self.back.drain(DRAIN).await {
            Drained::Complete => drained,
            cut @ Drained::Cut(_) => cut,
        }
    }
}

/// Starts discovery.
///
/// # Errors
/// When the state cannot be opened, is for another mesh, or an address is taken.
pub async fn start(config: &Config) -> Result<Running> {
    let mut settings = config.settings()?;
    let state = StateDir::new(&config.state_dir);
    let founding = state.check(config)?;
    let (front, back) = (TaskGroup::new("discovery"), TaskGroup::new("discovery state"));
    let store: Arc<dyn Store> = RedbStore::open(&state.store(), StoreOptions::default())
        .with_context(|| format!("the store {} cannot be opened", state.store().display()))?;
    let limits = TtlLimits {
        default: config.certificate_life.0,
        max: config.certificate_life_max.0,
    };
    let opened = trust::open(Arc::clone(&store), &state, &founding, limits).await?;
    let own_names = opened.names().clone();
    state::check_name(&settings.trust_domain, &founding, &own_names)?;
    if settings.trust_domain != own_names.signing {
        tracing::info!(
            trust_domain = %own_names.signing, configured = %settings.trust_domain,
            "the trust domain was renamed: what the store says counts"
        );
    }
    own_names.apply(&mut settings);
    let trust_domain = settings.trust_domain.clone();
    let (trust, authority) = (opened.handle(), opened.handle().authority());
    let objects = Objects::new(store);
    let bearer = Arc::new(Bearer::open(
        &state.bearer_key(),
        trust_domain.clone(),
        &settings.also,
    )?);
    let audit = Arc::new(
        Audit::open(&state.audit())
            .with_context(|| format!("{} cannot be opened", state.audit().display()))?,
    );
    let names = ServerNames::new(config, &own_names);
    let (identity, others) = names.issue(&authority, SystemTime::now())?;
    let bundles = own_names.bundles(&authority.bundle()).into_iter().map(Arc::new);
    let live = LiveIdentity::new(None, bundles.collect());
    live.set_identities(identity, others);
    let metrics = Arc::new(Metrics::default());

    let fleet = fleet::start(
        OwnerConfig {
            objects: objects.clone(),
            settings: settings.clone(),
            bundles: vec![(trust_domain.clone(), authority.bundle_pem())],
            memory_path: state.members(),
            vips_path: state.vips(),
            imported_vips_path: state.imported_vips(),
            export_namespaces: config.export_namespaces.iter().cloned().collect(),
            witness_port: config.witness_port,
            start_grace: config.start_grace.0,
        },
        &back,
    )
    .await
    .context("the store cannot be read")?;
    let addresses = AddressKeeper::start(
        objects.clone(),
        fleet.clone(),
        settings.clone(),
        Arc::clone(&live),
        config.witness_port,
        &back,
    );
    back.spawn_until_stopped(
        "own certificate",
        certificate::keep(names.clone(), trust.clone(), Arc::clone(&live)),
    );

    let federation = federation::start(
        FederationConfig {
            cluster: config.cluster_name(),
            settings: settings.clone(),
            roots_pem: authority.bundle_pem(),
            endpoints: config.federation_endpoints.clone(),
            advertise: config.advertise.clone(),
            store: Arc::clone(objects.store()),
            dir: state.federation(),
            fleet: fleet.clone(),
            audit: Arc::clone(&audit),
            metrics: Arc::clone(&metrics),
            live: Arc::clone(&live),
        },
        &front,
    )
    .await?;

    let door = Door {
        limits: Limits::default(),
        members: MemberLimits::default(),
        forwarders: Forwarders::new(fleet.clone(), settings.clone()),
        audit: Arc::clone(&audit),
        counters: Arc::default(),
    };
    let (subscribers, again) = (Subscribers::default(), Arc::new(Notify::new()));
    trust::start(
        opened,
        TrustConfig {
            live: Arc::clone(&live),
            names,
            objects: objects.clone(),
            fleet: fleet.clone(),
            federation: federation.clone(),
            subscribers: subscribers.clone(),
            again: Arc::clone(&again),
        },
        &back,
    );
    let settings_of_ca = settings.clone();
    let mesh = Arc::new(Context {
        objects,
        fleet: fleet.clone(),
        trust: trust.clone(),
        settings,
        endpoints: config.advertise.clone(),
        audit: Arc::clone(&audit),
        metrics: Arc::clone(&metrics),
    });
    let admin = Arc::new(AdminContext {
        mesh: Arc::clone(&mesh),
        bearer: Arc::clone(&bearer),
        subscribers: subscribers.clone(),
        protected_hosts: config.hosts(),
        started_unix_ms: jiff::Timestamp::now().as_millisecond(),
        federation: federation.clone(),
        tasks: front.clone(),
    });
    let remote = Authenticators::new(
        vec![Box::new(Mtls), Box::new(SharedBearer(Arc::clone(&bearer)))],
        fleet.clone(),
    );
    let ads = Ads::new(
        fleet.clone(),
        remote.clone(),
        subscribers.clone(),
        addresses,
        Arc::clone(&metrics),
        &door,
        front.clone(),
    );
    let certificates = CertificateService {
        trust,
        settings: settings_of_ca,
        authenticators: remote.clone(),
        bearer,
        world: fleet.world(),
        audit: Arc::clone(&audit),
        metrics: Arc::clone(&metrics),
    };

    // Everything is bound before anything is served: a second discovery fails without having answered anybody.
    let tcp = listener::bind(config.listen).await.with_context(|| {
        let port = config.listen.port();
        format!(
            "{} cannot be bound; ss -ltnp 'sport = {port}' shows who has it",
            config.listen
        )
    })?;
    let address = tcp.local_addr()?;
    make_runtime_dir(&config.admin_socket).with_context(|| format!("{}", config.admin_socket.display()))?;
    let unix = socket::bind(&config.admin_socket)
        .await
        .with_context(|| format!("{} cannot be bound", config.admin_socket.display()))?;
    let (pushed, scraped_at) = (PushedMetrics::default(), Arc::new(OnceLock::new()));
    let telemetry = TelemetryService {
        pushed: pushed.clone(),
        authenticators: remote.clone(),
        fleet: fleet.clone(),
        metrics: Arc::clone(&metrics),
    };
    let ready = Arc::new(AtomicBool::new(false));
    let shown = Shown {
        fleet: fleet.clone(),
        subscribers,
        metrics,
        listener: Arc::clone(&door.counters),
        ready: Arc::clone(&ready),
        pushed: pushed.clone(),
        scraped_at: Arc::clone(&scraped_at),
    };
    let mut bound = [None, None];
    let routes = [shown.clone().debug_route(), shown.readiness_route()];
    for ((slot, endpoint), route) in bound
        .iter_mut()
        .zip([config.debug_listen, config.readiness_listen])
        .zip(routes)
    {
        if let Some(at) = endpoint.address() {
            // An agent beside discovery has the same readiness port: no reason not to serve the mesh.
            match http::serve(at, route, &back).await {
                Ok(address) => *slot = Some(address),
                Err(error) => {
                    tracing::warn!("{}", Code::EndpointTaken.message(format_args!("{at}: {error}")));
                }
            }
        }
    }

    if let [Some(debug), _] = bound {
        let _ = scraped_at.set(scrape_address(debug, &config.hosts())); // set once, here
    }

    let tls = listener::Tls {
        config: Arc::new(federated_server_config(&live, federation.trusted())?),
        own: Arc::clone(&live),
    };
    let (accepted_tx, accepted_rx) = mpsc::channel(listener::ACCEPTED_MAX);
    front.spawn(
        "listener",
        listener::run(tcp, tls, door, accepted_tx, front.clone()),
    );
    let router = grpc()
        // Outermost: what is refused there waits for nothing.
        .layer(CountCalls)
        .layer(audited(&audit))
        .add_service(AggregatedDiscoveryServiceServer::new(ads).max_decoding_message_size(ADS_REQUEST_MAX))
        .add_service(
            IstioCertificateServiceServer::new(certificates).max_decoding_message_size(ENROLL_REQUEST_MAX),
        )
        .add_service(
            EnrollmentServer::new(EnrollmentService::new(mesh)).max_decoding_message_size(ENROLL_REQUEST_MAX),
        )
        .add_service(
            FederationServer::new(FederationService::new(federation, front.clone()))
                .max_decoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(TelemetryServer::new(telemetry).max_decoding_message_size(REQUEST_MAX))
        .add_service(
            // A request is read before anybody can look who sends it.
            AdminServer::new(AdminService::new(Arc::clone(&admin), remote))
                .max_decoding_message_size(ENROLL_REQUEST_MAX),
        );
    let stop = front.token().cancelled_owned();
    front.spawn("gRPC", async move {
        if let Err(error) = router
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted_rx), stop)
            .await
        {
            tracing::error!(%error, "the gRPC server ended");
        }
    });
    let (accepted_tx, accepted_rx) = mpsc::channel(listener::ACCEPTED_MAX);
    front.spawn("admin socket", socket::run(unix, accepted_tx, front.clone()));
    let local = Authenticators::new(vec![Box::new(socket::PeerCredentials)], fleet.clone());
    let router = Server::builder().layer(audited(&audit)).add_service(
        AdminServer::new(AdminService::new(admin, local)).max_decoding_message_size(ADMIN_REQUEST_MAX),
    );
    let stop = front.token().cancelled_owned();
    front.spawn("admin gRPC", async move {
        if let Err(error) = router
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted_rx), stop)
            .await
        {
            tracing::error!(%error, "the admin server ended");
        }
    });
    ready.store(true, Ordering::Relaxed);
    let [debug_address, readiness_address] = bound;
    Ok(Running {
        address,
        debug_address,
        readiness_address,
        fleet,
        trust_domain,
        again,
        ready,
        front,
        back,
    })
}

/// Where a scraper finds the debug endpoint: at its own address, or with that of all under the name of discovery.
fn scrape_address(bound: SocketAddr, hosts: &[String]) -> String {
    match hosts.first().filter(|_| bound.ip().is_unspecified()) {
        Some(host) if host.contains(':') => format!("[{host}]:{}", bound.port()),
        Some(host) => format!("{host}:{}", bound.port()),
        None => bound.to_string(),
    }
}

/// A call that is answered after its audit lines.
type Audited<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// No call is answered before what the audit log says of it is on the disk.
fn audited<F>(audit: &Arc<Audit>) -> MapFutureLayer<impl Fn(F) -> Audited<F::Output> + Clone + Send + 'static>
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    let audit = Arc::clone(audit);
    MapFutureLayer::new(move |call: F| {
        let audit = Arc::clone(&audit);
        Box::pin(async move {
            let answer = call.await;
            audit.flushed().await;
            answer
        }) as Audited<F::Output>
    })
}

fn grpc() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_max_header_list_size(HEADERS_MAX)
}

/// The bearer tokens that the admin API issues, as an authenticator.
struct SharedBearer(Arc<Bearer>);

#[tonic::async_trait]
impl crate::caller::Authenticator for SharedBearer {
    async fn authenticate(
        &self,
        link: &listener::Link,
        headers: &tonic::metadata::MetadataMap,
    ) -> Result<Option<crate::caller::Caller>, crate::refusal::Refusal> {
        self.0.authenticate(link, headers).await
    }
}
