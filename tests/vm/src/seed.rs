use anyhow::{Context as _, Result, ensure};
use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;

/// What a cloud gives an instance at its first boot, as the disk that cloud-init's NoCloud source reads.
#[derive(Debug)]
pub struct Seed {
    dir: TempDir,
}

impl Seed {
    /// The example of `packaging/examples/cloud-init` with its two words replaced, and nothing else: address, host name,
    /// key of the login user and a site's own certificate authority are what the cloud says.
    ///
    /// # Errors
    /// When the example has not the words, or the disk cannot be made.
    pub fn new(host: &str, address: Ipv4Addr, token: &str, repository: &str, site_ca: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let example = tombolo_packages::packaging().join("examples/cloud-init/user-data.yaml");
        let example = std::fs::read_to_string(&example).with_context(|| example.display().to_string())?;
        ensure!(
            example.contains("@TOKEN@") && example.contains("https://REPOSITORY/apt"),
            "the example has changed:\n{example}"
        );
        let user_data = example
            .replace("@TOKEN@", token)
            .replace("REPOSITORY", repository);

        let key = dir.path().join("key");
        crate::output(
            Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(&key),
        )?;
        let public = std::fs::read_to_string(key.with_extension("pub"))?;
        let meta_data = format!(
            "instance-id: {host}-1\nlocal-hostname: {host}\npublic-keys:\n- {}\n",
            public.trim()
        );
        let ca = std::fs::read_to_string(site_ca)?;
        let vendor_data = format!(
            "#cloud-boothook\n#!/bin/sh\n[ ! -e /usr/local/share/ca-certificates/site.crt ] || exit 0\ncat > /usr/local/share/ca-certificates/site.crt <<'CA'\n{ca}CA\nupdate-ca-certificates >/dev/null\n"
        );
        let network = format!(
            "version: 2\nethernets:\n  eth0:\n    addresses: [{address}/24]\n    gateway4: 10.77.0.1\n"
        );
        let mut iso = Command::new("genisoimage");
        iso.args(["-quiet", "-volid", "cidata", "-joliet", "-rock", "-output"])
            .arg(dir.path().join("seed.iso"));
        for (name, text) in [
            ("user-data", user_data),
            ("meta-data", meta_data),
            ("vendor-data", vendor_data),
            ("network-config", network),
        ] {
            std::fs::write(dir.path().join(name), text)?;
            iso.arg(dir.path().join(name));
        }
        crate::output(&mut iso)?;
        Ok(Self { dir })
    }

    /// The disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.path().join("seed.iso")
    }

    /// Private key of the login user.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }
}
