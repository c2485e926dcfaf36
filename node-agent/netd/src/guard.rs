//! The host's guard: one nft table of our own, by the program `nft`.
//!
//! **Invariant:** no other table is read or written. A change is one transaction of the kernel: there is no moment
//! without the old rules or the new ones.

use async_trait::async_trait;
use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{io::AsyncWriteExt as _, process::Command, sync::Mutex, time::timeout};
use tombolo_capture::netd::{GuardRules, HostGuard};

/// The table, in nft's words.
const TABLE: &str = "inet tombolo_guard";
/// Where distributions put nft. Not by PATH: what runs with netd's right is not for the environment to say.
const NFT: [&str; 3] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"];
/// nft takes milliseconds; the first time the kernel loads its modules.
const NFT_WITHIN: Duration = Duration::from_secs(4);

/// Keeps the table as the last rules said.
#[derive(Debug)]
pub(crate) struct Guard {
    interface: String,
    /// Rules that this process has set, and what nft shows of them.
    set: Mutex<Option<(GuardRules, String)>>,
}

impl Guard {
    /// For a host whose way into the mesh is the link `interface`.
    pub(crate) fn new(interface: &str) -> Self {
        Self {
            interface: interface.to_owned(),
            set: Mutex::new(None),
        }
    }
}

#[async_trait]
impl HostGuard for Guard {
    async fn set(&self, rules: &GuardRules) -> Result<(), String> {
        let mut set = self.set.lock().await;
        let Some(nft) = NFT.iter().map(Path::new).find(|path| path.is_file()) else {
            // Without it nobody has made a table either, unless this process has.
            if rules.ports.is_empty() && set.is_none() {
                return Ok(());
            }
            return Err("nft is not there; install the package nftables".to_owned());
        };
        let nft = nft.to_owned();
        if let Some((before, shown)) = &*set
            && before == rules
        {
            // Somebody may have flushed all tables: a firewall that was loaded again does that.
            if list(&nft).await? == *shown {
                return Ok(());
            }
            tracing::warn!("the guard was changed by somebody else; it is set again");
        }
        // Either it is in force as a whole, or what was before is.
        run(&nft, &["-f", "-"], &script(&self.interface, rules)).await?;
        *set = if rules.ports.is_empty() {
            tracing::info!("no port is guarded");
            None
        } else {
            let ports: Vec<u16> = rules.ports.iter().map(|guarded| guarded.port).collect();
            tracing::info!(?ports, "guarded");
            Some((rules.clone(), list(&nft).await?))
        };
        Ok(())
    }
}

/// The table as the kernel has it, without counters; empty if there is none.
async fn list(nft: &Path) -> Result<String, String> {
    let output = execute(nft, &["-s", "list", "table", "inet", "tombolo_guard"], "").await?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn run(nft: &Path, arguments: &[&str], input: &str) -> Result<(), String> {
    let output = execute(nft, arguments, input).await?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let first = text.lines().next().unwrap_or("no reason given");
    Err(format!("nft: {first}"))
}

async fn execute(nft: &Path, arguments: &[&str], input: &str) -> Result<Output, String> {
    let run = async {
        let mut child = Command::new(nft)
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let failed = |error: io::Error| format!("{}: {error}", PathBuf::from(nft).display());
    match timeout(NFT_WITHIN, run).await {
        Ok(output) => output.map_err(failed),
        Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
    }
}

/// One transaction that leaves exactly these rules.
///
/// A packet is looked at twice. As it arrives, before a published port of a container is rewritten and forwarded; and
/// as it is delivered, after another port may have been redirected to a guarded one. What the agent delivers comes in by
/// `lo`, what applications here send to the mesh by mesh0: neither is asked. A RST passes, so that a connection that was
/// open can end at both sides. Connections are not tracked: a host without conntrack stays one.
fn script(interface: &str, rules: &GuardRules) -> String {
    // The first line makes a table if there is none, for the second to have something to remove.
    let mut script = format!("table {TABLE} {{ }}\ndelete table {TABLE}\n");
    if rules.ports.is_empty() {
        return script;
    }
    let mut decide = String::new();
    let closed = rules.ports.iter().filter(|guarded| guarded.allowed.is_empty());
    let closed = list_of(closed.map(|guarded| guarded.port));
    if !closed.is_empty() {
        let _ = writeln!(decide, "  tcp dport {{ {closed} }} counter reject with tcp reset");
    }
    for guarded in rules.ports.iter().filter(|guarded| !guarded.allowed.is_empty()) {
        let port = guarded.port;
        for (word, v6) in [("ip", false), ("ip6", true)] {
            let of_family = guarded
                .allowed
                .iter()
                .filter(|prefix| prefix.addr().is_ipv6() == v6);
            let allowed = list_of(of_family);
            if !allowed.is_empty() {
                let _ = writeln!(decide, "  tcp dport {port} {word} saddr {{ {allowed} }} return");
            }
        }
        let _ = writeln!(decide, "  tcp dport {port} counter reject with tcp reset");
    }
    let elsewhere = format!("iifname != {{ \"lo\", \"{interface}\" }}");
    let _ = write!(
        script,
        "table {TABLE} {{\n chain decide {{\n  tcp flags rst return\n{decide} }}\n \
         chain arrived {{\n  type filter hook prerouting priority -150; policy accept;\n  \
         {elsewhere} fib daddr type local jump decide\n }}\n \
         chain delivered {{\n  type filter hook input priority -1; policy accept;\n  {elsewhere} jump decide\n }}\n}}\n"
    );
    script
}

fn list_of<T: ToString>(elements: impl Iterator<Item = T>) -> String {
    elements
        .map(|element| element.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_capture::netd::GuardedPort;

    fn port(port: u16, allowed: &[&str]) -> GuardedPort {
        GuardedPort {
            port,
            allowed: allowed.iter().map(|prefix| prefix.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_script_is_one_table() {
        let none = script("mesh0", &GuardRules::default());
        assert_eq!(
            none,
            "table inet tombolo_guard { }\ndelete table inet tombolo_guard\n"
        );
        let rules = GuardRules {
            ports: vec![
                port(8080, &[]),
                port(7000, &["10.0.0.0/8", "fd00::/8", "192.0.2.1/32"]),
                port(9090, &[]),
            ],
        };
        let text = script("mesh1", &rules);
        assert!(text.starts_with(&none), "{text}");
        for line in [
            "tcp dport { 8080, 9090 } counter reject with tcp reset",
            "tcp dport 7000 ip saddr { 10.0.0.0/8, 192.0.2.1/32 } return",
            "tcp dport 7000 ip6 saddr { fd00::/8 } return",
            "tcp dport 7000 counter reject with tcp reset",
            "iifname != { \"lo\", \"mesh1\" } fib daddr type local jump decide",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        for line in text.lines().filter(|line| line.contains("table ")) {
            assert!(line.contains(TABLE), "another table: {line}");
        }
    }
}
