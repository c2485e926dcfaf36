use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The first bytes of a header.
pub const PROXY_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Bytes before the part whose length they say.
pub const PROXY_PREFIX: usize = 16;
/// Longest header that is read: 52 bytes with IPv6 addresses, and room for extensions that are skipped.
pub const PROXY_MAX: usize = 512;

/// PROXY protocol version 2: whom a proxy speaks for, before the first byte of the connection itself.
///
/// Source: haproxy, doc/proxy-protocol.txt, 2.2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// The connection of somebody else.
    Proxied {
        /// Where it comes from.
        source: SocketAddr,
        /// Where it went to.
        destination: SocketAddr,
    },
    /// The proxy's own: its address counts.
    Local,
}

/// Bytes that are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// They do not begin with the signature of version 2.
    #[error("no PROXY header of version 2")]
    NotProxy,
    /// A command that version 2 does not have.
    #[error("an unknown command in a PROXY header")]
    Command,
    /// Neither TCP over IPv4 nor over IPv6.
    #[error("a PROXY header for something else than TCP")]
    Family,
    /// Over [`PROXY_MAX`], or too short for its addresses.
    #[error("a PROXY header of {0} bytes")]
    Length(usize),
}

impl ProxyHeader {
    /// Length of the whole header, from its first [`PROXY_PREFIX`] bytes.
    ///
    /// # Errors
    /// When they begin no header, or one that is too long.
    pub fn length(prefix: &[u8; PROXY_PREFIX]) -> Result<usize, ProxyError> {
        let (signature, rest) = prefix.split_at(PROXY_SIGNATURE.len());
        let &[version_and_command, _, high, low] = rest else {
            return Err(ProxyError::NotProxy);
        };
        if signature != PROXY_SIGNATURE || version_and_command >> 4 != 2 {
            return Err(ProxyError::NotProxy);
        }
        let length = PROXY_PREFIX + usize::from(u16::from_be_bytes([high, low]));
        if length > PROXY_MAX {
            return Err(ProxyError::Length(length));
        }
        Ok(length)
    }

    /// Reads a whole header, of the length that [`Self::length`] says. Extensions are skipped.
    ///
    /// # Errors
    /// When it is none, or not of TCP.
    pub fn decode(bytes: &[u8]) -> Result<Self, ProxyError> {
        let prefix = bytes.first_chunk().ok_or(ProxyError::Length(bytes.len()))?;
        if Self::length(prefix)? != bytes.len() {
            return Err(ProxyError::Length(bytes.len()));
        }
        let (command, family) = (prefix[12] & 0x0f, prefix[13]);
        let addresses = bytes.get(PROXY_PREFIX..).unwrap_or_default();
        match (command, family) {
            (0, _) => Ok(Self::Local),
            (1, 0x11) => {
                let &[a, b, c, d, e, f, g, h, sh, sl, dh, dl] =
                    addresses.first_chunk().ok_or(ProxyError::Length(bytes.len()))?;
                Ok(Self::Proxied {
                    source: (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([sh, sl])).into(),
                    destination: (Ipv4Addr::new(e, f, g, h), u16::from_be_bytes([dh, dl])).into(),
                })
            }
            (1, 0x21) => {
                let addresses: &[u8; 36] = addresses.first_chunk().ok_or(ProxyError::Length(bytes.len()))?;
                let at = |from: usize| {
                    let mut octets = [0; 16];
                    octets.copy_from_slice(&addresses[from..from + 16]);
                    IpAddr::V6(Ipv6Addr::from(octets))
                };
                let port = |from: usize| u16::from_be_bytes([addresses[from], addresses[from + 1]]);
                Ok(Self::Proxied {
                    source: (at(0), port(32)).into(),
                    destination: (at(16), port(34)).into(),
                })
            }
            (1, _) => Err(ProxyError::Family),
            _ => Err(ProxyError::Command),
        }
    }

    /// The bytes to send first. Addresses of two families are written as IPv6.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = PROXY_SIGNATURE.to_vec();
        match self {
            Self::Local => bytes.extend([0x20, 0, 0, 0]),
            Self::Proxied { source, destination } => {
                let ends = (source.ip().to_canonical(), destination.ip().to_canonical());
                if let (IpAddr::V4(from), IpAddr::V4(to)) = ends {
                    bytes.extend([0x21, 0x11, 0, 12]);
                    bytes.extend(from.octets());
                    bytes.extend(to.octets());
                } else {
                    bytes.extend([0x21, 0x21, 0, 36]);
                    for end in [ends.0, ends.1] {
                        let end = match end {
                            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                            IpAddr::V6(v6) => v6,
                        };
                        bytes.extend(end.octets());
                    }
                }
                bytes.extend(source.port().to_be_bytes());
                bytes.extend(destination.port().to_be_bytes());
            }
        }
        bytes
    }
}
