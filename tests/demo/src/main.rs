//! `make demo`: the main job of Tombolo end to end, on real network namespaces, with real applications.
//!
//! Host A runs `webapp`, hosts B and C `catalog` (nginx and PostgreSQL). Exits non-zero when any step fails.
#![allow(clippy::print_stdout, reason = "it tells a story")]

mod scenes;
mod story;

use anyhow::{Result, bail};
use std::{process::ExitCode, time::Duration};
use story::Story;
use tombolo_testkit::{Mesh, Nginx, Postgres, Process, Vm, binaries};

/// The whole story must fit in this, after the build.
const LIMIT: Duration = Duration::from_secs(90);

/// Everything on the stage. Dropped from top to bottom: applications, hosts, then the mesh with its namespaces.
struct Stage {
    apps: Vec<(Nginx, Postgres)>,
    session: Option<Process>,
    a: Vm,
    b: Vm,
    c: Vm,
    mesh: Mesh,
}

fn main() -> ExitCode {
    match tell() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn tell() -> Result<()> {
    let flags: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    if let Some(unknown) = flags
        .iter()
        .find(|f| !["--keep", "--pause"].contains(&f.as_str()))
    {
        bail!("unknown flag {unknown}; there are --keep and --pause");
    }
    if !nix::unistd::Uid::effective().is_root() {
        bail!("the demo makes network namespaces and needs root: make demo");
    }
    if !binaries().join("tombolo-agent").exists() {
        bail!("no programs in {}: make build", binaries().display());
    }
    let mut story = Story::new(has("--pause"));
    println!(
        "Tombolo: three hosts in three networks. A runs webapp, B and C run catalog (nginx, PostgreSQL)."
    );
    let mut stage = scenes::build()?;
    story.say(&format!(
        "hosts, router, nginx and two PostgreSQL servers are up ({})",
        story::time(story.elapsed())
    ));
    story.say("each host's dnsmasq has one line for mesh.internal; its owner logs every connection (access_log: all)");
    let before = scenes::fingerprints(&stage)?;
    scenes::join(&mut story, &mut stage)?;
    scenes::identity(&mut story, &mut stage)?;
    scenes::policy(&mut story, &mut stage)?;
    scenes::power_off(&mut story, &mut stage)?;
    scenes::survival(&mut story, &mut stage)?;
    scenes::envoy(&mut story, &stage)?;
    if has("--keep") {
        story.end();
        keep(&stage);
        return Ok(());
    }
    scenes::undo(&mut story, &mut stage, &before)?;
    story.end();
    if !has("--pause") && story.elapsed() > LIMIT {
        bail!(
            "the story took {:.0} s, the limit is {} s",
            story.elapsed().as_secs_f64(),
            LIMIT.as_secs()
        );
    }
    Ok(())
}

fn keep(stage: &Stage) {
    println!("\nThe mesh is up. Enter a host with:");
    for host in [&stage.mesh.control, &stage.a.host, &stage.b.host] {
        println!("  {:10} {}", host.name(), host.enter());
    }
    println!(
        "Programs: PATH={}:$PATH. Press Enter to take it down.",
        binaries().display()
    );
    let _ = std::io::stdin().read_line(&mut String::new());
}
