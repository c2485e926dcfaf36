use crate::Refusal;
use bytes::Bytes;
use std::{
    io,
    net::{IpAddr, SocketAddr},
};
use tokio::net::TcpStream;

/// Something an application did towards the mesh.
#[derive(Debug)]
pub enum Captured {
    /// A TCP connection to a VIP; the application waits in connect().
    Connect(PendingFlow),
    /// A DNS query by UDP.
    Dns(DnsQuery),
    /// A DNS connection by TCP.
    DnsTcp(TcpStream),
    /// A ping to a VIP.
    Ping(Ping),
}

/// A connection whose SYN is held.
#[derive(Debug)]
pub struct PendingFlow {}

impl PendingFlow {
    /// VIP and port.
    pub fn destination(&self) -> SocketAddr {
        todo!()
    }

    /// The application's address.
    pub fn source(&self) -> SocketAddr {
        todo!()
    }

    /// Re-injects the latest SYN and waits until the kernel's listener hands over the socket.
    ///
    /// # Errors
    /// When the application gave up, or the hold ended.
    pub async fn accept(self) -> io::Result<TcpStream> {
        todo!()
    }

    /// Refuses.
    pub fn refuse(self, with: Refusal) {
        let _ = with;
        todo!()
    }
}

/// A DNS query.
#[derive(Debug)]
pub struct DnsQuery {
    /// The query.
    pub bytes: Bytes,
}

impl DnsQuery {
    /// Who asks.
    pub fn source(&self) -> SocketAddr {
        todo!()
    }

    /// Answers.
    pub fn reply(self, answer: &[u8]) {
        let _ = answer;
        todo!()
    }
}

/// A ping to a VIP; dropped = not answered.
#[derive(Debug)]
pub struct Ping {}

impl Ping {
    /// The VIP.
    pub fn destination(&self) -> IpAddr {
        todo!()
    }

    /// Answers.
    pub fn reply(self) {
        todo!()
    }
}
