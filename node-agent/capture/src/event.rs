use crate::{
    Refusal,
    shared::{Phase, Shared},
};
use bytes::Bytes;
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};
use tokio::{net::TcpStream, sync::oneshot};
use tombolo_flow::FlowId;
use tombolo_packet::{Packet, build};

/// Something that an application did towards the mesh.
#[derive(Debug)]
pub enum Captured {
    /// A TCP connection to a virtual address; the application waits in connect().
    Connect(PendingFlow),
    /// A DNS query by UDP.
    Dns(DnsQuery),
    /// A DNS connection by TCP.
    DnsTcp(TcpStream),
    /// A ping to a virtual address.
    Ping(Ping),
}

/// A TCP connection whose SYN is held: the application's connect() has not returned.
///
/// Dropped, it is refused by RST. Held longer than the budget, it is refused by RST by itself, and both
/// [`Self::accept`] and [`Self::refuse`] come too late.
pub struct PendingFlow {
    shared: Arc<Shared>,
    id: FlowId,
    source: SocketAddr,
    destination: SocketAddr,
    decided: bool,
}

impl PendingFlow {
    pub(crate) fn new(shared: &Arc<Shared>, id: FlowId, source: SocketAddr, destination: SocketAddr) -> Self {
        Self {
            shared: Arc::clone(shared),
            id,
            source,
            destination,
            decided: false,
        }
    }

    /// The virtual address and port that the application connects to.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// The application's own address and port.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Delivers the latest SYN to the kernel's listener and waits until it hands over the socket: the application's
    /// connect() returns. The socket has TCP_NODELAY.
    ///
    /// If the future is dropped, the connection is made all the same, and cut by RST.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionAborted`] when the application gave up or the time for holding is over;
    /// [`io::ErrorKind::NotConnected`] when another process has taken over and decides about the connection anew.
    pub async fn accept(mut self) -> io::Result<TcpStream> {
        let gone = || {
            io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the application did not wait any longer",
            )
        };
        let (waiter, socket) = oneshot::channel();
        let frame = loop {
            if !self.shared.decided().await {
                self.decided = true;
                let text = "another process has taken over";
                return Err(io::Error::new(io::ErrorKind::NotConnected, text));
            }
            let mut state = self.shared.state();
            if !matches!(state.phase, Phase::Running | Phase::Quiet) {
                continue;
            }
            let frame = state.table.accept(self.id).ok_or_else(gone)?;
            state.waiters.insert(self.id, waiter);
            break frame;
        };
        self.decided = true;
        self.shared.write(&frame);
        TcpStream::from_std(socket.await.map_err(|_| gone())?)
    }

    /// Refuses the connection: the application's connect() fails.
    pub fn refuse(mut self, with: Refusal) {
        self.decided = true;
        self.shared.refuse(self.id, with);
    }
}

impl Drop for PendingFlow {
    fn drop(&mut self) {
        if !self.decided {
            self.shared.refuse(self.id, Refusal::Reset);
        }
    }
}

impl fmt::Debug for PendingFlow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            source, destination, ..
        } = self;
        f.debug_struct("PendingFlow")
            .field("source", source)
            .field("destination", destination)
            .finish_non_exhaustive()
    }
}

/// A DNS query by UDP to the DNS address; dropped, it is not answered.
pub struct DnsQuery {
    /// The query.
    pub bytes: Bytes,
    shared: Arc<Shared>,
    source: SocketAddr,
    destination: SocketAddr,
}

impl DnsQuery {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        bytes: &[u8],
        source: SocketAddr,
        destination: SocketAddr,
    ) -> Self {
        Self {
            bytes: Bytes::copy_from_slice(bytes),
            shared: Arc::clone(shared),
            source,
            destination,
        }
    }

    /// Who asks.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// Sends the answer; one that does not fit into a datagram (65,507 bytes) is dropped.
    pub fn reply(self, answer: &[u8]) {
        /// Headers: virtio-net, IPv6, UDP.
        const HEADERS: usize = tombolo_packet::VNET_LENGTH + 40 + 8;
        let mut frame = vec![0; HEADERS + answer.len()];
        if let Some(length) = build::datagram(&mut frame, self.destination, self.source, answer) {
            self.shared.write(frame.get(..length).unwrap_or_default());
        }
    }
}

impl fmt::Debug for DnsQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.bytes.len();
        f.debug_struct("DnsQuery")
            .field("source", &self.source)
            .field("length", &length)
            .finish_non_exhaustive()
    }
}

/// A ping to a virtual address; dropped, it is not answered.
pub struct Ping {
    shared: Arc<Shared>,
    destination: IpAddr,
    frame: Box<[u8]>,
}

impl Ping {
    pub(crate) fn new(shared: &Arc<Shared>, destination: IpAddr, frame: &[u8]) -> Self {
        Self {
            shared: Arc::clone(shared),
            destination,
            frame: frame.into(),
        }
    }

    /// The virtual address.
    pub fn destination(&self) -> IpAddr {
        self.destination
    }

    /// Answers in the name of the virtual address.
    pub fn reply(mut self) {
        let reply = Packet::parse(&self.frame).ok();
        let length = reply.and_then(|packet| build::echo_reply(&mut self.frame, &packet));
        self.shared
            .write(self.frame.get(..length.unwrap_or(0)).unwrap_or_default());
    }
}

impl fmt::Debug for Ping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ping")
            .field("destination", &self.destination)
            .finish_non_exhaustive()
    }
}
