//! Health probes of the WorkloadGroup: httpGet and tcpSocket, towards this host only.
//!
//! Source: Kubernetes' probes as Istio's WorkloadGroup has them: threshold 1/1, timeout 1 s, period 10 s, first probe
//! at once; an HTTP status of 200 to 399 is healthy; certificates are not verified.

use crate::{Registration, host};
use serde::Deserialize;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
};
use tokio_rustls::rustls;
use tombolo_types::Code;

/// Longest status line that is waited for.
const STATUS_LINE_MAX: u64 = 256;

/// Health of the application as it is reported to discovery.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Health {
    /// Not asked yet: nothing is reported, and discovery keeps what it knows.
    #[default]
    Unknown,
    /// Takes calls.
    Healthy,
    /// Takes none, because of this.
    Unhealthy(String),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    exec: Option<serde_json::Value>,
    grpc: Option<serde_json::Value>,
    http_get: Option<HttpGet>,
    tcp_socket: Option<TcpSocket>,
    #[serde(default)]
    initial_delay_seconds: u64,
    #[serde(default)]
    timeout_seconds: u64,
    #[serde(default)]
    period_seconds: u64,
    #[serde(default)]
    success_threshold: u32,
    #[serde(default)]
    failure_threshold: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct HttpGet {
    #[serde(default)]
    host: String,
    port: u16,
    #[serde(default)]
    path: String,
    #[serde(default)]
    scheme: String,
    #[serde(default)]
    http_headers: Vec<Header>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Header {
    name: String,
    value: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct TcpSocket {
    #[serde(default)]
    host: String,
    port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Http {
        tls: bool,
        path: String,
        headers: Vec<(String, String)>,
    },
    Tcp,
}

/// A probe that can be run here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    kind: Kind,
    /// None: the host's own address.
    host: Option<IpAddr>,
    port: u16,
    initial_delay: Duration,
    timeout: Duration,
    period: Duration,
    success_threshold: u32,
    failure_threshold: u32,
}

impl Probe {
    /// Reads `WorkloadGroup.spec.probe`; `None` where there is none.
    ///
    /// # Errors
    /// With the reason why it is not run: exec and grpc, a foreign host, a header with a line break.
    pub fn parse(json: &str) -> Result<Option<Self>, String> {
        if json.trim().is_empty() {
            return Ok(None);
        }
        let spec: Spec = serde_json::from_str(json).map_err(|error| format!("it cannot be read: {error}"))?;
        let (kind, host, port) = match spec {
            Spec { exec: Some(_), .. } => return Err("exec probes are not run".to_owned()),
            Spec { grpc: Some(_), .. } => return Err("grpc probes are not run".to_owned()),
            Spec {
                http_get: Some(get), ..
            } => {
                let tls = match get.scheme.to_ascii_uppercase().as_str() {
                    "" | "HTTP" => false,
                    "HTTPS" => true,
                    other => return Err(format!("the scheme {other:?} is not known")),
                };
                let path = if get.path.starts_with('/') {
                    get.path
                } else {
                    format!("/{}", get.path)
                };
                let headers: Vec<_> = get.http_headers.into_iter().map(|h| (h.name, h.value)).collect();
                let texts = headers
                    .iter()
                    .flat_map(|(name, value)| [name, value])
                    .chain([&path]);
                if texts.flat_map(|text| text.bytes()).any(|b| b < b' ' || b == 0x7f) {
                    return Err("a header or the path has a control character".to_owned());
                }
                (Kind::Http { tls, path, headers }, get.host, get.port)
            }
            Spec {
                tcp_socket: Some(socket),
                ..
            } => (Kind::Tcp, socket.host, socket.port),
            Spec { .. } => return Ok(None),
        };
        let host = match host.as_str() {
            "" => None,
            "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            text => match text.parse() {
                Ok(address) if host::is_own(address) => Some(address),
                _ => return Err(format!("{text:?} is not an address of this host")),
            },
        };
        let or = |value: u64, default| Duration::from_secs(if value == 0 { default } else { value });
        Ok(Some(Self {
            kind,
            host,
            port,
            initial_delay: Duration::from_secs(spec.initial_delay_seconds),
            timeout: or(spec.timeout_seconds, 1),
            period: or(spec.period_seconds, 10),
            success_threshold: spec.success_threshold.max(1),
            failure_threshold: spec.failure_threshold.max(1),
        }))
    }

    /// Asks once.
    ///
    /// # Errors
    /// With what went wrong, for people.
    pub async fn ask(&self, own: IpAddr) -> Result<(), String> {
        let address = SocketAddr::new(self.host.unwrap_or(own), self.port);
        match tokio::time::timeout(self.timeout, self.attempt(address)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(reason)) => Err(format!("{address}: {reason}")),
            Err(_) => Err(format!(
                "{address}: no answer within {} s",
                self.timeout.as_secs()
            )),
        }
    }

    async fn attempt(&self, address: SocketAddr) -> Result<(), String> {
        let socket = TcpStream::connect(address)
            .await
            .map_err(|error| error.to_string())?;
        match &self.kind {
            Kind::Tcp => Ok(()),
            Kind::Http {
                tls: false,
                path,
                headers,
            } => get(socket, address, path, headers).await,
            Kind::Http {
                tls: true,
                path,
                headers,
            } => {
                let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
                let connector = tokio_rustls::TlsConnector::from(Arc::new(anyone::config()?));
                let stream = connector
                    .connect(name, socket)
                    .await
                    .map_err(|error| format!("TLS: {error}"))?;
                get(stream, address, path, headers).await
            }
        }
    }
}

async fn get(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    address: SocketAddr,
    path: &str,
    headers: &[(String, String)],
) -> Result<(), String> {
    let mut request = format!("GET {path} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request.push_str(&format!("Host: {address}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("User-Agent: tombolo-probe\r\nAccept: */*\r\nConnection: close\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|error| error.to_string())?;
    let mut line = Vec::new();
    let mut head = stream.take(STATUS_LINE_MAX);
    while !line.contains(&b'\n') {
        let mut buffer = [0; 64];
        match head.read(&mut buffer).await.map_err(|error| error.to_string())? {
            0 => break,
            n => line.extend_from_slice(&buffer[..n]),
        }
    }
    let line = String::from_utf8_lossy(&line);
    let status = line
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.get(2..5))
        .and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("HTTP status {status}")),
        None => Err("the answer is not HTTP".to_owned()),
    }
}

/// Thresholds: so many in a row change the health.
#[derive(Debug, Default)]
struct Judge {
    successes: u32,
    failures: u32,
}

impl Judge {
    fn take(&mut self, probe: &Probe, result: Result<(), String>) -> Option<Health> {
        match result {
            Ok(()) => {
                (self.successes, self.failures) = (self.successes.saturating_add(1), 0);
                (self.successes >= probe.success_threshold).then_some(Health::Healthy)
            }
            Err(reason) => {
                (self.successes, self.failures) = (0, self.failures.saturating_add(1));
                (self.failures >= probe.failure_threshold).then_some(Health::Unhealthy(reason))
            }
        }
    }
}

/// Runs the probe of the registration, and another one when that changes, and keeps `health`. Without a probe the
/// workload is healthy as long as its agent runs; with one that is not run here it is unhealthy, with the reason.
/// `allowed` is the host owner's word.
pub async fn run(
    mut registration: watch::Receiver<Arc<Registration>>,
    allowed: bool,
    health: watch::Sender<Health>,
) {
    loop {
        let current = Arc::clone(&registration.borrow_and_update());
        let probe = match Probe::parse(&current.probe_json) {
            Ok(Some(_)) if !allowed => Err("probes are switched off in the agent's configuration".to_owned()),
            other => other,
        };
        let running = async {
            match probe {
                Ok(Some(probe)) => follow(&probe, &current, &health).await,
                Ok(None) => set(&health, Health::Healthy),
                Err(reason) => set(&health, Health::Unhealthy(Code::ProbeRefused.message(reason))),
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = running => {}
            changed = other_probe(&mut registration, &current.probe_json) => if !changed { return },
        }
    }
}

/// False when there will be no other one.
async fn other_probe(registration: &mut watch::Receiver<Arc<Registration>>, present: &str) -> bool {
    registration
        .wait_for(|registration| registration.probe_json != present)
        .await
        .is_ok()
}

async fn follow(probe: &Probe, registration: &Registration, health: &watch::Sender<Health>) {
    tokio::time::sleep(probe.initial_delay).await;
    let mut judge = Judge::default();
    let mut ticks = tokio::time::interval(probe.period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let own = host::addresses(Some(&registration.plan)).first().copied();
        let result = probe.ask(own.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))).await;
        if let Some(new) = judge.take(probe, result) {
            set(health, new);
        }
    }
}

/// A change of state is a change; another reason for the same state is not reported again.
fn set(health: &watch::Sender<Health>, new: Health) {
    health.send_if_modified(|old| {
        if std::mem::discriminant(old) == std::mem::discriminant(&new) {
            return false;
        }
        tracing::info!(health = ?new, "the health of the application has changed");
        *old = new;
        true
    });
}

/// TLS to a probe's target without asking who it is, as Kubernetes does: nothing secret is sent.
mod anyone {
    use super::rustls::{
        self, DigitallySignedStruct, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::WebPkiSupportedAlgorithms,
        pki_types::{CertificateDer, ServerName, UnixTime},
    };
    use std::sync::Arc;

    #[derive(Debug)]
    struct Anyone(WebPkiSupportedAlgorithms);

    impl ServerCertVerifier for Anyone {
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
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.supported_schemes()
        }
    }

    pub(super) fn config() -> Result<rustls::ClientConfig, String> {
        let provider = tombolo_identity::provider();
        let verifier = Anyone(provider.signature_verification_algorithms);
        let builder =
            rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| error.to_string())?;
        Ok(builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    fn parse(json: &str) -> Probe {
        Probe::parse(json).unwrap().unwrap()
    }

    #[test]
    fn kubernetes_defaults() {
        let probe = parse(r#"{"httpGet":{"port":8080}}"#);
        assert_eq!(
            probe.kind,
            Kind::Http {
                tls: false,
                path: "/".into(),
                headers: vec![]
            }
        );
        assert_eq!(
            (probe.host, probe.port, probe.initial_delay),
            (None, 8080, Duration::ZERO)
        );
        assert_eq!(
            (probe.timeout, probe.period),
            (Duration::from_secs(1), Duration::from_secs(10))
        );
        assert_eq!((probe.success_threshold, probe.failure_threshold), (1, 1));
        let probe = parse(
            r#"{"tcpSocket":{"port":5432,"host":"127.0.0.1"},"periodSeconds":5,"timeoutSeconds":2,"failureThreshold":3}"#,
        );
        assert_eq!(
            (probe.kind, probe.host),
            (Kind::Tcp, Some("127.0.0.1".parse().unwrap()))
        );
        assert_eq!(
            (probe.period, probe.timeout),
            (Duration::from_secs(5), Duration::from_secs(2))
        );
        assert_eq!(probe.failure_threshold, 3);
        assert!(Probe::parse("").unwrap().is_none() && Probe::parse("{}").unwrap().is_none());
    }

    #[test]
    fn refused() {
        for (json, word) in [
            (r#"{"exec":{"command":["true"]}}"#, "exec"),
            (r#"{"grpc":{"port":1}}"#, "grpc"),
            (r#"{"httpGet":{"port":80,"host":"192.0.2.1"}}"#, "192.0.2.1"),
            (r#"{"tcpSocket":{"port":80,"host":"example.org"}}"#, "example.org"),
            (r#"{"httpGet":{"port":80,"scheme":"FTP"}}"#, "FTP"),
            (
                r#"{"httpGet":{"port":80,"path":"/\r\nX: y"}}"#,
                "control character",
            ),
            (
                r#"{"httpGet":{"port":80,"httpHeaders":[{"name":"a","value":"b\n"}]}}"#,
                "control character",
            ),
            (r#"{"httpGet":{"port":70000}}"#, "cannot be read"),
        ] {
            let error = Probe::parse(json).unwrap_err();
            assert!(error.contains(word), "{json}: {error}");
        }
    }

    #[test]
    fn thresholds_count_in_a_row() {
        let probe = parse(r#"{"tcpSocket":{"port":1},"successThreshold":2,"failureThreshold":3}"#);
        let mut judge = Judge::default();
        let results = "+ - + + - - + - - - + +";
        let seen: String = results
            .split(' ')
            .map(
                |r| match judge.take(&probe, if r == "+" { Ok(()) } else { Err("x".into()) }) {
                    None => '.',
                    Some(Health::Healthy) => 'H',
                    Some(Health::Unhealthy(_)) => 'U',
                    Some(Health::Unknown) => '?',
                },
            )
            .collect();
        assert_eq!(seen, "...H.....U.H");
    }

    #[tokio::test]
    async fn http_and_tcp_against_real_sockets() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let tasks = tombolo_runtime::TaskGroup::new("test");
        tasks.spawn_until_stopped("server", async move {
            for answer in [
                "HTTP/1.1 204 No Content\r\n\r\n",
                "HTTP/1.0 503 x\r\n\r\n",
                "SSH-2.0\r\n",
                "",
            ] {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut request = [0; 512];
                let n = socket.read(&mut request).await.unwrap();
                assert!(request[..n].starts_with(b"GET /healthz?x=1 HTTP/1.1\r\nHost: 127.0.0.1:"));
                socket.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let own = "127.0.0.1".parse().unwrap();
        let probe = parse(&format!(
            r#"{{"httpGet":{{"port":{port},"path":"healthz?x=1"}}}}"#
        ));
        assert_eq!(probe.ask(own).await, Ok(()));
        for word in ["status 503", "not HTTP", "not HTTP"] {
            let error = probe.ask(own).await.unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        tasks.stop();
        tasks.drain(Duration::from_secs(5)).await;
        let error = parse(&format!(r#"{{"tcpSocket":{{"port":{port}}}}}"#))
            .ask(own)
            .await
            .unwrap_err();
        assert!(error.to_lowercase().contains("refused"), "{error}");
    }
}
