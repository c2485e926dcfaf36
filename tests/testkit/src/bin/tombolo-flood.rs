//! What strangers do to a way in to discovery, and what a member notices of it.
//!
//! `flood HOST:PORT NAME SECONDS SOURCE…`: from each source address, on one core and as fast as that goes: whole
//! ClientHellos whose answer is thrown away, connections that begin a message and say no more, and enrolments with tokens
//! that do not exist. Prints what came of it.
//! `probe HOST:PORT NAME`: calls every service without a certificate, and prints `METHOD CODE` a line.
//! `renew STATE_DIR COUNT`: renews the certificate of an agent that is stopped, again and again; prints the time of each
//! in ms, or the error.
#![allow(clippy::print_stdout, reason = "a command-line program")]

use anyhow::{Context as _, Result, bail};
use rustls::{
    DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsConnector;
use tombolo_proto::{
    istio::v1::auth::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    tombolo::{
        admin::v1::{GetRequest, admin_client::AdminClient},
        federation::v1::{PeerMessage, federation_client::FederationClient},
        v1::{EnrollRequest, PreflightRequest, RenewRequest, enrollment_client::EnrollmentClient},
    },
    xds::{DeltaDiscoveryRequest, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient},
};
use tombolo_runtime::TaskGroup;
use tonic::transport::{Channel, Endpoint};

/// Of each kind, for each source.
const HALF_OPEN: usize = 16;
const ENROLLING: usize = 4;
const IDLE: usize = 60;
/// Longest wait for an answer.
const WAIT: Duration = Duration::from_secs(2);

/// Takes whoever answers: this program has nothing to lose.
#[derive(Debug)]
struct Anybody(CryptoProvider);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Whom to flood.
struct Target {
    address: SocketAddr,
    name: ServerName<'static>,
    tls: Arc<rustls::ClientConfig>,
}

impl Target {
    fn new(address: &str, name: &str) -> Result<Arc<Self>> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider.clone()))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(Self {
            address: address.parse()?,
            name: ServerName::try_from(name.to_owned())?,
            tls: Arc::new(tls),
        }))
    }

    /// The first message of a client.
    fn hello(&self) -> Result<Vec<u8>> {
        let mut session = rustls::ClientConnection::new(Arc::clone(&self.tls), self.name.clone())?;
        let mut bytes = Vec::new();
        while session.wants_write() {
            session.write_tls(&mut bytes)?;
        }
        Ok(bytes)
    }

    async fn connect(&self, source: Option<IpAddr>) -> Result<TcpStream> {
        let socket = if self.address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if let Some(source) = source {
            socket.bind((source, 0).into())?;
        }
        let tcp = timeout(WAIT, socket.connect(self.address)).await??;
        tcp.set_nodelay(true)?;
        Ok(tcp)
    }

    async fn channel(&self, source: Option<IpAddr>) -> Result<Channel> {
        let tcp = self.connect(source).await?;
        let handshake = TlsConnector::from(Arc::clone(&self.tls)).connect(self.name.clone(), tcp);
        let mut stream = Some(hyper_util::rt::TokioIo::new(timeout(WAIT, handshake).await??));
        let endpoint = Endpoint::from_static("http://discovery");
        let connecting = endpoint.connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let stream = stream
                .take()
                .ok_or_else(|| std::io::Error::other("one connection only"));
            std::future::ready(stream)
        }));
        Ok(timeout(WAIT, connecting).await??)
    }
}

#[derive(Default)]
struct Counts {
    connections: AtomicU64,
    handshakes: AtomicU64,
    answers: AtomicU64,
    enrolments: AtomicU64,
    closed: AtomicU64,
    not_connected: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A handshake whose answer nobody wants.
async fn half_open(target: &Target, source: IpAddr, hello: &[u8], counts: &Counts) {
    let Ok(mut tcp) = target.connect(Some(source)).await else {
        count(&counts.not_connected);
        return sleep(Duration::from_millis(1)).await;
    };
    count(&counts.connections);
    let answer = async {
        tcp.write_all(hello).await?;
        tcp.read(&mut [0; 64]).await
    };
    match timeout(WAIT, answer).await {
        Ok(Ok(1..)) => count(&counts.answers),
        _ => count(&counts.closed),
    }
}

/// Enrolments on one connection, as many as it takes.
async fn enrol(target: &Target, source: IpAddr, counts: &Counts) {
    let Ok(channel) = target.channel(Some(source)).await else {
        count(&counts.closed);
        return sleep(Duration::from_millis(1)).await;
    };
    count(&counts.connections);
    count(&counts.handshakes);
    let mut client = EnrollmentClient::new(channel);
    let mut number = 0_u64;
    loop {
        number += 1;
        let request = EnrollRequest {
            token_id: [number.to_be_bytes(), [7; 8]].concat(),
            device_public_key: vec![4; 65],
            token_signature: vec![1; 64],
            device_signature: vec![1; 64],
            csr: "none".into(),
            ..EnrollRequest::default()
        };
        match timeout(WAIT, client.enroll(request)).await {
            Ok(Err(status)) if status.code() != tonic::Code::Unavailable && !lost(&status) => {
                count(&counts.enrolments);
            }
            _ => return,
        }
    }
}

/// The connection is gone, rather than the call refused.
fn lost(status: &tonic::Status) -> bool {
    std::error::Error::source(status).is_some()
}

async fn idle(target: &Target, source: IpAddr, counts: &Counts) {
    let Ok(mut tcp) = target.connect(Some(source)).await else {
        return sleep(Duration::from_millis(100)).await;
    };
    count(&counts.connections);
    let _ = tcp.write_all(&[22, 3, 1]).await;
    let _ = tcp.read(&mut [0; 64]).await; // until it is thrown out
    sleep(Duration::from_millis(100)).await;
}

async fn flood(target: Arc<Target>, seconds: u64, sources: &[IpAddr]) -> Result<()> {
    let (tasks, counts) = (TaskGroup::new("flood"), Arc::new(Counts::default()));
    let hello: Arc<[u8]> = target.hello()?.into();
    for &source in sources {
        for _ in 0..HALF_OPEN {
            let (target, counts, hello) = (Arc::clone(&target), Arc::clone(&counts), Arc::clone(&hello));
            tasks.spawn_until_stopped("half-open", async move {
                loop {
                    half_open(&target, source, &hello, &counts).await;
                }
            });
        }
        for _ in 0..ENROLLING {
            let (target, counts) = (Arc::clone(&target), Arc::clone(&counts));
            tasks.spawn_until_stopped("enrolments", async move {
                loop {
                    enrol(&target, source, &counts).await;
                }
            });
        }
        for _ in 0..IDLE {
            let (target, counts) = (Arc::clone(&target), Arc::clone(&counts));
            tasks.spawn_until_stopped("idle", async move {
                loop {
                    idle(&target, source, &counts).await;
                }
            });
        }
    }
    println!("floods");
    sleep(Duration::from_secs(seconds)).await;
    tasks.stop();
    let per_second = |counter: &AtomicU64| counter.load(Ordering::Relaxed) / seconds.max(1);
    println!(
        "a second: {} connections, {} answered, {} closed, {} handshakes, {} enrolments refused, {} not connected",
        per_second(&counts.connections),
        per_second(&counts.answers),
        per_second(&counts.closed),
        per_second(&counts.handshakes),
        per_second(&counts.enrolments),
        per_second(&counts.not_connected),
    );
    Ok(())
}

async fn probe(target: &Target) -> Result<()> {
    let code = |answer: Result<(), tonic::Status>| match answer {
        Ok(()) => "Ok".to_owned(),
        Err(status) => format!("{:?}", status.code()),
    };
    // One connection for each: what one call did is no reason for the next answer.
    let silent = || tokio_stream::pending::<DeltaDiscoveryRequest>();
    let mut ads = AggregatedDiscoveryServiceClient::new(target.channel(None).await?);
    let answer = ads.delta_aggregated_resources(silent()).await.map(drop);
    println!("ads {}", code(answer));
    let mut ca = IstioCertificateServiceClient::new(target.channel(None).await?);
    let answer = ca
        .create_certificate(IstioCertificateRequest::default())
        .await
        .map(drop);
    println!("certificate {}", code(answer));
    let mut admin = AdminClient::new(target.channel(None).await?);
    let get = GetRequest {
        kind: "WorkloadGroup".into(),
        namespace: "shop".into(),
        name: "front".into(),
    };
    println!("admin {}", code(admin.get(get).await.map(drop)));
    let mut federation = FederationClient::new(target.channel(None).await?);
    let silent = tokio_stream::pending::<PeerMessage>();
    println!("federation {}", code(federation.peer(silent).await.map(drop)));
    let mut enrolment = EnrollmentClient::new(target.channel(None).await?);
    let answer = enrolment.enroll(EnrollRequest::default()).await.map(drop);
    println!("enrol {}", code(answer));
    let answer = enrolment.renew(RenewRequest::default()).await.map(drop);
    println!("renew {}", code(answer));
    let answer = enrolment.preflight(PreflightRequest::default()).await.map(drop);
    println!("preflight {}", code(answer));
    Ok(())
}

async fn renew(state_dir: &Path, times: u32) -> Result<()> {
    let state = tombolo_control_client::State::open(state_dir, None)?;
    let restored = tombolo_control_client::restore(&state)?.context("not enrolled")?;
    for _ in 0..times {
        let begun = Instant::now();
        match tombolo_control_client::renew(&state, &restored.identity, true).await {
            Ok(_) => println!("{}", begun.elapsed().as_millis()),
            Err(problem) => println!("{problem} after {} ms", begun.elapsed().as_millis()),
        }
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match words.as_slice() {
        ["flood", address, name, seconds, sources @ ..] => {
            let sources: Vec<IpAddr> = sources
                .iter()
                .map(|source| source.parse())
                .collect::<Result<_, _>>()?;
            runtime.block_on(flood(Target::new(address, name)?, seconds.parse()?, &sources))
        }
        ["probe", address, name] => {
            let target = Target::new(address, name)?;
            runtime.block_on(async { probe(&target).await })
        }
        ["renew", state_dir, times] => runtime.block_on(renew(Path::new(state_dir), times.parse()?)),
        _ => bail!(
            "usage: tombolo-flood flood HOST:PORT NAME SECONDS SOURCE… | probe HOST:PORT NAME | renew STATE_DIR COUNT"
        ),
    }
}
