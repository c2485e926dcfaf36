use tombolo_types::SpiffeId;

/// Why a certificate, key or proof is not usable. No variant holds key material.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The text holds no PEM block of the wanted kind, or a damaged one.
    #[error("no usable PEM block of {what}: {cause}")]
    Pem {
        /// What was looked for.
        what: &'static str,
        /// What the reader met.
        cause: String,
    },
    /// Not an X.509 certificate that can be used.
    #[error("certificate: {0}")]
    Certificate(String),
    /// The certificate carries no `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("the certificate carries no workload identity (a spiffe:// URI)")]
    NoIdentity,
    /// A CA's answer needs the certificate, then intermediates, then the roots as its last element.
    #[error("the certificate chain of the CA has {0} elements, at least 2 are needed (certificate, roots)")]
    ShortChain(usize),
    /// The issued certificate does not lead to the roots that came with it.
    #[error("the certificate of {id} does not verify against the roots it came with: {cause}")]
    NotVerified {
        /// Whose certificate.
        id: SpiffeId,
        /// The verifier's words.
        cause: String,
    },
    /// The private key is unreadable or of another kind.
    #[error("private key: {0}")]
    Key(&'static str),
    /// The private key belongs to another certificate.
    #[error("the private key does not belong to the certificate")]
    KeyMismatch,
    /// A public key is not of the one accepted form.
    #[error("public key: {0}")]
    PublicKey(&'static str),
    /// A signature does not fit key and message.
    #[error("the signature does not fit")]
    Signature,
    /// The TLS library refuses a setting or is not far enough in its handshake.
    #[error("TLS: {0}")]
    Tls(String),
}
