//! The TLS handshake, driven through rustls' unbuffered interface; afterwards [`Records`] take over.

use crate::{
    TlsError,
    record::{Kernel, Records},
};
use rustls::{
    ClientConfig, Error, ServerConfig,
    client::UnbufferedClientConnection,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use rustls_pki_types::{CertificateDer, ServerName};
use std::{io, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Most bytes of a handshake that may wait to be understood: a certificate message has at most 64 KiB in rustls.
const INCOMING_MAX: usize = 96 * 1024;
/// Bytes read at once.
const READ: usize = 16 * 1024;

/// Why a handshake failed.
#[derive(Debug)]
pub(crate) enum HandshakeError {
    Io(io::Error),
    Tls(TlsError),
}

impl From<io::Error> for HandshakeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for HandshakeError {
    fn from(error: Error) -> Self {
        Self::Tls(error.into())
    }
}

/// A finished handshake.
pub(crate) struct Established {
    pub(crate) records: Records,
    /// The peer's chain as verified, leaf first.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// Data that came with the last flight, decrypted.
    pub(crate) early: Vec<u8>,
    /// Bytes behind it that are not whole records yet.
    pub(crate) incoming: Vec<u8>,
}

enum Step {
    /// Call again.
    Again,
    /// Send what is in `out`.
    Send,
    /// Read more.
    Read,
    /// The peer ended the connection.
    Closed,
}

/// One step of either side's state machine.
fn step<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> (usize, Result<Step, Error>) {
    let mut discard = status.discard;
    let state = match status.state {
        Ok(state) => state,
        Err(error) => return (discard, Err(error)),
    };
    let step = match state {
        ConnectionState::EncodeTlsData(mut data) => {
            let used = out.len();
            out.resize(used + 1024, 0);
            loop {
                match data.encode(&mut out[used..]) {
                    Ok(written) => {
                        out.truncate(used + written);
                        break Ok(Step::Again);
                    }
                    Err(EncodeError::InsufficientSize(needed)) => out.resize(used + needed.required_size, 0),
                    Err(EncodeError::AlreadyEncoded) => {
                        break Err(Error::General("a handshake message was encoded twice".into()));
                    }
                }
            }
        }
        ConnectionState::TransmitTlsData(transmit) => {
            transmit.done();
            Ok(Step::Send)
        }
        ConnectionState::ReadTraffic(mut traffic) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    early.extend_from_slice(record.payload);
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(Step::Again),
            }
        },
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Ok(Step::Read),
        ConnectionState::PeerClosed | ConnectionState::Closed => Ok(Step::Closed),
        // Early data is never enabled, and a state of a later rustls is none that we could serve.
        ConnectionState::ReadEarlyData(_) | _ => {
            Err(Error::General("unexpected state of the handshake".into()))
        }
    };
    (discard, step)
}

macro_rules! drive {
    ($tcp:expr, $session:expr) => {{
        let (tcp, session) = ($tcp, &mut $session);
        let (mut incoming, mut out, mut early) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            let (discard, next) = step(session.process_tls_records(&mut incoming), &mut out, &mut early);
            incoming.drain(..discard);
            match next {
                Ok(Step::Again) => {}
                Ok(Step::Send) => {
                    tcp.write_all(&out).await?;
                    out.clear();
                }
                Ok(Step::Read) if !session.is_handshaking() => break,
                Ok(Step::Read) => {
                    if incoming.len() > INCOMING_MAX {
                        return Err(Error::PeerSentOversizedRecord.into());
                    }
                    incoming.reserve(READ);
                    if tcp.read_buf(&mut incoming).await? == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                    }
                }
                Ok(Step::Closed) => return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
                Err(error) => {
                    // Tell the peer why, if it still listens. The alert comes before anything is read again.
                    out.clear();
                    let _ = step(session.process_tls_records(&mut incoming), &mut out, &mut early);
                    let _ = tcp.try_write(&out);
                    return Err(error.into());
                }
            }
        }
        let chain = session
            .peer_certificates()
            .unwrap_or_default()
            .iter()
            .map(|c| c.clone().into_owned())
            .collect();
        (chain, early, incoming)
    }};
}

/// Connects TLS over a fresh TCP connection. Not cancel-safe: drop the socket as well.
pub(crate) async fn connect(
    tcp: &mut TcpStream,
    mut config: ClientConfig,
    name: ServerName<'static>,
) -> Result<Established, HandshakeError> {
    config.enable_secret_extraction = true; // for `Records`
    let mut session = UnbufferedClientConnection::new(Arc::new(config), name)?;
    let (chain, early, incoming) = drive!(&mut *tcp, session);
    let (secrets, kernel) = session.dangerous_into_kernel_connection()?;
    Ok(Established {
        records: Records::new(Kernel::Client(kernel), secrets)?,
        chain,
        early,
        incoming,
    })
}

/// Accepts TLS over a fresh TCP connection. `config` must allow the extraction of secrets ([`server_config`]).
pub(crate) async fn accept(
    tcp: &mut TcpStream,
    config: Arc<ServerConfig>,
) -> Result<Established, HandshakeError> {
    let mut session = UnbufferedServerConnection::new(config)?;
    let (chain, early, incoming) = drive!(&mut *tcp, session);
    let (secrets, kernel) = session.dangerous_into_kernel_connection()?;
    Ok(Established {
        records: Records::new(Kernel::Server(kernel), secrets)?,
        chain,
        early,
        incoming,
    })
}

/// Makes a server configuration fit for [`accept`].
pub(crate) fn server_config(config: &ServerConfig) -> Arc<ServerConfig> {
    let mut config = config.clone();
    config.enable_secret_extraction = true;
    config.send_tls13_tickets = 0; // sessions are never resumed
    Arc::new(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::Control,
        io::{SharedIo, TlsIo},
        support::Mesh,
    };
    use std::future::poll_fn;
    use tokio::net::TcpListener;
    use tombolo_identity::{hbone_client_config, hbone_server_config, hbone_server_name};

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    /// Writes and sends, as the driver does.
    async fn say(io: &SharedIo, bytes: &[u8]) {
        io.clone().write_all(bytes).await.unwrap();
        poll_fn(|cx| io.lock().poll_send(cx)).await.unwrap();
    }

    async fn hear(io: &SharedIo, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        io.clone().read_exact(&mut bytes).await.unwrap();
        bytes
    }

    /// Our record layer against rustls' own, with key updates from both sides.
    #[tokio::test]
    async fn our_client_and_server_speak_with_rustls() {
        let mesh = Mesh::new("mesh.example");
        let live = mesh.workload("shop", "catalog", 1);
        let expected = vec![mesh.id("shop", "catalog")];

        let (mut near, far) = pair().await;
        // It sends session tickets, as other servers do.
        let mut config = hbone_server_config(&live).unwrap();
        config.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
        config.send_tls13_tickets = 2;
        let theirs = tokio_rustls::TlsAcceptor::from(Arc::new(config)).accept(far);
        let ours = connect(
            &mut near,
            hbone_client_config(&live, expected.clone()).unwrap(),
            hbone_server_name(),
        );
        let (mut ours, theirs) = tokio::join!(ours, theirs);
        ours.as_mut().unwrap().records.limit_key_to(3);
        let ours = SharedIo::new(TlsIo::new(near, ours.unwrap(), Control::new()));
        converse(&ours, theirs.unwrap().into()).await;

        let (near, mut far) = pair().await;
        let config = Arc::new(hbone_client_config(&live, expected).unwrap());
        let connector = tokio_rustls::TlsConnector::from(config);
        let theirs = connector.connect(hbone_server_name(), near);
        let ours = accept(&mut far, server_config(&hbone_server_config(&live).unwrap()));
        let (theirs, mut ours) = tokio::join!(theirs, ours);
        assert_eq!(ours.as_ref().unwrap().chain.len(), 1);
        ours.as_mut().unwrap().records.limit_key_to(3);
        let ours = SharedIo::new(TlsIo::new(far, ours.unwrap(), Control::new()));
        converse(&ours, theirs.unwrap().into()).await;
    }

    async fn converse(ours: &SharedIo, mut theirs: tokio_rustls::TlsStream<TcpStream>) {
        let long: Vec<u8> = (0..200_000u32).map(|i| i.to_le_bytes()[1]).collect();
        for round in 0..8u8 {
            let mut read = vec![0; long.len()];
            let (_, read) = tokio::join!(say(ours, &long), async {
                theirs.read_exact(&mut read).await.unwrap();
                read
            });
            assert!(read == long, "round {round}");
            match &mut theirs {
                tokio_rustls::TlsStream::Client(stream) => stream.get_mut().1.refresh_traffic_keys().unwrap(),
                tokio_rustls::TlsStream::Server(stream) => stream.get_mut().1.refresh_traffic_keys().unwrap(),
            }
            let (_, read) = tokio::join!(
                async {
                    theirs.write_all(&[round; 40_000]).await.unwrap();
                    theirs.flush().await.unwrap();
                },
                hear(ours, 40_000)
            );
            assert_eq!(read, [round; 40_000]);
        }
        ours.clone().shutdown().await.unwrap();
        assert_eq!(
            theirs.read(&mut [0; 8]).await.unwrap(),
            0,
            "close_notify is an orderly end"
        );
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.clone().read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_changed_record_is_refused() {
        let mesh = Mesh::new("mesh.example");
        let live = mesh.workload("shop", "catalog", 1);
        let (mut near, mut far) = pair().await;
        let config = hbone_client_config(&live, vec![mesh.id("shop", "catalog")]).unwrap();
        let (ours, theirs) = tokio::join!(
            connect(&mut near, config, hbone_server_name()),
            accept(&mut far, server_config(&hbone_server_config(&live).unwrap()))
        );
        drop(theirs);
        let ours = SharedIo::new(TlsIo::new(near, ours.unwrap(), Control::new()));
        far.write_all(&[23, 3, 3, 0, 32]).await.unwrap();
        far.write_all(&[9; 32]).await.unwrap();
        let error = ours.clone().read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
