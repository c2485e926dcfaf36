//! Neighbours of a host that forwards.

use crate::{
    agent::{Agent, ECHO},
    namespace::{alone, connect, shell, try_shell, vips},
};
use std::process::{Child, Command, Stdio};

/// A host beside this one, in a namespace that lives as long as a process.
struct Neighbour(Child);

impl Neighbour {
    fn new() -> Self {
        let child = Command::new("unshare")
            .args(["--net", "sleep", "600"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let neighbour = Self(child);
        crate::agent::wait_for("the neighbour's namespace", || {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
            of(&neighbour.0.id().to_string()) != of("self")
        });
        shell(&format!("ip link set up1 netns {}", neighbour.0.id()));
        neighbour.run("ip link set lo up && ip link set up1 up && ip address add 10.9.0.3/24 dev up1");
        neighbour.run("ip address add fd09::3/64 dev up1 nodad");
        neighbour.run("ip route add 240.240.0.0/16 via 10.9.0.2 && ip -6 route add 2001:2::/48 via fd09::2");
        neighbour
    }

    fn try_run(&self, line: &str) -> bool {
        try_shell(&format!(
            "nsenter --net=/proc/{}/ns/net sh -c '{line}'",
            self.0.id()
        ))
        .0
    }

    fn run(&self, line: &str) {
        assert!(self.try_run(line), "{line}");
    }

    fn reaches(&self, host: &str, port: u16) -> bool {
        self.try_run(&format!("nc -z -w 1 {host} {port}"))
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_neighbour_does_not_speak_as_this_host() {
    alone("lan::a_neighbour_does_not_speak_as_this_host", |world| {
        shell("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let neighbour = Neighbour::new();
        let agent = world.agent();
        for vip in vips(ECHO, 80) {
            connect(vip).unwrap();
            assert!(!neighbour.reaches(&vip.ip().to_string(), 80), "{vip}");
        }
        // Nor does it reach the listeners behind the device.
        neighbour.run("ip route add 240.240.255.253/32 via 10.9.0.2 || true");
        for listener in ["240.240.255.253", "2001:2:0:ffff::253"] {
            assert!(
                !neighbour.reaches(listener, 15001) && !neighbour.reaches(listener, 15053),
                "{listener}"
            );
        }
        drop(agent);
        // Opted in, it does.
        let _agent = Agent::start(world, "10.9.0.0/24,fd09::/64");
        for vip in vips(ECHO, 80) {
            assert!(neighbour.reaches(&vip.ip().to_string(), 80), "{vip}");
        }
    });
}

#[test]
fn new_addresses_of_this_host_count_at_once() {
    alone("lan::new_addresses_of_this_host_count_at_once", |world| {
        let _agent = world.agent();
        let [vip, _] = vips(ECHO, 80);
        connect(vip).unwrap();
        shell("ip address add 10.9.0.77/24 dev up0");
        shell(&format!("nc -z -w 5 -s 10.9.0.77 {} 80", vip.ip()));
    });
}
