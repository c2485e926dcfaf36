//! What a host says of its own resolver, read and not judged yet.

use std::{fs, net::IpAddr, path::Path};

/// systemd-resolved's socket for nss-resolve, since systemd 247. Unix sockets are listed in the network namespace that
/// they were made in only: a resolver of another namespace, seen through a bus that is shared, is not this host's.
const VARLINK: &str = "/run/systemd/resolve/io.systemd.Resolve";

/// A server that runs on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// The dnsmasq that NetworkManager runs.
    NetworkManagerDnsmasq,
    Dnsmasq,
    Unbound,
    /// BIND.
    Named,
}

impl Daemon {
    const ALL: [Self; 4] = [
        Self::NetworkManagerDnsmasq,
        Self::Dnsmasq,
        Self::Unbound,
        Self::Named,
    ];

    /// What it leaves in /run, and its unit. Processes of other users are not seen from a sandbox.
    const fn traces(self) -> (&'static [&'static str], Option<&'static str>) {
        match self {
            Self::NetworkManagerDnsmasq => (&["run/NetworkManager/dnsmasq.pid"], None),
            Self::Dnsmasq => (&["run/dnsmasq/dnsmasq.pid", "run/dnsmasq.pid"], Some("dnsmasq")),
            Self::Unbound => (&["run/unbound.pid", "run/unbound/unbound.pid"], Some("unbound")),
            Self::Named => (&["run/named/named.pid", "run/named.pid"], Some("named")),
        }
    }
}

/// Everything that is looked at.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Text of /etc/resolv.conf.
    pub(crate) resolv_conf: String,
    /// Text of /etc/nsswitch.conf.
    pub(crate) nsswitch: String,
    /// systemd-resolved is on the bus, and of this network namespace.
    pub(crate) resolved: bool,
    /// How NetworkManager has names looked up, as it says itself or its files do; `None` where there is none.
    pub(crate) network_manager: Option<String>,
    /// Servers that run.
    pub(crate) running: Vec<Daemon>,
    /// Where somebody in this network namespace listens for queries by UDP; unspecified: everywhere.
    pub(crate) listening: Vec<IpAddr>,
    /// Text of dnsmasq's main configuration, and of what its unit passes to it.
    pub(crate) dnsmasq_conf: String,
    /// Text of unbound's main configuration.
    pub(crate) unbound_conf: String,
}

impl Seen {
    /// Reads below `root`, which is `/` but in tests. `resolved` says whether systemd-resolved is on the bus,
    /// `network_manager` what NetworkManager said there.
    pub(crate) fn read(root: &Path, resolved: bool, network_manager: Option<String>) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let here = read("proc/net/unix").lines().any(|line| line.ends_with(VARLINK));
        let runs = |daemon: &Daemon| {
            let (files, name) = daemon.traces();
            files.iter().any(|path| root.join(path).exists()) || name.is_some_and(|name| unit(root, name))
        };
        let listening = [read("proc/net/udp"), read("proc/net/udp6")];
        Self {
            resolv_conf: read("etc/resolv.conf"),
            nsswitch: read("etc/nsswitch.conf"),
            resolved: resolved && here,
            network_manager: network_manager.or_else(|| network_manager_conf(root)),
            running: Daemon::ALL.into_iter().filter(runs).collect(),
            listening: listening.iter().flat_map(|table| listeners(table)).collect(),
            dnsmasq_conf: read("etc/dnsmasq.conf") + "\n" + &read("etc/default/dnsmasq"),
            unbound_conf: read("etc/unbound/unbound.conf"),
        }
    }

    /// The `nameserver` lines, in order. Source: resolv.conf(5).
    pub(crate) fn servers(&self) -> Vec<IpAddr> {
        let server = |line: &str| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver"))
                .then(|| words.next()?.split('%').next()?.parse().ok())
                .flatten()
        };
        self.resolv_conf.lines().filter_map(server).collect()
    }

    /// True if somebody of this network namespace takes queries to this address.
    pub(crate) fn listens_at(&self, address: IpAddr) -> bool {
        let covers =
            |at: &IpAddr| *at == address || (at.is_unspecified() && (at.is_ipv6() || address.is_ipv4()));
        self.listening.iter().any(covers)
    }
}

/// True while a unit of systemd has processes.
fn unit(root: &Path, name: &str) -> bool {
    ["sys/fs/cgroup", "sys/fs/cgroup/unified", "sys/fs/cgroup/systemd"]
        .iter()
        .any(|tree| root.join(format!("{tree}/system.slice/{name}.service")).exists())
}

/// `dns` of the section `main`, of the last file that has it; `None` where it does not run. Source:
/// NetworkManager.conf(5).
fn network_manager_conf(root: &Path) -> Option<String> {
    if !unit(root, "NetworkManager") {
        return None;
    }
    // The administrator's own files last.
    let mut files = Vec::new();
    for place in [
        "usr/lib/NetworkManager/conf.d",
        "run/NetworkManager/conf.d",
        "etc/NetworkManager/NetworkManager.conf",
        "etc/NetworkManager/conf.d",
    ] {
        let entries = fs::read_dir(root.join(place)).into_iter().flatten().flatten();
        let mut inside: Vec<_> = entries.map(|entry| entry.path()).collect();
        inside.sort();
        files.push(root.join(place));
        files.append(&mut inside);
    }
    let texts = files.iter().filter_map(|path| fs::read_to_string(path).ok());
    let found = texts.filter_map(|text| main_dns(&text)).next_back();
    Some(found.unwrap_or_else(|| "default".into()))
}

fn main_dns(text: &str) -> Option<String> {
    let (mut section, mut found) = ("", None);
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line;
        } else if let Some((key, value)) = line.split_once('=')
            && (section, key.trim()) == ("[main]", "dns")
        {
            found = Some(value.trim().to_owned());
        }
    }
    found
}

/// The addresses of a table of /proc/net that are bound to port 53. Source: the words are the host's own order.
fn listeners(table: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let (hex, port) = line.split_whitespace().nth(1)?.split_once(':')?;
        if port != "0035" {
            return None;
        }
        let word = |at: usize| u32::from_str_radix(hex.get(at * 8..at * 8 + 8)?, 16).ok();
        if hex.len() == 8 {
            return Some(IpAddr::from(word(0)?.to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for at in 0..4 {
            octets[at * 4..at * 4 + 4].copy_from_slice(&word(at)?.to_ne_bytes());
        }
        Some(IpAddr::from(octets))
    };
    table.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_53_is_found_in_the_kernels_tables() {
        let udp = "  sl  local_address rem_address   st\n  1: 0100007F:0035 00000000:0000 07\n 2: 0100007F:1F90 0:0 07\n";
        assert_eq!(listeners(udp), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
        let udp6 = "  1: 00000000000000000000000001000000:0035 0:0 07\n  2: 00000000000000000000000000000000:0035 0:0 07\n";
        let found = listeners(udp6);
        assert_eq!(found, ["::1".parse::<IpAddr>().unwrap(), "::".parse().unwrap()]);
        let seen = |text: &str| Seen {
            listening: listeners(text),
            ..Seen::default()
        };
        let at = |text: &str, address: &str| seen(text).listens_at(address.parse().unwrap());
        assert!(at(udp, "127.0.0.1") && !at(udp, "127.0.0.53") && !at(udp, "::1"));
        assert!(at(udp6, "127.0.0.53") && at(udp6, "::1") && !at("", "127.0.0.1"));
        assert!(at("1: 00000000:0035 0:0 07", "127.0.1.1") && !at("1: 00000000:0035 0:0 07", "::1"));
    }

    #[test]
    fn network_manager_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let mode = || Seen::read(root.path(), false, None).network_manager;
        write(
            "etc/NetworkManager/NetworkManager.conf",
            "[main]\nplugins=keyfile\n",
        );
        assert_eq!(mode(), None, "it does not run");
        write(
            "sys/fs/cgroup/system.slice/NetworkManager.service/cgroup.procs",
            "1",
        );
        assert_eq!(mode().as_deref(), Some("default"));
        write(
            "etc/NetworkManager/conf.d/dns.conf",
            "[device]\ndns=no\n[main]\n dns = dnsmasq\n",
        );
        assert_eq!(mode().as_deref(), Some("dnsmasq"));
        let said = Seen::read(root.path(), false, Some("none".into()));
        assert_eq!(
            said.network_manager.as_deref(),
            Some("none"),
            "its own word counts"
        );
    }
}
