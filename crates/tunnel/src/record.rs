//! The TLS 1.3 record layer after the handshake. Keys, nonces and the AEAD are rustls'; here are only the frames.

use rustls::{
    ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, PeerMisbehaved, ProtocolVersion,
    SupportedCipherSuite, Tls13CipherSuite,
    client::ClientConnectionData,
    crypto::cipher::{
        InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    },
    kernel::KernelConnection,
    server::ServerConnectionData,
};
use std::collections::VecDeque;

/// Header of a record: type, version, length.
pub(crate) const HEADER: usize = 5;
/// Most plaintext in a record (RFC 8446, 5.1).
pub(crate) const FRAGMENT_MAX: usize = 16 * 1024;
/// Most ciphertext in a record (RFC 8446, 5.2).
const CIPHERTEXT_MAX: usize = FRAGMENT_MAX + 256;
/// Records under one key, of 2^24.5 that AES-GCM bears (RFC 8446, 5.5): 128 GiB.
const RECORDS_PER_KEY: u64 = 1 << 23;
/// Records in a row that carry nothing, beyond which a peer only wastes our time.
const EMPTY_MAX: u32 = 32;
/// Longest handshake message after the handshake: a session ticket that holds a certificate chain.
const HANDSHAKE_MAX: usize = 64 * 1024;

const KEY_UPDATE: u8 = 24;
const NEW_SESSION_TICKET: u8 = 4;

/// rustls' part: derives the next keys.
pub(crate) enum Kernel {
    Client(KernelConnection<ClientConnectionData>),
    Server(KernelConnection<ServerConnectionData>),
}

impl Kernel {
    fn suite(&self) -> SupportedCipherSuite {
        match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        }
    }

    fn update(&mut self, sending: bool) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match (self, sending) {
            (Self::Client(kernel), true) => kernel.update_tx_secret(),
            (Self::Client(kernel), false) => kernel.update_rx_secret(),
            (Self::Server(kernel), true) => kernel.update_tx_secret(),
            (Self::Server(kernel), false) => kernel.update_rx_secret(),
        }
    }
}

/// Seals and opens the records of one connection.
pub(crate) struct Records {
    kernel: Kernel,
    suite: &'static Tls13CipherSuite,
    sealer: Box<dyn MessageEncrypter>,
    sealed: u64,
    seal_limit: u64,
    opener: Box<dyn MessageDecrypter>,
    opened: u64,
    empty: u32,
    handshake: Vec<u8>,
    update_requested: bool,
    /// The first error of either direction: a connection does not outlive it.
    broken: Option<Error>,
}

/// What a record was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opened {
    /// So many bytes of data, at the start of the record's body.
    Data(usize),
    /// Nothing for the application.
    Nothing,
    /// The peer will send no more.
    Closed,
}

/// A record at the start of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framed {
    /// Length of its body.
    Whole(usize),
    /// More bytes are needed.
    Partial,
}

/// Finds the record at the start of `bytes`.
pub(crate) fn framed(bytes: &[u8]) -> Result<Framed, Error> {
    let Some(&[typ, major, _, high, low]) = bytes.first_chunk::<HEADER>() else {
        return Ok(Framed::Partial);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if typ != u8::from(ContentType::ApplicationData) || major != 3 {
        return Err(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec.into());
    }
    if length > CIPHERTEXT_MAX {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok(if bytes.len() < HEADER + length {
        Framed::Partial
    } else {
        Framed::Whole(length)
    })
}

fn tls13(suite: SupportedCipherSuite) -> Result<&'static Tls13CipherSuite, Error> {
    suite
        .tls13()
        .ok_or_else(|| Error::General("TLS 1.3 is needed".into()))
}

fn parts(
    secrets: ConnectionTrafficSecrets,
) -> Result<(rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv), Error> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("a cipher suite of unknown shape".into())),
    }
}

impl Records {
    pub(crate) fn new(kernel: Kernel, secrets: ExtractedSecrets) -> Result<Self, Error> {
        let suite = tls13(kernel.suite())?;
        let (sealed, tx) = secrets.tx;
        let (opened, rx) = secrets.rx;
        let (key, iv) = parts(tx)?;
        let sealer = suite.aead_alg.encrypter(key, iv);
        let (key, iv) = parts(rx)?;
        let opener = suite.aead_alg.decrypter(key, iv);
        let seal_limit = RECORDS_PER_KEY;
        let handshake = Vec::new();
        Ok(Self {
            kernel,
            suite,
            sealer,
            sealed,
            seal_limit,
            opener,
            opened,
            empty: 0,
            handshake,
            update_requested: false,
            broken: None,
        })
    }

    /// Seals the parts, at most [`FRAGMENT_MAX`] bytes together, into one record.
    pub(crate) fn seal(&mut self, plain: &[&[u8]], out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        self.usable()?;
        let sealed = self.seal_data(plain, out);
        self.note(sealed)
    }

    fn seal_data(&mut self, plain: &[&[u8]], out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        if self.update_requested || self.sealed >= self.seal_limit {
            self.update_keys(out)?;
        }
        self.seal_as(ContentType::ApplicationData, plain, out)
    }

    fn usable(&self) -> Result<(), Error> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// Keeps the first error: a nonce is not used again, and nothing is opened behind a record that was not whole.
    fn note<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        result.inspect_err(|error| {
            self.broken.get_or_insert_with(|| error.clone());
        })
    }

    /// Seals the alert that ends our direction.
    pub(crate) fn seal_close(&mut self, out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        self.usable()?;
        // Level warning, close_notify.
        let sealed = self.seal_as(ContentType::Alert, &[&[1, 0]], out);
        self.note(sealed)
    }

    fn update_keys(&mut self, out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        self.update_requested = false;
        // update_not_requested: the peer keeps its own count.
        self.seal_as(ContentType::Handshake, &[&[KEY_UPDATE, 0, 0, 1, 0]], out)?;
        let (sequence, secrets) = self.kernel.update(true)?;
        let (key, iv) = parts(secrets)?;
        self.sealer = self.suite.aead_alg.encrypter(key, iv);
        self.sealed = sequence;
        Ok(())
    }

    fn seal_as(
        &mut self,
        typ: ContentType,
        plain: &[&[u8]],
        out: &mut VecDeque<Vec<u8>>,
    ) -> Result<(), Error> {
        let payload = OutboundChunks::new(plain);
        let message = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_3,
            payload,
        };
        let record = self.sealer.encrypt(message, self.sealed)?;
        self.sealed += 1;
        out.push_back(record.encode());
        Ok(())
    }

    /// Opens a record's body in place. After an error it opens nothing any more.
    pub(crate) fn open(&mut self, body: &mut [u8]) -> Result<Opened, Error> {
        self.usable()?;
        let opened = self.open_next(body);
        self.note(opened)
    }

    fn open_next(&mut self, body: &mut [u8]) -> Result<Opened, Error> {
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
        let plain = self.opener.decrypt(message, self.opened)?;
        self.opened += 1;
        if !self.handshake.is_empty() && plain.typ != ContentType::Handshake {
            return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
        }
        match plain.typ {
            ContentType::ApplicationData if !plain.payload.is_empty() => {
                self.empty = 0;
                Ok(Opened::Data(plain.payload.len()))
            }
            ContentType::ApplicationData => self.wasted(),
            ContentType::Alert => match *plain.payload {
                // close_notify and user_canceled, of which the first is always to follow.
                [_, 0] => Ok(Opened::Closed),
                [_, 90] => self.wasted(),
                [_, description] => Err(Error::AlertReceived(description.into())),
                _ => Err(Error::InvalidMessage(rustls::InvalidMessage::InvalidEmptyPayload)),
            },
            ContentType::Handshake => {
                let payload = plain.payload;
                if self.handshake.len() + payload.len() > HANDSHAKE_MAX {
                    return Err(Error::InvalidMessage(
                        rustls::InvalidMessage::HandshakePayloadTooLarge,
                    ));
                }
                self.handshake.extend_from_slice(payload);
                self.handshakes()?;
                self.wasted()
            }
            typ @ (ContentType::ChangeCipherSpec | ContentType::Heartbeat | ContentType::Unknown(_) | _) => {
                Err(Error::InappropriateMessage {
                    expect_types: vec![
                        ContentType::ApplicationData,
                        ContentType::Alert,
                        ContentType::Handshake,
                    ],
                    got_type: typ,
                })
            }
        }
    }

    fn wasted(&mut self) -> Result<Opened, Error> {
        self.empty += 1;
        if self.empty > EMPTY_MAX {
            return Err(PeerMisbehaved::TooManyEmptyFragments.into());
        }
        Ok(Opened::Nothing)
    }

    /// Takes the whole handshake messages that have come.
    fn handshakes(&mut self) -> Result<(), Error> {
        while let Some(&[typ, a, b, c]) = self.handshake.first_chunk::<4>() {
            let end = 4 + usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
            if end > HANDSHAKE_MAX {
                return Err(Error::InvalidMessage(
                    rustls::InvalidMessage::HandshakePayloadTooLarge,
                ));
            }
            let Some(body) = self.handshake.get(4..end) else {
                return Ok(());
            };
            match (typ, body, &self.kernel) {
                (KEY_UPDATE, &[request @ (0 | 1)], _) => {
                    if self.handshake.len() != end {
                        // What follows would be under the new key already (RFC 8446, 5.1).
                        return Err(PeerMisbehaved::KeyEpochWithPendingFragment.into());
                    }
                    self.update_requested |= request == 1;
                    let (sequence, secrets) = self.kernel.update(false)?;
                    let (key, iv) = parts(secrets)?;
                    self.opener = self.suite.aead_alg.decrypter(key, iv);
                    self.opened = sequence;
                }
                // Sessions are never resumed: each handshake proves both identities anew.
                (NEW_SESSION_TICKET, _, Kernel::Client(_)) => {}
                _ => return Err(Error::InvalidMessage(rustls::InvalidMessage::InvalidKeyUpdate)),
            }
            self.handshake.drain(..end);
        }
        Ok(())
    }

    /// Makes the next record start a new key: what happens after 128 GiB otherwise.
    #[cfg(test)]
    pub(crate) fn limit_key_to(&mut self, records: u64) {
        self.seal_limit = records;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{support::Mesh, tls};
    use tokio::net::{TcpListener, TcpStream};
    use tombolo_identity::{hbone_client_config, hbone_server_config, hbone_server_name};

    /// Both ends of a fresh connection.
    async fn pair() -> (Records, Records) {
        let mesh = Mesh::new("mesh.example");
        let live = mesh.workload("shop", "catalog", 1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut far = listener.accept().await.unwrap().0;
        let config = hbone_client_config(&live, vec![mesh.id("shop", "catalog")]).unwrap();
        let server = tls::server_config(&hbone_server_config(&live).unwrap());
        let (near, far) = tokio::join!(
            tls::connect(&mut near, config, hbone_server_name()),
            tls::accept(&mut far, server)
        );
        (near.unwrap().records, far.unwrap().records)
    }

    fn seal(records: &mut Records, typ: ContentType, plain: &[u8]) -> Vec<u8> {
        let mut out = VecDeque::new();
        records.seal_as(typ, &[plain], &mut out).unwrap();
        out.pop_front().unwrap().split_off(HEADER)
    }

    #[tokio::test]
    async fn after_a_forged_record_nothing_is_opened() {
        let (mut near, mut far) = pair().await;
        let mut first = seal(&mut near, ContentType::ApplicationData, b"one");
        let mut second = seal(&mut near, ContentType::ApplicationData, b"two");
        assert_eq!(far.open(&mut first.clone()), Ok(Opened::Data(3)));
        assert_eq!(far.open(&mut first), Err(Error::DecryptError), "replayed");
        assert_eq!(
            far.open(&mut second),
            Err(Error::DecryptError),
            "the connection is over"
        );
    }

    #[tokio::test]
    async fn records_are_opened_in_order_only() {
        let (mut near, mut far) = pair().await;
        let _lost = seal(&mut near, ContentType::ApplicationData, b"one");
        let mut second = seal(&mut near, ContentType::ApplicationData, b"two");
        assert_eq!(far.open(&mut second), Err(Error::DecryptError));
        let mut own = seal(&mut far, ContentType::ApplicationData, b"mine");
        let (mut near, mut far) = pair().await;
        assert!(near.open(&mut own.clone()).is_err(), "of another connection");
        assert!(far.open(&mut own).is_err(), "its own");
    }

    #[tokio::test]
    async fn what_may_not_come_after_the_handshake() {
        let refused = async |records: &[(ContentType, &[u8])]| {
            let (mut near, mut far) = pair().await;
            let (last, before) = records.split_last().unwrap();
            for (typ, plain) in before {
                far.open(&mut seal(&mut near, *typ, plain)).unwrap();
            }
            far.open(&mut seal(&mut near, last.0, last.1)).unwrap_err()
        };
        let data = ContentType::ApplicationData;
        let handshake = ContentType::Handshake;
        // A handshake message in two parts with something between them (RFC 8446, 5.1).
        assert_eq!(
            refused(&[(handshake, &[KEY_UPDATE, 0]), (data, b"x")]).await,
            Error::PeerMisbehaved(PeerMisbehaved::MessageInterleavedWithHandshakeMessage)
        );
        assert_eq!(
            refused(&[(handshake, &[KEY_UPDATE, 0]), (ContentType::Alert, &[1, 0])]).await,
            Error::PeerMisbehaved(PeerMisbehaved::MessageInterleavedWithHandshakeMessage)
        );
        // Something behind a key update in the same record would be under a key that is gone.
        assert_eq!(
            refused(&[(handshake, &[KEY_UPDATE, 0, 0, 1, 0, KEY_UPDATE])]).await,
            Error::PeerMisbehaved(PeerMisbehaved::KeyEpochWithPendingFragment)
        );
        for message in [
            &[KEY_UPDATE, 0, 0, 1, 2][..],
            &[KEY_UPDATE, 0, 0, 0],
            &[NEW_SESSION_TICKET, 0, 0, 0],
            &[1, 0, 0, 0],
            &[13, 0, 0, 0],
            &[11, 1, 0, 0],
        ] {
            refused(&[(handshake, message)]).await;
        }
        refused(&[(ContentType::ChangeCipherSpec, &[1])]).await;
        refused(&[(ContentType::Alert, &[2])]).await;
        refused(&[(ContentType::Alert, &[2, 20])]).await;
        let empty: Vec<(ContentType, &[u8])> = vec![(data, b""); 1 + EMPTY_MAX as usize];
        assert_eq!(
            refused(&empty).await,
            Error::PeerMisbehaved(PeerMisbehaved::TooManyEmptyFragments)
        );
    }

    #[tokio::test]
    async fn a_key_update_changes_the_key_once_and_is_answered_once() {
        let (mut near, mut far) = pair().await;
        let ask = [KEY_UPDATE, 0, 0, 1, 1];
        let mut out = VecDeque::new();
        for _ in 0..3 {
            assert_eq!(
                far.open(&mut seal(&mut near, ContentType::Handshake, &ask)),
                Ok(Opened::Nothing)
            );
            let (sequence, secrets) = near.kernel.update(true).unwrap();
            let (key, iv) = parts(secrets).unwrap();
            (near.sealer, near.sealed) = (near.suite.aead_alg.encrypter(key, iv), sequence);
        }
        let mut under_the_new_key = seal(&mut near, ContentType::ApplicationData, b"new");
        assert_eq!(far.open(&mut under_the_new_key), Ok(Opened::Data(3)));
        far.seal(&[b"answer"], &mut out).unwrap();
        assert_eq!(out.len(), 2, "one update for three requests, then the data");
        let opened: Vec<_> = out
            .into_iter()
            .map(|record| near.open(&mut record[HEADER..].to_vec()))
            .collect();
        assert_eq!(opened, [Ok(Opened::Nothing), Ok(Opened::Data(6))]);
    }

    #[test]
    fn frames() {
        assert_eq!(framed(&[]), Ok(Framed::Partial));
        assert_eq!(framed(&[23, 3, 3, 0]), Ok(Framed::Partial));
        assert_eq!(framed(&[23, 3, 3, 0, 2, 9]), Ok(Framed::Partial));
        assert_eq!(framed(&[23, 3, 3, 0, 2, 9, 9, 9]), Ok(Framed::Whole(2)));
        assert_eq!(
            framed(&[23, 3, 3, 0x41, 0x01]),
            Err(Error::PeerSentOversizedRecord)
        );
        assert!(framed(b"GET / HTTP/1.1").is_err());
    }
}
