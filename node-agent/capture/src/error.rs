use std::io;

/// Why capture could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaptureError {
    /// The TUN descriptor cannot be used.
    #[error("the TUN device cannot be used: {0}")]
    Device(#[source] io::Error),
    /// The table of another process cannot be used.
    #[error("the connections of the running agent cannot be taken over: {0}")]
    Table(#[from] tombolo_flow::ImportError),
    /// A listener on mesh0's own address could not be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
