//! What goes wrong on a host, as its administrator meets it: in `systemctl status`, in the journal, by its fields.

use crate::{lifecycle::Mesh, needs_machines};
use anyhow::{Context as _, Result, ensure};
use std::time::{Duration, Instant};
use tombolo_packages::{Machine, Yard};

const STATE: &str = "/var/lib/tombolo/agent";

/// Connects to port 80 of an address by four processes for three seconds; prints how often it was refused.
const FLOOD: &str = r#"use Socket; pipe(R, W); my $to = pack_sockaddr_in(80, inet_aton($ARGV[0]));
for (1..4) {
  next if fork; my ($end, $n) = (time + 3, 0);
  while (time < $end) { socket(my $s, PF_INET, SOCK_STREAM, 0); $n++ unless connect($s, $to); close $s }
  syswrite W, "$n\n"; exit;
}
1 while wait > 0; close W; my $all = 0; $all += $_ while <R>; print $all;
"#;

fn serves(vm: &Machine) -> Result<()> {
    vm.until("systemctl show --value -p StatusText tombolo-agent | grep '^Serving'")
        .map(drop)
}

fn restarts(vm: &Machine) -> Result<u32> {
    vm.property("tombolo-agent", "NRestarts")?
        .parse()
        .context("NRestarts")
}

#[test]
fn trouble_is_said_where_administrators_look() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let vm = mesh.member(&yard, "catalog", "catalog")?;
    serves(&vm)?;

    // A key that nobody knows: the reason is in `systemctl status`, and it is tried at the pace of RestartSec.
    vm.ok("echo 'acces_log: all' >> /etc/tombolo/agent.yaml")?;
    let before = restarts(&vm)?;
    let begun = Instant::now();
    vm.sh("systemctl --no-block restart tombolo-agent")?;
    let shown = vm.until("systemctl status --no-pager tombolo-agent | grep -A1 'Status:.*TMB0504'")?;
    ensure!(shown.contains("did you mean access_log?"), "{shown}");
    std::thread::sleep(Duration::from_secs(5));
    let (count, allowed) = (restarts(&vm)? - before, begun.elapsed().as_secs() / 2 + 2);
    ensure!(u64::from(count) <= allowed, "{count} restarts, at most {allowed}");
    let said = vm.ok("journalctl -q --no-pager -o cat -u tombolo-agent | grep -c TMB0504")?;
    ensure!(
        said.parse::<u32>()? >= count,
        "a restart without a reason: {count} and {said}"
    );
    vm.ok("sed -i '/acces_log: all/d' /etc/tombolo/agent.yaml")?;
    serves(&vm).context("it comes back by itself")?;

    // No netd: the start does not hang, and says what is missing; then it goes on by itself.
    vm.ok("systemctl mask --runtime --now tombolo-netd")?;
    let begun = Instant::now();
    vm.ok("systemctl restart tombolo-agent")?;
    ensure!(
        begun.elapsed() < Duration::from_secs(15),
        "the start took {:?}",
        begun.elapsed()
    );
    let line = vm.property("tombolo-agent", "StatusText")?;
    ensure!(
        line.contains("TMB0307") && line.contains("systemctl status tombolo-netd"),
        "{line}"
    );
    vm.ok("systemctl unmask --runtime tombolo-netd && systemctl start tombolo-netd")?;
    serves(&vm)?;

    // Somebody ran a copy as root: systemd gives the folder back, the agent closes the key and says so.
    vm.ok(&format!(
        "systemctl stop tombolo-agent && chown -R root:root {STATE} && chmod 644 {STATE}/device.key"
    ))?;
    vm.ok("systemctl start tombolo-agent")?;
    serves(&vm)?;
    ensure!(vm.ok(&format!("stat -c '%a %U' {STATE}/device.key"))? == "600 tombolo-agent");
    vm.ok("journalctl -q --no-pager -o cat -u tombolo-agent CODE=TMB0508 | grep 'tombolo leave'")?;

    // A state that cannot be used: it runs, and says so, and no file is touched.
    vm.ok(&format!(
        "cp -a {STATE}/roots.pem /root/ && echo rubbish > {STATE}/roots.pem"
    ))?;
    let before = restarts(&vm)?;
    vm.ok("systemctl restart tombolo-agent")?;
    vm.until("systemctl status --no-pager tombolo-agent | grep 'Status:.*TMB0507'")?;
    let said = vm.sh("tombolo status")?;
    ensure!(
        !said.ok() && said.text().contains("leave --force"),
        "{}",
        said.text()
    );
    ensure!(restarts(&vm)? <= before && vm.ok(&format!("cat {STATE}/roots.pem"))? == "rubbish");
    vm.ok(&format!("cp -a /root/roots.pem {STATE}/"))?;
    serves(&vm)?;

    // An /etc that cannot be written: up and down work, and say what they could not do.
    vm.ok("tombolo down && mount --bind /etc /etc && mount -o remount,bind,ro /etc")?;
    let said = vm.sh("tombolo up")?.checked()?.text();
    ensure!(said.contains("will not start at the next boot"), "{said}");
    serves(&vm)?;
    vm.ok("tombolo down")?;
    ensure!(!vm.sh("ip link show mesh0")?.ok());
    vm.ok("umount /etc && tombolo up")?;
    serves(&vm)
}

#[test]
fn the_journal_is_found_by_fields_explained_and_never_full() -> Result<()> {
    needs_machines!();
    let yard = Yard::new()?;
    let mesh = Mesh::found(&yard)?;
    let callee = mesh.member(&yard, "callee", "catalog")?;
    let caller = mesh.member(&yard, "caller", "webapp")?;
    let vip = mesh.vip("catalog")?;
    ensure!(caller.until(&format!("curl -sS -m 5 http://{vip}/"))? == "callee");
    let lines = |vm: &Machine, filter: &str| -> Result<usize> {
        let text = vm.ok(&format!(
            "journalctl -q --no-pager -o cat -u tombolo-agent {filter}"
        ))?;
        Ok(text.lines().count())
    };

    // A well-behaved load is not logged one by one; a flood of refused calls is cut far below journald's limit.
    let before = lines(&caller, "")?;
    for _ in 0..20 {
        caller.ok(&format!("curl -sS -m 5 http://{vip}/"))?;
    }
    ensure!(
        lines(&caller, "")? == before,
        "calls that end well are logged by default"
    );
    // Refused at the callee: the application is gone. As many as this machine can make in three seconds.
    callee.ok("systemctl stop application.socket")?;
    caller.write("/opt/flood.pl", "0755", FLOOD)?;
    let tried: usize = caller.ok(&format!("perl /opt/flood.pl {vip}"))?.parse()?;
    let failed = lines(&caller, "MESSAGE_ID=6f1d7c9a2b5e4f08a3c1d9460e0e0002")?;
    println!("{failed} lines for {tried} refused connections");
    ensure!(
        tried > 1000,
        "{tried} connections are no flood: the log holds 500 at once"
    );
    ensure!((400..=700).contains(&failed), "{failed} lines");
    caller.until("journalctl -q --no-pager -o cat -u tombolo-agent | grep 'were not written one by one'")?;
    let lost = caller.sh("journalctl -q --no-pager -o cat -u systemd-journald | grep -i suppressed")?;
    ensure!(!lost.ok(), "{}", lost.text());
    callee.ok("systemctl start application.socket")?;

    // By what they are about.
    let web = "spiffe://mesh.example/ns/shop/sa/webapp";
    let catalog = "spiffe://mesh.example/ns/shop/sa/catalog";
    for (vm, filter) in [
        (&callee, format!("PEER={web}")),
        (&caller, format!("IDENTITY={web}")),
        (&caller, "SERVICE=catalog.shop.svc.mesh.internal".to_owned()),
        (&callee, format!("IDENTITY={catalog}")),
        // The agent serves; discovery was reached.
        (&caller, "MESSAGE_ID=6f1d7c9a2b5e4f08a3c1d9460e0e0004".to_owned()),
        (&caller, "MESSAGE_ID=6f1d7c9a2b5e4f08a3c1d9460e0e0007".to_owned()),
    ] {
        ensure!(lines(vm, &filter)? > 0, "{filter}\n{}", vm.journal());
    }
    let flow = caller.ok("journalctl -q --no-pager -o json -u tombolo-agent | grep -o '\"FLOW\":\"[^\"]*' | head -1 | cut -d'\"' -f4")?;
    ensure!(
        flow.contains('>') && lines(&caller, &format!("'FLOW={flow}'"))? == 1,
        "{flow}"
    );
    let shown = caller
        .ok("journalctl -q --no-pager -u tombolo-agent MESSAGE_ID=6f1d7c9a2b5e4f08a3c1d9460e0e0002 -n 1")?;
    ensure!(
        shown.contains("connection failed") && shown.contains("reason="),
        "{shown}"
    );
    let explained = caller.ok(
        "journalctl -q --no-pager -x -u tombolo-agent MESSAGE_ID=6f1d7c9a2b5e4f08a3c1d9460e0e0002 -n 1",
    )?;
    ensure!(explained.contains("Next: tombolo why"), "{explained}");
    let all = caller.ok("journalctl --list-catalog | grep -c TMB")?;
    ensure!(all.parse::<usize>()? > 60, "{all} codes in the catalogue");
    Ok(())
}
