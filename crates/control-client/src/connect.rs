use crate::Problem;
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream, rustls};
use tombolo_identity::{ConnectRefusal, PeerRefusal, client_exporter, control_server_name};
use tombolo_types::{Code, TrustDomain};
use tonic::transport::{Channel, Endpoint};

/// TCP connect to one address. A name with several addresses is tried one after the other.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Together at most 2.5 s: a discovery that died without a word is noticed within 3 s.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const PING_TIMEOUT: Duration = Duration::from_millis(1500);
/// The same bound for data that nobody acknowledges.
const USER_TIMEOUT: Duration = Duration::from_secs(3);
/// Window of a stream: one round trip of 100 ms carries a response of 4 MiB in half a second.
const STREAM_WINDOW: u32 = 1 << 20;
/// Largest response: 100,000 workloads in one have about 40 MB.
pub(crate) const MESSAGE_BYTES_MAX: usize = 200 << 20;

/// An open, proven connection to discovery. It is one TLS connection: when it ends, calls on it fail.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    /// Channel binding of this very connection.
    pub(crate) exporter: [u8; 32],
    /// Unique address of this host on it.
    pub(crate) local: SocketAddr,
    /// What it was dialled at.
    pub(crate) remote: SocketAddr,
}

/// Opens a connection to `endpoint` (`host:port`).
pub(crate) async fn connect(
    endpoint: &str,
    trust_domain: &TrustDomain,
    tls: rustls::ClientConfig,
) -> Result<Connection, Problem> {
    let unreachable =
        |cause: &dyn std::fmt::Display| Problem::new(Code::Unreachable, format!("{endpoint}: {cause}"));
    let tcp = dial(endpoint).await.map_err(|error| unreachable(&error))?;
    let local = tcp.local_addr().map_err(|error| unreachable(&error))?;
    let remote = tcp.peer_addr().map_err(|error| unreachable(&error))?;
    let name = control_server_name(trust_domain).map_err(|error| unreachable(&error))?;
    let handshake = TlsConnector::from(Arc::new(tls)).connect(name, tcp);
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(tls_problem(endpoint, &error)),
        Err(_) => return Err(unreachable(&"it accepts connections but does not answer TLS")),
    };
    let exporter = client_exporter(stream.get_ref().1).map_err(|error| unreachable(&error))?;
    let channel = over(stream)
        .await
        .map_err(|error| unreachable(&crate::problem::deepest(&error)))?;
    Ok(Connection {
        channel,
        exporter,
        local,
        remote,
    })
}

async fn dial(endpoint: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses = tokio::time::timeout(HANDSHAKE_TIMEOUT, tokio::net::lookup_host(endpoint));
    let addresses = addresses
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the name does not resolve"))??;
    for address in addresses {
        match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => {
                tcp.set_nodelay(true)?;
                socket2::SockRef::from(&tcp).set_tcp_user_timeout(Some(USER_TIMEOUT))?;
                return Ok(tcp);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {address}")),
        }
    }
    Err(last)
}

async fn over(stream: TlsStream<TcpStream>) -> Result<Channel, tonic::transport::Error> {
    let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
    // The scheme is http because TLS is ours. The one connection is handed out once: proofs are bound to it.
    Endpoint::from_static("http://discovery")
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(2 * STREAM_WINDOW)
        .user_agent(concat!("tombolo/", env!("CARGO_PKG_VERSION")))?
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = stream.take();
            async move {
                stream.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the connection has ended"))
            }
        }))
        .await
}

fn tls_problem(endpoint: &str, error: &io::Error) -> Problem {
    use rustls::{CertificateError as Bad, Error::InvalidCertificate};
    if let Some(refusal) = ConnectRefusal::find(error) {
        return refusal_problem(endpoint, refusal);
    }
    if let Some(refusal) = PeerRefusal::find(error) {
        return Problem::new(Code::NotDiscovery, format!("{endpoint}: {refusal}"));
    }
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let code = match tls {
        // Discovery renews its own in time: it is this host's clock. Both times are named.
        Some(InvalidCertificate(Bad::ExpiredContext { time, not_after })) => {
            let refusal = ConnectRefusal::Expired {
                server_not_after: not_after.as_secs(),
                now: time.as_secs(),
            };
            return refusal_problem(endpoint, &refusal);
        }
        Some(InvalidCertificate(Bad::NotValidYetContext { time, not_before })) => {
            let refusal = ConnectRefusal::NotYetValid {
                server_not_before: not_before.as_secs(),
                now: time.as_secs(),
            };
            return refusal_problem(endpoint, &refusal);
        }
        Some(InvalidCertificate(Bad::Expired | Bad::NotValidYet)) => Code::ClockSkew,
        Some(InvalidCertificate(_)) => Code::NotDiscovery,
        _ => Code::Unreachable,
    };
    Problem::new(code, format!("{endpoint}: TLS: {error}"))
}

pub(crate) fn refusal_problem(endpoint: &str, refusal: &ConnectRefusal) -> Problem {
    Problem::new(refusal.code(), format!("{endpoint}: {refusal}"))
}
