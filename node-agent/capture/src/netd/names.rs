use super::message::Refusal;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, time::Duration};
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

/// Which resolver of the host is pointed at the mesh: `names` in `/etc/tombolo/agent.yaml`.
///
/// netd reads it from the file, which only root writes, and never takes the agent's word for it: an agent that was
/// taken over must not be able to have all names of the host sent to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NamesMode {
    /// What looks up names here, where that can be done for the mesh's names alone.
    #[default]
    Auto,
    /// systemd-resolved, over D-Bus.
    Resolved,
    /// The dnsmasq that NetworkManager runs.
    #[serde(rename = "networkmanager")]
    NetworkManager,
    /// dnsmasq.
    Dnsmasq,
    /// unbound.
    Unbound,
    /// The host's plain list of servers, with the mesh in front: all names pass through the agent.
    ResolvConf,
    /// Nothing is pointed at the mesh.
    None,
}

impl NamesMode {
    /// All, in the order of the documents.
    pub const ALL: [Self; 7] = [
        Self::Auto,
        Self::Resolved,
        Self::NetworkManager,
        Self::Dnsmasq,
        Self::Unbound,
        Self::ResolvConf,
        Self::None,
    ];

    /// As it is written in the file.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Resolved => "resolved",
            Self::NetworkManager => "networkmanager",
            Self::Dnsmasq => "dnsmasq",
            Self::Unbound => "unbound",
            Self::ResolvConf => "resolv-conf",
            Self::None => "none",
        }
    }

    /// Reads the one line of a configuration file; [`Self::Auto`] where there is none.
    ///
    /// # Errors
    /// With the value, when it is none of these.
    pub fn in_file(text: &str) -> Result<Self, String> {
        let value = text.lines().find_map(|line| line.strip_prefix("names:"));
        let Some(value) = value else { return Ok(Self::Auto) };
        let value = value.split(" #").next().unwrap_or_default().trim();
        let value = value.trim_matches(['"', '\'']);
        value.parse().map_err(|()| value.to_owned())
    }
}

impl fmt::Display for NamesMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for NamesMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or(())
    }
}

/// How names are looked up on the host, and what became of the wish.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostNames {
    /// Who looks up names, for people: `systemd-resolved`, `dnsmasq`.
    pub resolver: String,
    /// The resolver was told to ask the mesh. Otherwise nothing on the host was changed.
    pub asks: bool,
    /// What an administrator does, where the resolver was not told: the one line to add, and where.
    pub advice: String,
    /// The back-end that told it, as `names` in the configuration says it; empty: none.
    #[serde(default)]
    pub backend: String,
    /// It was changed just now, and is changed back unless [`HostResolver::confirm`] follows within
    /// [`CONFIRM_WITHIN`].
    #[serde(default)]
    pub confirm: bool,
    /// It is kept only while [`HostResolver::alive`] is said every [`ALIVE_EVERY`].
    #[serde(default)]
    pub alive: bool,
}

/// So long netd waits for the word that lookups work, before it takes a change back by itself: an agent that dies in
/// between must not leave a resolver that nobody has tried. A restart of dnsmasq takes 0.3 s, a lookup 5 s at most.
pub const CONFIRM_WITHIN: Duration = Duration::from_secs(15);

/// How often the agent says that it answers, where all names of the host pass through it.
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// Tells the host's resolver. It is beside netd and not of this crate, so that what it takes (D-Bus) stays out of the
/// agent.
#[async_trait]
pub trait HostResolver: fmt::Debug + Send + Sync {
    /// Finds out who looks up names and has it ask the mesh, as far as the host's owner lets it. Returns within eight
    /// seconds.
    ///
    /// # Errors
    /// With what the resolver said when it refused; it is as it was before.
    async fn set(&self, settings: &DnsSettings) -> Result<HostNames, String>;

    /// Says how lookups went after a change that [`HostNames::confirm`] asks about. With a problem the change is taken
    /// back, and not tried again soon.
    ///
    /// # Errors
    /// With what the resolver said when it was told to.
    async fn confirm(&self, problem: Option<String>) -> Result<HostNames, String>;

    /// The agent answers lookups.
    async fn alive(&self);

    /// Takes back what [`Self::set`] did. mesh0 may be gone already.
    async fn revert(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owners_word_is_read_from_the_file() {
        for mode in NamesMode::ALL {
            let json = format!("\"{mode}\"");
            assert_eq!(
                serde_json::from_str::<NamesMode>(&json).unwrap(),
                mode,
                "one spelling"
            );
            for line in [
                format!("names: {mode}"),
                format!("names: {json}"),
                format!("names:  '{mode}' # mine"),
            ] {
                assert_eq!(
                    NamesMode::in_file(&format!("workers: 2\n{line}\nprobes: true\n")),
                    Ok(mode),
                    "{line}"
                );
            }
        }
        for text in ["", "#names: resolv-conf\n", "bridges: []\n names: none\n"] {
            assert_eq!(NamesMode::in_file(text), Ok(NamesMode::Auto), "{text}");
        }
        for text in ["names: resolvconf\n", "names:\n", "names: [none]\n"] {
            assert!(NamesMode::in_file(text).is_err(), "{text}");
        }
    }

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
