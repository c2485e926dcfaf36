//! A guarded port over a boot, a missing tool, the removal of the package and its return.

use crate::{HOST, lifecycle::Mesh, needs_machines};
use anyhow::{Result, ensure};
use tombolo_packages::{Machine, Yard};

const STRICT: &str = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
    metadata: {name: strict, namespace: shop}\nspec: {mtls: {mode: STRICT}}\n";
const TABLE: &str = "nft list table inet tombolo_guard";
/// A firewall of the host's owner, which no one else touches.
const OTHERS: &str = "nft add table inet site && nft add chain inet site input '{ type filter hook input priority 0; }' && \
    nft add rule inet site input tcp dport 25 drop";

/// A neighbour without the mesh dials the application.
fn closed(from: &Machine, to: &Machine) -> Result<()> {
    let line = format!("curl -sS -m 3 http://{}:8080/ 2>&1; test $? = 7", to.address());
    from.until(&line).map(drop)
}

fn open(from: &Machine, to: &Machine) -> Result<()> {
    let line = format!("curl -sS -m 3 http://{}:8080/", to.address());
    from.until(&line).map(drop)
}

#[test]
fn a_guard_is_back_before_ready_and_goes_with_the_package() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let neighbour = &mesh.discovery;
    let vm = mesh.member(&yard, "vm", "catalog")?;
    vm.ok(OTHERS)?;
    open(neighbour, &vm)?;
    mesh.discovery.sh_with("tombolo apply -f -", STRICT)?.checked()?;
    closed(neighbour, &vm)?;
    vm.until("tombolo status | grep '8080 guarded: PeerAuthentication says STRICT'")?;

    // The tool that netd calls is gone, and the table with it: open, and said; closed again once it is back.
    vm.ok("nft delete table inet tombolo_guard && mv /usr/sbin/nft /usr/sbin/nft.away && systemctl reload tombolo-agent")?;
    let said = vm.until("tombolo status | grep -A3 TMB0314")?;
    ensure!(said.contains("install the package nftables"), "{said}");
    ensure!(!vm.sh("tombolo status")?.ok(), "it is a failure");
    open(neighbour, &vm)?;
    vm.ok("mv /usr/sbin/nft.away /usr/sbin/nft")?;
    closed(neighbour, &vm)?;
    vm.until("tombolo status")?;

    // A boot without discovery: the table is there when systemd hears that the agent is ready.
    vm.until("grep -aq istio_converted_static_strict /var/lib/tombolo/agent/snapshot.bin")?;
    vm.write(
        "/etc/systemd/system/tombolo-agent.service.d/look.conf",
        "0644",
        "[Service]\nExecStartPost=+/bin/sh -c 'nft list table inet tombolo_guard >/run/at-ready 2>&1'\n",
    )?;
    mesh.discovery.ok("systemctl stop tombolo-discovery")?;
    vm.reboot()?;
    vm.until("systemctl is-active tombolo-agent")?;
    ensure!(
        vm.ok("cat /run/at-ready")?.contains("8080"),
        "{}\n{}",
        vm.ok("cat /run/at-ready")?,
        vm.journal()
    );
    closed(neighbour, &vm)?;
    vm.ok("rm -r /etc/systemd/system/tombolo-agent.service.d && systemctl daemon-reload")?;
    mesh.discovery.ok("systemctl start tombolo-discovery")?;

    // Killed both, it stays; the package goes, and so does the table, with nothing else.
    vm.ok(OTHERS)?;
    vm.ok("systemctl kill -s KILL tombolo-netd && systemctl kill -s KILL tombolo-agent")?;
    vm.ok(TABLE)?;
    vm.until("systemctl is-active tombolo-netd tombolo-agent && tombolo status")?;
    vm.apt("remove tombolo-agent")?;
    ensure!(!vm.sh(TABLE)?.ok(), "the guard outlives the package");
    ensure!(
        vm.ok(HOST)?.contains("tcp dport 25 drop"),
        "somebody else's firewall is gone"
    );
    open(neighbour, &vm)?;
    // Installed again it is the same member, and guarded again.
    vm.apt("install tombolo-agent")?;
    closed(neighbour, &vm)?;
    vm.apt("purge tombolo-agent tombolo")?;
    ensure!(!vm.sh(TABLE)?.ok());
    open(neighbour, &vm)
}
