use crate::{IdentityError, pem};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ED25519, EcdsaKeyPair, Ed25519KeyPair,
        KeyPair as _, UnparsedPublicKey,
    },
};
use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use std::fmt;
use zeroize::Zeroizing;

/// SubjectPublicKeyInfo of an uncompressed P-256 point, up to the point. One form only, so that a key has one digest.
const P256_SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];

/// The key of a device (a VM): ECDSA P-256, made on it and never sent; never the key of a certificate. `Debug` shows
/// only the public half.
pub struct DeviceKey {
    pkcs8: Zeroizing<Vec<u8>>,
    pair: EcdsaKeyPair,
}

impl fmt::Debug for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceKey")
            .field("public_key", &crate::bundle::hex(&self.public_key()))
            .finish_non_exhaustive()
    }
}

impl DeviceKey {
    /// Makes a new key.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate() -> Result<Self, IdentityError> {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| IdentityError::Key("the system gives no randomness"))?;
        Self::from_pkcs8(Zeroizing::new(document.as_ref().to_vec()))
    }

    /// Reads what [`Self::to_pem`] wrote.
    ///
    /// # Errors
    /// When it is not a P-256 key in PKCS#8.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|_| IdentityError::Key("not a PEM private key (PKCS#8)"))?;
        Self::from_pkcs8(Zeroizing::new(key.secret_pkcs8_der().to_vec()))
    }

    fn from_pkcs8(pkcs8: Zeroizing<Vec<u8>>) -> Result<Self, IdentityError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &pkcs8)
            .map_err(|_| IdentityError::Key("not an ECDSA P-256 key"))?;
        Ok(Self { pkcs8, pair })
    }

    /// PKCS#8 PEM. It is a secret.
    pub fn to_pem(&self) -> Zeroizing<String> {
        pem::encode("PRIVATE KEY", &self.pkcs8)
    }

    /// The public key, SubjectPublicKeyInfo DER (91 bytes).
    pub fn public_key(&self) -> Vec<u8> {
        [&P256_SPKI_PREFIX, self.pair.public_key().as_ref()].concat()
    }

    /// Signs (ECDSA with SHA-256, ASN.1 form).
    ///
    /// # Panics
    /// When the system gives no randomness after it did at start.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let signature = self
            .pair
            .sign(&SystemRandom::new(), message)
            .expect("the system's random generator works");
        signature.as_ref().to_vec()
    }
}

/// Checks a signature of a device's key, given as [`DeviceKey::public_key`] gives it.
///
/// # Errors
/// When the key is not of that form, or the signature does not fit.
pub fn verify_device_signature(spki: &[u8], message: &[u8], signature: &[u8]) -> Result<(), IdentityError> {
    let point = spki
        .strip_prefix(&P256_SPKI_PREFIX)
        .filter(|point| point.len() == 65)
        .ok_or(IdentityError::PublicKey("not an uncompressed P-256 key"))?;
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(message, signature)
        .map_err(|_| IdentityError::Signature)
}

/// The Ed25519 key inside a join token. `Debug` shows only the public half.
pub struct JoinKey(Ed25519KeyPair);

impl fmt::Debug for JoinKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinKey")
            .field("public_key", &crate::bundle::hex(&self.public_key()))
            .finish_non_exhaustive()
    }
}

impl JoinKey {
    /// The key that belongs to a token's seed.
    ///
    /// # Panics
    /// Never: every 32-byte seed is an Ed25519 key.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(Ed25519KeyPair::from_seed_unchecked(seed).expect("every 32-byte seed is an Ed25519 key"))
    }

    /// The public key: what discovery stores.
    pub fn public_key(&self) -> [u8; 32] {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.public_key().as_ref());
        key
    }

    /// Signs; 64 bytes.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(message).as_ref().to_vec()
    }
}

/// Checks a signature of a join token's key.
///
/// # Errors
/// When the public key is not 32 bytes of a valid point, or the signature does not fit.
pub fn verify_join_signature(public: &[u8], message: &[u8], signature: &[u8]) -> Result<(), IdentityError> {
    if public.len() != 32 {
        return Err(IdentityError::PublicKey("not 32 bytes of Ed25519"));
    }
    UnparsedPublicKey::new(&ED25519, public)
        .verify(message, signature)
        .map_err(|_| IdentityError::Signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_keys() {
        let key = DeviceKey::generate().unwrap();
        let again = DeviceKey::from_pem(&key.to_pem()).unwrap();
        assert_eq!(again.public_key(), key.public_key());
        assert_eq!(key.public_key().len(), 91);
        assert!(key.to_pem().starts_with("-----BEGIN PRIVATE KEY-----\n"));
        let signature = again.sign(b"message");
        verify_device_signature(&key.public_key(), b"message", &signature).unwrap();
        assert_eq!(
            verify_device_signature(&key.public_key(), b"other", &signature),
            Err(IdentityError::Signature)
        );
        let other = DeviceKey::generate().unwrap();
        assert_eq!(
            verify_device_signature(&other.public_key(), b"message", &signature),
            Err(IdentityError::Signature)
        );
        for bad in [
            &[][..],
            &key.public_key()[..90],
            &[key.public_key(), vec![0]].concat(),
            &[0x30; 91],
        ] {
            assert!(matches!(
                verify_device_signature(bad, b"message", &signature),
                Err(IdentityError::PublicKey(_))
            ));
        }
    }

    #[test]
    fn the_public_key_is_what_other_tools_read() {
        let key = DeviceKey::generate().unwrap();
        let pair = rcgen::KeyPair::from_pem(&key.to_pem()).unwrap();
        assert_eq!(
            rcgen::PublicKeyData::subject_public_key_info(&pair),
            key.public_key()
        );
    }

    #[test]
    fn join_keys() {
        // RFC 8032 7.1, test 1.
        let seed = *b"\x9d\x61\xb1\x9d\xef\xfd\x5a\x60\xba\x84\x4a\xf4\x92\xec\x2c\xc4\x44\x49\xc5\x69\x7b\x32\x69\x19\x70\x3b\xac\x03\x1c\xae\x7f\x60";
        let key = JoinKey::from_seed(&seed);
        assert!(crate::bundle::hex(&key.public_key()).starts_with("d75a980182b10ab7d54bfed3c964073a"));
        let signature = key.sign(b"");
        assert!(crate::bundle::hex(&signature).starts_with("e5564300c360ac729086e2cc806e828a"));
        verify_join_signature(&key.public_key(), b"", &signature).unwrap();
        assert!(verify_join_signature(&key.public_key(), b"x", &signature).is_err());
        assert!(verify_join_signature(&key.public_key()[..31], b"", &signature).is_err());
    }

    #[test]
    fn debug_shows_no_secret() {
        let key = DeviceKey::generate().unwrap();
        let pem = key.to_pem();
        let body: Vec<_> = pem.lines().filter(|line| !line.starts_with('-')).collect();
        let shown = format!("{key:?} {:?}", JoinKey::from_seed(&[0x41; 32]));
        assert!(body.iter().all(|line| !shown.contains(line)), "{shown}");
        assert!(
            !shown.contains("41414141") && !shown.contains("65, 65"),
            "{shown}"
        );
        // The scalar stands 36 bytes into the PKCS#8 of a P-256 key; it must not appear as hex either.
        let scalar = crate::bundle::hex(&key.pkcs8[36..68]);
        assert!(!shown.contains(&scalar[..16]), "{shown}");
    }
}
