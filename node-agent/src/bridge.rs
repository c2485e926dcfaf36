//! Whose containers or guests may use the mesh as this host.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Longest name of a link, in bytes. Source: IFNAMSIZ of linux/if.h.
const LINK_NAME_MAX: usize = 15;

/// A bridge that was opted in: its addresses, or its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum Bridge {
    /// Packets from these addresses are taken.
    Prefix(IpNet),
    /// Packets from the prefixes that a link has, whatever they are at the time.
    Link(String),
}

impl TryFrom<String> for Bridge {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if let Ok(prefix) = text.parse() {
            return Ok(Self::Prefix(prefix));
        }
        let usable = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !text.is_empty() && text.len() <= LINK_NAME_MAX && text.bytes().all(usable) {
            Ok(Self::Link(text))
        } else {
            Err(format!(
                "{text:?} is neither a prefix (172.17.0.0/16) nor the name of a bridge (docker0)"
            ))
        }
    }
}

impl From<Bridge> for String {
    fn from(bridge: Bridge) -> Self {
        bridge.to_string()
    }
}

impl fmt::Display for Bridge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefix(prefix) => prefix.fmt(f),
            Self::Link(name) => name.fmt(f),
        }
    }
}

/// The prefixes among them, and the names.
pub(crate) fn split(bridges: &[Bridge]) -> (Vec<IpNet>, Vec<String>) {
    let (mut prefixes, mut links) = (Vec::new(), Vec::new());
    for bridge in bridges {
        match bridge {
            Bridge::Prefix(prefix) => prefixes.push(*prefix),
            Bridge::Link(name) => links.push(name.clone()),
        }
    }
    (prefixes, links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_and_names() {
        let read = |text: &str| Bridge::try_from(text.to_owned());
        assert_eq!(
            read("172.17.0.0/16"),
            Ok(Bridge::Prefix("172.17.0.0/16".parse().unwrap()))
        );
        assert_eq!(read("docker0"), Ok(Bridge::Link("docker0".into())));
        assert_eq!(read("br-4f2a.1_b"), Ok(Bridge::Link("br-4f2a.1_b".into())));
        for text in [
            "",
            "172.17.0.0/40",
            "a name",
            "longer-than-a-name",
            "br0/24",
            "fd00::1::/64",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        let both = [read("10.0.0.0/8").unwrap(), read("podman1").unwrap()];
        let (prefixes, links) = split(&both);
        assert_eq!(
            (prefixes.len(), links.as_slice()),
            (1, &["podman1".to_owned()][..])
        );
    }
}
