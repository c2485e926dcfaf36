use crate::{control::Lease, headers::Baggage};
use bytes::Bytes;
use h2::{RecvStream, SendStream};
use std::sync::Arc;
use tombolo_identity::Peer;

/// An accepted CONNECT: bytes both ways. Copied with [`crate::bidirectional`]; dropped, it is reset.
#[derive(Debug)]
pub struct TunnelStream {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) recv: RecvStream,
    pub(crate) lease: Lease,
    pub(crate) peer: Arc<Peer>,
    pub(crate) baggage: Option<Box<Baggage>>,
}

impl TunnelStream {
    /// Who is at the other end of the connection, as its certificate proves.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// What the peer said of its workload when it accepted.
    pub fn baggage(&self) -> Option<&Baggage> {
        self.baggage.as_deref()
    }
}
