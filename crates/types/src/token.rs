use crate::TrustDomain;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use std::fmt;
use zeroize::{Zeroize as _, Zeroizing};

/// First characters of every join token: secret scanners and typing errors are found by them.
pub const TOKEN_PREFIX: &str = "tmb1_";

/// Most endpoints in one token.
const ENDPOINTS_MAX: usize = 8;
/// Most characters of one endpoint: a DNS name and a port.
const ENDPOINT_LENGTH_MAX: usize = 253 + 6;
/// Most characters of a whole token.
const TOKEN_LENGTH_MAX: usize = 4096;

/// Why a text is not a join token. No variant repeats any part of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// Another text.
    #[error("it does not start with tmb1_")]
    Prefix,
    /// Another text, where an invite was wanted.
    #[error("it does not start with tmi1_")]
    InvitePrefix,
    /// Not base64url.
    #[error("it has a character that no token has (copied with a line break?)")]
    Alphabet,
    /// Cut off, or a typing error.
    #[error("its checksum does not fit: it is cut off or has a typing error")]
    Checksum,
    /// Right checksum, wrong content: made by another version.
    #[error("its content is not of this version")]
    Content,
}

/// A join token: where discovery is, how to know it, and a key that may be used a counted number of times.
///
/// Text form: `tmb1_` + base64url(body + CRC-32 of body). Body: version 1; 16-byte token id; 32-byte SHA-256 of the
/// root's SubjectPublicKeyInfo; 32-byte Ed25519 seed; trust domain and endpoints as length-prefixed strings.
/// `Debug` shows no secret, and the seed is wiped when the value is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Names the JoinToken object at discovery.
    pub id: [u8; 16],
    /// SHA-256 of the root's SubjectPublicKeyInfo.
    pub root_pin: [u8; 32],
    /// Ed25519 private seed. Discovery stores only the public key.
    pub seed: Zeroizing<[u8; 32]>,
    /// Trust domain: the exact identity of discovery follows from it.
    pub trust_domain: TrustDomain,
    /// `host:port` of discovery, in order of preference; one to eight.
    pub endpoints: Vec<String>,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &self.id_text())
            .field("trust_domain", &self.trust_domain)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

impl JoinToken {
    /// The id as 32 hex digits: the name of the JoinToken object.
    pub fn id_text(&self) -> String {
        self.id.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The text form. It is a secret.
    pub fn encode(&self) -> Zeroizing<String> {
        let mut body = Zeroizing::new(Vec::with_capacity(256));
        body.push(1);
        body.extend_from_slice(&self.id);
        body.extend_from_slice(&self.root_pin);
        body.extend_from_slice(&*self.seed);
        let mut text = |value: &str| {
            body.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
            body.extend_from_slice(value.as_bytes());
        };
        text(self.trust_domain.as_str());
        self.endpoints.iter().for_each(|endpoint| text(endpoint));
        frame(TOKEN_PREFIX, body)
    }

    /// Reads the text form; white space around it is ignored.
    ///
    /// # Errors
    /// With what is wrong, never with a part of the token.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let encoded = text.trim().strip_prefix(TOKEN_PREFIX).ok_or(TokenError::Prefix)?;
        let body = unframe(encoded)?;
        let mut reader = Reader(&body);
        if reader.array::<1>()? != [1] {
            return Err(TokenError::Content);
        }
        let (id, root_pin, seed) = (reader.array()?, reader.array()?, Zeroizing::new(reader.array()?));
        let trust_domain = reader.text()?.parse().map_err(|_| TokenError::Content)?;
        let endpoints = reader.endpoints()?;
        Ok(Self {
            id,
            root_pin,
            seed,
            trust_domain,
            endpoints,
        })
    }
}

/// The text of a body: prefix, base64url of the body and its checksum.
pub(crate) fn frame(prefix: &str, mut body: Zeroizing<Vec<u8>>) -> Zeroizing<String> {
    let sum = crc32(&body);
    body.extend_from_slice(&sum.to_be_bytes());
    let mut encoded = URL_SAFE_NO_PAD.encode(&*body);
    let token = Zeroizing::new(format!("{prefix}{encoded}"));
    encoded.zeroize();
    token
}

/// The body of a text whose prefix is taken off, its checksum checked.
pub(crate) fn unframe(encoded: &str) -> Result<Zeroizing<Vec<u8>>, TokenError> {
    if encoded.len() > TOKEN_LENGTH_MAX {
        return Err(TokenError::Content);
    }
    let mut body = Zeroizing::new(URL_SAFE_NO_PAD.decode(encoded).map_err(|error| match error {
        base64::DecodeError::InvalidByte(..) => TokenError::Alphabet,
        base64::DecodeError::InvalidLength(_)
        | base64::DecodeError::InvalidLastSymbol(..)
        | base64::DecodeError::InvalidPadding => TokenError::Checksum,
    })?);
    let split = body.len().checked_sub(4).ok_or(TokenError::Checksum)?;
    if crc32(&body[..split]).to_be_bytes() != body[split..] {
        return Err(TokenError::Checksum);
    }
    body.truncate(split);
    Ok(body)
}

/// Takes fields from the front of a token's body.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(TokenError::Content)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, TokenError> {
        let length = usize::from(u16::from_be_bytes(self.array()?));
        let (head, rest) = self.0.split_at_checked(length).ok_or(TokenError::Content)?;
        self.0 = rest;
        std::str::from_utf8(head).map_err(|_| TokenError::Content)
    }

    /// The rest of the body: one to eight `host:port`.
    pub(crate) fn endpoints(&mut self) -> Result<Vec<String>, TokenError> {
        let mut endpoints = Vec::new();
        while !self.0.is_empty() {
            let endpoint = self.text()?;
            let port = endpoint
                .rsplit_once(':')
                .and_then(|(host, port)| (!host.is_empty()).then_some(port));
            if endpoint.len() > ENDPOINT_LENGTH_MAX || port.is_none_or(|port| port.parse::<u16>().is_err()) {
                return Err(TokenError::Content);
            }
            endpoints.push(endpoint.to_owned());
        }
        if endpoints.is_empty() || endpoints.len() > ENDPOINTS_MAX {
            return Err(TokenError::Content);
        }
        Ok(endpoints)
    }
}

/// CRC-32 (IEEE 802.3), bitwise: tokens are short and a table would be longer than the loop.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            id: [7; 16],
            root_pin: [8; 32],
            seed: Zeroizing::new([9; 32]),
            trust_domain: "mesh.example".parse().unwrap(),
            endpoints: vec!["discovery.example:15012".into(), "[2001:db8::1]:15012".into()],
        }
    }

    #[test]
    fn crc_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926); // the check value of CRC-32/ISO-HDLC
    }

    #[test]
    fn round_trip() {
        let text = token().encode();
        assert!(text.starts_with(TOKEN_PREFIX));
        assert_eq!(JoinToken::decode(&format!("  {}\n", *text)), Ok(token()));
    }

    #[test]
    fn every_typing_error_is_found() {
        let text = token().encode();
        for i in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert_ne!(JoinToken::decode(&changed), Ok(token()), "{i}");
            assert!(JoinToken::decode(&text[..i]).is_err(), "{i}");
        }
        assert_eq!(JoinToken::decode("hello"), Err(TokenError::Prefix));
        assert_eq!(JoinToken::decode("tmb1_ab\nc"), Err(TokenError::Alphabet));
    }

    #[test]
    fn debug_shows_no_seed() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains("9, 9") && !shown.contains("seed"), "{shown}");
    }
}
