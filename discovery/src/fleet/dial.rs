//! The second witness: does the HBONE port of a member accept a connection.

use super::liveness::Dialled;
use std::{io, net::SocketAddr, time::Duration};
use tokio::net::TcpStream;

/// Longest wait for an answer. Members are near (one network) or behind a gateway; a VM that is alive answers from its
/// kernel even under load.
const TIMEOUT: Duration = Duration::from_millis(500);

/// Dials once.
pub(super) async fn dial(endpoint: SocketAddr) -> Dialled {
    match tokio::time::timeout(TIMEOUT, TcpStream::connect(endpoint)).await {
        Ok(Ok(_)) => Dialled::Reached,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Dialled::Refused,
        Ok(Err(_)) | Err(_) => Dialled::Silent,
    }
}
