use crate::{Host, Lab, Output, Shape, lab::run};
use anyhow::Result;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A private network, `10.0.0.0/24` in each, behind a router that masquerades, drops everything that comes in, and lets
/// nothing out but port 443.
#[derive(Debug)]
pub struct Lan {
    ns: String,
    address: Ipv4Addr,
    hosts: u8,
}

impl Lan {
    /// Network namespace of its router: hosts are on `br0`, the internet on `up0`.
    pub fn namespace(&self) -> &str {
        &self.ns
    }

    /// Address on the internet: what others see of everybody inside.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Runs a command on its router.
    ///
    /// # Errors
    /// When it cannot be started or exits with another code than 0.
    pub fn on_router(&self, line: &str) -> Result<Output> {
        let mut args = vec!["netns", "exec", &self.ns];
        args.extend(line.split(' '));
        run("ip", &args)
    }
}

impl Lab {
    /// Adds a private network with a way out to the router of the lab.
    ///
    /// # Errors
    /// When a namespace, a link or a rule cannot be made.
    pub fn lan(&mut self, name: &str) -> Result<Lan> {
        let n = self.take_number();
        let (ns, router) = (self.namespace_of(name), self.router());
        run("ip", &["netns", "add", &ns])?;
        for step in [
            format!("link add h{n} netns {router} type veth peer name up0 netns {ns}"),
            format!("-n {router} addr add 10.77.{n}.1/24 dev h{n}"),
            format!("-n {router} link set h{n} up"),
            format!("-n {ns} link set lo up"),
            format!("-n {ns} addr add 10.77.{n}.2/24 dev up0"),
            format!("-n {ns} link set up0 up"),
            format!("-n {ns} route add default via 10.77.{n}.1"),
            format!("-n {ns} link add br0 type bridge"),
            format!("-n {ns} addr add 10.0.0.1/24 dev br0"),
            format!("-n {ns} link set br0 up"),
        ] {
            run("ip", &step.split(' ').collect::<Vec<_>>())?;
        }
        let lan = Lan {
            ns,
            address: Ipv4Addr::new(10, 77, n, 2),
            hosts: 0,
        };
        for line in [
            "sysctl -qw net.ipv4.ip_forward=1",
            "iptables -P INPUT DROP",
            "iptables -P FORWARD DROP",
            // Where bridged frames pass the firewall too.
            "iptables -A FORWARD -i br0 -o br0 -j ACCEPT",
            "iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "iptables -A FORWARD -i br0 -o up0 -p tcp --dport 443 -j ACCEPT",
            "iptables -A FORWARD -i br0 -o up0 -p udp --dport 443 -j ACCEPT",
            // Nothing hangs where a site would say no.
            "iptables -A FORWARD -i br0 -j REJECT --reject-with icmp-admin-prohibited",
            "iptables -t nat -A POSTROUTING -o up0 -j MASQUERADE",
        ] {
            lan.on_router(line)?;
        }
        Ok(lan)
    }

    /// Adds a host to a private network, as `10.0.0.LAST`.
    ///
    /// # Errors
    /// As [`Lab::host`].
    pub fn lan_host(&mut self, lan: &mut Lan, name: &str, last: u8) -> Result<Host> {
        let ns = self.namespace_of(name);
        run("ip", &["netns", "add", &ns])?;
        run("ip", &["-n", &ns, "link", "set", "lo", "up"])?;
        let link = plug(lan, &ns, "eth0", last)?;
        run("ip", &["-n", &ns, "route", "add", "default", "via", "10.0.0.1"])?;
        let shape = Shape {
            ipv6: false,
            ..Shape::default()
        };
        let address = Ipv4Addr::new(10, 0, 0, last);
        Host::start(
            name,
            ns,
            link,
            lan.ns.clone(),
            self.dir(),
            shape,
            address,
            Ipv6Addr::UNSPECIFIED,
        )
    }

    /// Gives a host a second foot, in a private network, as `10.0.0.LAST` on `lan0`.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn attach(&self, host: &Host, lan: &mut Lan, last: u8) -> Result<()> {
        plug(lan, host.namespace(), "lan0", last).map(drop)
    }
}

fn plug(lan: &mut Lan, ns: &str, device: &str, last: u8) -> Result<String> {
    lan.hosts += 1;
    let (router, link) = (&lan.ns, format!("l{}", lan.hosts));
    for step in [
        format!("link add {link} netns {router} type veth peer name {device} netns {ns}"),
        format!("-n {router} link set {link} master br0 up"),
        format!("-n {ns} addr add 10.0.0.{last}/24 dev {device}"),
        format!("-n {ns} link set {device} up"),
    ] {
        run("ip", &step.split(' ').collect::<Vec<_>>())?;
    }
    Ok(link)
}
