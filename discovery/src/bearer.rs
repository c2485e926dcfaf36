//! Bearer tokens for clients that come without a certificate, such as ztunnel: ES256, with a key of discovery's own.

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use std::{fmt, path::Path, time::Duration};
use tombolo_identity::DeviceKey;
use tombolo_types::{SpiffeId, TrustDomain};

/// The audience that Istio's clients and servers agree on.
const AUDIENCE: &str = "istio-ca";
/// Longest life of a token.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// Life when none is asked for.
pub const TTL_DEFAULT: Duration = Duration::from_secs(3600);
/// Clocks of discovery before and after a restore may differ by so many seconds.
const LEEWAY_SECONDS: u64 = 10;

/// Why a bearer token was refused or could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BearerError {
    /// The key file is unreadable.
    #[error("the key of bearer tokens, {path}: {cause}")]
    Key {
        /// Which file.
        path: String,
        /// Why.
        cause: String,
    },
    /// Signature, audience, issuer or time does not fit.
    #[error("the bearer token is not valid: {0}")]
    Token(#[from] jsonwebtoken::errors::Error),
    /// A valid signature over a subject that is no service account of ours.
    #[error("the bearer token's subject {0:?} is not system:serviceaccount:NAMESPACE:NAME")]
    Subject(String),
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    sub: String,
    aud: Vec<String>,
    iat: u64,
    exp: u64,
    /// See [`Asked::all_roots`].
    #[serde(
        rename = "tombolo.io/all-roots",
        default,
        skip_serializing_if = "std::ops::Not::not"
    )]
    all_roots: bool,
}

/// What a token is made for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Of the service account.
    pub namespace: &'a str,
    /// Whose identity its bearer has.
    pub service_account: &'a str,
    /// Its certificates come with the roots of every member cluster: for clients that cannot tell roots apart by
    /// trust domain and are to call other ones all the same.
    pub all_roots: bool,
}

/// Makes and checks tokens.
pub struct Bearer {
    signing: EncodingKey,
    verifying: DecodingKey,
    trust_domain: TrustDomain,
    issuer: String,
    /// Its own first, then those of other names of the trust domain.
    issuers: Vec<String>,
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bearer")
            .field("issuer", &self.issuer)
            .finish_non_exhaustive()
    }
}

impl Bearer {
    /// Opens the key at `path`, making it on first use. Tokens that were made under another name (`also`) of the trust
    /// domain hold as well; their bearers get identities of `trust_domain`.
    ///
    /// # Errors
    /// When the file cannot be read, written or understood.
    pub fn open(path: &Path, trust_domain: TrustDomain, also: &[TrustDomain]) -> Result<Self, BearerError> {
        let failed = |cause: &dyn fmt::Display| BearerError::Key {
            path: path.display().to_string(),
            cause: cause.to_string(),
        };
        let key = match std::fs::read_to_string(path) {
            Ok(pem) => DeviceKey::from_pem(&zeroize::Zeroizing::new(pem)).map_err(|e| failed(&e))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = DeviceKey::generate().map_err(|e| failed(&e))?;
                crate::files::write_secret(path, key.to_pem().as_bytes()).map_err(|e| failed(&e))?;
                key
            }
            Err(error) => return Err(failed(&error)),
        };
        let signing = EncodingKey::from_ec_pem(key.to_pem().as_bytes()).map_err(|e| failed(&e))?;
        let verifying =
            DecodingKey::from_ec_pem(crate::files::pem("PUBLIC KEY", &key.public_key()).as_bytes())
                .map_err(|e| failed(&e))?;
        let names = std::iter::once(&trust_domain).chain(also);
        let issuers: Vec<String> = names.map(|name| format!("https://discovery.{name}")).collect();
        let issuer = format!("https://discovery.{trust_domain}");
        Ok(Self {
            issuers,
            signing,
            verifying,
            trust_domain,
            issuer,
        })
    }

    /// A token for a service account, good for `ttl` from `now_unix` (seconds).
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue(&self, asked: &Asked<'_>, ttl: Duration, now_unix: u64) -> Result<String, BearerError> {
        let Asked {
            namespace,
            service_account,
            all_roots,
        } = *asked;
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: format!("system:serviceaccount:{namespace}:{service_account}"),
            aud: vec![AUDIENCE.into()],
            iat: now_unix,
            exp: now_unix + ttl.as_secs(),
            all_roots,
        };
        Ok(jsonwebtoken::encode(
            &Header::new(Algorithm::ES256),
            &claims,
            &self.signing,
        )?)
    }

    /// Whose token it is.
    ///
    /// # Errors
    /// When it is not one of ours, not for us, or past its time.
    pub fn verify(&self, token: &str) -> Result<SpiffeId, BearerError> {
        let claims = self.claims(token)?;
        let refused = || BearerError::Subject(claims.sub.clone());
        let account = claims
            .sub
            .strip_prefix("system:serviceaccount:")
            .ok_or_else(refused)?;
        let (namespace, name) = account.split_once(':').ok_or_else(refused)?;
        SpiffeId::new(self.trust_domain.clone(), namespace, name).map_err(|_| refused())
    }

    /// True for a token that holds and whose bearer is to be given all roots.
    pub fn is_for_all_roots(&self, token: &str) -> bool {
        self.claims(token).is_ok_and(|claims| claims.all_roots)
    }

    fn claims(&self, token: &str) -> Result<Claims, BearerError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&self.issuers);
        validation.set_required_spec_claims(&["exp", "iss", "sub", "aud"]);
        validation.leeway = LEEWAY_SECONDS;
        Ok(jsonwebtoken::decode::<Claims>(token, &self.verifying, &validation)?.claims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> u64 {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[test]
    fn only_our_own_live_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let td: TrustDomain = "mesh.example".parse().unwrap();
        let open =
            |file: &str, td: &TrustDomain| Bearer::open(&dir.path().join(file), td.clone(), &[]).unwrap();
        let bearer = open("bearer.key", &td);
        let hour = Duration::from_secs(3600);
        let issue = |namespace, now, all_roots| {
            let asked = Asked {
                namespace,
                service_account: "x",
                all_roots,
            };
            bearer.issue(&asked, hour, now).unwrap()
        };
        let token = issue("shop", now(), false);
        assert!(!bearer.is_for_all_roots(&token) && !token.contains("all-roots"));
        let wide = issue("shop", now(), true);
        assert!(bearer.is_for_all_roots(&wide) && bearer.verify(&wide).is_ok());
        assert!(
            !bearer.is_for_all_roots(&issue("shop", now() - 7200, true)),
            "expired"
        );
        assert_eq!(
            bearer.verify(&token).unwrap().to_string(),
            "spiffe://mesh.example/ns/shop/sa/x"
        );
        // The key survives a restart, another discovery has another.
        let again = open("bearer.key", &td);
        assert!(again.verify(&token).is_ok());
        let other = open("other.key", &td);
        assert!(other.verify(&token).is_err());
        // Another issuer with the same key (a mesh with another trust domain).
        let new: TrustDomain = "other.example".parse().unwrap();
        assert!(open("bearer.key", &new).verify(&token).is_err());
        // Unless it is the same mesh, which is being renamed.
        let renamed = Bearer::open(&dir.path().join("bearer.key"), new, std::slice::from_ref(&td)).unwrap();
        assert_eq!(
            renamed.verify(&token).unwrap().to_string(),
            "spiffe://other.example/ns/shop/sa/x"
        );
        // Expired; damaged; unsigned.
        assert!(bearer.verify(&issue("shop", now() - 7200, false)).is_err());
        assert!(bearer.verify(&token[..token.len() - 4]).is_err());
        let (head, rest) = token.split_once('.').unwrap();
        assert!(!head.is_empty());
        let unsigned = format!("eyJhbGciOiJub25lIn0.{}.", rest.split_once('.').unwrap().0);
        assert!(bearer.verify(&unsigned).is_err());
        assert!(
            bearer.verify(&issue("SHOP", now(), false)).is_err(),
            "not a namespace"
        );
    }
}
