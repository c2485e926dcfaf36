//! `make demo`: the main job of Tombolo end to end, on real network namespaces, with real applications.
//!
//! First one mesh: host A runs `webapp`, hosts B and C `catalog` (nginx and PostgreSQL). Then two clusters that join,
//! with a kiosk behind NAT. Exits non-zero when any step fails.
#![allow(clippy::print_stdout, reason = "it tells a story")]

mod clusters;
mod joined;
mod load;
mod outages;
mod scenes;
mod story;
mod wire;

use anyhow::{Result, bail};
use clusters::Clusters;
use std::{process::ExitCode, time::Duration};
use story::Story;
use tombolo_testkit::{Host, Mesh, Nginx, Postgres, Process, Vm, binaries};

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

/// What was asked for.
struct Flags {
    /// Leave everything up at the end, and wait.
    keep: bool,
    /// Wait before each scene.
    pause: bool,
    /// The second part alone.
    clusters: bool,
}

fn flags() -> Result<Flags> {
    let mut flags = Flags {
        keep: false,
        pause: false,
        clusters: false,
    };
    for word in std::env::args().skip(1) {
        match word.as_str() {
            "--keep" => flags.keep = true,
            "--pause" => flags.pause = true,
            "--clusters" => flags.clusters = true,
            unknown => bail!("unknown flag {unknown}; there are --keep, --pause and --clusters"),
        }
    }
    Ok(flags)
}

fn tell() -> Result<()> {
    let flags = flags()?;
    if !nix::unistd::Uid::effective().is_root() {
        bail!("the demo makes network namespaces and needs root: make demo");
    }
    if !binaries().join("tombolo-agent").exists() {
        bail!("no programs in {}: make build", binaries().display());
    }
    let mut story = Story::new(flags.pause);
    let stage = if flags.clusters {
        None
    } else {
        one_mesh(&mut story, &flags)?
    };
    let clusters = two_clusters(&mut story, &flags)?;
    story.end();
    if flags.keep {
        keep(stage.as_ref(), &clusters);
    } else if !flags.pause && story.elapsed() > LIMIT {
        bail!(
            "the story took {:.0} s, the limit is {} s",
            story.elapsed().as_secs_f64(),
            LIMIT.as_secs()
        );
    }
    Ok(())
}

/// Scenes 1 to 7. What is on the stage afterwards, if it is to be kept.
fn one_mesh(story: &mut Story, flags: &Flags) -> Result<Option<Stage>> {
    println!(
        "One mesh: three hosts in three networks. A runs webapp, B and C run catalog (nginx, PostgreSQL)."
    );
    let mut stage = scenes::build()?;
    story.say(&format!(
        "hosts, router, nginx and two PostgreSQL servers are up ({})",
        story::time(story.elapsed())
    ));
    story.say("each host's dnsmasq has one line for mesh.internal; its owner logs every connection (access_log: all)");
    let before = scenes::fingerprints(&stage)?;
    scenes::join(story, &mut stage)?;
    scenes::identity(story, &mut stage)?;
    scenes::policy(story, &mut stage)?;
    scenes::power_off(story, &mut stage)?;
    scenes::survival(story, &mut stage)?;
    scenes::envoy(story, &stage)?;
    if flags.keep {
        return Ok(Some(stage));
    }
    scenes::undo(story, &mut stage, &before)?;
    Ok(None)
}

/// Scenes 8 to 12.
fn two_clusters(story: &mut Story, flags: &Flags) -> Result<Clusters> {
    story.next_is(8);
    println!(
        "\nTwo clusters: west (webapp, catalog), east (payments, catalog), and a kiosk of west in a shop."
    );
    let mut clusters = joined::join(story)?;
    joined::kiosk(story, &mut clusters)?;
    outages::gateway(story, &mut clusters)?;
    outages::cluster(story, &mut clusters)?;
    if !flags.keep {
        joined::remove(story, &clusters)?;
    }
    Ok(clusters)
}

fn keep(stage: Option<&Stage>, clusters: &Clusters) {
    println!(
        "\nEverything is up: what would be taken down at the end of each part is not. Enter a host with:"
    );
    let show = |part: &str, hosts: Vec<&Host>| {
        println!("{part}");
        for host in hosts {
            println!("  {:10} {}", host.name(), host.enter());
        }
    };
    if let Some(stage) = stage {
        show(
            "one mesh (C has no power)",
            vec![&stage.mesh.control, &stage.a.host, &stage.b.host],
        );
    }
    show(
        "two clusters (west and east are the hosts of the discoveries)",
        clusters.hosts(),
    );
    println!(
        "Programs: PATH={}:$PATH. Press Enter to take it down.",
        binaries().display()
    );
    let _ = std::io::stdin().read_line(&mut String::new());
}
