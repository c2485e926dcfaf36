//! HBONE inside a stream: what a caller has opened through a gateway to a host that holds a reverse session.

use super::{Accepted, Refused, Server, ServerSide, Service, http2, run};
use crate::{
    conn_io::ConnIo, control::Control, driver_plain::PlainDriver, observe::Side, stream_io::TunnelIo,
};
use std::{net::SocketAddr, sync::Arc};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tombolo_identity::peer_of;
use tombolo_runtime::TaskGroup;

impl Server {
    /// Serves HBONE inside `stream` as if it were a TCP connection from `remote` to `local`: the caller's own TLS, end to end.
    /// Counted among the connections; drained, rechecked and cut with them. Returns when the connection has ended.
    pub async fn serve_nested<S: Service>(
        &self,
        stream: TunnelIo,
        (local, remote): (SocketAddr, SocketAddr),
        service: Arc<S>,
        tasks: &TaskGroup,
    ) {
        let shared = &self.shared;
        let bundle_generation = shared.live.current().bundle_generation;
        let shaken = timeout(
            shared.limits.handshake_timeout,
            self.shake(stream, (local, remote), Arc::clone(&service), tasks.clone()),
        );
        let (side, accepted, control) = match shaken.await.unwrap_or(Err(Refused::Timeout)) {
            Ok(ready) => ready,
            Err(refused) => {
                let (label, error) = refused.label();
                shared.observer.handshake(Side::Server, label);
                tracing::debug!(%remote, label, error, "nested handshake failed");
                return;
            }
        };
        shared.observer.handshake(Side::Server, "ok");
        let driver = PlainDriver::new(side, control);
        run(driver, accepted, bundle_generation, &*service, shared).await;
    }

    async fn shake<S: Service>(
        &self,
        stream: TunnelIo,
        (local, remote): (SocketAddr, SocketAddr),
        service: Arc<S>,
        tasks: TaskGroup,
    ) -> Result<(ServerSide<S>, Arc<Accepted>, Arc<Control>), Refused> {
        let shared = &self.shared;
        let tls = TlsAcceptor::from(Arc::clone(&shared.tls))
            .accept(stream)
            .await
            .map_err(Refused::io)?;
        let chain = tls.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = peer_of(chain).map_err(|error| Refused::tls(&error))?;
        if !service.admit(&peer) {
            return Err(Refused::NotAdmitted);
        }
        let connection = http2(&shared.limits)
            .handshake(ConnIo::Nested(Box::new(tls)))
            .await
            .map_err(Refused::Http2)?;
        let control = Control::new();
        let accepted = Arc::new(Accepted {
            peer: Arc::new(peer),
            local,
            remote,
            is_tcp: false,
            control: Arc::clone(&control),
        });
        let side = ServerSide::new(connection, &accepted, service, tasks, shared);
        Ok((side, accepted, control))
    }
}
