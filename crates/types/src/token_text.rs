//! The text of tokens and invites: prefix + base64url(body + CRC-32 of body), and what all bodies begin with.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::{Zeroize as _, Zeroizing};

/// Most endpoints in one token.
const ENDPOINTS_MAX: usize = 8;
/// Most characters of one endpoint: a DNS name and a port.
const ENDPOINT_LENGTH_MAX: usize = 253 + 6;
/// Most characters of a whole token.
const TOKEN_LENGTH_MAX: usize = 4096;
/// Of the body; another one has another meaning.
const VERSION: u8 = 1;

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

/// What every body begins with, behind its version: 16-byte id, 32-byte pin, 32-byte seed.
pub(crate) struct Head {
    /// Names the object at discovery.
    pub(crate) id: [u8; 16],
    /// SHA-256 of the root's SubjectPublicKeyInfo.
    pub(crate) root_pin: [u8; 32],
    /// Ed25519 private seed.
    pub(crate) seed: Zeroizing<[u8; 32]>,
}

/// An id as 32 hex digits: the name of its object.
pub(crate) fn id_text(id: &[u8; 16]) -> String {
    id.iter().map(|b| format!("{b:02x}")).collect()
}

/// The text of a body: its head, then length-prefixed strings.
pub(crate) fn write<'a>(
    prefix: &str,
    (id, root_pin, seed): (&[u8; 16], &[u8; 32], &[u8; 32]),
    texts: impl IntoIterator<Item = &'a str>,
) -> Zeroizing<String> {
    let mut body = Zeroizing::new(Vec::with_capacity(256));
    body.push(VERSION);
    body.extend_from_slice(id);
    body.extend_from_slice(root_pin);
    body.extend_from_slice(seed);
    for value in texts {
        body.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
        body.extend_from_slice(value.as_bytes());
    }
    let sum = crc32(&body);
    body.extend_from_slice(&sum.to_be_bytes());
    let mut encoded = URL_SAFE_NO_PAD.encode(&*body);
    let token = Zeroizing::new(format!("{prefix}{encoded}"));
    encoded.zeroize();
    token
}

/// The body behind a prefix, its checksum checked; white space around the text is ignored.
pub(crate) fn body(text: &str, prefix: &str, other: TokenError) -> Result<Zeroizing<Vec<u8>>, TokenError> {
    let encoded = text.trim().strip_prefix(prefix).ok_or(other)?;
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
    pub(crate) fn head(&mut self) -> Result<Head, TokenError> {
        if self.array::<1>()? != [VERSION] {
            return Err(TokenError::Content);
        }
        Ok(Head {
            id: self.array()?,
            root_pin: self.array()?,
            seed: Zeroizing::new(self.array()?),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TokenError> {
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

    #[test]
    fn crc_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926); // the check value of CRC-32/ISO-HDLC
    }
}
