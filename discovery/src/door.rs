//! What a connection passes before its TLS handshake: where it comes from, and whether that source may have another one.

use crate::{
    audit::{ANONYMOUS, Audit, Line},
    forwarders::{self, First, Forwarder, Forwarders},
    limits::{HalfOpen, Limits},
    listener::ListenerCounters,
    members::MemberLimits,
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::net::TcpStream;
use tombolo_runtime::fair::Place;
use tombolo_types::Code;

/// A header from somebody who may not send one is said in the log at most so often; the audit log has its own bound.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Whom the listener lets in.
#[derive(Debug, Clone)]
pub struct Door {
    /// Before a connection has shown who it is.
    pub limits: Limits,
    /// After.
    pub members: MemberLimits,
    /// Who may say where a connection comes from.
    pub forwarders: Forwarders,
    /// For those who say so and may not.
    pub audit: Arc<Audit>,
    /// What came of it.
    pub counters: Arc<ListenerCounters>,
}

/// What a connection holds before its handshake.
#[derive(Debug)]
pub(crate) enum Waiting {
    /// Its source is known.
    Source(HalfOpen),
    /// A gateway's, which may be about to say for whom it is.
    Gateway(Forwarder, Place),
}

impl Door {
    fn source(&self, address: IpAddr) -> Option<HalfOpen> {
        let listed = self.forwarders.lists(address);
        self.limits.admit(address, listed, Instant::now())
    }

    /// A place for a new connection; `None`: close it.
    pub(crate) fn enter(&self, address: IpAddr) -> Option<Waiting> {
        match self.forwarders.find(address) {
            Some(gateway) => {
                let place = self.limits.gateway(address)?;
                Some(Waiting::Gateway(gateway, place))
            }
            None => self.source(address).map(Waiting::Source),
        }
    }

    /// Where the connection comes from: as TCP says, or as the gateway does that it comes through.
    pub(crate) async fn whence(
        &self,
        socket: &mut TcpStream,
        remote: SocketAddr,
        waiting: Waiting,
    ) -> io::Result<(SocketAddr, Option<Forwarder>, HalfOpen)> {
        let first = forwarders::first(socket).await?;
        let (source, via) = match (waiting, first) {
            (Waiting::Source(place), First::Other) => return Ok((remote, None, place)),
            (Waiting::Source(_), First::Header) => {
                self.refuse_header(remote);
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "a PROXY header, and not from a gateway",
                ));
            }
            (Waiting::Gateway(..), First::Other) => (remote, None),
            (Waiting::Gateway(gateway, _place), First::Header) => match forwarders::read(socket).await? {
                Some(source) => {
                    self.counters.forwarded.fetch_add(1, Ordering::Relaxed);
                    (source, Some(gateway))
                }
                None => (remote, None),
            },
        };
        match self.source(source.ip()) {
            Some(place) => Ok((source, via, place)),
            None => {
                self.counters.limited.fetch_add(1, Ordering::Relaxed);
                Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    "too many half-open connections of this source",
                ))
            }
        }
    }

    fn refuse_header(&self, remote: SocketAddr) {
        let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
        let said = Code::ProxyRefused.message(format_args!("{remote} is not the address of a gateway"));
        self.counters.impostors.fetch_add(1, Ordering::Relaxed);
        if self.limits.may_say(SAY_AGAIN, Instant::now()) {
            tracing::warn!("{said}");
        }
        self.audit.write_bounded(Line {
            who: ANONYMOUS.into(),
            from: remote.to_string(),
            verb: "name-source".into(),
            result: format!("refused: {said}"),
            ..Line::default()
        });
    }
}
