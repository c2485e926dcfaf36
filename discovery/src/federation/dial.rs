//! Dialling: other members by the roots of their record, the inviting one by the pin of the token.

use super::{Command, Federation, Outgoing, QUEUE_MAX, owner::next_conn, service::read};
use rustls::ClientConfig;
use std::{io, sync::Arc, time::Duration};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tombolo_federation::limits::MESSAGE_BYTES_MAX;
use tombolo_identity::{
    LiveIdentity, TrustBundle, WorkloadIdentity, client_exporter, control_client_config, control_server_name,
    peer_of,
};
use tombolo_proto::tombolo::federation::v1::federation_client::FederationClient;
use tombolo_types::{SpiffeId, TrustDomain};
use tonic::transport::{Channel, Endpoint};

/// TCP and TLS to one endpoint.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// All endpoints of a member together: less than the time that the core waits.
const DIAL_TIMEOUT: Duration = Duration::from_secs(9);

/// A connection to another discovery.
#[derive(Debug)]
pub(super) struct Connected {
    /// Over this one connection. It never reconnects: the binding would differ.
    pub(super) channel: Channel,
    /// Channel binding (RFC 9266).
    pub(super) exporter: [u8; 32],
    /// The name of its trust domain that the other side has shown.
    pub(super) trust_domain: TrustDomain,
}

/// Connects, and asks for the discovery of a trust domain.
///
/// # Errors
/// When the endpoint does not answer in time or is not who it should be.
pub(super) async fn connect(
    endpoint: &str,
    trust_domain: &TrustDomain,
    tls: ClientConfig,
) -> io::Result<Connected> {
    let connecting = async {
        let socket = TcpStream::connect(endpoint).await?;
        socket.set_nodelay(true)?;
        let name = control_server_name(trust_domain).map_err(io::Error::other)?;
        let stream = tokio_rustls::TlsConnector::from(Arc::new(tls))
            .connect(name, socket)
            .await?;
        let exporter = client_exporter(stream.get_ref().1).map_err(io::Error::other)?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let shown = peer_of(chain).map_err(io::Error::other)?.id.trust_domain;
        let mut once = Some(hyper_util::rt::TokioIo::new(stream));
        let connector = tower::service_fn(move |_: http::Uri| {
            let io = once
                .take()
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
            async move { io }
        });
        let channel = Endpoint::from_static("http://discovery")
            .connect_with_connector(connector)
            .await
            .map_err(io::Error::other)?;
        Ok(Connected {
            channel,
            exporter,
            trust_domain: shown,
        })
    };
    tokio::time::timeout(CONNECT_TIMEOUT, connecting)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// Whom to dial.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) cluster: Arc<str>,
    pub(super) endpoints: Vec<String>,
    /// Names of its trust domain, the one that it is asked for first.
    pub(super) names: Vec<TrustDomain>,
    pub(super) roots_pem: String,
    /// What is shown to it.
    pub(super) identity: Option<Arc<WorkloadIdentity>>,
}

/// Dials a member and reads its stream to the end.
pub(super) async fn run(federation: Federation, target: Target) {
    let opened = tokio::time::timeout(DIAL_TIMEOUT, open(&target)).await;
    let connected = match opened {
        Ok(Ok(opened)) => opened,
        Ok(Err(cause)) => return failed(&federation, &target, cause).await,
        Err(_) => return failed(&federation, &target, "no answer in time".into()).await,
    };
    let mut client = FederationClient::new(connected.channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let (messages_tx, messages_rx) = mpsc::channel(QUEUE_MAX);
    let (conn, closing) = (next_conn(), CancellationToken::new());
    // The answer's headers come when the peer has taken the stream; nothing of ours is on it before.
    let answers = tokio::time::timeout(CONNECT_TIMEOUT, client.peer(ReceiverStream::new(messages_rx))).await;
    let messages = match answers {
        Ok(Ok(answers)) => answers.into_inner(),
        Ok(Err(status)) => return failed(&federation, &target, status.message().to_owned()).await,
        Err(_) => return failed(&federation, &target, "no answer to the stream".into()).await,
    };
    let opened = Command::Opened {
        conn,
        dialled: Some(target.cluster.clone()),
        trust_domain: connected.trust_domain,
        exporter: connected.exporter,
        outgoing: Outgoing {
            messages_tx,
            closing: closing.clone(),
        },
    };
    if federation.tell(opened).await.is_ok() {
        read(&federation, conn, messages, closing).await;
    }
}

async fn failed(federation: &Federation, target: &Target, cause: String) {
    tracing::debug!(cluster = %target.cluster, cause, "a member cannot be dialled");
    let cause = cause.chars().filter(|c| !c.is_control()).take(300).collect();
    let told = Command::DialFailed(target.cluster.clone(), cause);
    let _ = federation.tell(told).await; // discovery stops
}

async fn open(target: &Target) -> Result<Connected, String> {
    let (first, also) = target.names.split_first().ok_or("it has no trust domain")?;
    let bundle = TrustBundle::from_pem(first.clone(), &target.roots_pem);
    let bundle = bundle.map_err(|error| error.to_string())?;
    let others = also.iter().map(|name| Arc::new(bundle.named(name.clone())));
    let others: Vec<Arc<TrustBundle>> = others.collect();
    let bundle = Arc::new(bundle.with_names(also.to_vec(), Vec::new()));
    let bundles = std::iter::once(bundle).chain(others).collect();
    let own = LiveIdentity::new(target.identity.clone(), bundles);
    let discovery = SpiffeId::discovery(first.clone());
    let mut causes = Vec::new();
    for endpoint in &target.endpoints {
        let tls = control_client_config(&own, &discovery, true).map_err(|error| error.to_string())?;
        match connect(endpoint, first, tls).await {
            Ok(connected) => return Ok(connected),
            Err(error) => causes.push(format!("{endpoint}: {error}")),
        }
    }
    Err(causes.join("; "))
}
