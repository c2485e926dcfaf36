//! Names on a host with systemd-resolved: mesh names by it, all others as before, and not one file changed.

use crate::{HOST, lifecycle::Mesh, needs_machines};
use anyhow::{Result, ensure};
use tombolo_packages::{Machine, Session, Upstream, Yard};

pub(crate) const NAME: &str = "catalog.shop.svc.mesh.internal";
/// As HOST, but for the routes of mesh0.
const FILES: &str = "sha256sum /etc/resolv.conf /etc/nsswitch.conf /etc/hosts; readlink /etc/resolv.conf; nft -s list ruleset; \
                     iptables-save | sed '/^#/d'";

/// 1,000 names that nobody has asked for before; gives how many were not found. Ten of them by a program each, the
/// others by one: a thousand starts take a minute where the lookups take a second.
fn lookups(machine: &Machine, round: &str) -> Result<u32> {
    let answer = Upstream::ANSWER;
    let line = format!(
        "bad=0; for i in $(seq 10); do \
         [ \"$(getent ahostsv4 n$i.{round}.example.net | head -1 | cut -d' ' -f1)\" = {answer} ] || bad=$((bad+1)); done; \
         more=$(perl -MSocket -e 'for (11..1000) {{ my $a = gethostbyname(\"n$_.{round}.example.net\"); \
         $bad++ unless $a && inet_ntoa($a) eq \"{answer}\" }} print $bad + 0'); echo $((bad + more))"
    );
    Ok(machine.ok(&line)?.parse()?)
}

/// The settings of all links, without their numbers.
fn resolver(machine: &Machine) -> Result<String> {
    machine.ok("resolvectl status --no-pager | sed 's/^Link [0-9]*/Link/'")
}

#[test]
fn resolved_asks_the_mesh_for_its_names_alone() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let upstream = Upstream::start(&yard)?;
    let mesh = Mesh::found(&yard)?;
    let _callee = mesh.member(&yard, "callee", "catalog")?;
    let vm = mesh.stranger(&yard, "caller", &[])?;
    vm.ok("ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf")?;
    vm.ok("grep -q '^hosts:.*resolve.*dns' /etc/nsswitch.conf")?;
    let server = Upstream::ADDRESS;
    vm.ok(&format!(
        "resolvectl dns eth0 {server} && resolvectl default-route eth0 yes"
    ))?;
    ensure!(lookups(&vm, "before")? == 0);
    let (host, files, settings) = (vm.ok(HOST)?, vm.ok(FILES)?, resolver(&vm)?);

    let mut session = Session::open(&yard, &vm)?;
    let said = vm.sh_with("tombolo up -", &mesh.token("webapp")?)?.checked()?;
    ensure!(!said.text().contains("TMB0313"), "{}", said.text());
    let vip = mesh.vip("catalog")?;
    ensure!(vm.until(&format!("getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1"))? == vip);
    ensure!(vm.ok(&format!("getent hosts {NAME}"))?.contains(NAME));
    ensure!(vm.until(&format!("curl -sS -m 5 http://{NAME}/"))? == "callee");
    // Programs that speak DNS themselves get the same by the stub.
    ensure!(vm.ok(&format!("dig +short +time=2 {NAME}"))? == vip);
    let status = vm.ok("tombolo status")?;
    let line = "looked up by systemd-resolved, which asks the mesh for mesh.internal (names: resolved)";
    ensure!(!status.contains("TMB0313") && status.contains(line), "{status}");
    let link = vm.ok("resolvectl status --no-pager mesh0")?;
    for line in [
        "-DefaultRoute -LLMNR -mDNS -DNSOverTLS DNSSEC=no",
        "DNS Servers: 240.240.255.254",
        "DNS Domain: ~mesh.internal",
    ] {
        ensure!(link.contains(line), "{line:?} is not in\n{link}");
    }
    ensure!(vm.ok(FILES)? == files, "up changed a file");

    // Ordinary names: each went to the network's server, none of the mesh's did.
    ensure!(lookups(&vm, "up")? == 0);
    ensure!(
        upstream.asked(".up.example.net") == 1000,
        "{}",
        upstream.asked(".up.example.net")
    );
    ensure!(upstream.asked("mesh.internal") == 0);

    // A new resolved, with nothing of the old one kept, is told again.
    vm.ok("systemctl stop systemd-resolved && rm -rf /run/systemd/resolve/netif")?;
    vm.ok("systemctl start systemd-resolved")?;
    vm.until(&format!(
        "test \"$(getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1)\" = {vip}"
    ))?;
    vm.ok(&format!(
        "resolvectl dns eth0 {server} && resolvectl default-route eth0 yes"
    ))?;
    vm.ok("systemctl restart systemd-resolved")?;
    vm.until(&format!(
        "test \"$(getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1)\" = {vip}"
    ))?;

    // Frozen, then killed and not yet back: ordinary names do not notice.
    let pid = vm.pid("tombolo-agent")?;
    vm.ok(&format!("kill -STOP {pid}"))?;
    let failed = lookups(&vm, "frozen")?;
    ensure!(
        vm.pid("tombolo-agent")? == pid,
        "the watchdog was faster than the lookups"
    );
    vm.ok(&format!("kill -CONT {pid}"))?;
    ensure!(failed == 0, "{failed} of 1,000 while the agent was frozen");
    session.check("frozen")?;
    let drop_in = "/run/systemd/system/tombolo-agent.service.d/zz.conf";
    vm.write(drop_in, "0644", "[Service]\nRestartSec=60s\nRestartSteps=0\n")?;
    vm.ok("systemctl daemon-reload && systemctl kill -s KILL tombolo-agent")?;
    ensure!(lookups(&vm, "killed")? == 0);
    ensure!(
        vm.property("tombolo-agent", "ActiveState")? == "activating",
        "it was back already"
    );
    ensure!(vm.ok(FILES)? == files, "kill -9 changed a file");
    session.check("killed")?;
    vm.ok(&format!(
        "rm {drop_in} && systemctl daemon-reload && systemctl restart tombolo-agent"
    ))?;
    vm.until(&format!(
        "test \"$(getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1)\" = {vip}"
    ))?;
    // Its discovery hears nothing and says nothing any more.
    let discovery = mesh.discovery.address();
    let hole = format!("ip route add blackhole {discovery}/32");
    vm.ok(&hole)?;
    ensure!(
        !vm.sh(&format!("nc -z -w1 {discovery} 15012"))?.ok(),
        "discovery is still reached"
    );
    ensure!(lookups(&vm, "black-holed")? == 0);
    session.check("black-holed")?;
    ensure!(
        vm.ok(&format!("getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1"))? == vip,
        "the snapshot serves"
    );
    ensure!(vm.ok(FILES)? == files);
    vm.ok(&hole.replace(" add ", " del "))?;
    // mesh0 is another link now.
    vm.ok("ip link del mesh0")?;
    vm.until("resolvectl domain mesh0 | grep -F '~mesh.internal'")?;
    vm.until(&format!(
        "test \"$(getent ahostsv4 {NAME} | head -1 | cut -d' ' -f1)\" = {vip}"
    ))?;

    vm.ok("tombolo down")?;
    ensure!(
        resolver(&vm)? == settings,
        "before:\n{settings}\nafter:\n{}",
        resolver(&vm)?
    );
    ensure!(vm.ok(HOST)? == host, "before:\n{host}\nafter:\n{}", vm.ok(HOST)?);
    ensure!(!vm.sh(&format!("getent hosts {NAME}"))?.ok());
    ensure!(lookups(&vm, "down")? == 0);
    session.check("down")
}

#[test]
fn other_resolvers_get_advice_and_keep_their_files() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.stranger(&yard, "plain", &[])?;
    vm.ok("systemctl disable --now systemd-resolved; rm -f /etc/resolv.conf; echo 'nameserver 10.77.0.1' > /etc/resolv.conf")?;
    let files = vm.ok(FILES)?;
    let said = vm
        .sh_with("tombolo up -", &mesh.token("catalog")?)?
        .checked()?
        .text();
    let line = "server=/mesh.internal/240.240.255.254";
    // `up` may be done before the first lookup has failed; then status says it.
    let status = vm.until("tombolo status | grep -A2 TMB0313")?;
    ensure!(
        status.contains(line) && status.contains("/etc/resolv.conf"),
        "{said}\n{status}"
    );
    ensure!(vm.sh("tombolo status")?.ok(), "it is no failure");
    ensure!(vm.ok(FILES)? == files);
    // Resolved by the administrator's own means: no finding.
    let vip = mesh.vip("catalog")?;
    vm.ok(&format!("echo '{vip} {NAME}' >> /etc/hosts"))?;
    vm.until("! tombolo status | grep TMB0313").map(drop)
}
