use super::message::Refusal;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr};
use tombolo_types::Code;

/// Longest name, in bytes. Source: RFC 1035 2.3.4.
const NAME_BYTES_MAX: usize = 253;
const LABEL_BYTES_MAX: usize = 63;
/// One server of each family.
const SERVERS_MAX: usize = 2;

/// What the host's resolver shall ask the mesh for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsSettings {
    /// This name and everything below it, for example `mesh.internal`.
    pub domain: String,
    /// The DNS VIPs, in the families that mesh0 has; at most one of each.
    pub servers: Vec<IpAddr>,
}

impl DnsSettings {
    /// The agent reads what the network sends: it must not be able to have all names of the host, or those of a
    /// whole top-level domain, sent to itself. Servers are asked on mesh0 and nowhere else.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let refused = |cause: String| Refusal {
            code: Code::NamesNotAsked,
            cause,
        };
        let label = |label: &str| {
            let usable = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
            !label.is_empty() && label.len() <= LABEL_BYTES_MAX && label.bytes().all(usable)
        };
        let labels: Vec<&str> = self.domain.split('.').collect();
        if self.domain.len() > NAME_BYTES_MAX || labels.len() < 2 || !labels.iter().all(|each| label(each)) {
            return Err(refused(format!(
                "{:?} is not a domain of two labels or more",
                self.domain
            )));
        }
        let one_each = |v6: bool| self.servers.iter().filter(|ip| ip.is_ipv6() == v6).count() <= 1;
        if self.servers.is_empty() || self.servers.len() > SERVERS_MAX || !one_each(true) || !one_each(false)
        {
            return Err(refused("a DNS VIP of each family, and at least one".into()));
        }
        Ok(())
    }
}

/// How names are looked up on the host, and what became of the wish.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNames {
    /// Who looks up names, for people: `systemd-resolved`, `dnsmasq`.
    pub resolver: String,
    /// The resolver was told to ask the mesh. Otherwise nothing on the host was changed.
    pub asks: bool,
    /// What an administrator does, where the resolver was not told: the one line to add, and where.
    pub advice: String,
}

/// Tells the host's resolver. It is beside netd and not of this crate, so that what it takes (D-Bus) stays out of the
/// agent.
#[async_trait]
pub trait HostResolver: fmt::Debug + Send + Sync {
    /// Finds out who looks up names and has it ask the mesh, if that can be done without changing a file of the host.
    /// Returns within five seconds.
    ///
    /// # Errors
    /// With what the resolver said when it refused; it is as it was before.
    async fn set(&self, settings: &DnsSettings) -> Result<HostNames, String>;

    /// Takes back what [`Self::set`] did. mesh0 may be gone already.
    async fn revert(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_domain_of_its_own() {
        let v4: IpAddr = "240.240.255.254".parse().unwrap();
        let v6: IpAddr = "2001:2:0:ffff::254".parse().unwrap();
        let check = |domain: &str, servers: &[IpAddr]| {
            let settings = DnsSettings {
                domain: domain.to_owned(),
                servers: servers.to_vec(),
            };
            settings.check().is_ok()
        };
        assert!(
            check("mesh.internal", &[v4]) && check("cluster.local", &[v4, v6]) && check("a.b-1.c2", &[v6])
        );
        for domain in [
            "",
            ".",
            "com",
            "com.",
            ".com",
            "a..b",
            "*.com",
            "~.",
            "A.b",
            "a b.c",
            &"a.".repeat(150),
        ] {
            assert!(!check(domain, &[v4]), "{domain:?}");
        }
        assert!(!check("mesh.internal", &[]) && !check("mesh.internal", &[v4, v4]));
    }
}
