//! Live trust changes: the root is exchanged while clusters call each other, and nobody notices but who shall.

use crate::{
    PATIENCE,
    federation::{Clusters, EAST, WEST, group, serve, service, url},
    needs_root,
};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::{
    io::Read as _,
    process::{Child, Stdio},
    thread::JoinHandle,
    time::Duration,
};
use tombolo_testkit::{Vm, wait_for};

/// Requests a second of each of the four clients.
const RATE: &str = "50";

/// Requests from one host to a service, on new connections or on one that is kept.
pub(crate) struct Load {
    what: String,
    child: Option<Child>,
    /// What it says, read while it runs: a pipe holds less than a minute of it.
    said: Option<JoinHandle<String>>,
}

impl Load {
    pub(crate) fn start(from: &Vm, mode: &str, to: &str) -> Result<Self> {
        let mut child = from
            .host
            .command("tombolo-peer")
            .args(["call", mode, &service(to), "80", RATE])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut out = child.stdout.take().context("stdout")?;
        let said = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = out.read_to_string(&mut text); // what is cut is no line that ends with ok
            text
        });
        Ok(Self {
            what: format!("{mode} {} -> {to}", from.host.name()),
            child: Some(child),
            said: Some(said),
        })
    }

    /// All four: each way, new connections and a kept one.
    fn both_ways(clusters: &Clusters) -> Result<Vec<Self>> {
        let (front, back) = (&clusters.vms[WEST], &clusters.vms[EAST]);
        let all = [(front, "back"), (back, "front")];
        let modes = all
            .iter()
            .flat_map(|pair| ["load", "keep"].map(|mode| (mode, pair)));
        modes
            .map(|(mode, (from, to))| Self::start(from, mode, to))
            .collect()
    }

    /// Stops it: how many requests there were. None may have failed.
    pub(crate) fn end(mut self) -> Result<usize> {
        let mut child = self.child.take().context("ended")?;
        drop(child.stdin.take());
        let output = child.wait_with_output()?;
        let said = self.said.take().and_then(|said| said.join().ok());
        let text = said.context("its output is lost")? + &String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{}: {text}", self.what);
        let bad: Vec<_> = text.lines().filter(|line| !line.ends_with(" ok")).collect();
        let all = text.lines().count();
        ensure!(
            bad.is_empty(),
            "{}: {} of {all} failed, first: {:?}",
            self.what,
            bad.len(),
            &bad[..bad.len().min(5)]
        );
        Ok(all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn rotation(clusters: &mut Clusters, at: usize) -> Result<Value> {
    let shown = clusters.tombolo(at, "trust show -o json")?;
    Ok(serde_json::from_str(&shown)?)
}

fn step(clusters: &mut Clusters) -> Result<String> {
    let shown = rotation(clusters, WEST)?;
    Ok(shown["rotation"]["step"].as_str().unwrap_or_default().to_owned())
}

/// Roots that a host holds, the signing one first.
fn roots(vm: &Vm) -> Result<String> {
    let line = "grep -c 'BEGIN CERTIFICATE' /var/lib/tombolo/agent/roots.pem";
    Ok(vm.host.sh(line)?.stdout.trim().to_owned())
}

fn issuer(vm: &Vm) -> Result<String> {
    let line = "openssl x509 -noout -issuer -in /var/lib/tombolo/agent/identity.pem";
    Ok(vm.host.sh(line)?.checked()?.stdout)
}

/// A step of the rotation in the west, with discovery killed before, while, or right after it is made.
fn killed_around(clusters: &mut Clusters, verb: &str, wanted: &str) -> Result<()> {
    for delay in [3, 27] {
        if !verb.contains("--force") {
            unblocked(clusters)?;
        }
        let line = format!("trust rotate {verb} --yes");
        let args: Vec<&str> = line.split(' ').collect();
        let mut asking = clusters.mesh.control.spawn("tombolo", &args)?;
        std::thread::sleep(Duration::from_millis(delay));
        clusters.mesh.kill_discovery();
        asking.wait(PATIENCE);
        clusters.mesh.start_discovery()?;
        if step(clusters)? == wanted {
            return Ok(());
        }
    }
    if !verb.contains("--force") {
        unblocked(clusters)?;
    }
    // Killed too early each time: undisturbed now, and killed after.
    wait_for(verb, PATIENCE, || {
        clusters
            .tombolo(WEST, &format!("trust rotate {verb} --yes"))
            .map(drop)
    })?;
    clusters.mesh.kill_discovery();
    clusters.mesh.start_discovery()?;
    ensure!(step(clusters)? == wanted, "{}", step(clusters)?);
    Ok(())
}

fn unblocked(clusters: &mut Clusters) -> Result<()> {
    wait_for("everybody to be ready", PATIENCE, || {
        let shown = rotation(clusters, WEST)?;
        let blockers = &shown["rotation"]["blockers"];
        ensure!(blockers.as_array().is_some_and(Vec::is_empty), "{blockers}");
        Ok(())
    })
}

/// True if the agent at `address` takes a client with the certificate in `/run/old.pem`.
fn old_is_believed(from: &Vm, address: &str) -> Result<bool> {
    is_believed(from, "/run/old.pem", (address, 15008))
}

/// True if the HBONE server there takes a client with a certificate and key of a file. Who the server is, is not asked.
pub(crate) fn is_believed(from: &Vm, file: &str, (address, port): (&str, u16)) -> Result<bool> {
    let program = format!(
        "import socket, ssl\nc = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
         c.load_cert_chain('{file}'); c.set_alpn_protocols(['h2'])\n\
         t = c.wrap_socket(socket.create_connection(('{address}', {port}), 5))\nt.settimeout(5)\n\
         try:\n    t.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + bytes([0,0,0,4,0,0,0,0,0])); print('answer', len(t.recv(9)))\n\
         except ssl.SSLError as e:\n    print('alert', e)\n"
    );
    let text = from.host.run("python3", &["-c", &program])?.checked()?.stdout;
    match text.split(' ').next() {
        Some("answer") if text.starts_with("answer 9") => Ok(true),
        Some("alert") => Ok(false),
        _ => bail!("{text}"),
    }
}

#[test]
fn the_root_is_rotated_under_load() -> Result<()> {
    needs_root!();
    let mut clusters = Clusters::start("rotation")?;
    let late = clusters.on(WEST, |mesh, lan| {
        mesh.apply(&group("late"))?;
        let vm = mesh.bare_in(lan, "late", 6)?;
        vm.up(&mesh.token("late")?)?;
        Ok(vm)
    })?;
    let _servers = (
        serve(&clusters.vms[WEST], "front")?,
        serve(&clusters.vms[EAST], "back")?,
        serve(&late, "late")?,
    );
    clusters.join()?;
    clusters.answers(WEST, "back")?;
    clusters.answers(EAST, "front")?;
    late.curl_until(&url("back"), PATIENCE)?;
    let (old_token, first) = (clusters.on(WEST, |mesh, _| mesh.token("late"))?, issuer(&late)?);
    late.host
        .sh("cp /var/lib/tombolo/agent/identity.pem /run/old.pem")?
        .checked()?;
    let address = clusters.vms[WEST].host.address().to_string();
    ensure!(old_is_believed(&late, &address)?);
    // One sleeps through the first two steps, the other through all.
    let left = clusters.on(WEST, |mesh, lan| {
        let vm = mesh.bare_in(lan, "left", 8)?;
        vm.up(&mesh.token("late")?)?;
        Ok(vm)
    })?;
    for sleeper in [&late, &left] {
        sleeper.host.run("tombolo", &["down"])?.checked()?;
    }
    wait_for("the sleepers to be away", PATIENCE, || {
        let list: Value = serde_json::from_str(&clusters.tombolo(WEST, "vm list -o json")?)?;
        let away = list["vms"].as_array().context("vms")?.iter();
        let away = away.filter(|vm| vm["connected"] == false).count();
        ensure!(away == 2, "{away}: {list}");
        Ok(())
    })?;
    // A discovery that has just started waits 20 s for whom it knows: here the sleepers do not come.
    let grace = "echo 'start_grace: 1s' >> /etc/tombolo/discovery.yaml";
    clusters.mesh.control.sh(grace)?.checked()?;

    let load = Load::both_ways(&clusters)?;
    killed_around(&mut clusters, "start", "started")?;
    unblocked(&mut clusters)?;
    for at in [WEST, EAST] {
        // Each host holds the roots of both clusters apart; those of its own trust domain are counted.
        let wanted = if at == WEST { "2" } else { "1" };
        wait_for("the roots", PATIENCE, || {
            let held = roots(&clusters.vms[at])?;
            ensure!(held == wanted, "{held}");
            Ok(())
        })?;
    }
    let refused = clusters.tombolo(WEST, "trust rotate finish --yes").unwrap_err();
    ensure!(format!("{refused:#}").contains("TMB0801"), "{refused:#}");
    ensure!(issuer(&clusters.vms[WEST])? == first, "the old root signs on");

    killed_around(&mut clusters, "switch", "switched")?;
    wait_for("a certificate of the new root", PATIENCE, || {
        ensure!(issuer(&clusters.vms[WEST])? != first);
        Ok(())
    })?;
    // The sleeper's certificate is in the way: it is good still, and only the old root vouches for it.
    let refused = clusters.tombolo(WEST, "trust rotate finish --yes").unwrap_err();
    let refused = format!("{refused:#}");
    ensure!(
        refused.contains("TMB0802") && refused.contains("shop/late"),
        "{refused}"
    );
    // It comes back without anybody's help, and a token of before the switch still works.
    late.host.run("tombolo", &["up"])?.checked()?;
    late.curl_until(&url("back"), PATIENCE)?;
    let newcomer = clusters.on(WEST, |mesh, lan| mesh.bare_in(lan, "newcomer", 7))?;
    newcomer.up(&old_token)?;
    newcomer.curl_until(&url("back"), PATIENCE)?;
    // The other one is left behind, by name.
    wait_for("all but one to be ready", PATIENCE, || {
        let shown = rotation(&mut clusters, WEST)?;
        let blockers = &shown["rotation"]["blockers"];
        ensure!(
            blockers.as_array().is_some_and(|all| all.len() == 1),
            "{blockers}"
        );
        Ok(())
    })?;
    ensure!(old_is_believed(&late, &address)?);

    killed_around(&mut clusters, "finish --force", "steady")?;
    wait_for("the old root to be gone", PATIENCE, || {
        ensure!(!old_is_believed(&late, &address)? && roots(&late)? == "1");
        Ok(())
    })?;
    late.curl_until(&url("back"), PATIENCE)?;
    // Its certificate is in its time and nobody believes it: its device key brings it back.
    left.host.run("tombolo", &["up"])?;
    left.curl_until(&url("back"), PATIENCE)?;
    let mut requests = 0;
    for one in load {
        requests += one.end()?;
    }
    println!("{requests} requests, none failed");
    ensure!(requests > 1000, "{requests} requests");
    // Connections that the old root let in run on until they are cut.
    let audit = clusters.tombolo(WEST, "audit")?;
    for verb in ["rotate-start", "rotate-switch", "rotate-finish"] {
        ensure!(audit.contains(verb), "{verb} is not in the audit log");
    }
    Ok(())
}
