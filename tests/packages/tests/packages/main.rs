//! Packages as users have them: built by the scripts, installed from a signed repository, on hosts booted by systemd.
//!
//! One binary, one module per concern. Needs root, the release build and what `packaging/setup.sh` installs.

mod contents;
mod guard;
mod hardening;
mod install;
mod lifecycle;
mod names;
mod resolvers;
mod rpm;
mod scripts;
mod troubles;
mod upgrade;

/// Leaves a test with SKIPPED where the suite cannot run.
macro_rules! needs_machines {
    () => {
        if !tombolo_packages::required() {
            return Ok(());
        }
    };
}
pub(crate) use needs_machines;

/// Every unit of the agent's package.
const AGENT_UNITS: [&str; 3] = [
    "tombolo-agent.service",
    "tombolo-netd.service",
    "tombolo-join.service",
];

/// What must never change on a host, whatever the mesh does: one text to compare.
const HOST: &str = "sha256sum /etc/resolv.conf /etc/nsswitch.conf /etc/hosts; nft -s list ruleset; \
                    iptables-save | grep -v '^#' | sed 's/\\[[0-9:]*\\]//'; ip -o link show | grep -v mesh0 | cut -d@ -f1 | cut -d' ' -f2; \
                    ip route; ip -6 route";
