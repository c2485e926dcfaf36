//! Who looks up names on this host, found by reading and nothing else.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};
use tombolo_capture::netd::DnsSettings;

/// Where systemd-resolved listens for programs that speak DNS: its stub, and the one that does not expand names.
const STUBS: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)];
/// Its socket for nss-resolve, since systemd 247. Unix sockets are listed in the network namespace that they were made
/// in only: a resolver of another namespace, seen through a bus that is shared, is not this host's.
const VARLINK: &str = "/run/systemd/resolve/io.systemd.Resolve";

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

impl Lookup {
    /// Reads below `root`, which is `/` but in tests. `resolved` says whether systemd-resolved is on the bus.
    pub(crate) fn detect(root: &Path, resolved: bool) -> Self {
        let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let any = |paths: &[&str]| paths.iter().any(|path| root.join(path).exists());
        let conf = read("etc/resolv.conf");
        let servers = servers(&conf);
        let here = read("proc/net/unix").lines().any(|line| line.ends_with(VARLINK));
        let resolved = resolved && here;
        let stub = |server: &IpAddr| STUBS.iter().any(|stub| *server == IpAddr::V4(*stub));
        if resolved && (nss_resolve(&read("etc/nsswitch.conf")) || servers.first().is_some_and(stub)) {
            return Self::Resolved;
        }
        if let Some(local) = servers.first().filter(|server| server.is_loopback()) {
            // Processes of other users are not seen from a sandbox; what they leave in /run is, and their units.
            return if any(&["run/NetworkManager/dnsmasq.pid"]) {
                Self::NetworkManagerDnsmasq
            } else if any(&["run/dnsmasq/dnsmasq.pid", "run/dnsmasq.pid"]) || unit(root, "dnsmasq") {
                Self::Dnsmasq
            } else if any(&["run/unbound.pid", "run/unbound/unbound.pid"]) || unit(root, "unbound") {
                Self::Unbound
            } else if any(&["run/named/named.pid", "run/named.pid"]) || unit(root, "named") {
                Self::Named
            } else {
                Self::Server(*local)
            };
        }
        if resolved {
            return Self::ResolvedUnused;
        }
        let by_manager = |line: &str| line.starts_with('#') && line.contains("NetworkManager");
        Self::File {
            network_manager: conf.lines().any(by_manager),
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
                 with: {dnsmasq}"
            ),
        }
    }
}

/// The `nameserver` lines, in order. Source: resolv.conf(5).
fn servers(conf: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver"))
            .then(|| words.next()?.split('%').next()?.parse().ok())
            .flatten()
    };
    conf.lines().filter_map(server).collect()
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

/// True while a unit of systemd has processes.
fn unit(root: &Path, name: &str) -> bool {
    ["sys/fs/cgroup", "sys/fs/cgroup/unified", "sys/fs/cgroup/systemd"]
        .iter()
        .any(|tree| root.join(format!("{tree}/system.slice/{name}.service")).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Lookup::detect(root.path(), resolved)
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
                "dnsmasq with: server=/mesh.internal/240.240.255.254",
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
