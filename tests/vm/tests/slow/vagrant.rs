//! `vagrant up` as a user does it, on a libvirt of the test's own.

use anyhow::{Context as _, Result, ensure};
use std::{path::PathBuf, process::Command, time::Instant};
use tombolo_packages::{revision, workspace};
use tombolo_vm::{Record, built, has};

fn obstacle() -> Option<String> {
    let tools = [
        "vagrant",
        "libvirtd",
        "virsh",
        "qemu-system-x86_64",
        "rsync",
        "dnsmasq",
        "grub-mkimage",
    ];
    let missing = tools.into_iter().find(|tool| !has(tool))?;
    Some(format!(
        "{missing} is missing (packaging/box/setup.sh --vagrant installs it)"
    ))
}

/// Folders of a user of Vagrant and of a libvirt, thrown away with the test.
struct Site {
    dir: tempfile::TempDir,
    image: PathBuf,
}

impl Site {
    fn new() -> Result<Self> {
        Ok(Self {
            dir: tempfile::Builder::new()
                .prefix("vagrant")
                .tempdir_in("/var/tmp")?,
            image: built("box")?,
        })
    }

    /// Runs a script with a libvirtd beside it; both end with it.
    fn run(&self, script: &str) -> Result<String> {
        let at = |name: &str| self.dir.path().join(name);
        let result = Command::new(workspace().join("tests/vm/libvirt-run"))
            .arg(at("libvirt"))
            .args(["bash", "-euc", script])
            .current_dir(workspace().join("vagrant"))
            .env("VAGRANT_HOME", at("home"))
            .env("VAGRANT_DOTFILE_PATH", at("dotfile"))
            .env("VAGRANT_DEFAULT_PROVIDER", "libvirt")
            .env("VAGRANT_NO_COLOR", "1")
            .env("TOMBOLO_TCG", "1")
            .env("TOMBOLO_BOX", &self.image)
            .env("TOMBOLO_PACKAGES", revision(1)?.packages())
            .output()?;
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&result.stdout),
            String::from_utf8_lossy(&result.stderr)
        );
        let from = text.lines().count().saturating_sub(80);
        let end: Vec<_> = text.lines().skip(from).collect();
        ensure!(
            result.status.success(),
            "{}: ...\n{}",
            result.status,
            end.join("\n")
        );
        Ok(text)
    }
}

#[test]
fn up_makes_a_mesh_and_a_second_up_changes_nothing() -> Result<()> {
    if let Some(reason) = obstacle() {
        tombolo_testkit::skip("vagrant", &reason);
        return Ok(());
    }
    if !tombolo_packages::required() {
        return Ok(());
    }
    let site = Site::new()?;
    let mut record = Record::new("Vagrant");
    let begun = Instant::now();
    let said = site.run(
        "vagrant up; echo \"first $SECONDS\"
         vagrant up; echo \"second $SECONDS\"
         vagrant provision; echo \"provisioned $SECONDS\"
         vagrant destroy -f",
    )?;
    let seconds = |what: &str| -> u64 {
        let line = said
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{what} ")));
        line.and_then(|text| text.parse().ok()).unwrap_or_default()
    };
    // Each of the three ends with the smoke test, and it is the same mesh all the time.
    let works = said.matches("the mesh works").count();
    ensure!(works == 3, "{works} of 3 smoke tests\n{said}");
    ensure!(said.matches("is a member already").count() == 4, "{said}");
    ensure!(said.matches("with a token of one use").count() == 2, "{said}");
    record.add(
        "version",
        tombolo_vm::output(Command::new("vagrant").arg("--version"))?.trim(),
    );
    record.add("provider", "libvirt, processor emulated, box of packaging/box");
    record.add(
        "vagrant up: three machines, packages, mesh, smoke test",
        format!("{} s", seconds("first")),
    );
    record.add(
        "vagrant up again, smoke test",
        format!("{} s", seconds("second") - seconds("first")),
    );
    record.add(
        "vagrant provision, smoke test",
        format!("{} s", seconds("provisioned") - seconds("second")),
    );
    // `tombolo up` says ok too, of its own steps: only what follows the last heading counts.
    let (_, last) = said.rsplit_once("smoke test\n").context("no smoke test")?;
    let checks = last.lines().filter(|line| line.starts_with("  ok   "));
    let checks: Vec<_> = checks.map(str::trim).collect();
    ensure!(checks.len() == 7, "{checks:?}");
    record.add("smoke test", checks.join("\n"));
    record.add("all", format!("{} s", begun.elapsed().as_secs()));
    record.write()
}
