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
        })
    }

    /// Seals the parts, at most [`FRAGMENT_MAX`] bytes together, into one record.
    pub(crate) fn seal(&mut self, plain: &[&[u8]], out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        if self.update_requested || self.sealed >= self.seal_limit {
            self.update_keys(out)?;
        }
        self.seal_as(ContentType::ApplicationData, plain, out)
    }

    /// Seals the alert that ends our direction.
    pub(crate) fn seal_close(&mut self, out: &mut VecDeque<Vec<u8>>) -> Result<(), Error> {
        // Level warning, close_notify.
        self.seal_as(ContentType::Alert, &[&[1, 0]], out)
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

    /// Opens a record's body in place.
    pub(crate) fn open(&mut self, body: &mut [u8]) -> Result<Opened, Error> {
        let message = InboundOpaqueMessage::new(ContentType::ApplicationData, ProtocolVersion::TLSv1_2, body);
        let plain = self.opener.decrypt(message, self.opened)?;
        self.opened += 1;
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
