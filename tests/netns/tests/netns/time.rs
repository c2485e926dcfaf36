//! Certificates in time: the wall clock of the hosts is moved, everything else is real.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tombolo_testkit::{Clock, EchoServer, Host, Mesh, MeshOptions, Nginx, Vm, wait_for};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// Longest way back into the mesh after any absence.
const BACK: Duration = Duration::from_secs(10);
/// The service.
const URL: &str = "http://catalog.shop.svc.mesh.internal/";
/// Past the half life of a certificate of 24 h and its jitter.
const HALF_LIFE: Duration = Duration::from_secs(13 * 3600);

fn options() -> MeshOptions {
    MeshOptions {
        clock: true,
        ..MeshOptions::default()
    }
}

/// Leaves a test with SKIPPED where clocks cannot be moved.
macro_rules! needs_clock {
    () => {
        needs_root!();
        if !Clock::require("netns time") {
            return Ok(());
        }
    };
}

/// A client that runs until it is asked how it went.
struct Client(Option<Child>);

impl Client {
    fn start(host: &Host, mode: &str, port: u16, count: u64) -> Result<Self> {
        let child = host
            .command("tombolo-peer")
            .args(["call", mode, CATALOG, &port.to_string(), &count.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self(Some(child)))
    }

    /// New connections, `per_second` of them.
    fn load(host: &Host, per_second: u64) -> Result<Self> {
        Self::start(host, "load", 80, per_second)
    }

    fn end(&mut self) -> Result<String> {
        let mut child = self.0.take().context("ended")?;
        drop(child.stdin.take());
        let output = child.wait_with_output()?;
        let text = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
        ensure!(output.status.success(), "{text}");
        Ok(text)
    }

    /// Stops the load. How many requests there were; none may have failed.
    fn all_well(mut self) -> Result<usize> {
        let text = self.end()?;
        let bad: Vec<_> = text.lines().filter(|line| !line.ends_with(" ok")).collect();
        let all = text.lines().count();
        ensure!(
            bad.is_empty(),
            "{} of {all} failed, first: {:?}",
            bad.len(),
            &bad[..bad.len().min(5)]
        );
        Ok(all)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What discovery knows of the VM with this hostname.
fn vm_of(mesh: &Mesh, hostname: &str) -> Result<Value> {
    let list: Value = serde_json::from_str(&mesh.tombolo("vm list -o json")?)?;
    let vms = list["vms"].as_array().context("vms")?;
    vms.iter()
        .find(|vm| vm["hostname"] == hostname)
        .cloned()
        .with_context(|| format!("{hostname}: {list}"))
}

fn generation(mesh: &Mesh, hostname: &str) -> Result<u64> {
    vm_of(mesh, hostname)?["generation"]
        .as_u64()
        .context("generation")
}

/// Serial number of the certificate on the host's disk.
fn serial(vm: &Vm) -> Result<String> {
    let line = "openssl x509 -noout -serial -in /var/lib/tombolo/agent/identity.pem";
    Ok(vm.host.sh(line)?.checked()?.stdout)
}

/// Serial number of the certificate that discovery serves with.
fn discovery_serial(mesh: &Mesh) -> Result<String> {
    let line = "openssl s_client -connect 127.0.0.1:15012 -alpn h2 </dev/null 2>/dev/null | openssl x509 -noout -serial";
    Ok(mesh.control.sh(line)?.checked()?.stdout)
}

fn status(vm: &Vm) -> Result<Value> {
    let output = vm.host.run("tombolo", &["status", "-o", "json"])?;
    serde_json::from_str(&output.stdout).with_context(|| output.text())
}

/// Codes of the findings, in order.
fn codes(vm: &Vm) -> Result<String> {
    let status = status(vm)?;
    let found = status["findings"].as_array().context("findings")?;
    let codes: Vec<_> = found.iter().filter_map(|f| f["code"].as_str()).collect();
    Ok(codes.join(" "))
}

fn wait_for_code(vm: &Vm, code: &str, deadline: Duration) -> Result<()> {
    wait_for(&format!("{code} on {}", vm.host.name()), deadline, || {
        let found = codes(vm)?;
        ensure!(found.contains(code), "{found:?}");
        Ok(())
    })
}

fn wait_for_serving(vm: &Vm, deadline: Duration) -> Result<()> {
    wait_for(&format!("{} to serve", vm.host.name()), deadline, || {
        let status = status(vm)?;
        ensure!(
            status["state"] == "Serving" && status["controlConnected"] == true,
            "{status}"
        );
        Ok(())
    })
}

#[test]
fn rotation_under_load_fails_nothing() -> Result<()> {
    needs_clock!();
    let (a, b, mesh) = pair("rotation", "http=80:8080,tcp=7002", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    let _echo = EchoServer::start(&b.host, "echo", 7002)?;
    a.curl_until(URL, PATIENCE)?;
    let state = || -> Result<_> {
        Ok((
            [generation(&mesh, "a")?, generation(&mesh, "b")?],
            [serial(&a)?, serial(&b)?, discovery_serial(&mesh)?],
        ))
    };
    let (generations, serials) = state()?;
    let load = Client::load(&a.host, 60)?;
    let mut stream = Client::start(&a.host, "drip", 7002, 20)?;
    // Time flies 12,000 times faster: a half life is 3.6 s.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(16) {
        mesh.clock().advance(Duration::from_secs(600))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let requests = load.all_well().with_context(|| a.agent_log())?;
    let dripped = stream.end().context("the long stream")?;
    ensure!(requests > 600, "{requests} requests");
    ensure!(dripped.contains("dripped"), "{dripped}");
    let (later, new) = state()?;
    for (before, after) in generations.iter().zip(later) {
        ensure!(after >= before + 2, "generation {before} to {after}");
    }
    ensure!(serials.iter().zip(&new).all(|(old, new)| old != new), "{new:?}");
    for vm in [&a, &b] {
        wait_for_serving(vm, PATIENCE)?;
    }
    Ok(())
}

#[test]
fn after_any_absence_the_device_key_is_enough() -> Result<()> {
    needs_clock!();
    let (a, b, mesh) = pair("absence", "http=80:8080", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(URL, PATIENCE)?;
    // Off for longer than any certificate lives. The other host and discovery sleep as long: their clocks jump too.
    a.host.run("tombolo", &["down"])?.checked()?;
    mesh.clock().advance(8 * DAY)?;
    let begun = Instant::now();
    a.host.run("tombolo", &["up"])?.checked()?;
    a.curl_until(URL, BACK)?;
    ensure!(begun.elapsed() <= BACK, "back after {:?}", begun.elapsed());
    for vm in [&a, &b] {
        wait_for_serving(vm, BACK)?;
    }
    // Running, but cut off from discovery until everything has expired.
    mesh.control.unplug()?;
    mesh.clock().advance(8 * DAY)?;
    for vm in [&a, &b] {
        wait_for_code(vm, "TMB0303", PATIENCE)?;
    }
    wait_for("nobody to believe an expired certificate", PATIENCE, || {
        ensure!(!a.curl(URL)?.ok());
        Ok(())
    })?;
    let before = generation(&mesh, "a")?;
    mesh.control.plug()?;
    let begun = Instant::now();
    a.curl_until(URL, BACK)?;
    for vm in [&a, &b] {
        wait_for_serving(vm, BACK)?;
    }
    ensure!(begun.elapsed() <= BACK, "back after {:?}", begun.elapsed());
    ensure!(generation(&mesh, "a")? == before + 1);
    Ok(())
}

#[test]
fn without_discovery_nothing_breaks_before_expiry() -> Result<()> {
    needs_clock!();
    let (a, b, mut mesh) = pair("halflife", "http=80:8080", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(URL, PATIENCE)?;
    ensure!(codes(&a)?.is_empty(), "{}", codes(&a)?);
    let load = Client::load(&a.host, 40)?;
    mesh.kill_discovery();
    mesh.clock().advance(HALF_LIFE)?;
    for vm in [&a, &b] {
        wait_for_code(vm, "TMB0304", PATIENCE)?;
    }
    mesh.clock().advance(10 * HOUR)?;
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(codes(&a)?.contains("TMB0304") && !codes(&a)?.contains("TMB0303"));
    let requests = load.all_well()?;
    ensure!(requests > 60, "{requests} requests");
    mesh.clock().advance(2 * HOUR)?;
    for vm in [&a, &b] {
        wait_for_code(vm, "TMB0303", PATIENCE)?;
        let output = vm.host.run("tombolo", &["status"])?;
        ensure!(
            !output.ok() && output.text().contains("renews by itself"),
            "{}",
            output.text()
        );
    }
    mesh.start_discovery()?;
    let begun = Instant::now();
    a.curl_until(URL, BACK)?;
    for vm in [&a, &b] {
        wait_for_serving(vm, BACK)?;
        ensure!(codes(vm)?.is_empty(), "{}", codes(vm)?);
    }
    ensure!(begun.elapsed() <= BACK, "healed after {:?}", begun.elapsed());
    Ok(())
}

/// The state directory of an enrolled host, as a copied disk has it.
fn copy_state(from: &Host, to: &Host) -> Result<()> {
    let line = "tar -C /var/lib/tombolo/agent --exclude lock -c . | base64 -w0";
    to.write("/run/state.b64", &from.sh(line)?.checked()?.stdout)?;
    to.sh("mkdir -p /var/lib/tombolo/agent && base64 -d /run/state.b64 | tar -C /var/lib/tombolo/agent -xp")?
        .checked()
        .map(drop)
}

#[test]
fn of_two_copies_of_a_device_one_goes_on() -> Result<()> {
    needs_clock!();
    let (a, b, mut mesh) = pair("clone", "http=80:8080", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "b")?;
    a.curl_until(URL, PATIENCE)?;
    let device = vm_of(&mesh, "b")?;
    let id = device["deviceId"].as_str().context("deviceId")?.to_owned();
    let addresses = device["addresses"].clone();
    let load = Client::load(&a.host, 40)?;
    // The copy starts, without the application: whatever came to it would fail.
    let c = mesh.bare("c")?;
    copy_state(&b.host, &c.host)?;
    c.host.run("tombolo", &["up"])?.checked()?;
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(
        vm_of(&mesh, "b")?["addresses"] == addresses,
        "the address stays with its holder"
    );
    // The copy goes to sleep, the original renews, the copy wakes up.
    c.host.signal_all("tombolo-agent", Signal::SIGSTOP)?;
    let before = generation(&mesh, "b")?;
    mesh.clock().advance(HALF_LIFE)?;
    wait_for("b to renew", PATIENCE, || {
        ensure!(generation(&mesh, "b")? == before + 1);
        Ok(())
    })?;
    c.host.signal_all("tombolo-agent", Signal::SIGCONT)?;
    wait_for_code(&c, "TMB0121", PATIENCE)?;
    let output = c.host.run("tombolo", &["status"])?;
    ensure!(output.text().contains("tombolo vm readmit"), "{}", output.text());
    ensure!(
        mesh.tombolo(&format!("vm describe {id}"))?
            .contains("CloneRefused")
    );
    ensure!(mesh.tombolo("audit")?.contains("TMB0121"));
    // A farewell of the copy is not one of the original.
    c.host.run("tombolo", &["down"])?.checked()?;
    std::thread::sleep(Duration::from_millis(500));
    let requests = load.all_well().with_context(|| c.agent_log())?;
    ensure!(requests > 60, "{requests} requests");
    ensure!(a.curl(URL)?.stdout == "b\n" && vm_of(&mesh, "b")?["state"] == "Healthy");

    // The other way round: the original is lost, and the copy is what shall be the VM from now on.
    b.host.power_off()?;
    let _other = Nginx::start(&c.host, 8080, "c")?;
    mesh.tombolo(&format!("vm readmit {id}"))?;
    c.host.run("tombolo", &["up"])?.checked()?;
    wait_for_serving(&c, PATIENCE)?;
    ensure!(a.curl_until(URL, PATIENCE)? == "c\n");
    ensure!(generation(&mesh, "b")? > before + 1);
    // Found again, the original is the copy that comes too late.
    b.host.plug()?;
    b.host.run("tombolo", &["up"])?.checked()?;
    c.host.signal_all("tombolo-agent", Signal::SIGCONT)?;
    mesh.clock().advance(HALF_LIFE)?;
    wait_for_code(&b, "TMB0121", PATIENCE)?;
    wait_for_serving(&c, PATIENCE)?;
    ensure!(a.curl_until(URL, PATIENCE)? == "c\n");
    Ok(())
}

#[test]
fn a_clock_that_is_an_hour_off_is_named() -> Result<()> {
    needs_clock!();
    let mut mesh = Mesh::start("skew", options())?;
    mesh.group("catalog", "http=80:8080")?;
    let (vm, token) = (mesh.bare("vm")?, mesh.token("catalog")?);
    let own = Arc::new(Clock::new(mesh.lab.dir(), "vm")?);
    vm.host.follow(&own);
    // Its certificate begins two minutes earlier: soon after the full hour that is in the hour before.
    let hours = "date -u +%Y-%m-%dT%H; date -u -d '-2 minutes' +%Y-%m-%dT%H";
    let hours = mesh.control.sh(hours)?.stdout;
    let discovery: Vec<&str> = hours.lines().collect();
    for (offset, word) in [
        (-3600, "the server's certificate begins at"),
        (3600, " min ahead"),
    ] {
        own.set(offset)?;
        let before = vm.host.fingerprint()?;
        let output = vm.host.run("tombolo", &["up", &token])?;
        let text = output.text();
        let there = vm
            .host
            .sh(&format!("date -u -d '{offset} seconds' +%Y-%m-%dT%H"))?
            .stdout;
        ensure!(!output.ok() && text.contains("TMB0113"), "{text}");
        ensure!(
            text.contains(there.trim()) && discovery.iter().any(|hour| text.contains(hour)),
            "both times: {text}"
        );
        ensure!(text.contains(word), "{text}");
        ensure!(
            text.contains("next:") && vm.host.fingerprint()? == before,
            "{text}"
        );
    }
    // Set right, the same token works.
    own.set(0)?;
    vm.up(&token)?;
    Ok(())
}

#[test]
fn killed_while_it_renews_it_is_still_one_device() -> Result<()> {
    needs_clock!();
    let (a, b, mut mesh) = pair("killed", "http=80:8080", options())?;
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(URL, PATIENCE)?;
    let state =
        |vm: &Vm| -> Result<String> { Ok(format!("/proc/{}/root/var/lib/tombolo/agent", vm.agent_pid()?)) };
    let mut seed = u64::from(std::process::id());
    for round in 0..12 {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let (before, dir) = (generation(&mesh, "b")?, state(&b)?);
        mesh.clock().advance(HALF_LIFE)?;
        // The request is on disk before it is sent: from there on every moment counts.
        let pending = std::path::Path::new(&dir).join("pending.json");
        let end = Instant::now() + Duration::from_secs(3);
        while !pending.exists() && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_micros(seed >> 49)); // up to 33 ms
        if round % 3 != 1 {
            b.host.signal_all("tombolo-agent", Signal::SIGKILL)?;
        }
        if round % 3 != 0 {
            mesh.kill_discovery();
            mesh.start_discovery()?;
        }
        if round % 3 != 1 {
            b.host.run("tombolo", &["up"])?.checked()?;
        }
        wait_for("the renewal to be whole", PATIENCE, || {
            let there = generation(&mesh, "b")?;
            let text = std::fs::read_to_string(format!("{}/registration.json", state(&b)?))?;
            let here = serde_json::from_str::<Value>(&text)?["generation"].as_u64();
            ensure!(
                there > before && here == Some(there) && codes(&b)?.is_empty(),
                "round {round}: {before}, then {there} at discovery, {here:?} here, {}",
                codes(&b)?
            );
            Ok(())
        })?;
    }
    ensure!(
        !mesh.tombolo("audit")?.contains("TMB0121"),
        "nobody was taken for a clone"
    );
    a.curl_until(URL, BACK)?;
    Ok(())
}

/// Makes roots, signers and a client certificate as an organisation's own CA would.
const MAKE_CAS: &str = r#"
set -e; cd "$1"
ca() { # name, key arguments: a root, a signer, Istio's four files
  mkdir -p $1; n=$1; shift
  openssl req -x509 -newkey "$@" -nodes -days 3650 -subj "/O=Example $n/CN=Root of $n" -keyout $n/root-key.pem -out $n/root-cert.pem     -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign,cRLSign
  openssl req -newkey "$@" -nodes -subj "/O=Example $n/CN=Signer of $n" -keyout $n/ca-key.pem -out $n/ca.csr
  printf 'basicConstraints=critical,CA:true,pathlen:0
keyUsage=critical,digitalSignature,keyCertSign
subjectKeyIdentifier=hash
' > $n/ext
  openssl x509 -req -in $n/ca.csr -CA $n/root-cert.pem -CAkey $n/root-key.pem -CAcreateserial -days 730 -extfile $n/ext -out $n/ca-cert.pem
  cat $n/ca-cert.pem $n/root-cert.pem > $n/cert-chain.pem
}
client() { # CA: a client with the identity of webapp
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/" -keyout $1/client-key.pem -out $1/client.csr
  printf 'subjectAltName=critical,URI:spiffe://mesh.example/ns/shop/sa/webapp
extendedKeyUsage=clientAuth,serverAuth
keyUsage=critical,digitalSignature
' > $1/ext
  openssl x509 -req -in $1/client.csr -CA $1/ca-cert.pem -CAkey $1/ca-key.pem -CAcreateserial -days 1 -extfile $1/ext -out $1/client.pem
  cat $1/ca-cert.pem >> $1/client.pem
}
ca first rsa:2048
ca second ec -pkeyopt ec_paramgen_curve:P-256
ca third ec -pkeyopt ec_paramgen_curve:P-256
client first; client second; client third
"#;

/// True if the agent at `address` takes a client with this certificate: its answer is HTTP/2, not an alert.
fn is_believed(from: &Host, address: &str, ca: &str) -> Result<bool> {
    let program = format!(
        "import socket, ssl\nc = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE\n\
         c.load_cert_chain('{ca}/client.pem', '{ca}/client-key.pem'); c.set_alpn_protocols(['h2'])\n\
         t = c.wrap_socket(socket.create_connection(('{address}', 15008), 5))\nt.settimeout(5)\n\
         try:\n    t.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n' + bytes([0,0,0,4,0,0,0,0,0])); print('answer', len(t.recv(9)))\n\
         except ssl.SSLError as e:\n    print('alert', e)\n"
    );
    let text = from.run("python3", &["-c", &program])?.checked()?.stdout;
    ensure!(
        text.starts_with("answer 9") || text.starts_with("alert"),
        "{text}"
    );
    Ok(text.starts_with("answer"))
}

#[test]
fn several_roots_live_at_once() -> Result<()> {
    needs_clock!();
    let mut mesh = Mesh::prepare("roots", options())?;
    let dir = mesh.lab.dir().join("cas");
    std::fs::create_dir_all(&dir)?;
    let cas = dir.to_str().context("path")?.to_owned();
    mesh.control.run("sh", &["-c", MAKE_CAS, "sh", &cas])?.checked()?;
    mesh.options.init = vec!["--ca-dir".into(), format!("{cas}/first")];
    mesh.found()?;
    mesh.group("webapp", "http=80:8080")?;
    mesh.group("catalog", "http=80:8080")?;
    let (b, a) = (mesh.vm("b", "catalog")?, mesh.vm("a", "webapp")?);
    let _nginx = Nginx::start(&b.host, 8080, "hello")?;
    a.curl_until(URL, PATIENCE)?;
    // Leaf, signer; discovery adds the root for those who know it by its pin only.
    let subjects = |at: &str, client: &str| -> Result<Vec<String>> {
        let line = format!(
            "openssl s_client -connect {at} -alpn h2 -showcerts {client} </dev/null 2>/dev/null | grep -a '^ *[0-9] s:\\|^ *i:' | grep -o 'CN *= *.*' | sed 's/ *= */=/'"
        );
        Ok(a.host.sh(&line)?.stdout.lines().map(str::to_owned).collect())
    };
    let own = "-cert /var/lib/tombolo/agent/identity.pem -key /var/lib/tombolo/agent/identity.pem";
    // The issuer of the leaf, then subject and issuer of each certificate above it; leaves have no name.
    let (signer, root) = ("CN=Signer of first", "CN=Root of first");
    let agent = subjects(&b.host.at(15008), own)?;
    ensure!(agent == [signer, signer, root], "{agent:?}");
    let discovery = subjects(&mesh.control.at(15012), "")?;
    ensure!(discovery == [signer, signer, root, root, root], "{discovery:?}");
    let address = b.host.address().to_string();
    let believed = |ca: &str| is_believed(&a.host, &address, &format!("{cas}/{ca}"));
    ensure!(believed("first")? && !believed("second")? && !believed("third")?);

    let load = Client::load(&a.host, 40)?;
    let ca = "/var/lib/tombolo/discovery/ca";
    let restart = |mesh: &mut Mesh, line: &str| -> Result<()> {
        mesh.kill_discovery();
        mesh.control.sh(line)?.checked()?;
        mesh.start_discovery()
    };
    let roots = |vm: &Vm| -> Result<String> {
        Ok(vm
            .host
            .sh("grep -c BEGIN /var/lib/tombolo/agent/roots.pem")?
            .stdout)
    };
    restart(
        &mut mesh,
        &format!("cp {cas}/second/root-cert.pem {ca}/extra-roots.pem"),
    )?;
    wait_for("both roots on both hosts", PATIENCE, || {
        for vm in [&a, &b] {
            ensure!(roots(vm)?.trim() == "2", "{}", roots(vm)?);
        }
        Ok(())
    })?;
    ensure!(believed("first")? && believed("second")? && !believed("third")?);
    // The second CA takes over while certificates of the first are out.
    restart(
        &mut mesh,
        &format!(
            "for f in ca-cert ca-key cert-chain root-cert; do cat {cas}/second/$f.pem > {ca}/$f.pem; done; cat {cas}/first/root-cert.pem > {ca}/extra-roots.pem"
        ),
    )?;
    let issuer = |vm: &Vm| -> Result<String> {
        Ok(vm
            .host
            .sh("openssl x509 -noout -issuer -in /var/lib/tombolo/agent/identity.pem")?
            .stdout)
    };
    mesh.clock().advance(HALF_LIFE)?;
    for vm in [&a, &b] {
        wait_for("a certificate of the second CA", PATIENCE, || {
            ensure!(issuer(vm)?.contains("Signer of second"), "{}", issuer(vm)?);
            Ok(())
        })?;
    }
    let _ = load.all_well()?;
    a.curl_until(URL, PATIENCE)?;
    // Who joins now pins the new root, and talks to all.
    let d = mesh.vm("d", "webapp")?;
    d.curl_until(URL, PATIENCE)?;
    Ok(())
}
