//! The public ports. Each connection is looked at before anything is decrypted, and goes to whom it is for: members
//! (HBONE), hosts that hold reverse sessions, or discovery behind it.

use crate::{
    admission::Admission,
    config::Settings,
    hello::{ClientHello, HELLO_MAX, Peeked, peek},
    metrics::Metrics,
    service::Calls,
    way_in::WayIn,
};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tombolo_control_client::Registration;
use tombolo_identity::asked_trust_domain;
use tombolo_runtime::{TaskGroup, fair::Places};
use tombolo_tunnel::{ALPN_REVERSE, Pool, ReverseSession, Server};
use tombolo_types::{DeviceId, TrustDomain};

/// Longest wait for the first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between looks at a message that has not come whole: it doubles.
const LOOK: Duration = Duration::from_millis(2);
/// A host may be quicker than the news of its enrolment.
const ENTRY_PATIENCE: Duration = Duration::from_secs(3);

/// Everything that a connection may need.
pub(crate) struct Front {
    pub(crate) settings: Settings,
    /// Who this gateway is.
    pub(crate) registration: watch::Receiver<Arc<Registration>>,
    pub(crate) server: Server,
    pub(crate) calls: Arc<Calls>,
    pub(crate) admission: Admission,
    pub(crate) pool: Pool,
    pub(crate) metrics: Arc<Metrics>,
    /// Before it is known what a connection is.
    pub(crate) unknown: Arc<Places>,
    /// Connections to discovery.
    pub(crate) way_in: WayIn,
    /// Connections of sidecars.
    pub(crate) passing: Arc<Places>,
    pub(crate) tasks: TaskGroup,
}

/// What the first message is for.
#[derive(Debug, PartialEq, Eq)]
enum Purpose {
    Hbone,
    Reverse,
    Discovery,
    Unknown,
}

/// What a connection is for; `is_own` knows the names of the own trust domain.
fn purpose(hello: &ClientHello, is_own: impl Fn(&TrustDomain) -> bool) -> Purpose {
    let discovery = |name: &str| asked_trust_domain(name).is_some_and(|name| is_own(&name));
    match &hello.server_name {
        Some(name) if discovery(name) => Purpose::Discovery,
        Some(_) => Purpose::Unknown,
        None if hello.alpn.iter().any(|protocol| protocol == ALPN_REVERSE) => Purpose::Reverse,
        None => Purpose::Hbone,
    }
}

impl Front {
    /// Accepts on one of the ports until the group stops.
    pub(crate) async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Some((tcp, remote)) = next(&listener).await else {
                continue;
            };
            let Some(place) = self.unknown.enter(remote.ip()) else {
                self.metrics.limited("unproven");
                continue;
            };
            let front = Arc::clone(&self);
            self.tasks.spawn_until_stopped("gateway connection", async move {
                let hello = first_message(&tcp).await;
                drop(place);
                match hello {
                    Some(hello) => front.dispatch(tcp, remote, &hello).await,
                    None => front.metrics.accepted("refused"),
                }
            });
        }
    }

    /// True for a name by which somebody may look for the own discovery: hosts that were away while the trust domain was
    /// renamed do so by the old one.
    fn is_own(&self, trust_domain: &TrustDomain) -> bool {
        self.registration.borrow().is_name(trust_domain)
            || self.calls.world.peek().is_name_of_own(trust_domain)
    }

    async fn dispatch(self: Arc<Self>, tcp: TcpStream, remote: SocketAddr, hello: &ClientHello) {
        match purpose(hello, |name| self.is_own(name)) {
            Purpose::Hbone => {
                self.metrics.accepted("hbone");
                self.server.take(tcp, remote, &self.calls, &self.tasks);
            }
            Purpose::Reverse => {
                self.metrics.accepted("reverse");
                self.reverse(tcp, remote).await;
            }
            Purpose::Discovery => {
                let _place = match self.way_in.admit(remote.ip(), Instant::now().into_std()) {
                    Ok(place) => place,
                    Err(limit) => return self.metrics.limited(limit.as_str()),
                };
                self.metrics.accepted("discovery");
                self.way_in.pass(tcp, remote).await;
            }
            Purpose::Unknown => {
                self.metrics.accepted("refused");
                tracing::debug!(%remote, server_name = hello.server_name, "refused: no such name here");
            }
        }
    }

    async fn reverse(&self, tcp: TcpStream, remote: SocketAddr) {
        // Until it is known whether it may be held.
        let Some(_place) = self.unknown.enter(remote.ip()) else {
            return self.metrics.limited("unproven");
        };
        match self.pool.accept_reverse(tcp).await {
            Ok(session) => self.hold(session).await,
            Err(error) => tracing::debug!(%remote, %error, "a reverse session was not made"),
        }
    }

    /// Serves the same over QUIC.
    pub(crate) fn listen_quic(self: &Arc<Self>, address: SocketAddr) -> io::Result<SocketAddr> {
        let front = Arc::clone(self);
        let take = move |session: ReverseSession| {
            front.metrics.accepted("reverse");
            let holder = Arc::clone(&front);
            front
                .tasks
                .spawn_until_stopped("reverse session", async move { holder.hold(session).await });
        };
        self.server
            .listen_quic(address, &self.calls, Arc::new(take), &self.tasks)
    }

    /// Takes a reverse session, if the host may hold one.
    async fn hold(&self, session: ReverseSession) {
        let (remote, transport) = (session.remote(), session.transport());
        let peer = Arc::clone(session.peer());
        let Some(device) = self.admitted(&session).await else {
            session.cut();
            tracing::warn!(
                %remote, peer = %peer.id,
                "reverse session refused: no WorkloadEntry of an outbound group of this network names this device"
            );
            return;
        };
        if !self.calls.sessions.insert(device, session) {
            self.metrics.limited("sessions");
            tracing::warn!(%remote, peer = %peer.id, "reverse session refused: sessions_max is reached");
            return;
        }
        self.count();
        tracing::info!(%remote, peer = %peer.id, %device, transport, "reverse session");
    }

    pub(crate) fn count(&self) {
        self.metrics.hold(self.calls.sessions.reap());
        let resting = self.calls.balance.resting(Instant::now());
        self.metrics
            .resting
            .set(i64::try_from(resting).unwrap_or(i64::MAX));
    }

    /// The device, if an entry of the home network names it with this identity.
    async fn admitted(&self, session: &ReverseSession) -> Option<DeviceId> {
        let deadline = Instant::now() + ENTRY_PATIENCE;
        loop {
            let device = self.admission.device(&self.calls.world.load(), session.peer());
            if device.is_some() {
                return device;
            }
            if Instant::now() >= deadline || session.is_closed() {
                return None;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// The next connection; none when accepting failed, after a pause.
pub(crate) async fn next(listener: &TcpListener) -> Option<(TcpStream, SocketAddr)> {
    match listener.accept().await {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            // Out of file descriptors: wait instead of spinning.
            tracing::debug!(%error, "accept failed");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

/// Looks at what a client says first, without taking it. `None`: too slow, gone, or no TLS.
pub(crate) async fn first_message(tcp: &TcpStream) -> Option<ClientHello> {
    let look = async {
        let mut buffer = vec![0; 2048];
        let mut pause = LOOK;
        loop {
            let count = tcp.peek(&mut buffer).await?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            match peek(buffer.get(..count).unwrap_or_default()) {
                Peeked::Hello(hello) => return Ok(hello),
                Peeked::NotTls => return Err(io::ErrorKind::InvalidData.into()),
                Peeked::Incomplete if count == buffer.len() => buffer.resize(HELLO_MAX, 0),
                // The socket stays readable while the rest is on its way.
                Peeked::Incomplete => {
                    sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_millis(100));
                }
            }
        }
    };
    timeout(HELLO_TIMEOUT, look).await.ok()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_a_connection_is_for() {
        let td: TrustDomain = "mesh.example".parse().unwrap();
        let hello = |name: Option<&str>, alpn: &[&[u8]]| ClientHello {
            server_name: name.map(str::to_owned),
            alpn: alpn.iter().map(|protocol| protocol.to_vec()).collect(),
        };
        for (name, alpn, expected) in [
            (None, &[&b"h2"[..]][..], Purpose::Hbone),
            (None, &[], Purpose::Hbone),
            (None, &[ALPN_REVERSE], Purpose::Reverse),
            (Some("discovery.mesh.example"), &[b"h2"], Purpose::Discovery),
            (Some("discovery.other.example"), &[b"h2"], Purpose::Unknown),
            (
                Some("discovery.mesh.example.org"),
                &[ALPN_REVERSE],
                Purpose::Unknown,
            ),
            (Some("bank.example"), &[b"http/1.1"], Purpose::Unknown),
        ] {
            let is_own = |name: &TrustDomain| *name == td;
            assert_eq!(purpose(&hello(name, alpn), is_own), expected, "{name:?}");
        }
    }
}
