//! The layer rule: dependencies between our crates point downward only, and the pure layers stay pure.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path, process::Command};

/// Layer of every package. A new crate gets its line here first: where it stands is a decision.
const LAYERS: &[(&str, u8)] = &[
    ("tombolo-types", 0),
    ("tombolo-proto", 0),
    ("tombolo-packet", 0),
    ("tombolo-config", 1),
    ("tombolo-identity", 1),
    ("tombolo-destination", 1),
    ("tombolo-authz", 1),
    ("tombolo-dns", 1),
    ("tombolo-flow", 1),
    ("tombolo-snapshot", 2),
    ("tombolo-registry", 2),
    ("tombolo-federation", 2),
    ("tombolo-runtime", 3),
    ("tombolo-telemetry", 3),
    ("tombolo-control-client", 4),
    ("tombolo-tunnel", 4),
    ("tombolo-capture", 4),
    ("tombolo-ca", 4),
    ("tombolo-store", 4),
    ("tombolo-dataplane", 5),
    ("tombolo-agent", 6),
    ("tombolo-netd", 6),
    ("tombolo-discovery", 6),
    ("tombolo-gateway", 6),
    ("tombolo", 6),
    ("tombolo-testkit", 7),
    ("tombolo-bench-wan", 8),
    ("tombolo-bench-sessions", 8),
    ("tombolo-netns", 8),
    ("tombolo-interop", 8),
    ("tombolo-demo", 8),
    ("tombolo-simulation", 8),
    ("tombolo-packages", 8),
    ("tombolo-vm", 9),
    ("xtask", 8),
];

/// Highest pure layer: no async runtime, sockets or clients below or at it.
const PURE: u8 = 2;

/// What a pure crate must not pull in.
const IMPURE: &[&str] = &[
    "tokio", "mio", "hyper", "h2", "quinn", "kube", "tonic", "socket2", "redb",
];

/// `cargo metadata` as JSON.
pub(crate) fn metadata(dependencies: bool) -> Result<Value> {
    let mut command = Command::new(env!("CARGO"));
    command.args(["metadata", "--format-version=1", "--locked"]);
    if !dependencies {
        command.arg("--no-deps");
    }
    let output = command.output().context("cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

pub(crate) fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Checks the layer rule.
pub(crate) fn layers() -> Result<()> {
    let layers: BTreeMap<&str, u8> = LAYERS.iter().copied().collect();
    let metadata = metadata(false)?;
    let mut wrong = Vec::new();
    for package in list(&metadata, "packages") {
        let name = text(package, "name");
        let Some(&layer) = layers.get(name) else {
            wrong.push(format!(
                "{name} has no layer: add it to LAYERS in xtask/src/graph.rs"
            ));
            continue;
        };
        for dependency in list(package, "dependencies") {
            let other = text(dependency, "name");
            let normal = dependency["kind"].is_null();
            if let Some(&below) = layers.get(other)
                && normal
                && below >= layer
            {
                wrong.push(format!(
                    "{name} (layer {layer}) depends on {other} (layer {below})"
                ));
            }
        }
        if layer <= PURE {
            let tree = Command::new(env!("CARGO"))
                .args([
                    "tree", "--locked", "-p", name, "-e", "normal", "--prefix", "none", "--format", "{p}",
                ])
                .output()?;
            let tree = String::from_utf8_lossy(&tree.stdout).into_owned();
            for line in tree.lines() {
                let dependency = line.split(' ').next().unwrap_or_default();
                if IMPURE.contains(&dependency) {
                    wrong.push(format!(
                        "{name} is pure (layer {layer}) but pulls in {dependency}"
                    ));
                }
            }
        }
    }
    wrong.sort();
    wrong.dedup();
    if wrong.is_empty() {
        println!("layers: {} packages, every arrow points down", layers.len());
        Ok(())
    } else {
        bail!("layers:\n  {}", wrong.join("\n  "))
    }
}

/// Finds dependencies that no source file of the package names.
pub(crate) fn unused() -> Result<()> {
    let metadata = metadata(false)?;
    let mut found = Vec::new();
    for package in list(&metadata, "packages") {
        let folder = Path::new(text(package, "manifest_path"))
            .parent()
            .context("manifest path")?;
        let mut source = String::new();
        for sub in ["src", "tests", "benches", "examples"] {
            collect(&folder.join(sub), &mut source)?;
        }
        source.push_str(&std::fs::read_to_string(folder.join("build.rs")).unwrap_or_default());
        for dependency in list(package, "dependencies") {
            let name = dependency["rename"]
                .as_str()
                .unwrap_or_else(|| text(dependency, "name"));
            if !source.contains(&name.replace('-', "_"))
                && !ELSEWHERE.contains(&(text(package, "name"), name))
            {
                found.push(format!("{}: {name}", text(package, "name")));
            }
        }
    }
    if found.is_empty() {
        println!("unused: every dependency is named in its package");
        Ok(())
    } else {
        bail!("unused dependencies:\n  {}", found.join("\n  "))
    }
}

/// Named where the search does not look: in generated code, or in a test module of another package.
const ELSEWHERE: &[(&str, &str)] = &[
    ("tombolo-proto", "tonic"),
    ("tombolo-proto", "tonic-prost"),
    ("tombolo-dataplane", "rcgen"),
];

fn collect(folder: &Path, into: &mut String) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            // Members nested in a member's folder are packages of their own.
            if !path.join("Cargo.toml").exists() {
                collect(&path, into)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&std::fs::read_to_string(&path)?);
        }
    }
    Ok(())
}
