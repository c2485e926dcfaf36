//! What the host's resolver sees.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use tombolo_testkit::{MeshOptions, wait_for};

#[test]
fn mesh_names_are_answered_and_others_never_notice() -> Result<()> {
    needs_root!();
    let (a, _b, mesh) = pair("names", "http=80:8080", MeshOptions::default())?;
    let ask = |line: &str| -> Result<String> { Ok(a.host.sh(line)?.text()) };
    let vip = ask(&format!("getent ahostsv4 {CATALOG}"))?;
    ensure!(vip.starts_with("240.240."), "{vip}");
    let vip6 = ask(&format!("getent ahostsv6 {CATALOG}"))?;
    ensure!(vip6.contains("2001:2:"), "{vip6}");
    // The DNS VIP itself: UDP, TCP, unknown names, other names forwarded to the host's own servers.
    let dig = |args: &str| ask(&format!("dig +time=3 +tries=1 @240.240.255.254 {args}"));
    ensure!(dig(&format!("+short {CATALOG} A"))?.starts_with("240.240."));
    ensure!(dig(&format!("+tcp +short {CATALOG} A"))?.starts_with("240.240."));
    ensure!(dig("nobody.shop.svc.mesh.internal A")?.contains("NXDOMAIN"));
    ensure!(dig("+short host1.ordinary.example A")?.trim() == "192.0.2.7");
    let stray = dig(&format!("{CATALOG} MX"))?;
    ensure!(
        stray.contains("NOERROR") && stray.contains("ANSWER: 0"),
        "{stray}"
    );
    // Frozen, the agent harms nobody.
    let pid = a.agent_pid()?;
    a.host.signal_all("tombolo-agent", Signal::SIGSTOP)?;
    let frozen = ask(
        "i=0; bad=0; while [ $i -lt 1000 ]; do getent ahostsv4 h$i.ordinary.example >/dev/null || bad=$((bad+1)); i=$((i+1)); done; echo $bad",
    )?;
    a.host.signal_all("tombolo-agent", Signal::SIGCONT)?;
    ensure!(
        frozen.trim() == "0",
        "{frozen} of 1,000 ordinary lookups failed while the agent was frozen"
    );
    ensure!(a.agent_pid()? == pid);
    // Killed, mesh addresses fail at once instead of hanging, and still nobody else notices.
    a.host.signal_all("tombolo-agent", Signal::SIGKILL)?;
    wait_for("the agent to be gone", PATIENCE, || {
        ensure!(a.host.pids_of("tombolo-agent")?.is_empty());
        // Its memory goes before its descriptors: until the kernel has closed the device, a SYN still goes into it.
        ensure!(a.host.sh("ip -o link show mesh0")?.stdout.contains("NO-CARRIER"));
        Ok(())
    })?;
    let address = vip.split_whitespace().next().unwrap_or_default().to_owned();
    let how = a
        .host
        .run("tombolo-peer", &["call", "connect", &address, "80"])?
        .stdout;
    ensure!(how.starts_with("EHOSTUNREACH"), "{how}");
    let took: u64 = how
        .split_whitespace()
        .rev()
        .nth(1)
        .and_then(|ms| ms.parse().ok())
        .unwrap_or(u64::MAX);
    ensure!(took < 200, "{how}");
    ensure!(ask("getent ahostsv4 h.ordinary.example")?.contains("192.0.2.7"));
    drop(mesh);
    Ok(())
}
