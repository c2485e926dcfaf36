use crate::{NameError, TrustDomain};
use std::{fmt, str::FromStr, sync::Arc};

/// Why a SPIFFE id was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeError {
    /// Not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Form(String),
    /// A part is not a valid name.
    #[error("SPIFFE id: {0}")]
    Name(#[from] NameError),
}

/// A workload identity, `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`. Cheap to clone.
///
/// Source: Istio's form of SPIFFE ids; ztunnel demands exactly these five parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// Trust domain.
    pub trust_domain: TrustDomain,
    /// Kubernetes-style namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
}

impl SpiffeId {
    /// Joins checked parts. Service accounts may be DNS subdomains (dots), as in Kubernetes.
    ///
    /// # Errors
    /// When a part is not a valid name.
    pub fn new(trust_domain: TrustDomain, namespace: &str, service_account: &str) -> Result<Self, NameError> {
        crate::check_label("namespace", namespace)?;
        if service_account.is_empty() {
            return Err(NameError::Empty {
                what: "service account",
            });
        }
        service_account
            .split('.')
            .try_for_each(|label| crate::check_label("service account", label))?;
        Ok(Self {
            trust_domain,
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    /// The identity of discovery in a trust domain: agents demand exactly this one.
    pub fn discovery(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            namespace: crate::mesh::SYSTEM_NAMESPACE.into(),
            service_account: "discovery".into(),
        }
    }

    /// The identity of the east-west gateways of a trust domain.
    pub fn gateway(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            namespace: crate::mesh::SYSTEM_NAMESPACE.into(),
            service_account: "gateway".into(),
        }
    }

    /// The principal as AuthorizationPolicy writes it: without `spiffe://`.
    pub fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;
    fn from_str(value: &str) -> Result<Self, SpiffeError> {
        let form = || SpiffeError::Form(value.to_owned());
        let rest = value.strip_prefix("spiffe://").ok_or_else(form)?;
        let parts: Vec<&str> = rest.split('/').collect();
        match parts.as_slice() {
            [td, "ns", ns, "sa", sa] => Ok(Self::new(td.parse()?, ns, sa)?),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = "spiffe://mesh.example/ns/shop/sa/catalog";
        let id: SpiffeId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(id.principal(), "mesh.example/ns/shop/sa/catalog");
        assert_eq!(
            SpiffeId::discovery(id.trust_domain).to_string(),
            "spiffe://mesh.example/ns/tombolo-system/sa/discovery"
        );
    }

    #[test]
    fn refused() {
        for bad in [
            "",
            "spiffe://",
            "https://a/ns/b/sa/c",
            "spiffe://a/ns/b/sa",
            "spiffe://a/ns/b/sa/c/d",
            "spiffe://a/NS/b/sa/c",
            "spiffe:///ns/b/sa/c",
            "spiffe://a/ns//sa/c",
            "spiffe://a/ns/b/sa/",
            "spiffe://a/ns/b/sa/c?x",
            "spiffe://A/ns/b/sa/c",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad}");
        }
    }
}
