//! Every hardening line of the units: tried from inside, where something can be tried, and a reason where not.

use crate::needs_machines;
use anyhow::{Context as _, Result, ensure};
use std::{collections::BTreeMap, fs};
use tombolo_packages::{Machine, Yard, packaging, revision};

const UNITS: [&str; 4] = [
    "tombolo-agent",
    "tombolo-netd",
    "tombolo-gateway",
    "tombolo-discovery",
];

/// What proves a line.
enum Proof {
    /// This shell line works without the line and fails with it. `perl` makes the calls that no tool makes.
    Try(&'static str),
    /// This shell line works with it: what it says of the process is true.
    Holds(&'static str),
    /// It is no restriction, or none that can be tried here; this is why it is there and what covers it.
    Reason(&'static str),
}
use Proof::{Holds, Reason, Try};

const PROOFS: &[(&str, Proof)] = &[
    (
        "Type",
        Reason("members_call_each_other_over_reboots_and_outages waits for READY"),
    ),
    (
        "NotifyAccess",
        Reason("Type=notify needs it; main is the narrowest"),
    ),
    ("ExecStart", Reason("runs")),
    ("ExecReload", Reason("the upgrade suite reloads")),
    ("User", Holds("test \"$(id -u)\" != 0")),
    ("Group", Holds("test \"$(id -g)\" != 0")),
    (
        "SupplementaryGroups",
        Reason(
            "dnsmasq_and_unbound_get_a_file_of_their_own_and_give_it_back reads owner and group of the file",
        ),
    ),
    ("RuntimeDirectory", Reason("the_sandbox_holds writes there")),
    (
        "RuntimeDirectoryMode",
        Reason("only_root_and_the_admin_group_are_served: the socket checks who asks"),
    ),
    (
        "RuntimeDirectoryPreserve",
        Reason("what_goes_wrong_at_a_reload_and_after_it: the next process finds the one before"),
    ),
    ("StateDirectory", Reason("the_sandbox_holds writes there")),
    (
        "StateDirectoryMode",
        Reason("the_sandbox_holds reads mode and owner"),
    ),
    ("UMask", Holds("test \"$(umask)\" = 0077")),
    (
        "Restart",
        Reason("members_call_each_other_over_reboots_and_outages kills it"),
    ),
    (
        "RestartSec",
        Reason("members_call_each_other_over_reboots_and_outages kills it"),
    ),
    (
        "WatchdogSec",
        Reason("members_call_each_other_over_reboots_and_outages stops it"),
    ),
    (
        "TimeoutStartSec",
        Reason("bounds a start; trouble_is_said_where_administrators_look needs less"),
    ),
    ("TimeoutStopSec", Reason("longer than drain_seconds")),
    (
        "KillMode",
        Reason("what_goes_wrong_at_a_reload_and_after_it kills the main process; what is open goes on"),
    ),
    ("FileDescriptorStoreMax", Reason("the upgrade suite reloads")),
    (
        "LimitNOFILE",
        Reason("no restriction; a proxy needs two descriptors a connection"),
    ),
    (
        "OOMScoreAdjust",
        Reason("no restriction; others go first when memory ends"),
    ),
    (
        "CapabilityBoundingSet",
        Try("mknod $TMP/x c 1 3 || chroot / true"),
    ),
    (
        "AmbientCapabilities",
        // None, or the gateway's one for port 443: 1 << 10.
        Holds("grep -qE 'CapAmb:.(0000000000000400|0*)$' /proc/self/status"),
    ),
    (
        "NoNewPrivileges",
        Holds("grep -q 'NoNewPrivs:.1' /proc/self/status"),
    ),
    ("ProtectSystem", Try("touch /usr/x && rm /usr/x")),
    (
        "ReadWritePaths",
        Holds("test -w /proc/sys/net/ipv4/conf/all/ignore_routes_with_linkdown"),
    ),
    ("ProtectHome", Try("ls /root/.profile")),
    ("PrivateTmp", Try("test -e /tmp/marker")),
    (
        "PrivateDevices",
        Try("test -e /dev/kmsg -o -e /dev/fuse -o -e /dev/tty0 -o -e /dev/console"),
    ),
    ("BindPaths", Holds("test -c /dev/net/tun")),
    (
        "DevicePolicy",
        Reason("belongs to PrivateDevices=; the cgroup's part needs a kernel of its own"),
    ),
    (
        "DeviceAllow",
        Reason("as DevicePolicy=; mesh0 could not be made without it"),
    ),
    ("ProtectProc", Try("test -e /proc/1/status")),
    (
        "ProtectClock",
        Reason("a container has no clock to set; the calls are in the filter's @clock besides"),
    ),
    (
        "ProtectControlGroups",
        Try("mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x"),
    ),
    ("ProtectHostname", Try("hostname \"$(hostname)\"")),
    (
        "ProtectKernelLogs",
        Reason("a container has no kernel log; the call is in the filter's @syslog besides"),
    ),
    (
        "ProtectKernelModules",
        Try("mkdir -p /usr/lib/modules && ls /usr/lib/modules/"),
    ),
    (
        "ProtectKernelTunables",
        Try("echo 64 > /proc/sys/net/core/somaxconn"),
    ),
    (
        "RestrictAddressFamilies",
        Try("perl -e 'exit(socket(my $s, 17, 3, 0) ? 0 : 1)'"),
    ),
    (
        "IPAddressDeny",
        Reason("its filter needs a cgroup of its own; netd has no socket that could send besides"),
    ),
    (
        "RestrictNamespaces",
        Try("unshare --uts true || unshare --user true"),
    ),
    (
        "RestrictRealtime",
        Reason("a container has no realtime budget to give; the call is in the filter's @resources besides"),
    ),
    ("RestrictSUIDSGID", Try("touch $TMP/s && chmod u+s $TMP/s")),
    (
        "LockPersonality",
        Try("perl -e 'exit(syscall(135, 8) >= 0 ? 0 : 1)'"),
    ),
    (
        "MemoryDenyWriteExecute",
        Try("perl -e 'exit(syscall(9, 0, 4096, 7, 0x22, -1, 0) == -1 ? 1 : 0)'"),
    ),
    (
        "RemoveIPC",
        Reason("it makes no such objects; what a fault would leave goes with it"),
    ),
    (
        "KeyringMode",
        Reason("it uses no keys of the kernel; those of root's session are not lent"),
    ),
    (
        "SystemCallArchitectures",
        Reason("needs a 32-bit program to try; none is on the host"),
    ),
    // setpriority is in @resources, chown in @privileged: neither needs a privilege for oneself.
    (
        "SystemCallFilter",
        Try("perl -e 'exit(syscall(141, 0, 0, 1) == 0 ? 0 : 1)'"),
    ),
    (
        "SystemCallErrorNumber",
        Holds("perl -e 'syscall(141, 0, 0, 1); exit($!{EPERM} ? 0 : 1)'"),
    ),
];

/// The `[Service]` lines of a unit: key to values, in order.
fn service_lines(unit: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let text = fs::read_to_string(packaging().join(format!("systemd/{unit}.service")))?;
    let mut lines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let own = text
        .lines()
        .skip_while(|line| *line != "[Service]")
        .skip(1)
        .take_while(|line| !line.starts_with('['));
    for line in own.filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (key, value) = line.split_once('=').with_context(|| line.to_owned())?;
        lines.entry(key.to_owned()).or_default().push(value.to_owned());
    }
    Ok(lines)
}

/// Runs lines in a service with these properties; gives the keys of those that worked.
fn worked(vm: &Machine, properties: &str, lines: &[(&str, &str)]) -> Result<Vec<String>> {
    let mut script = String::from("TMP=$STATE_DIRECTORY\n");
    for (key, line) in lines {
        script.push_str(&format!("if ( {line} ) >/dev/null 2>&1; then echo {key}; fi\n"));
    }
    vm.write("/opt/try.sh", "0755", &script)?;
    let said = vm.ok(&format!(
        "systemd-run --quiet --wait --pipe --collect -p StateDirectory=tried {properties} sh /opt/try.sh"
    ))?;
    Ok(said.lines().map(str::to_owned).collect())
}

#[test]
fn every_hardening_line_is_tried_or_has_a_reason() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let vm = yard.machine("vm")?;
    vm.add_repository(revision(1)?)?;
    vm.apt("install tombolo-agent tombolo-gateway tombolo-discovery")?;
    vm.ok("touch /tmp/marker /root/.profile")?;
    for unit in UNITS {
        let lines = service_lines(unit)?;
        for key in lines.keys() {
            ensure!(
                PROOFS.iter().any(|(known, _)| known == key),
                "{unit}: {key}= has neither a test nor a reason"
            );
        }
        let proof = |key: &str| {
            PROOFS
                .iter()
                .find(|(known, _)| *known == key)
                .map(|(_, proof)| proof)
        };
        let tried: Vec<_> = lines
            .keys()
            .filter_map(|key| match proof(key)? {
                Try(line) | Holds(line) => Some((key.as_str(), *line)),
                Reason(reason) => {
                    assert!(!reason.is_empty());
                    None
                }
            })
            .collect();
        // Those lines themselves, for a service that does nothing but try.
        let own = |key: &str| {
            ![
                "Type",
                "NotifyAccess",
                "Restart",
                "StateDirectory",
                "RuntimeDirectory",
                "Watchdog",
                "Exec",
                "Timeout",
                "FileDescriptor",
            ]
            .iter()
            .any(|other| key.starts_with(other))
        };
        let mut properties: Vec<String> = lines
            .iter()
            .filter(|(key, _)| own(key))
            .flat_map(|(key, values)| values.iter().map(move |value| format!("-p '{key}={value}'")))
            .collect();
        if lines.contains_key("LimitNOFILE") {
            properties.retain(|property| !property.contains("LimitNOFILE"));
        }
        let inside = worked(&vm, &properties.join(" "), &tried)?;
        let outside = worked(&vm, "", &tried)?;
        for (key, line) in &tried {
            let (inside, outside) = (inside.iter().any(|k| k == key), outside.iter().any(|k| k == key));
            match proof(key) {
                Some(Try(_)) => {
                    ensure!(!inside, "{unit}: {key}= does not forbid: {line}");
                    ensure!(
                        outside,
                        "{unit}: {key}=: nobody can do this here, so it proves nothing: {line}"
                    );
                }
                _ => ensure!(inside, "{unit}: {key}= does not hold: {line}"),
            }
        }
        println!("{unit}: {} lines, {} of them tried", lines.len(), tried.len());
    }
    Ok(())
}
