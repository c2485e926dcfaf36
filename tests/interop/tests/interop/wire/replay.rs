//! A caller that sends what was recorded of another implementation, whether or not that one is here.

use super::{Keys, STEP, bytes_of, local, provider};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use serde_json::Value;
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
    task::spawn_local,
    time::timeout,
};
use tombolo_identity::peer_of;
use tombolo_testkit::in_namespace;

/// What came back.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    /// Who terminated the outer layer.
    pub(crate) gateway: String,
    pub(crate) outer: u16,
    pub(crate) outer_headers: HeaderMap,
    /// Who terminated the inner layer; empty if it was not reached.
    pub(crate) endpoint: String,
    pub(crate) inner: u16,
    pub(crate) inner_headers: HeaderMap,
    pub(crate) body: String,
}

/// Sends the recorded layers `outer` and `inner`, and an HTTP request inside them, from a network namespace.
pub(crate) fn call_through(
    namespace: &str,
    gateway: SocketAddr,
    keys: &Keys,
    (outer, inner): (&Value, &Value),
) -> Result<Answer> {
    in_namespace(namespace, || {
        local(async {
            timeout(STEP, call(gateway, keys, outer, inner))
                .await
                .context("the call did not end")?
        })
    })
}

async fn call(gateway: SocketAddr, keys: &Keys, outer: &Value, inner: &Value) -> Result<Answer> {
    let mut answer = Answer::default();
    let tcp = TcpStream::connect(gateway).await?;
    let (tls, peer) = shake(tcp, keys, outer).await.context("outer handshake")?;
    answer.gateway = peer;
    let (response, to) = ask(tls, outer).await.context("outer request")?;
    answer.outer = response.status().as_u16();
    let (parts, from) = response.into_parts();
    answer.outer_headers = parts.headers;
    if answer.outer != 200 {
        return Ok(answer);
    }
    let (tls, peer) = shake(bytes_of(from, to), keys, inner)
        .await
        .context("inner handshake")?;
    answer.endpoint = peer;
    let (response, to) = ask(tls, inner).await.context("inner request")?;
    answer.inner = response.status().as_u16();
    let (parts, from) = response.into_parts();
    answer.inner_headers = parts.headers;
    if answer.inner == 200 {
        let mut io = bytes_of(from, to);
        io.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await?;
        let mut body = Vec::new();
        io.read_to_end(&mut body).await?;
        answer.body = String::from_utf8_lossy(&body).into_owned();
    }
    Ok(answer)
}

/// TLS as the record says: its server name (none) and protocols.
async fn shake<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    keys: &Keys,
    layer: &Value,
) -> Result<(tokio_rustls::client::TlsStream<IO>, String)> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_client_auth_cert(keys.chain.clone(), keys.key.clone_key())?;
    let protocols = layer["alpn"].as_array().into_iter().flatten();
    config.alpn_protocols = protocols
        .filter_map(|protocol| Some(protocol.as_str()?.as_bytes().to_vec()))
        .collect();
    config.enable_sni = layer["server_name"].is_string();
    let name = match layer["server_name"].as_str() {
        Some(name) => ServerName::try_from(name.to_owned())?,
        None => ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()),
    };
    let tls = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, io)
        .await?;
    let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = peer_of(chain)?.id.to_string();
    Ok((tls, peer))
}

async fn ask<IO: AsyncRead + AsyncWrite + Unpin + 'static>(
    tls: IO,
    layer: &Value,
) -> Result<(http::Response<h2::RecvStream>, h2::SendStream<Bytes>)> {
    let (mut sender, connection) = h2::client::Builder::new()
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_header_list_size(16 << 10)
        .enable_push(false)
        .handshake::<_, Bytes>(tls)
        .await?;
    spawn_local(async move {
        let _ = connection.await;
    });
    let authority = layer["authority"].as_str().context("no authority")?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = http::Uri::builder().authority(authority).build()?;
    *request.version_mut() = http::Version::HTTP_2;
    for (name, value) in layer["headers"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        let value = value.replace("SOURCE", "10.0.0.6:40000").replace(
            "TRACE-PARENT",
            "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        );
        request.headers_mut().insert(
            HeaderName::try_from(name.as_str())?,
            HeaderValue::try_from(value)?,
        );
    }
    let (response, to) = sender.send_request(request, false)?;
    // The sender stays with the stream: dropping the last one says that no more will come, which is true.
    Ok((response.await?, to))
}

/// The caller here looks at who answered afterwards.
#[derive(Debug)]
struct Anybody;

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
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signed,
            &provider().signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signed,
            &provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
