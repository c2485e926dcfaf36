use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

/// Namespace of discovery and gateways.
pub(crate) const SYSTEM_NAMESPACE: &str = "tombolo-system";

/// True for namespaces that no WorkloadGroup, token or certificate is made for by the ordinary way.
pub fn reserved_namespace(namespace: &str) -> bool {
    matches!(namespace, SYSTEM_NAMESPACE | "istio-system" | "kube-system")
}

/// Port numbers.
pub mod ports {
    /// HBONE, TCP.
    pub const HBONE: u16 = 15008;
    /// Discovery: ADS, CA, enrolment, admin for operators.
    pub const DISCOVERY: u16 = 15012;
    /// Discovery: read-only HTTP on loopback.
    pub const DISCOVERY_DEBUG: u16 = 15014;
    /// Metrics of agent and gateway.
    pub const METRICS: u16 = 15020;
    /// Readiness.
    pub const READINESS: u16 = 15021;
    /// Listener of captured TCP flows, on mesh0's own address only.
    pub const CAPTURE: u16 = 15001;
    /// DNS over TCP of captured flows, on mesh0's own address only.
    pub const CAPTURE_DNS: u16 = 15053;

    /// Ports that a workload may never have delivered: ours, and ztunnel's and Envoy's beside us.
    pub const NEVER_DELIVERED: [u16; 10] = [
        15000, 15001, 15006, 15008, 15012, 15014, 15020, 15021, 15053, 15090,
    ];
}

/// A node's address within a network: the same IP may exist in two networks. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    /// Network id; empty is the default network.
    pub network: Arc<str>,
    /// Address.
    pub address: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

/// Why VIP prefixes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressPlanError {
    /// IPv4 prefixes are /8 to /20, so that the reserved last /24 and enough VIPs fit.
    #[error("VIP prefix {0}: use an IPv4 prefix of /8 to /20")]
    Length4(Ipv4Net),
    /// IPv6 prefixes are /32 to /48, so that the reserved /64 fits.
    #[error("VIP prefix {0}: use an IPv6 prefix of /32 to /48")]
    Length6(Ipv6Net),
    /// Not a prefix.
    #[error("VIP prefix {0:?} is not an IP prefix")]
    Syntax(String),
}

/// The mesh's virtual addresses: one IPv4 and one IPv6 prefix, and in each the agent's own addresses.
///
/// In the last /24 of the IPv4 prefix and the `ffff` /64 of the IPv6 prefix `.253` (`::253`) is mesh0's own address
/// and `.254` (`::254`) the DNS VIP, the same on every host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPlan {
    /// IPv4 VIPs.
    pub v4: Ipv4Net,
    /// IPv6 VIPs.
    pub v6: Ipv6Net,
}

impl Default for AddressPlan {
    fn default() -> Self {
        Self {
            v4: Ipv4Net::new_assert(Ipv4Addr::new(240, 240, 0, 0), 16),
            v6: Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0), 48),
        }
    }
}

impl AddressPlan {
    /// Reads textual prefixes; a family that is not named keeps its default.
    ///
    /// # Errors
    /// When a text is not a prefix or its length is out of range.
    pub fn from_prefixes<S: AsRef<str>>(
        prefixes: impl IntoIterator<Item = S>,
    ) -> Result<Self, AddressPlanError> {
        let mut plan = Self::default();
        for text in prefixes {
            let text = text.as_ref();
            match text
                .parse::<IpNet>()
                .map_err(|_| AddressPlanError::Syntax(text.to_owned()))?
            {
                IpNet::V4(net) if !(8..=20).contains(&net.prefix_len()) => {
                    return Err(AddressPlanError::Length4(net));
                }
                IpNet::V6(net) if !(32..=48).contains(&net.prefix_len()) => {
                    return Err(AddressPlanError::Length6(net));
                }
                IpNet::V4(net) => plan.v4 = net.trunc(),
                IpNet::V6(net) => plan.v6 = net.trunc(),
            }
        }
        Ok(plan)
    }

    /// Both prefixes as text, IPv4 first.
    pub fn prefixes(&self) -> [String; 2] {
        [self.v4.to_string(), self.v6.to_string()]
    }

    /// True if `address` is one of the mesh's virtual addresses (reserved ones too).
    pub fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.v4.contains(&a),
            IpAddr::V6(a) => self.v6.contains(&a),
        }
    }

    /// True if `address` is in the blocks that are never given to a service.
    pub fn is_reserved(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a.octets()[..3] == self.last_v4(0).octets()[..3] || a == self.v4.network(),
            IpAddr::V6(a) => a.segments()[..4] == self.last_v6(0).segments()[..4] || a == self.v6.network(),
        }
    }

    fn last_v4(&self, host: u8) -> Ipv4Addr {
        let o = self.v4.broadcast().octets();
        Ipv4Addr::new(o[0], o[1], o[2], host)
    }

    fn last_v6(&self, host: u16) -> Ipv6Addr {
        let s = self.v6.network().segments();
        Ipv6Addr::new(s[0], s[1], s[2], 0xffff, 0, 0, 0, host)
    }

    /// mesh0's own IPv4 address.
    pub fn host_v4(&self) -> Ipv4Addr {
        self.last_v4(253)
    }

    /// mesh0's own IPv6 address.
    pub fn host_v6(&self) -> Ipv6Addr {
        self.last_v6(0x253)
    }

    /// The DNS VIP.
    pub fn dns_v4(&self) -> Ipv4Addr {
        self.last_v4(254)
    }

    /// The DNS VIP.
    pub fn dns_v6(&self) -> Ipv6Addr {
        self.last_v6(0x254)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_plan() {
        let plan = AddressPlan::default();
        assert_eq!(plan.host_v4().to_string(), "240.240.255.253");
        assert_eq!(plan.dns_v4().to_string(), "240.240.255.254");
        assert_eq!(plan.host_v6().to_string(), "2001:2:0:ffff::253");
        assert_eq!(plan.dns_v6().to_string(), "2001:2:0:ffff::254");
        assert!(
            plan.is_reserved("240.240.255.7".parse().unwrap())
                && plan.is_reserved("240.240.0.0".parse().unwrap())
        );
        assert!(
            !plan.is_reserved("240.240.0.1".parse().unwrap())
                && !plan.is_reserved("2001:2::1".parse().unwrap())
        );
        assert!(plan.contains("2001:2::1".parse().unwrap()) && !plan.contains("10.0.0.1".parse().unwrap()));
    }

    #[test]
    fn prefixes() {
        let plan = AddressPlan::from_prefixes(["10.240.0.0/16"]).unwrap();
        assert_eq!(
            plan.prefixes(),
            ["10.240.0.0/16".to_owned(), "2001:2::/48".to_owned()]
        );
        for bad in ["", "x", "10.0.0.0/24", "2001:2::/64", "0.0.0.0/0"] {
            assert!(AddressPlan::from_prefixes([bad]).is_err(), "{bad}");
        }
    }
}
