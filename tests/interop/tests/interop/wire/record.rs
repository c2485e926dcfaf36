//! A gateway and the endpoint behind it in one, which write down what a caller sends and answer it themselves.

use super::{Keys, Layer, STEP, bytes_of, local, provider};
use anyhow::{Context as _, Result};
use rustls::{ServerConfig, server::WebPkiClientVerifier};
use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    sync::oneshot,
    task::spawn_local,
    time::timeout,
};
use tokio_rustls::LazyConfigAcceptor;
use tombolo_identity::peer_of;
use tombolo_testkit::{Host, enter};

/// What the endpoint answers.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 9\r\n\r\nrecorded\n";

/// Listens until it is dropped.
#[derive(Debug)]
pub(crate) struct Recorder {
    seen: mpsc::Receiver<Result<(Layer, Layer)>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Recorder {
    /// On a port of `host`: `gateway` shows itself outside, `endpoint` inside.
    pub(crate) fn start(host: &Host, port: u16, gateway: &Keys, endpoint: &Keys) -> Result<Self> {
        let (seen_tx, seen) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let (ready_tx, ready) = mpsc::channel();
        let namespace = host.namespace().to_owned();
        let configs = (config(gateway)?, config(endpoint)?);
        let thread = std::thread::spawn(move || {
            enter(&namespace)?;
            local(async move {
                let listener = TcpListener::bind(("0.0.0.0", port)).await?;
                let _ = ready_tx.send(());
                let serve = async {
                    loop {
                        let (tcp, _) = listener.accept().await?;
                        let (configs, seen_tx) = (configs.clone(), seen_tx.clone());
                        spawn_local(async move {
                            if let Err(error) = connection(tcp, configs, &seen_tx).await {
                                let _ = seen_tx.send(Err(error));
                            }
                        });
                    }
                };
                tokio::select! {
                    ended = serve => ended,
                    _ = stopped => Ok(()),
                }
            })
        });
        ready.recv_timeout(STEP).context("the recorder does not listen")?;
        Ok(Self {
            seen,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// The next call: outer and inner layer.
    pub(crate) fn next(&self) -> Result<(Layer, Layer)> {
        self.seen.recv_timeout(STEP).context("nothing was recorded")?
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn config(keys: &Keys) -> Result<Arc<ServerConfig>> {
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&keys.roots), provider()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(keys.chain.clone(), keys.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

/// Every stream of an outer connection: callers pool them.
async fn connection(
    tcp: tokio::net::TcpStream,
    (outer, inner): (Arc<ServerConfig>, Arc<ServerConfig>),
    seen: &mpsc::Sender<Result<(Layer, Layer)>>,
) -> Result<()> {
    let (tls, hello) = timeout(STEP, shake(tcp, outer))
        .await
        .context("outer handshake")??;
    let mut http2 = h2::server::handshake(tls).await.context("outer HTTP/2")?;
    while let Some(accepted) = http2.accept().await {
        let Ok((request, mut respond)) = accepted else {
            break;
        };
        let (parts, from) = request.into_parts();
        let layer = hello.clone().with(parts);
        let to = respond.send_response(http::Response::new(()), false)?;
        let (inner, seen) = (Arc::clone(&inner), seen.clone());
        spawn_local(async move {
            let inside = timeout(STEP, nested(bytes_of(from, to), inner)).await;
            let recorded = inside
                .context("the inner layer")
                .flatten()
                .map(|inner| (layer, inner));
            let _ = seen.send(recorded);
        });
    }
    Ok(())
}

async fn nested(io: tokio::io::DuplexStream, config: Arc<ServerConfig>) -> Result<Layer> {
    let (tls, hello) = shake(io, config).await.context("inner handshake")?;
    let mut http2 = h2::server::handshake(tls).await.context("inner HTTP/2")?;
    let (request, mut respond) = http2.accept().await.context("no inner request")??;
    let (parts, from) = request.into_parts();
    let layer = hello.with(parts);
    let to = respond.send_response(http::Response::new(()), false)?;
    // The connection moves on only while it is polled.
    spawn_local(async move { while let Some(Ok(_)) = http2.accept().await {} });
    spawn_local(async move {
        let mut io = bytes_of(from, to);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(io.read_u8().await?);
        }
        io.write_all(ANSWER).await?;
        io.shutdown().await
    });
    Ok(layer)
}

/// What the handshake showed.
#[derive(Debug, Clone)]
struct Hello {
    server_name: Option<String>,
    alpn: Vec<String>,
    suites: Vec<String>,
    peer: String,
}

impl Hello {
    fn with(self, request: http::request::Parts) -> Layer {
        Layer {
            server_name: self.server_name,
            alpn: self.alpn,
            suites: self.suites,
            peer: self.peer,
            request,
        }
    }
}

async fn shake<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    config: Arc<ServerConfig>,
) -> Result<(tokio_rustls::server::TlsStream<IO>, Hello)> {
    let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), io).await?;
    let hello = start.client_hello();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut seen = Hello {
        server_name: hello.server_name().map(str::to_owned),
        alpn: hello.alpn().into_iter().flatten().map(text).collect(),
        suites: hello
            .cipher_suites()
            .iter()
            .map(|suite| format!("{suite:?}"))
            .collect(),
        peer: String::new(),
    };
    let tls = start.into_stream(config).await?;
    let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
    seen.peer = peer_of(chain)?.id.to_string();
    Ok((tls, seen))
}
