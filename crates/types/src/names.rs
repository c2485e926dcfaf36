use std::{fmt, str::FromStr, sync::Arc};

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing there.
    #[error("{what} is empty")]
    Empty {
        /// Which name.
        what: &'static str,
    },
    /// Over its limit.
    #[error("{what} has {length} characters, at most {limit} are allowed")]
    TooLong {
        /// Which name.
        what: &'static str,
        /// Characters found.
        length: usize,
        /// Characters allowed.
        limit: usize,
    },
    /// A character outside the allowed set, or at a place where it may not stand.
    #[error(
        "{what} {value:?}: use lower case letters, digits and '-', starting and ending with a letter or digit"
    )]
    Character {
        /// Which name.
        what: &'static str,
        /// The refused text.
        value: String,
    },
    /// Not "namespace/name".
    #[error("{value:?} is not of the form namespace/name")]
    NotNamespaced {
        /// The refused text.
        value: String,
    },
}

/// Checks an RFC 1123 label: 1 to 63 of `a-z 0-9 -`, first and last alphanumeric.
///
/// # Errors
/// With the reason, naming the value as `what`.
pub fn check_label(what: &'static str, value: &str) -> Result<(), NameError> {
    if value.is_empty() {
        return Err(NameError::Empty { what });
    }
    if value.len() > 63 {
        return Err(NameError::TooLong {
            what,
            length: value.len(),
            limit: 63,
        });
    }
    let bytes = value.as_bytes();
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if !bytes.iter().all(|&b| alnum(b) || b == b'-') || !alnum(bytes[0]) || !alnum(bytes[bytes.len() - 1]) {
        return Err(NameError::Character {
            what,
            value: value.to_owned(),
        });
    }
    Ok(())
}

fn check_dns(what: &'static str, value: &str) -> Result<(), NameError> {
    if value.is_empty() {
        return Err(NameError::Empty { what });
    }
    if value.len() > 253 {
        return Err(NameError::TooLong {
            what,
            length: value.len(),
            limit: 253,
        });
    }
    value.split('.').try_for_each(|label| check_label(what, label))
}

/// A SPIFFE trust domain, lower case, for example `mesh.example`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        check_dns("trust domain", value)?;
        Ok(Self(value.into()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A DNS host name in canonical form: lower case, no trailing dot; may start with `*.`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hostname(Arc<str>);

impl Hostname {
    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True for `*.example.org`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }

    /// True if `self` is `domain` or below it.
    pub fn is_within(&self, domain: &str) -> bool {
        self.0
            .strip_suffix(domain)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }
}

impl FromStr for Hostname {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        let canonical = value.strip_suffix('.').unwrap_or(value).to_ascii_lowercase();
        check_dns("host name", canonical.strip_prefix("*.").unwrap_or(&canonical))?;
        Ok(Self(canonical.into()))
    }
}

impl fmt::Display for Hostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `namespace/name`. For a service the name is its host name: `shop/catalog.shop.svc.mesh.internal`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name within it.
    pub name: Arc<str>,
}

impl NamespacedName {
    /// Joins the two parts; neither is checked here.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl FromStr for NamespacedName {
    type Err = NameError;
    fn from_str(value: &str) -> Result<Self, NameError> {
        match value.split_once('/') {
            Some((ns, name)) if !ns.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::new(ns, name))
            }
            _ => Err(NameError::NotNamespaced {
                value: value.to_owned(),
            }),
        }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels() {
        for ok in ["a", "shop", "a-b", "0", &"x".repeat(63)] {
            assert_eq!(check_label("n", ok), Ok(()), "{ok}");
        }
        for bad in ["", "A", "-a", "a-", "a.b", "a_b", "é", &"x".repeat(64)] {
            assert!(check_label("n", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn hostnames_are_canonical() {
        let host: Hostname = "Catalog.Shop.svc.Mesh.internal.".parse().unwrap();
        assert_eq!(host.as_str(), "catalog.shop.svc.mesh.internal");
        assert!(host.is_within("mesh.internal") && !host.is_within("esh.internal"));
        assert!("*.example.org".parse::<Hostname>().unwrap().is_wildcard());
        assert!("a..b".parse::<Hostname>().is_err());
    }

    #[test]
    fn namespaced_names() {
        assert_eq!(
            "shop/x.y".parse::<NamespacedName>().unwrap().to_string(),
            "shop/x.y"
        );
        for bad in ["", "a", "/a", "a/", "a/b/c"] {
            assert!(bad.parse::<NamespacedName>().is_err(), "{bad}");
        }
    }
}
