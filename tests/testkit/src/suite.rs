use anyhow::{Result, bail};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// Folder of the programs under test: `TOMBOLO_BIN_DIR`, else the release build of this workspace.
pub fn binaries() -> PathBuf {
    std::env::var_os("TOMBOLO_BIN_DIR").map_or_else(
        || {
            let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
                || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target")),
                PathBuf::from,
            );
            target.join("release")
        },
        PathBuf::from,
    )
}

/// Says that a suite cannot run and why; fails when `TOMBOLO_TEST_REQUIRE` names it (or `all`).
///
/// # Panics
/// When the suite is required.
#[allow(clippy::print_stdout, reason = "the runner and people read it there")]
pub fn skip(suite: &str, reason: &str) {
    let required = std::env::var("TOMBOLO_TEST_REQUIRE").unwrap_or_default();
    let named = required
        .split([',', ' '])
        .any(|name| name == suite || name == "all");
    assert!(
        !named,
        "{suite} is required (TOMBOLO_TEST_REQUIRE) but cannot run: {reason}"
    );
    println!("SKIPPED {suite}: {reason}");
}

/// True if hosts can be made here; otherwise says SKIPPED.
///
/// # Panics
/// When the suite is required and cannot run.
pub fn require_root(suite: &str) -> bool {
    if !nix::unistd::Uid::effective().is_root() {
        skip(suite, "network namespaces, mounts and /dev/net/tun need root");
        return false;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        skip(suite, "/dev/net/tun is missing (modprobe tun)");
        return false;
    }
    if !binaries().join("tombolo-agent").exists() {
        skip(
            suite,
            &format!("no programs in {} (cargo build --release)", binaries().display()),
        );
        return false;
    }
    true
}

/// The Envoy of the interop suite and the benchmark: `TOMBOLO_ENVOY`, or the one that `make setup` installs.
pub fn envoy() -> Option<PathBuf> {
    let installed = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/envoy/envoy");
    std::env::var_os("TOMBOLO_ENVOY")
        .map(PathBuf::from)
        .or_else(|| Some(installed.into()))
        .filter(|path| path.exists())
}

/// Polls until `condition` gives a value; fails at the deadline with the last reason.
///
/// # Errors
/// At the deadline.
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => bail!("waited {deadline:?} for {what}: {error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}
