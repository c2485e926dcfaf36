//! The scenes, in order. Each leaves the stage so that the next one can begin.

use crate::{
    Stage,
    load::{Load, now_ms},
    story::{self, Story},
    wire::{CANARY, Capture},
};
use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use tombolo_testkit::{Host, Mesh, MeshOptions, Nginx, Postgres, wait_for};

/// The service that everything is about.
const CATALOG: &str = "catalog.shop.svc.mesh.internal";
const WAIT: Duration = Duration::from_secs(15);

/// Hosts and applications; nothing of Tombolo runs yet.
pub(crate) fn build() -> Result<Stage> {
    let mut mesh = Mesh::prepare("demo", MeshOptions::default())?;
    let (a, b, c) = (mesh.bare("A")?, mesh.bare("B")?, mesh.bare("C")?);
    // Both databases at once: initdb is the slowest part of the stage.
    let apps = std::thread::scope(|scope| {
        let starts: Vec<_> = [&b.host, &c.host]
            .map(|host| {
                scope.spawn(move || {
                    Ok::<_, anyhow::Error>((
                        Nginx::start(host, 8080, &format!("catalog on {}", host.name()))?,
                        Postgres::start(host, 5432)?,
                    ))
                })
            })
            .into_iter()
            .collect();
        starts
            .into_iter()
            .map(|start| {
                start
                    .join()
                    .map_err(|_| anyhow::anyhow!("an application did not start"))?
            })
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(Stage {
        apps,
        session: None,
        a,
        b,
        c,
        mesh,
    })
}

pub(crate) fn fingerprints(stage: &Stage) -> Result<Vec<(String, String)>> {
    [&stage.a.host, &stage.b.host, &stage.c.host]
        .iter()
        .map(|host| Ok((host.name().to_owned(), host.fingerprint()?)))
        .collect()
}

/// From nothing to the first call by name.
pub(crate) fn join(story: &mut Story, stage: &mut Stage) -> Result<()> {
    story.step("Two commands and no file per VM, and services call each other by name");
    let url = format!("http://{CATALOG}");
    let (before, _) = story.type_on(&stage.a.host, &format!("curl -sS -m 5 {url}"))?;
    ensure!(!before.ok(), "the name must be unknown before the mesh is there");
    let begun = Instant::now();
    let advertise = stage.mesh.control.at(15012);
    story.must(
        &stage.mesh.control,
        &format!("tombolo-discovery init --trust-domain mesh.example --advertise {advertise}"),
    )?;
    story.say("discovery$ tombolo-discovery run &");
    stage.mesh.start_discovery()?;
    let discovery = begun.elapsed();
    story.must(
        &stage.mesh.control,
        "tombolo workload-group create webapp -n shop --service-account webapp --port http=80:8080",
    )?;
    story.must(
        &stage.mesh.control,
        "tombolo workload-group create catalog -n shop --service-account catalog --port http=80:8080 --port postgres=5432",
    )?;
    let mut joined = Vec::new();
    for (vm, group) in [(&stage.b, "catalog"), (&stage.a, "webapp"), (&stage.c, "catalog")] {
        let begun = Instant::now();
        let token = story.secret(
            &stage.mesh.control,
            &format!("tombolo token create -n shop --workload-group {group}"),
        )?;
        story.must(&vm.host, &format!("tombolo up {token}"))?;
        joined.push(begun.elapsed());
    }
    let (_, call) = story.must(&stage.a.host, &format!("curl -sS -m 10 {url}"))?;
    story.result("discovery from nothing to serving", "1 command", discovery);
    story.result(
        "a VM joins (token create + up)",
        "2 commands, 0 files",
        joined.iter().copied().max().unwrap_or_default(),
    );
    story.result("first call by name", "answered", call);
    Ok(())
}

/// Identity at the callee, plaintext at the application, nothing readable on the wire.
pub(crate) fn identity(story: &mut Story, stage: &mut Stage) -> Result<()> {
    story.step("The callee knows who calls; the wire shows nothing");
    let begun = Instant::now();
    let capture = Capture::start(stage.mesh.lab.router_command("tcpdump"), stage.mesh.lab.dir())?;
    let (echoed, _) = story.must(
        &stage.a.host,
        &format!("curl -sS -m 10 -H 'X-Canary: {CANARY}' http://{CATALOG}/echo"),
    )?;
    ensure!(
        echoed.contains(CANARY),
        "the application must see the canary (positive control)"
    );
    let (row, took) = story.must(
        &stage.a.host,
        &format!("psql -h {CATALOG} -U postgres -d shop -At -c \"select 'row through the mesh: {CANARY}'\""),
    )?;
    ensure!(row.contains(CANARY), "the database must answer");
    let captured = capture.finish()?;
    let principal = "spiffe://mesh.example/ns/shop/sa/webapp";
    let line = wait_for("the access log", WAIT, || {
        let found = [&stage.b.host, &stage.c.host].iter().find_map(|host| {
            Some((
                host.name().to_owned(),
                host.sh(&format!("grep -h '{principal}' /var/log/tombolo/agent.log"))
                    .ok()?
                    .stdout,
            ))
            .filter(|found| !found.1.is_empty())
        });
        found.context("no line with A's identity yet")
    })
    .with_context(|| stage.b.agent_log() + &stage.c.agent_log())?;
    let first = line.1.lines().next().unwrap_or_default();
    story.say(&format!("the log of {}: {}", line.0, story::logged(first)));
    story.result("A's identity in the callee's log", principal, begun.elapsed());
    story.result(
        &format!("canary on the wire ({} KB captured)", captured / 1000),
        "0 times; 2 times at the applications",
        begun.elapsed(),
    );
    story.result("database session through the same path", "answered", took);
    Ok(())
}

/// A policy cuts what it denies, refuses what comes, and `why` names it.
pub(crate) fn policy(story: &mut Story, stage: &mut Stage) -> Result<()> {
    story
        .step("A policy denies A: the open session is cut, a new connect is refused, `why` names the policy");
    let mut command = stage.a.host.command("psql");
    command.args([
        "-h",
        CATALOG,
        "-U",
        "postgres",
        "-d",
        "shop",
        "-At",
        "-c",
        "select 'session open'",
        "-c",
        "select pg_sleep(600)",
    ]);
    let mut session = stage.a.host.spawn_command("psql", command)?;
    wait_for("the session", WAIT, || {
        if session.log().contains("session open") {
            Ok(())
        } else {
            bail!("not yet: {}", session.log())
        }
    })?;
    story.say("A$ psql … (a session that stays open)");
    let yaml = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-webapp, namespace: shop}\nspec:\n  action: DENY\n  selector: {matchLabels: {app: catalog}}\n  rules:\n  - from:\n    - source: {principals: [mesh.example/ns/shop/sa/webapp]}\n";
    stage
        .mesh
        .control
        .write("/root/no-webapp.yaml", yaml)
        .or_else(|_| stage.mesh.control.write("/run/no-webapp.yaml", yaml))?;
    let begun = Instant::now();
    story.must(
        &stage.mesh.control,
        "cd /run; test -f no-webapp.yaml || cp /root/no-webapp.yaml .; tombolo apply -f no-webapp.yaml",
    )?;
    let ended = session.wait(WAIT).context("the session must be cut")?;
    let cut = begun.elapsed();
    ensure!(ended != 0, "psql must report the cut");
    story.result(
        "open database session",
        format!("cut, psql exit code {ended}"),
        cut,
    );
    let (refused, _) = story.type_on(&stage.a.host, &format!("tombolo-peer call connect {CATALOG} 80"))?;
    ensure!(
        refused.stdout.contains("ECONNREFUSED"),
        "connect() must be refused, not accepted and dropped"
    );
    let (why, took) = story.type_on(&stage.a.host, &format!("tombolo why {CATALOG}:80"))?;
    ensure!(
        !why.ok() && why.text().contains("no-webapp"),
        "why must name the policy"
    );
    story.holds("new connect while denied", "ECONNREFUSED");
    story.result("why names the policy", "shop/no-webapp", took);
    let begun = Instant::now();
    story.must(&stage.mesh.control, "tombolo delete ap no-webapp -n shop")?;
    wait_for("the way back", WAIT, || {
        stage
            .a
            .host
            .sh(&format!("curl -sS -m 5 http://{CATALOG}"))?
            .checked()
    })?;
    story.result("policy deleted", "calls again", begun.elapsed());
    stage.session = Some(session);
    Ok(())
}

/// Power-off under load.
pub(crate) fn power_off(story: &mut Story, stage: &mut Stage) -> Result<()> {
    story.step("One of two endpoints loses power under load");
    let load = Load::start(&stage.a.host, CATALOG, 100)?;
    story.say(&format!("A$ 100 new connections a second to {CATALOG}:80"));
    std::thread::sleep(Duration::from_secs(1));
    let dead = now_ms();
    let begun = Instant::now();
    stage.c.host.power_off()?;
    story.say("C: power off (link down, every process killed)");
    let name = wait_for("C to be taken out", WAIT, || {
        let list = stage.mesh.tombolo("vm list -n shop")?;
        list.lines()
            .find(|line| line.contains(" Away "))
            .map(str::to_owned)
            .with_context(|| format!("all are healthy:\n{list}"))
    })?;
    let out = now_ms();
    let took = begun.elapsed();
    story.say(&name);
    std::thread::sleep(Duration::from_secs(2));
    let calls = load.finish()?;
    for call in calls.failed().take(3) {
        story.say(&format!(
            "{} ms after the power-off: {}",
            call.end.saturating_sub(dead),
            call.how
        ));
    }
    let (total, failed) = (calls.total(), calls.failed().count());
    // Those that had begun before it was taken out may end later.
    let failed_after = calls.failed().filter(|call| call.start > out).count();
    ensure!(total > 200, "only {total} requests were made");
    ensure!(
        failed_after == 0,
        "{failed_after} requests failed after the endpoint was taken out"
    );
    ensure!(
        took <= Duration::from_secs(3),
        "taken out after {:.1} s",
        took.as_secs_f64()
    );
    story.result("power-off to taken out", "3 s allowed", took);
    story.result(
        "failed requests",
        format!("{failed_after} after it was taken out, {failed} of {total} in all"),
        took,
    );
    Ok(())
}

/// Control plane and agent die; the agent alone comes back.
pub(crate) fn survival(story: &mut Story, stage: &mut Stage) -> Result<()> {
    story.step("Discovery and A's agent are killed; the agent alone comes back");
    stage.mesh.kill_discovery();
    stage.a.host.signal_all("tombolo-agent", Signal::SIGKILL)?;
    story.say("kill -9 of discovery and of A's agent");
    let begun = Instant::now();
    story.must(&stage.a.host, "tombolo up")?;
    let url = format!("http://{CATALOG}");
    wait_for("the first call", WAIT, || {
        stage.a.host.sh(&format!("curl -sS -m 5 {url}"))?.checked()
    })?;
    story.result(
        "agent restarted without a control plane",
        "serving from its snapshot",
        begun.elapsed(),
    );
    stage.a.host.signal_all("tombolo-agent", Signal::SIGSTOP)?;
    let begun = Instant::now();
    let (lookups, _) = story.must(
        &stage.a.host,
        "i=0; bad=0; while [ $i -lt 1000 ]; do getent ahostsv4 host$i.ordinary.example >/dev/null || bad=$((bad+1)); i=$((i+1)); done; echo $bad failures",
    )?;
    stage.a.host.signal_all("tombolo-agent", Signal::SIGCONT)?;
    ensure!(lookups.trim() == "0 failures", "ordinary lookups must not notice");
    story.result(
        "1,000 ordinary lookups, agent frozen",
        "0 failures",
        begun.elapsed(),
    );
    stage.mesh.start_discovery()
}

/// An Envoy of the registry, unmodified, as HBONE client.
pub(crate) fn envoy(story: &mut Story, stage: &Stage) -> Result<()> {
    story.step("The real, unmodified Envoy calls B's service over HBONE with a certificate of our CA");
    let Some(envoy) = tombolo_testkit::envoy() else {
        bail!("no Envoy: run make setup (it says why if it could not be fetched)")
    };
    let host = &stage.a.host;
    let config = tombolo_testkit::envoy_client(
        "/var/lib/tombolo/agent",
        &stage.b.host.at(15008),
        &stage.b.host.at(8080),
        "spiffe://mesh.example/ns/shop/sa/catalog",
    );
    host.write("/etc/tombolo-envoy.yaml", &config)?;
    let envoy = envoy.display().to_string();
    let begun = Instant::now();
    let mut process = host.spawn(
        &envoy,
        &[
            "-c",
            "/etc/tombolo-envoy.yaml",
            "--concurrency",
            "1",
            "--use-dynamic-base-id",
            "--log-level",
            "warn",
            "--disable-hot-restart",
        ],
    )?;
    let answer = wait_for("Envoy's call", WAIT, || {
        Ok(host
            .sh("curl -sS -m 5 http://127.0.0.1:19080/")?
            .checked()?
            .stdout)
    })
    .with_context(|| process.log())?;
    story.say(&format!(
        "A$ curl http://127.0.0.1:19080/   (Envoy 1.40 -> {} -> nginx)",
        stage.b.host.at(15008)
    ));
    story.say(answer.trim());
    ensure!(answer.contains("catalog on B"), "Envoy must reach B");
    process.kill();
    story.result("Envoy 1.40 through our agent", "answered", begun.elapsed());
    Ok(())
}

/// Everything stops; nothing is left.
pub(crate) fn undo(story: &mut Story, stage: &mut Stage, before: &[(String, String)]) -> Result<()> {
    story.step("Everything is stopped: the hosts are as they were");
    let begun = Instant::now();
    for host in [&stage.a.host, &stage.b.host] {
        story.must(host, "tombolo leave")?;
    }
    // C had no power when the others left: at its next start it is asked to leave without a network.
    stage.c.host.plug()?;
    story.must(&stage.c.host, "tombolo leave --force")?;
    for ((name, before), host) in before.iter().zip([&stage.a.host, &stage.b.host, &stage.c.host]) {
        compare(name, before, host)?;
    }
    story.result(
        "nft, routes, links, resolver files",
        "no difference on A, B and C",
        begun.elapsed(),
    );
    stage.apps.clear();
    Ok(())
}

fn compare(name: &str, before: &str, host: &Host) -> Result<()> {
    let mut last = String::new();
    let same = wait_for("the host to be as before", Duration::from_secs(5), || {
        last = host.fingerprint()?;
        if last == before {
            Ok(())
        } else {
            bail!("it differs")
        }
    });
    if same.is_err() {
        let gone: Vec<_> = before.lines().filter(|line| !last.contains(line)).collect();
        let new: Vec<_> = last.lines().filter(|line| !before.contains(line)).collect();
        bail!("{name} differs.\n  gone: {gone:#?}\n  new: {new:#?}");
    }
    Ok(())
}
