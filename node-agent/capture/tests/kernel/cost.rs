//! What capture costs. Not a gate: figures for people, on a quiet machine.

use crate::{
    agent::{Agent, ECHO, FLOOD, SINK, SOURCE},
    namespace::{alone, connect, shell, vips},
};
use nix::sys::resource::{UsageWho, getrusage};
use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    time::{Duration, Instant},
};

/// CPU seconds of the agent so far.
fn agent_cpu(agent: &Agent) -> f64 {
    let tasks: f64 = std::fs::read_dir(format!("/proc/{}/task", agent.pid()))
        .unwrap()
        .map(|task| {
            let path = task.unwrap().path().join("schedstat");
            std::fs::read_to_string(path)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .parse::<f64>()
                .unwrap()
        })
        .sum();
    tasks / 1e9
}

/// CPU seconds of this process so far.
fn own_cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

#[test]
#[ignore = "a measurement"]
fn per_gigabyte_and_per_connection() {
    if std::env::var_os("TOMBOLO_KERNEL_TEST_INSIDE").is_none() {
        // `alone` starts tests that are not ignored.
        let status = std::process::Command::new("unshare")
            .args(["--net", "--"])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--ignored",
                "--nocapture",
                "cost::per_gigabyte_and_per_connection",
            ])
            .env("TOMBOLO_KERNEL_TEST_INSIDE", "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    alone("cost::per_gigabyte_and_per_connection", |world| {
        let agent = world.agent();
        if let Ok(mtu) = std::env::var("MTU") {
            shell(&format!("ip link set mesh0 mtu {mtu}"));
        }
        let gigabytes = FLOOD as f64 / 1e9;
        for round in 0..3 {
            let (start, cpu, own) = (Instant::now(), agent_cpu(&agent), own_cpu());
            let mut stream = connect(vips(SINK, 80)[0]).unwrap();
            let block = vec![7; 256 * 1024];
            for _ in 0..FLOOD / block.len() {
                stream.write_all(&block).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
            let mut count = [0; 8];
            stream.read_exact(&mut count).unwrap();
            assert_eq!(u64::from_be_bytes(count), FLOOD as u64);
            report(
                round,
                "up",
                gigabytes,
                start.elapsed(),
                agent_cpu(&agent) - cpu,
                own_cpu() - own,
            );

            let (start, cpu, own) = (Instant::now(), agent_cpu(&agent), own_cpu());
            let mut stream = connect(vips(SOURCE, 80)[0]).unwrap();
            let mut block = vec![7; 256 * 1024];
            let mut total = 0;
            while let Ok(length @ 1..) = stream.read(&mut block) {
                total += length;
            }
            assert_eq!(total, FLOOD);
            report(
                round,
                "down",
                gigabytes,
                start.elapsed(),
                agent_cpu(&agent) - cpu,
                own_cpu() - own,
            );

            let (start, cpu) = (Instant::now(), agent_cpu(&agent));
            let connections = 3000u32;
            for _ in 0..connections {
                let mut stream = connect(vips(ECHO, 80)[0]).unwrap();
                stream.write_all(b"x").unwrap();
                stream.read_exact(&mut [0]).unwrap();
            }
            let each = (agent_cpu(&agent) - cpu) / f64::from(connections) * 1e6;
            println!(
                "round {round} connections: {each:.1} us of the agent, {:.0}/s",
                f64::from(connections) / start.elapsed().as_secs_f64()
            );

            let mut stream = connect(vips(ECHO, 80)[0]).unwrap();
            stream.set_nodelay(true).unwrap();
            let mut times: Vec<Duration> = (0..5000)
                .map(|_| {
                    let start = Instant::now();
                    stream.write_all(&[1; 1024]).unwrap();
                    stream.read_exact(&mut [0; 1024]).unwrap();
                    start.elapsed()
                })
                .collect();
            times.sort_unstable();
            println!(
                "round {round} 1 KiB round trip: p50 {:?}, p99 {:?}",
                times[2500], times[4950]
            );
        }
    });
}

fn report(round: u32, way: &str, gigabytes: f64, elapsed: Duration, agent: f64, application: f64) {
    println!(
        "round {round} {way}: {:.2} GB/s, CPU s/GB: agent {:.2}, application {:.2}, together {:.2}",
        gigabytes / elapsed.as_secs_f64(),
        agent / gigabytes,
        application / gigabytes,
        (agent + application) / gigabytes,
    );
}
