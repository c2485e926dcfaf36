//! The far side: an endpoint, and a gateway in front of it that passes bytes.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tombolo_identity::Peer;
use tombolo_runtime::TaskGroup;
use tombolo_tunnel::{Call, Incoming, Monitor, Service, bidirectional};

/// Bytes of a request, and of its answer.
pub(crate) const REQUEST_BYTES: usize = 4096;
/// Where bytes are taken and counted.
pub(crate) const SINK: u16 = 80;
/// Where each request gets an answer.
pub(crate) const ECHO: u16 = 81;

/// The agent in front of the application.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) sink: SocketAddr,
    pub(crate) echo: SocketAddr,
}

impl Service for Endpoint {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        let sink = incoming
            .authority()
            .is_ok_and(|authority| authority.port() == SINK);
        let application = if sink { self.sink } else { self.echo };
        let Ok(tcp) = TcpStream::connect(application).await else {
            return;
        };
        let _ = tcp.set_nodelay(true);
        if let Ok(stream) = incoming.accept(None) {
            bidirectional(tcp, stream, &Monitor::default()).await;
        }
    }
}

/// The application: takes and counts, or answers.
pub(crate) async fn application(listener: TcpListener, received: Option<Arc<AtomicU64>>, tasks: TaskGroup) {
    while let Ok((mut tcp, _)) = listener.accept().await {
        let _ = tcp.set_nodelay(true);
        let received = received.clone();
        tasks.spawn("application", async move {
            let Some(received) = received else {
                let mut request = [0; REQUEST_BYTES];
                while tcp.read_exact(&mut request).await.is_ok() && tcp.write_all(&request).await.is_ok() {}
                return;
            };
            let mut buffer = vec![0; 256 * 1024];
            while let Ok(length @ 1..) = tcp.read(&mut buffer).await {
                received.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
    }
}

/// The gateway of the far network.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) endpoint: SocketAddr,
}

impl Service for Gateway {
    fn admit(&self, _: &Peer) -> bool {
        true
    }

    async fn connect(self: Arc<Self>, incoming: Incoming) {
        let Ok(mut tcp) = TcpStream::connect(self.endpoint).await else {
            return;
        };
        let _ = tcp.set_nodelay(true);
        match incoming.accept_call(None) {
            Ok(Call::Stream(stream)) => {
                bidirectional(tcp, stream, &Monitor::default()).await;
            }
            Ok(Call::Io(mut io)) => {
                // Either end may cut it.
                let _ = copy_bidirectional(&mut tcp, &mut io).await;
            }
            Err(_) => {}
        }
    }
}
