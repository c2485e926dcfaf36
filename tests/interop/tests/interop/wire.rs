//! What stands on the wire of a call into another network: written down at a stand-in for gateway and endpoint, and
//! sent by a stand-in for the caller.
//!
//! Both are made of rustls and h2 alone, so that no mistake of ours is at both ends.

mod record;
mod replay;

pub(crate) use record::Recorder;
pub(crate) use replay::call_through;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Map, Value, json};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::spawn_local,
};
use tombolo_testkit::Host;

/// Bytes between a stream and what reads it.
const PIPE: usize = 64 << 10;
/// Longest wait for any one step.
const STEP: Duration = Duration::from_secs(10);

/// A key with its chain, and the roots to believe.
#[derive(Debug)]
pub(crate) struct Keys {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<rustls::RootCertStore>,
}

impl Clone for Keys {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            roots: Arc::clone(&self.roots),
        }
    }
}

impl Keys {
    /// Of the program whose state folder this is.
    pub(crate) fn of(host: &Host, state: &str) -> Result<Self> {
        let identity = host.sh(&format!("cat {state}/identity.pem"))?.checked()?.stdout;
        let roots_pem = host.sh(&format!("cat {state}/roots.pem"))?.checked()?.stdout;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(identity.as_bytes()).collect();
        let mut roots = rustls::RootCertStore::empty();
        for root in CertificateDer::pem_slice_iter(roots_pem.as_bytes()) {
            roots.add(root?)?;
        }
        Ok(Self {
            chain: chain?,
            key: PrivateKeyDer::from_pem_slice(identity.as_bytes()).context("no key")?,
            roots: Arc::new(roots),
        })
    }
}

/// One layer of a call: the handshake and the request, as they came.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) server_name: Option<String>,
    pub(crate) alpn: Vec<String>,
    pub(crate) suites: Vec<String>,
    pub(crate) peer: String,
    pub(crate) request: http::request::Parts,
}

impl Layer {
    /// As a record: what differs from call to call (ports, trace ids) is masked, if it has the form that it must have.
    pub(crate) fn masked(&self) -> Value {
        let uri = &self.request.uri;
        let mut headers = Map::new();
        for (name, value) in &self.request.headers {
            let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
            let text = match name.as_str() {
                "traceparent" => masked_trace(&text),
                "forwarded" => masked_source(&text),
                _ => text,
            };
            headers.insert(name.to_string(), text.into());
        }
        json!({
            "server_name": self.server_name,
            "alpn": self.alpn,
            "cipher_suites": self.suites,
            "method": self.request.method.as_str(),
            "scheme": uri.scheme_str(),
            "path": uri.path_and_query().map(http::uri::PathAndQuery::as_str),
            "authority": uri.authority().map(http::uri::Authority::as_str),
            "headers": headers,
        })
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.request.headers.get(name)?.to_str().ok()
    }
}

/// `00-<32 hex>-<16 hex>-00`.
fn masked_trace(text: &str) -> String {
    let parts: Vec<&str> = text.split('-').collect();
    let hex = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    match parts.as_slice() {
        ["00", trace, parent, "00"] if hex(trace, 32) && hex(parent, 16) => "00-TRACE-PARENT-00".to_owned(),
        _ => text.to_owned(),
    }
}

/// `for="<address>:<port>"`, and whatever follows.
fn masked_source(text: &str) -> String {
    let source = text.strip_prefix("for=\"").and_then(|rest| rest.split_once('"'));
    match source {
        Some((source, rest)) if source.parse::<std::net::SocketAddr>().is_ok() => {
            format!("for=\"SOURCE\"{rest}")
        }
        _ => text.to_owned(),
    }
}

/// The two halves of an HTTP/2 stream as one that TLS can run in. Belongs in a `LocalSet`.
fn bytes_of(mut from: RecvStream, mut to: SendStream<Bytes>) -> DuplexStream {
    let (near, far) = tokio::io::duplex(PIPE);
    let (mut reader, mut writer) = tokio::io::split(far);
    spawn_local(async move {
        while let Some(Ok(data)) = from.data().await {
            let _ = from.flow_control().release_capacity(data.len());
            if writer.write_all(&data).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    });
    spawn_local(async move {
        let mut buffer = vec![0; 16 << 10];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            // More than the window waits in h2's own queue: these are small calls.
            if to
                .send_data(Bytes::copy_from_slice(&buffer[..count]), false)
                .is_err()
            {
                return;
            }
        }
        let _ = to.send_data(Bytes::new(), true);
    });
    near
}

fn local<T>(run: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, run)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
