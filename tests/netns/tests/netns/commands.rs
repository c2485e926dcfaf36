//! What operators and owners of hosts type, and what they read when it is wrong.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use tombolo_testkit::{Host, Mesh, MeshOptions, Nginx, Output, wait_for};

pub(crate) fn run(host: &Host, line: &str) -> Result<Output> {
    host.run("tombolo", &line.split_whitespace().collect::<Vec<_>>())
}

/// The exit code, and every part in what was printed.
pub(crate) fn says(output: &Output, code: i32, parts: &[&str]) -> Result<()> {
    let text = output.text();
    ensure!(
        output.code == code,
        "exit code {} instead of {code}: {text}",
        output.code
    );
    for part in parts {
        ensure!(text.contains(part), "{part:?} is not in: {text}");
    }
    Ok(())
}

fn as_nobody(host: &Host, line: &str) -> Result<Output> {
    let mut args = vec![
        "--reuid",
        "65534",
        "--regid",
        "65534",
        "--clear-groups",
        "tombolo",
    ];
    args.extend(line.split_whitespace());
    host.run("setpriv", &args)
}

#[test]
fn only_root_and_the_admin_group_are_served() -> Result<()> {
    needs_root!();
    let (a, b, mesh) = pair("users", "http=80:8080", MeshOptions::default())?;
    for line in [
        "get se -A",
        "token create -n shop --workload-group catalog",
        "delete se catalog -n shop",
    ] {
        says(
            &as_nobody(&mesh.control, line)?,
            3,
            &["TMB0205", "tombolo-admin", "sudo"],
        )?;
    }
    for line in ["status", "why catalog.shop.svc.mesh.internal:80"] {
        says(&as_nobody(&a.host, line)?, 3, &["TMB0205", "sudo"])?;
    }
    for line in ["down", "leave", "leave --force"] {
        says(&as_nobody(&a.host, line)?, 3, &["TMB0117"])?;
    }
    ensure!(
        mesh.tombolo("audit")?.contains("refused: TMB0205"),
        "refusals are in the audit log"
    );
    // A second agent, started by hand, leaves the first its socket.
    says(&a.host.run("tombolo-agent", &["run"])?, 1, &["TMB0503"])?;
    says(&run(&a.host, "status")?, 0, &["Serving"])?;
    // A second netd says so in one sentence.
    let netd = a.host.run("tombolo-netd", &["run"])?;
    says(&netd, 1, &["TMB0311"])?;
    ensure!(netd.stderr.lines().count() == 1, "{}", netd.stderr);
    // `up` again is no mistake, with or without a token, and burns none.
    says(&run(&a.host, "up")?, 0, &["enrolled already"])?;
    let token = mesh.token("webapp")?;
    says(&a.host.run("tombolo", &["up", &token])?, 0, &["enrolled already"])?;
    ensure!(
        mesh.tombolo("token list -n shop")?.contains("0/1"),
        "the token was not spent"
    );
    // Leaving needs discovery, or --force.
    mesh.control.unplug()?;
    says(&run(&b.host, "leave")?, 4, &["--force"])?;
    wait_for("status to miss discovery", PATIENCE, || {
        says(
            &run(&b.host, "status")?,
            0,
            &["Degraded", "shop/catalog-", "TMB0302"],
        )
    })?;
    says(&run(&b.host, "leave --force")?, 0, &["tombolo vm delete"])?;
    ensure!(
        b.host
            .sh("ls -A /var/lib/tombolo/agent 2>/dev/null")?
            .stdout
            .is_empty()
    );
    Ok(())
}

#[test]
fn hosts_that_cannot_join_say_why() -> Result<()> {
    needs_root!();
    let mut mesh = Mesh::start("cannot", MeshOptions::default())?;
    mesh.group("catalog", "http=80:8080")?;
    let vm = mesh.bare("a")?;
    let host = &vm.host;
    let token = mesh.token("catalog")?;
    let up = || host.run("tombolo", &["up", &token]);
    for route in ["240.240.5.0/24", "2001:2::/48"] {
        let family = if route.contains(':') { "-6" } else { "-4" };
        host.sh(&format!("ip {family} route add {route} dev eth0"))?
            .checked()?;
        says(&up()?, 1, &["TMB0114", route])?;
        ensure!(
            host.sh("ls -A /var/lib/tombolo /run/tombolo")?
                .text()
                .matches("agent")
                .count()
                == 0
        );
        host.sh(&format!("ip {family} route del {route} dev eth0"))?
            .checked()?;
    }
    // A mistake in the settings: the key, and the lines of this start only.
    host.write("/etc/tombolo/agent.yaml", "acces_log: all\n")?;
    says(
        &run(host, "config show")?,
        1,
        &["TMB0504", "did you mean access_log?"],
    )?;
    says(&up()?, 5, &["TMB0118", "TMB0504", "acces_log"])?;
    host.write("/etc/tombolo/agent.yaml", "")?;
    // The port for other hosts is taken; when it is free again the agent goes on by itself.
    let mut squatter = host.spawn("tombolo-peer", &["serve", "echo", "15008"])?;
    wait_for("the squatter", PATIENCE, || {
        ensure!(host.sh("ss -Hltn 'sport = 15008'")?.stdout.contains("15008"));
        Ok(())
    })?;
    let output = run(host, "up")?;
    says(&output, 5, &["TMB0118", "TMB0506", "15008"])?;
    ensure!(
        !output.text().contains("TMB0504"),
        "an old line: {}",
        output.text()
    );
    says(&run(host, "status")?, 1, &["Starting", "TMB0506", "ss -ltnp"])?;
    squatter.kill();
    wait_for("the agent to serve", PATIENCE, || {
        says(&run(host, "status")?, 0, &["Serving"])
    })?;
    // netd is gone and the agent starts anew: the first broken hop is that, and not the resolver.
    run(host, "down")?.checked()?;
    let mut alone = host.spawn(
        "setpriv",
        &[
            "--reuid",
            "tombolo-agent",
            "--regid",
            "tombolo-agent",
            "--clear-groups",
            "tombolo-agent",
            "run",
        ],
    )?;
    wait_for("the agent to miss netd", PATIENCE, || {
        says(&run(host, "status")?, 1, &["TMB0307"])
    })?;
    says(
        &run(host, &format!("why {CATALOG}:80"))?,
        1,
        &["BROKEN  name", "TMB0307"],
    )?;
    alone.kill();
    // A taken port of discovery.
    let mut squatter = host.spawn("tombolo-peer", &["serve", "echo", "15012"])?;
    wait_for("the squatter", PATIENCE, || {
        ensure!(host.sh("ss -Hltn 'sport = 15012'")?.stdout.contains("15012"));
        Ok(())
    })?;
    let init = [
        "init",
        "--trust-domain",
        "other.example",
        "--advertise",
        "10.77.9.9:15012",
    ];
    host.run("tombolo-discovery", &init)?.checked()?;
    says(
        &host.run("tombolo-discovery", &init)?,
        1,
        &["has a discovery already", "Nothing was changed"],
    )?;
    says(
        &host.run("tombolo-discovery", &["run"])?,
        1,
        &["15012", "ss -ltnp"],
    )?;
    squatter.kill();
    Ok(())
}

#[test]
fn damage_on_disk_is_said_and_healed() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("damage", "http=80:8080", MeshOptions::default())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let url = format!("http://{CATALOG}/");
    a.curl_until(&url, PATIENCE)?;
    let state = "/var/lib/tombolo/agent";
    let sh = |line: &str| a.host.sh(line)?.checked().map(|output| output.stdout);
    let snapshot = || {
        wait_for("the snapshot", PATIENCE, || {
            a.host.sh(&format!("test -s {state}/snapshot.bin"))?.checked()
        })
    };
    snapshot()?;
    // Snapshot and certificate: set aside, and made again.
    sh(&format!(
        "tombolo down && for f in snapshot.bin identity.pem; do echo rubbish > {state}/$f; done"
    ))?;
    run(&a.host, "up")?.checked()?;
    a.curl_until(&url, PATIENCE)?;
    let kept = sh(&format!("cat {state}/snapshot.bin.bad {state}/identity.pem.bad"))?;
    ensure!(kept == "rubbish\nrubbish\n", "{kept}");
    ensure!(a.agent_log().contains("TMB0501"), "{}", a.agent_log());
    snapshot()?;
    ensure!(sh(&format!("cat {state}/identity.pem"))?.contains("PRIVATE KEY"));
    wait_for("the host to be whole again", PATIENCE, || {
        says(&run(&a.host, "status")?, 0, &["Serving"])
    })?;

    // A full disk: what is in memory is served, status says it, and it heals when there is room.
    sh(&format!(
        "tombolo down && cp -a {state} /run/kept && mount -t tmpfs -o size=32k,mode=0700,uid=$(id -u tombolo-agent),gid=$(id -g tombolo-agent) tiny {state} \
         && cp -a /run/kept/device.key /run/kept/identity.pem /run/kept/registration.json /run/kept/roots.pem {state}/ \
         && (dd if=/dev/zero of={state}/fill bs=512 2>/dev/null || true)"
    ))?;
    run(&a.host, "up")?.checked()?;
    a.curl_until(&url, PATIENCE)?;
    wait_for("status to say it", PATIENCE, || {
        says(
            &run(&a.host, "status")?,
            1,
            &["Degraded", "TMB0502", "the snapshot is not stored"],
        )
    })?;
    a.curl_until(&url, PATIENCE)?;
    sh(&format!("rm {state}/fill"))?;
    snapshot()?;
    wait_for("status to be well", PATIENCE, || {
        says(&run(&a.host, "status")?, 0, &["Serving"])
    })?;
    sh(&format!("tombolo down && umount {state}"))?;

    // What nobody can give again: the way out is named, and is one.
    sh(&format!("echo '{{' > {state}/registration.json"))?;
    for line in ["up", "leave"] {
        says(
            &run(&a.host, line)?,
            1,
            &["TMB0507", "registration.json", "leave --force"],
        )?;
    }
    says(&run(&a.host, "leave --force")?, 0, &["nothing is left"])?;
    Ok(())
}

#[test]
fn headless_and_static_endpoints_go_through_the_mesh() -> Result<()> {
    needs_root!();
    let (a, b, mut mesh) = pair("kinds", "http=80:8080", MeshOptions::default())?;
    let c = mesh.vm("c", "catalog")?;
    let plain = mesh.bare("plain")?;
    let _apps = (
        Nginx::start(&b.host, 8080, "b")?,
        Nginx::start(&c.host, 8080, "c")?,
        Nginx::start(&plain.host, 9000, "plain")?,
    );
    let entry = |name: &str, label: &str, rest: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: shop{label}}}\nspec:\n  \
             hosts: [{name}.shop.svc.mesh.internal]\n  resolution: STATIC\n  {rest}\n"
        )
    };
    let ports = "ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}]";
    let headless = ", labels: {networking.istio.io/enable-autoallocate-ip: \"false\"}";
    mesh.apply(&format!(
        "{}{}{}",
        entry("heads", headless, &format!("location: MESH_INTERNAL\n  {ports}\n  workloadSelector: {{labels: {{app: catalog}}}}")),
        entry(
            "outside",
            "",
            &format!(
                "location: MESH_EXTERNAL\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 9000}}]\n  \
                 endpoints: [{{address: {}}}]",
                plain.host.ipv4()
            )
        ),
        entry(
            "inside",
            "",
            &format!(
                "location: MESH_INTERNAL\n  {ports}\n  \
                 endpoints: [{{address: {}, serviceAccount: catalog, labels: {{networking.istio.io/tunnel: http}}}}]",
                b.host.ipv4()
            )
        ),
    ))?;
    ensure!(a.curl_until("http://outside.shop.svc.mesh.internal/", PATIENCE)? == "plain\n");
    ensure!(a.curl_until("http://inside.shop.svc.mesh.internal/", PATIENCE)? == "b\n");
    // The name has one virtual address per endpoint, and each endpoint a name of its own.
    wait_for("both addresses", PATIENCE, || {
        let found = a.host.sh("dig +short heads.shop.svc.mesh.internal A")?.stdout;
        ensure!(
            found.lines().filter(|line| line.starts_with("240.240.")).count() == 2,
            "{found}"
        );
        Ok(())
    })?;
    let entries = mesh.tombolo("get we -n shop -l app=catalog -o name")?;
    let mut seen = String::new();
    for entry in entries.lines() {
        let name = entry.rsplit('/').next().unwrap_or_default();
        let instance = format!("{name}.heads.shop.svc.mesh.internal");
        seen.push_str(&a.curl_until(&format!("http://{instance}/"), PATIENCE)?);
        says(
            &run(&a.host, &format!("why {instance}:80"))?,
            0,
            &["spiffe://mesh.example/ns/shop/sa/catalog"],
        )?;
    }
    ensure!(seen.contains("b\n") && seen.contains("c\n"), "{seen}");
    // All of them through the tunnel: the callee saw who calls.
    ensure!(b.agent_log().contains("ns/shop/sa/webapp") && c.agent_log().contains("ns/shop/sa/webapp"));
    // Ping: only what has a healthy endpoint answers.
    ensure!(a.host.sh(&format!("ping -c 1 -W 2 {CATALOG}"))?.ok());
    ensure!(!a.host.sh("ping -c 1 -W 1 240.240.77.7")?.ok());
    for vm in [&b, &c] {
        vm.host.run("tombolo", &["down"])?.checked()?;
    }
    wait_for("ping to fail", PATIENCE, || {
        if a.host.sh(&format!("ping -c 1 -W 1 {CATALOG}"))?.ok() {
            bail!("somebody answers")
        }
        Ok(())
    })
}

#[test]
fn the_hosts_resolver_is_followed() -> Result<()> {
    needs_root!();
    let (a, _b, _mesh) = pair("resolver", "http=80:8080", MeshOptions::default())?;
    let dig = |name: &str| -> Result<String> {
        Ok(a.host
            .sh(&format!("dig +time=3 +tries=1 +short @240.240.255.254 {name} A"))?
            .stdout
            .trim()
            .to_owned())
    };
    ensure!(dig("x.ordinary.example")? == "192.0.2.7");
    // Short names, in the namespace of the host.
    for short in ["catalog", "catalog.shop", "catalog.shop.svc"] {
        ensure!(dig(short)?.starts_with("240.240."), "{short}");
    }
    ensure!(!dig("catalog.corp.example")?.contains("240.240."));
    // Another server and a search list, while the agent runs.
    let other = a.host.spawn(
        "dnsmasq",
        &[
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
            "--user=root",
            "--listen-address=127.0.0.9",
            "--bind-interfaces",
            "--address=/ordinary.example/192.0.2.99",
        ],
    )?;
    let pid = a.agent_pid()?;
    a.host
        .write("/etc/resolv.conf", "search corp.example\nnameserver 127.0.0.9\n")?;
    wait_for("the new server", PATIENCE, || {
        let answer = dig("x.ordinary.example")?;
        ensure!(answer == "192.0.2.99", "{answer}");
        Ok(())
    })?;
    ensure!(
        dig("catalog.corp.example")?.contains("240.240."),
        "the search domain is taken off"
    );
    ensure!(a.agent_pid()? == pid, "without a restart");
    other.signal(Signal::SIGTERM)?;
    Ok(())
}
