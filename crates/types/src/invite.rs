use crate::{
    TokenError, TrustDomain, check_label,
    token_text::{self, Head, Reader},
};
use std::fmt;
use zeroize::Zeroizing;

/// First characters of every cluster invite.
pub const INVITE_PREFIX: &str = "tmi1_";

/// An invite: where the inviting discovery is, how to know it, and a key that admits one named cluster once.
///
/// Text form: `tmi1_` + base64url(body + CRC-32 of body). Body: version 1; 16-byte invite id; 32-byte SHA-256 of the
/// inviter's root's SubjectPublicKeyInfo; 32-byte Ed25519 seed; the inviter's trust domain, the invited cluster's name
/// and endpoints as length-prefixed strings. `Debug` shows no secret, and the seed is wiped when the value is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct InviteToken {
    /// Names the ClusterInvite object at the inviting discovery.
    pub id: [u8; 16],
    /// SHA-256 of the SubjectPublicKeyInfo of the inviter's root.
    pub root_pin: [u8; 32],
    /// Ed25519 private seed. The inviter stores only the public key.
    pub seed: Zeroizing<[u8; 32]>,
    /// Trust domain of the inviter: the exact identity of its discovery follows from it.
    pub trust_domain: TrustDomain,
    /// Name of the cluster that is invited.
    pub cluster: String,
    /// `host:port` of the inviting discovery, in order of preference; one to eight.
    pub endpoints: Vec<String>,
}

impl fmt::Debug for InviteToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InviteToken")
            .field("id", &self.id_text())
            .field("trust_domain", &self.trust_domain)
            .field("cluster", &self.cluster)
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

impl InviteToken {
    /// The id as 32 hex digits: the name of the ClusterInvite object.
    pub fn id_text(&self) -> String {
        token_text::id_text(&self.id)
    }

    /// The text form. It is a secret.
    pub fn encode(&self) -> Zeroizing<String> {
        let texts = [self.trust_domain.as_str(), &self.cluster];
        token_text::write(
            INVITE_PREFIX,
            (&self.id, &self.root_pin, &self.seed),
            texts.into_iter().chain(self.endpoints.iter().map(String::as_str)),
        )
    }

    /// Reads the text form; white space around it is ignored.
    ///
    /// # Errors
    /// With what is wrong, never with a part of the invite.
    pub fn decode(text: &str) -> Result<Self, TokenError> {
        let body = token_text::body(text, INVITE_PREFIX, TokenError::InvitePrefix)?;
        let mut reader = Reader(&body);
        let Head { id, root_pin, seed } = reader.head()?;
        let trust_domain = reader.text()?.parse().map_err(|_| TokenError::Content)?;
        let cluster = reader.text()?;
        check_label("cluster", cluster).map_err(|_| TokenError::Content)?;
        Ok(Self {
            id,
            root_pin,
            seed,
            trust_domain,
            cluster: cluster.to_owned(),
            endpoints: reader.endpoints()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JoinToken;

    fn token() -> InviteToken {
        InviteToken {
            id: [7; 16],
            root_pin: [8; 32],
            seed: Zeroizing::new([9; 32]),
            trust_domain: "mesh.example".parse().unwrap(),
            cluster: "east".into(),
            endpoints: vec!["gateway.example:443".into(), "[2001:db8::1]:15012".into()],
        }
    }

    #[test]
    fn round_trip() {
        let text = token().encode();
        assert_eq!(InviteToken::decode(&format!("  {}\n", *text)), Ok(token()));
    }

    #[test]
    fn every_typing_error_is_found() {
        let text = token().encode();
        for i in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert_ne!(InviteToken::decode(&changed), Ok(token()), "{i}");
            assert!(InviteToken::decode(&text[..i]).is_err(), "{i}");
        }
    }

    #[test]
    fn neither_token_passes_for_the_other() {
        let invite = token().encode();
        assert_eq!(JoinToken::decode(&invite), Err(TokenError::Prefix));
        assert_eq!(InviteToken::decode("tmb1_AAAA"), Err(TokenError::InvitePrefix));
    }

    #[test]
    fn debug_shows_no_seed() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains("9, 9") && !shown.contains("seed"), "{shown}");
    }
}
