//! A client and a server in memory.

use rustls::{ClientConfig, ClientConnection, Error, ServerConfig, ServerConnection};
use rustls_pki_types::ServerName;
use std::sync::Arc;

pub(crate) struct Pair {
    pub(crate) client: ClientConnection,
    pub(crate) server: ServerConnection,
    /// The first error of each side.
    pub(crate) client_error: Option<Error>,
    pub(crate) server_error: Option<Error>,
}

impl Pair {
    pub(crate) fn is_up(&self) -> bool {
        self.client_error.is_none()
            && self.server_error.is_none()
            && !self.client.is_handshaking()
            && !self.server.is_handshaking()
    }
}

/// Carries bytes both ways until neither side has more to say. In TLS 1.3 a client is done before the server has
/// judged its certificate: look at both sides.
pub(crate) fn handshake(client: ClientConfig, server: ServerConfig, name: ServerName<'static>) -> Pair {
    let mut pair = Pair {
        client: ClientConnection::new(Arc::new(client), name).unwrap(),
        server: ServerConnection::new(Arc::new(server)).unwrap(),
        client_error: None,
        server_error: None,
    };
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while pair.client.wants_write() {
            pair.client.write_tls(&mut bytes).unwrap();
        }
        let sent = bytes.len();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && pair.server_error.is_none() {
            pair.server.read_tls(&mut rest).unwrap();
            pair.server_error = pair.server.process_new_packets().err();
        }
        let mut bytes = Vec::new();
        while pair.server.wants_write() {
            pair.server.write_tls(&mut bytes).unwrap();
        }
        if sent + bytes.len() == 0 {
            break;
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() && pair.client_error.is_none() {
            pair.client.read_tls(&mut rest).unwrap();
            pair.client_error = pair.client.process_new_packets().err();
        }
    }
    pair
}
