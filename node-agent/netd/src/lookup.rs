//! Who looks up names on this host, judged by what was read and nothing else.

use crate::seen::{Daemon, Seen};
use std::net::{IpAddr, Ipv4Addr};
use tombolo_capture::netd::{DnsSettings, NamesMode};

/// Where systemd-resolved listens for programs that speak DNS: its stub, and the one that does not expand names.
const STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];

/// How programs of the host look up names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// systemd-resolved, by its stub or nss-resolve.
    Resolved,
    /// systemd-resolved runs, but nothing leads programs to it.
    ResolvedUnused,
    /// The dnsmasq that NetworkManager runs.
    NetworkManagerDnsmasq,
    Dnsmasq,
    Unbound,
    /// BIND.
    Named,
    /// Something else that listens on this host.
    Server(IpAddr),
    /// The servers of a plain /etc/resolv.conf, written by NetworkManager or not.
    File {
        network_manager: bool,
    },
}

impl Seen {
    /// True if programs come to systemd-resolved: by the C library, or by the first server of /etc/resolv.conf.
    pub(crate) fn leads_to_resolved(&self) -> bool {
        let stub = |server: &IpAddr| STUBS.iter().any(|stub| *server == IpAddr::V4(*stub));
        nss_resolve(&self.nsswitch) || self.servers().first().is_some_and(stub)
    }
}

impl Lookup {
    /// Judges.
    pub(crate) fn of(seen: &Seen) -> Self {
        if seen.resolved && seen.leads_to_resolved() {
            return Self::Resolved;
        }
        let servers = seen.servers();
        if let Some(local) = servers.first().filter(|server| server.is_loopback()) {
            return match seen.running.first() {
                Some(Daemon::NetworkManagerDnsmasq) => Self::NetworkManagerDnsmasq,
                Some(Daemon::Dnsmasq) => Self::Dnsmasq,
                Some(Daemon::Unbound) => Self::Unbound,
                Some(Daemon::Named) => Self::Named,
                None if seen.network_manager.as_deref() == Some("dnsmasq") => Self::NetworkManagerDnsmasq,
                None => Self::Server(*local),
            };
        }
        if seen.resolved {
            return Self::ResolvedUnused;
        }
        let by_manager = |line: &str| line.starts_with('#') && line.contains("NetworkManager");
        Self::File {
            network_manager: matches!(seen.network_manager.as_deref(), Some("default"))
                || seen.resolv_conf.lines().any(by_manager),
        }
    }

    /// The back-end that can point it at the mesh's names alone, without a word of the host's owner.
    pub(crate) const fn backend(&self) -> Option<NamesMode> {
        match self {
            Self::Resolved => Some(NamesMode::Resolved),
            Self::NetworkManagerDnsmasq => Some(NamesMode::NetworkManager),
            Self::Dnsmasq => Some(NamesMode::Dnsmasq),
            Self::Unbound => Some(NamesMode::Unbound),
            Self::ResolvedUnused | Self::Named | Self::Server(_) | Self::File { .. } => None,
        }
    }

    /// Its name, for people.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Resolved => "systemd-resolved".into(),
            Self::ResolvedUnused => "/etc/resolv.conf, past systemd-resolved".into(),
            Self::NetworkManagerDnsmasq => "NetworkManager's dnsmasq".into(),
            Self::Dnsmasq => "dnsmasq".into(),
            Self::Unbound => "unbound".into(),
            Self::Named => "named".into(),
            Self::Server(address) => format!("the server at {address}"),
            Self::File {
                network_manager: true,
            } => "/etc/resolv.conf, by NetworkManager".into(),
            Self::File {
                network_manager: false,
            } => "/etc/resolv.conf".into(),
        }
    }

    /// What an administrator does; empty where there is nothing to do.
    pub(crate) fn advice(&self, settings: &DnsSettings) -> String {
        let domain = &settings.domain;
        let server = settings
            .servers
            .first()
            .map_or_else(String::new, IpAddr::to_string);
        let dnsmasq = format!("server=/{domain}/{server}");
        match self {
            Self::Resolved => String::new(),
            Self::ResolvedUnused => {
                "systemd-resolved runs and could ask the mesh, but programs do not come to it; run: \
                 ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf"
                    .into()
            }
            Self::NetworkManagerDnsmasq => format!(
                "add to a file of your own under /etc/NetworkManager/dnsmasq.d, and run systemctl reload \
                 NetworkManager: {dnsmasq}"
            ),
            Self::Dnsmasq => format!(
                "add to a file of your own under /etc/dnsmasq.d, and run systemctl restart dnsmasq: {dnsmasq}"
            ),
            Self::Unbound => format!(
                "add to a file of your own under /etc/unbound/unbound.conf.d, and run systemctl reload unbound: \
                 server: domain-insecure: \"{domain}\" forward-zone: name: \"{domain}\" forward-addr: {server}"
            ),
            Self::Named => format!(
                "add to named.conf.local, and run systemctl reload named: \
                 zone \"{domain}\" {{ type forward; forward only; forwarders {{ {server}; }}; }};"
            ),
            Self::Server(_) => format!("have it forward {domain} to {server}"),
            Self::File {
                network_manager: true,
            } => format!(
                "a plain list of servers cannot have one for {domain} alone; add under [main] of \
                 /etc/NetworkManager/NetworkManager.conf, with systemd-resolved installed: dns=systemd-resolved"
            ),
            Self::File {
                network_manager: false,
            } => format!(
                "a plain list of servers cannot have one for {domain} alone; install systemd-resolved, or dnsmasq \
                 with: {dnsmasq} (or see tombolo up --help, --names resolv-conf, for what that costs)"
            ),
        }
    }
}

/// True if the C library asks systemd-resolved before DNS servers. Source: nsswitch.conf(5), nss-resolve(8).
fn nss_resolve(nsswitch: &str) -> bool {
    let hosts = nsswitch.lines().find_map(|line| {
        let line = line.split('#').next().unwrap_or_default();
        line.trim().strip_prefix("hosts:")
    });
    let mut services = hosts.unwrap_or_default().split_whitespace();
    services.find(|service| matches!(*service, "resolve" | "dns")) == Some("resolve")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const NSS: &str = "passwd: files\nhosts: files resolve [!UNAVAIL=return] dns\n";
    const SOCKET: &str = "Num RefCount Protocol Flags Type St Inode Path\n\
                          0000: 00000002 00000000 00010000 0001 01 77 /run/systemd/resolve/io.systemd.Resolve\n";
    const STUB: &str = "# by resolved\nnameserver 127.0.0.53\noptions edns0\nsearch .\n";

    fn detect(files: &[(&str, &str)], resolved: bool) -> Lookup {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        Lookup::of(&Seen::read(root.path(), resolved, None))
    }

    #[test]
    fn resolved_where_programs_come_to_it() {
        let here = ("proc/net/unix", SOCKET);
        assert_eq!(detect(&[here, ("etc/resolv.conf", STUB)], true), Lookup::Resolved);
        assert_eq!(
            detect(&[here, ("etc/nsswitch.conf", NSS)], true),
            Lookup::Resolved
        );
        let uplink = ("etc/resolv.conf", "nameserver 10.0.0.1\n");
        assert_eq!(
            detect(&[here, ("etc/nsswitch.conf", NSS), uplink], true),
            Lookup::Resolved
        );
        let dns_first = ("etc/nsswitch.conf", "hosts: files dns resolve # resolve\n");
        assert_eq!(detect(&[here, dns_first, uplink], true), Lookup::ResolvedUnused);
        // On the bus, but of another network namespace; or not running at all.
        for resolved in [true, false] {
            let elsewhere = detect(&[("etc/resolv.conf", STUB), ("etc/nsswitch.conf", NSS)], resolved);
            assert_eq!(elsewhere, Lookup::Server(STUBS[0].into()));
        }
        assert_eq!(
            detect(&[here, ("etc/resolv.conf", STUB)], false),
            Lookup::Server(STUBS[0].into())
        );
    }

    #[test]
    fn other_servers_of_the_host() {
        let local = (
            "etc/resolv.conf",
            "# mine\nsearch example.com\nnameserver 127.0.0.1\n",
        );
        let table = [
            ("run/NetworkManager/dnsmasq.pid", Lookup::NetworkManagerDnsmasq),
            ("run/dnsmasq/dnsmasq.pid", Lookup::Dnsmasq),
            (
                "sys/fs/cgroup/system.slice/dnsmasq.service/cgroup.procs",
                Lookup::Dnsmasq,
            ),
            ("run/unbound.pid", Lookup::Unbound),
            (
                "sys/fs/cgroup/unified/system.slice/unbound.service/cgroup.procs",
                Lookup::Unbound,
            ),
            ("run/named/named.pid", Lookup::Named),
            ("run/else.pid", Lookup::Server([127, 0, 0, 1].into())),
        ];
        for (file, expected) in table {
            assert_eq!(detect(&[local, (file, "1")], false), expected, "{file}");
        }
        // It runs, but no program of the host asks it.
        let away = ("etc/resolv.conf", "nameserver 10.0.0.1\n");
        let file = |network_manager| Lookup::File { network_manager };
        assert_eq!(detect(&[away, ("run/dnsmasq.pid", "1")], false), file(false));
        let managed = (
            "etc/resolv.conf",
            "# Generated by NetworkManager\nnameserver fe80::1%eth0\n",
        );
        assert_eq!(detect(&[managed], false), file(true));
        assert_eq!(detect(&[], false), file(false));
    }

    /// What was read, and what follows from it.
    #[test]
    fn every_kind_of_host() {
        let stub = "nameserver 127.0.0.53\n";
        let local = "nameserver 127.0.0.1\nnameserver 10.0.0.1\n";
        let away = "nameserver 10.0.0.1\nnameserver 127.0.0.1\n";
        let files = "hosts: files dns\n";
        let seen = |resolv_conf: &str, nsswitch: &str, resolved, nm: Option<&str>, running: &[Daemon]| Seen {
            resolv_conf: resolv_conf.into(),
            nsswitch: nsswitch.into(),
            resolved,
            network_manager: nm.map(str::to_owned),
            running: running.to_vec(),
            ..Seen::default()
        };
        let file = |network_manager| Lookup::File { network_manager };
        let server = Lookup::Server([127, 0, 0, 1].into());
        let both = &[Daemon::NetworkManagerDnsmasq, Daemon::Dnsmasq][..];
        let table = [
            (seen(stub, files, true, None, &[]), Lookup::Resolved, "resolved"),
            (
                seen(away, NSS, true, Some("systemd-resolved"), &[]),
                Lookup::Resolved,
                "resolved",
            ),
            (seen(away, files, true, None, &[]), Lookup::ResolvedUnused, ""),
            (
                seen(local, files, true, None, &[Daemon::Dnsmasq]),
                Lookup::Dnsmasq,
                "dnsmasq",
            ),
            (
                seen(local, NSS, true, None, &[Daemon::Dnsmasq]),
                Lookup::Resolved,
                "resolved",
            ),
            (
                seen(local, files, false, Some("dnsmasq"), both),
                Lookup::NetworkManagerDnsmasq,
                "networkmanager",
            ),
            (
                seen(local, files, false, Some("dnsmasq"), &[]),
                Lookup::NetworkManagerDnsmasq,
                "networkmanager",
            ),
            (
                seen(local, files, false, Some("none"), &[Daemon::Unbound]),
                Lookup::Unbound,
                "unbound",
            ),
            (
                seen(local, files, false, None, &[Daemon::Named]),
                Lookup::Named,
                "",
            ),
            (seen(local, files, false, None, &[]), server, ""),
            (
                seen(away, files, false, None, &[Daemon::Dnsmasq]),
                file(false),
                "",
            ),
            (seen(away, files, false, Some("default"), &[]), file(true), ""),
            (seen(away, files, false, Some("none"), &[]), file(false), ""),
            (seen("", "", false, None, &[]), file(false), ""),
        ];
        for (seen, lookup, backend) in table {
            let found = Lookup::of(&seen);
            assert_eq!(found, lookup, "{seen:?}");
            assert_eq!(found.backend().map_or("", NamesMode::as_str), backend, "{seen:?}");
        }
    }

    #[test]
    fn advice_is_the_line() {
        let settings = DnsSettings {
            domain: "mesh.internal".into(),
            servers: vec!["240.240.255.254".parse().unwrap()],
        };
        assert_eq!(Lookup::Resolved.advice(&settings), "");
        for (lookup, line) in [
            (Lookup::Dnsmasq, ": server=/mesh.internal/240.240.255.254"),
            (
                Lookup::NetworkManagerDnsmasq,
                ": server=/mesh.internal/240.240.255.254",
            ),
            (
                Lookup::Unbound,
                "forward-zone: name: \"mesh.internal\" forward-addr: 240.240.255.254",
            ),
            (
                Lookup::Server([127, 0, 0, 1].into()),
                "forward mesh.internal to 240.240.255.254",
            ),
            (
                Lookup::File {
                    network_manager: false,
                },
                "dnsmasq with: server=/mesh.internal/240.240.255.254 (or see tombolo up --help, --names resolv-conf, for \
                 what that costs)",
            ),
        ] {
            assert!(
                lookup.advice(&settings).ends_with(line),
                "{}",
                lookup.advice(&settings)
            );
        }
    }
}
