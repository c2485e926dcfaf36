//! The life of mesh0, and who may ask for what.

use crate::{
    agent::{ECHO, wait_for},
    namespace::{AGENT, alone, connect, runtime, shell, try_shell, vips},
};
use nix::sys::signal::Signal;
use std::{
    io::{ErrorKind, Read as _, Write as _},
    path::Path,
    time::{Duration, Instant},
};
use tombolo_capture::netd::{DnsSettings, Families, GuardRules, NetdClient, NetdError};
use tombolo_types::AddressPlan;

/// Everything that netd could have changed.
fn host() -> String {
    shell(
        "ip link; ip address; ip route show table all; ip -6 route show table all; ip rule; \
         sysctl -a 2>/dev/null | grep -E 'rp_filter|linkdown' | grep -v mesh0",
    )
}

fn code(error: &NetdError) -> String {
    if let NetdError::Refused { code, .. } = error {
        code.clone()
    } else {
        format!("{error:?}")
    }
}

#[test]
fn without_an_agent_calls_fail_at_once() {
    alone("life::without_an_agent_calls_fail_at_once", |world| {
        // A default route that a call could leak to.
        shell("ip route add default via 10.9.0.1 dev up0 && ip -6 route add default via fd09::1 dev up0");
        let agent = world.agent();
        let mut open: Vec<_> = vips(ECHO, 80).map(|vip| connect(vip).unwrap()).into();
        agent.kill();
        // The kernel spreads the news of a lost carrier within a second.
        wait_for("the routes are left out", || {
            vips(ECHO, 80)
                .iter()
                .all(|vip| !try_shell(&format!("ip route get {}", vip.ip())).0)
        });
        for vip in vips(ECHO, 80) {
            let start = Instant::now();
            assert_eq!(
                connect(vip).unwrap_err().kind(),
                ErrorKind::HostUnreachable,
                "{vip}"
            );
            assert!(
                start.elapsed() < Duration::from_millis(200),
                "{vip}: {:?}",
                start.elapsed()
            );
        }
        let agent = world.agent();
        for vip in vips(ECHO, 80) {
            connect(vip).unwrap();
        }
        // Connections through the dead agent end as soon as they are used.
        for stream in &mut open {
            stream.write_all(b"x").unwrap();
            assert_eq!(
                stream.read(&mut [0; 8]).unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
        }
        // A frozen agent: calls wait, and go on when it does.
        agent.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", agent.pid());
        wait_for("the agent stops", || {
            std::fs::read_to_string(&stat).unwrap().contains(") T ")
        });
        let [vip, _] = vips(ECHO, 80);
        let waiting = std::thread::spawn(move || connect(vip));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!waiting.is_finished());
        agent.signal(Signal::SIGCONT);
        waiting.join().unwrap().unwrap();
    });
}

#[test]
fn revert_leaves_nothing() {
    alone("life::revert_leaves_nothing", |world| {
        let before = host();
        let agent = world.agent();
        assert!(host() != before);
        let routes = shell("ip route get 240.240.3.4; ip -6 route get 2001:2::34");
        assert!(
            routes.contains("mesh0 src 240.240.255.253") && routes.contains("src 2001:2:0:ffff::253"),
            "{routes}"
        );
        assert!(
            !shell("ip -6 address show dev mesh0").contains("fe80::"),
            "no link-local address"
        );
        drop(agent);
        runtime().block_on(async {
            let netd = NetdClient::connect(&world.socket).await.unwrap();
            netd.revert().await.unwrap();
            netd.revert().await.unwrap();
        });
        let after = host();
        let changed: Vec<_> = after.lines().filter(|line| !before.contains(line)).collect();
        assert!(after == before, "{changed:?}");
    });
}

#[test]
fn the_device_ends_under_the_agent() {
    alone("life::the_device_ends_under_the_agent", |world| {
        let agent = world.agent();
        runtime().block_on(async {
            NetdClient::connect(&world.socket)
                .await
                .unwrap()
                .revert()
                .await
                .unwrap()
        });
        // Its events end, and so does it.
        let status = format!("/proc/{}/stat", agent.pid());
        wait_for("the agent ends", || {
            std::fs::read_to_string(&status).unwrap().contains(") Z ")
        });
        let agent = world.agent();
        connect(vips(ECHO, 80)[0]).unwrap();
        drop(agent);
    });
}

#[test]
fn a_prefix_that_is_routed_already_is_refused() {
    alone("life::a_prefix_that_is_routed_already_is_refused", |world| {
        runtime().block_on(async {
            let netd = NetdClient::connect(&world.socket).await.unwrap();
            let plan = AddressPlan::default();
            netd.set_address(plan, true, true).await.unwrap();
            for route in ["240.240.3.0/24", "240.0.0.0/8", "2001:2:0:7::/64"] {
                shell(&format!("ip route add {route} dev up0"));
                let error = netd.set_route(plan, true, true).await.unwrap_err();
                let text = error.to_string();
                assert!(
                    code(&error) == "TMB0114" && text.contains("up0") && text.contains(route),
                    "{text}"
                );
                assert!(
                    !shell("ip route; ip -6 route").contains("mesh0"),
                    "nothing half done"
                );
                shell(&format!("ip route del {route} dev up0"));
            }
            // Halves of the address space are how VPN clients write a default route.
            shell("ip route add 128.0.0.0/1 dev up0");
            netd.set_route(plan, true, true).await.unwrap();
            netd.set_route(plan, true, true).await.unwrap();
            // Another plan, another family: what was before goes.
            let other = AddressPlan::from_prefixes(["10.240.0.0/16"]).unwrap();
            netd.set_address(other, true, false).await.unwrap();
            netd.set_route(other, true, false).await.unwrap();
            let routes = shell("ip route; ip -6 route; ip address show dev mesh0");
            assert!(
                routes.contains("10.240.0.0/16 dev mesh0") && routes.contains("unreachable 10.240.0.0/16")
            );
            assert!(
                !routes.contains("240.240.") && !routes.contains("2001:2:"),
                "{routes}"
            );
            // Address space of the Internet is never routed to an agent.
            let public = AddressPlan::from_prefixes(["8.0.0.0/8"]).unwrap();
            assert_eq!(
                code(&netd.set_route(public, true, true).await.unwrap_err()),
                "TMB0311"
            );
        });
    });
}

#[test]
fn a_family_is_offered_where_the_host_has_it() {
    alone("life::a_family_is_offered_where_the_host_has_it", |world| {
        runtime().block_on(async {
            let netd = NetdClient::connect(&world.socket).await.unwrap();
            let plan = AddressPlan::default();
            let offered = async || netd.set_address(plan, true, true).await.unwrap();
            assert_eq!(
                offered().await,
                Families {
                    ipv4: true,
                    ipv6: true
                }
            );
            shell("ip -6 address flush dev up0 scope global");
            assert_eq!(
                offered().await,
                Families {
                    ipv4: true,
                    ipv6: false
                }
            );
            assert!(!shell("ip address show dev mesh0").contains("inet6"));
            shell("sysctl -w net.ipv6.conf.mesh0.disable_ipv6=1; ip address add fd09::2/64 dev up0 nodad");
            assert_eq!(
                offered().await,
                Families {
                    ipv4: true,
                    ipv6: false
                },
                "disabled: never fatal"
            );
            shell("sysctl -w net.ipv6.conf.mesh0.disable_ipv6=0; ip address del 10.9.0.2/24 dev up0");
            assert_eq!(
                offered().await,
                Families {
                    ipv4: false,
                    ipv6: true
                }
            );
        });
    });
}

#[test]
fn strangers_are_not_answered_and_later_verbs_say_so() {
    alone(
        "life::strangers_are_not_answered_and_later_verbs_say_so",
        |world| {
            let stranger = std::process::Command::new("setpriv")
                .args(["--reuid", &(AGENT - 1).to_string(), "--clear-groups", "--"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "--ignored", "life::stranger"])
                .env("STRANGER_SOCKET", &world.socket)
                .status();
            assert!(stranger.unwrap().success());
            runtime().block_on(async {
                let netd = NetdClient::connect(&world.socket).await.unwrap();
                assert_eq!(
                    code(&netd.set_guard(GuardRules::default()).await.unwrap_err()),
                    "TMB0312"
                );
                let error = netd.set_dns(DnsSettings::default()).await.unwrap_err();
                assert!(
                    error
                        .to_string()
                        .starts_with("TMB0312 This version cannot do that."),
                    "{error}"
                );
                // A second agent is told what is in its way.
                let first = netd.open_tun().await.unwrap();
                let error = netd.open_tun().await.unwrap_err();
                assert!(
                    code(&error) == "TMB0311" && error.to_string().contains("another process"),
                    "{error}"
                );
                drop(first);
                netd.open_tun().await.unwrap();
            });
        },
    );
}

/// Another user's process; not a test by itself.
#[test]
#[ignore = "started by another test"]
fn stranger() {
    let Some(socket) = std::env::var_os("STRANGER_SOCKET") else {
        return;
    };
    runtime().block_on(async {
        let error = NetdClient::connect(Path::new(&socket)).await.unwrap_err();
        assert!(matches!(error, NetdError::Io(_)), "{error}");
    });
}

#[test]
fn another_kind_of_link_is_left_alone() {
    alone("life::another_kind_of_link_is_left_alone", |world| {
        shell("ip link add mesh0 type bridge");
        runtime().block_on(async {
            let netd = NetdClient::connect(&world.socket).await.unwrap();
            assert_eq!(code(&netd.open_tun().await.unwrap_err()), "TMB0311");
            assert_eq!(
                code(
                    &netd
                        .set_address(AddressPlan::default(), true, true)
                        .await
                        .unwrap_err()
                ),
                "TMB0311"
            );
            assert_eq!(code(&netd.revert().await.unwrap_err()), "TMB0311");
        });
        shell("ip link show mesh0");
    });
}
