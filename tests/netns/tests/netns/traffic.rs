//! Bytes through the mesh: all of them, in order, with the edges of TCP preserved.

use crate::{CATALOG, PATIENCE, needs_root, pair};
use anyhow::{Context as _, Result, ensure};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::Stdio,
};
use tombolo_testkit::{EchoServer, MeshOptions, Nginx, Redis, Shape, Vm, wait_for};

const GB: u64 = 1 << 30;

fn call(vm: &Vm, mode: &str, port: u16, count: u64) -> Result<()> {
    let output = vm.host.run(
        "tombolo-peer",
        &["call", mode, CATALOG, &port.to_string(), &count.to_string()],
    )?;
    output
        .checked()
        .with_context(|| format!("{mode} of {count} bytes\n--- agent\n{}", vm.agent_log()))
        .map(drop)
}

#[test]
fn a_gigabyte_each_way_and_the_edges_of_tcp() -> Result<()> {
    needs_root!();
    let ports = "sum=7001,source=7002,echo=7003,banner=7004,reset=7005,slow=7006";
    let (a, b, _mesh) = pair("bytes", ports, MeshOptions::default())?;
    let _servers = ["sum", "source", "echo", "banner", "reset", "slow"]
        .into_iter()
        .zip(7001..)
        .map(|(mode, port)| EchoServer::start(&b.host, mode, port))
        .collect::<Result<Vec<_>>>()?;
    call(&a, "sum", 7001, GB)?;
    call(&a, "source", 7002, GB)?;
    call(&a, "echo", 7003, 64 << 20)?;
    // Half-close: the server answers only after it has read the end, for nothing and for one byte too.
    call(&a, "sum", 7001, 0)?;
    call(&a, "sum", 7001, 1)?;
    call(&a, "banner", 7004, 0)?;
    // 4 MiB at 640 KiB/s: backpressure holds the sender, nothing is dropped.
    call(&a, "sum", 7006, 4 << 20)?;
    let reset = a.host.run("tombolo-peer", &["call", "reset", CATALOG, "7005"])?;
    ensure!(
        reset.stdout.starts_with("ECONNRESET"),
        "a reset must arrive as one: {}",
        reset.text()
    );
    Ok(())
}

#[test]
fn a_thousand_idle_connections() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair("idle", "echo=7003", MeshOptions::default())?;
    let _server = EchoServer::start(&b.host, "echo", 7003)?;
    let mut child = a
        .host
        .command("tombolo-peer")
        .args(["call", "hold", CATALOG, "7003", "1000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    ensure!(
        lines.next().transpose()?.as_deref() == Some("holding 1000"),
        "{}",
        a.agent_log()
    );
    let status = a
        .host
        .run("tombolo", &["status", "-o", "json"])?
        .checked()?
        .stdout;
    ensure!(
        status.contains("1000"),
        "status counts open connections: {status}"
    );
    child.stdin.take().context("stdin")?.write_all(b"\n")?;
    ensure!(
        lines
            .next()
            .transpose()?
            .is_some_and(|line| line.starts_with("ok")),
        "all still answer"
    );
    ensure!(child.wait()?.success());
    Ok(())
}

#[test]
fn a_narrow_path_carries_everything() -> Result<()> {
    needs_root!();
    let shape = Shape {
        mtu: 1280,
        ..Shape::default()
    };
    let (a, b, _mesh) = pair(
        "mtu",
        "sum=7001,source=7002",
        MeshOptions {
            shape,
            ..MeshOptions::default()
        },
    )?;
    let _servers = (
        EchoServer::start(&b.host, "sum", 7001)?,
        EchoServer::start(&b.host, "source", 7002)?,
    );
    call(&a, "sum", 7001, 32 << 20)?;
    call(&a, "source", 7002, 32 << 20)
}

#[test]
fn hosts_with_ipv6_alone() -> Result<()> {
    needs_root!();
    let shape = Shape {
        ipv4: false,
        ..Shape::default()
    };
    let (a, b, _mesh) = pair(
        "v6",
        "http=80:8080,sum=7001",
        MeshOptions {
            shape,
            ..MeshOptions::default()
        },
    )?;
    let _nginx = Nginx::start(&b.host, 8080, "over IPv6")?;
    let _server = EchoServer::start(&b.host, "sum", 7001)?;
    ensure!(a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)? == "over IPv6\n");
    call(&a, "sum", 7001, 32 << 20)
}

#[test]
fn real_applications_and_connect_tells_the_truth() -> Result<()> {
    needs_root!();
    let (a, b, _mesh) = pair(
        "apps",
        "http=80:8080,redis=6379,closed=7009",
        MeshOptions::default(),
    )?;
    let nginx = Nginx::start(&b.host, 8080, "hello from b")?;
    let _redis = Redis::start(&b.host, 6379)?;
    ensure!(a.curl_until(&format!("http://{CATALOG}/"), PATIENCE)? == "hello from b\n");
    let set = a
        .host
        .sh(&format!(
            "redis-cli -h {CATALOG} set k v; redis-cli -h {CATALOG} get k"
        ))?
        .checked()?;
    ensure!(set.stdout == "OK\nv\n", "{}", set.text());
    // The application is not there: refused, not accepted and dropped.
    let connect = |port: &str| a.host.run("tombolo-peer", &["call", "connect", CATALOG, port]);
    for port in ["7009", "9999"] {
        let how = connect(port)?;
        ensure!(
            how.stdout.starts_with("ECONNREFUSED"),
            "port {port}: {}\n{}",
            how.text(),
            a.agent_log()
        );
    }
    drop(nginx);
    wait_for("nginx to be gone", PATIENCE, || {
        let how = connect("80")?;
        ensure!(how.stdout.starts_with("ECONNREFUSED"), "{}", how.text());
        Ok(())
    })?;
    // The agent works without any capability.
    let status = std::fs::read_to_string(format!("/proc/{}/status", a.agent_pid()?))?;
    ensure!(
        status.lines().any(|line| line == "CapEff:\t0000000000000000"),
        "{status}"
    );
    // ping answers while there is a healthy endpoint.
    a.host.sh(&format!("ping -c 1 -W 3 {CATALOG}"))?.checked()?;
    // A live service without an endpoint is unreachable, and says so at once.
    let how = a.host.run(
        "tombolo-peer",
        &["call", "connect", "webapp.shop.svc.mesh.internal", "80"],
    )?;
    ensure!(
        how.stdout.starts_with("ECONNREFUSED") || how.stdout.starts_with("EHOSTUNREACH"),
        "{}",
        how.text()
    );
    Ok(())
}
