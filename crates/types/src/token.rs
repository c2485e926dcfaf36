use crate::{
    TokenError, TrustDomain,
    token_text::{self, Head, Reader},
};
use std::fmt;
use zeroize::Zeroizing;

/// First characters of every join token: secret scanners and typing errors are found by them.
pub const TOKEN_PREFIX: &str = "tmb1_";

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
        token_text::id_text(&self.id)
    }

    /// The text form. It is a secret.
    pub fn encode(&self) -> Zeroizing<String> {
        let texts = std::iter::once(self.trust_domain.as_str());
        token_text::write(
            TOKEN_PREFIX,
            (&self.id, &self.root_pin, &self.seed),
            texts.chain(self.endpoints.iter().map(String::as_str)),
        )
    }

    /// Reads the text form; white space around it is ignored.
    ///
    /// # Errors
    /// With what is wrong, never with a part of the token.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let body = token_text::body(text, TOKEN_PREFIX, TokenError::Prefix)?;
        let mut reader = Reader(&body);
        let Head { id, root_pin, seed } = reader.head()?;
        let trust_domain = reader.text()?.parse().map_err(|_| TokenError::Content)?;
        Ok(Self {
            id,
            root_pin,
            seed,
            trust_domain,
            endpoints: reader.endpoints()?,
        })
    }
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
