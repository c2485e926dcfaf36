//! What can be checked of the VM's files without a VM, in seconds: part of every run.

use anyhow::{Result, ensure};
use std::{path::Path, process::Command};
use tombolo_packages::workspace;
use tombolo_vm::{has, output};

/// `vagrant validate` for both providers, where Vagrant is; its files as Ruby where only that is.
#[test]
fn the_vagrantfile_is_valid() -> Result<()> {
    let folder = workspace().join("vagrant");
    if has("vagrant") {
        let home = tempfile::tempdir()?;
        for file in [folder.clone(), workspace().join("packaging/box")] {
            let said = output(
                Command::new("vagrant")
                    .args(["validate", "--ignore-provider"])
                    .current_dir(&file)
                    .env("VAGRANT_HOME", home.path())
                    .env("VAGRANT_DOTFILE_PATH", home.path().join("dotfile")),
            )?;
            ensure!(
                said.contains("validated successfully"),
                "{}: {said}",
                file.display()
            );
        }
        return Ok(());
    }
    ensure!(
        std::env::var_os("TOMBOLO_REQUIRE_VAGRANT").is_none_or(|value| value != "1"),
        "vagrant is required (TOMBOLO_REQUIRE_VAGRANT) but not installed"
    );
    tombolo_testkit::skip(
        "vagrant validate",
        "vagrant is not installed (apt-get install vagrant)",
    );
    if has("ruby") {
        for name in ["Vagrantfile", "mesh.rb"] {
            output(Command::new("ruby").arg("-c").arg(folder.join(name)))?;
        }
    }
    Ok(())
}

/// Every script that builds images or sets machines up can be read by its shell.
#[test]
fn scripts_have_no_syntax_error() -> Result<()> {
    let mut seen = 0;
    for folder in ["packaging/box", "vagrant/provision", "tests/vm"] {
        for entry in std::fs::read_dir(workspace().join(folder))? {
            let path = entry?.path();
            let Some(shell) = shebang(&path) else { continue };
            output(Command::new(shell).arg("-n").arg(&path))?;
            seen += 1;
        }
    }
    ensure!(seen >= 7, "only {seen} scripts were found");
    Ok(())
}

/// The shell that a file names in its first line.
fn shebang(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().next()?.strip_prefix("#!")?;
    line.split_whitespace().next().map(str::to_owned)
}
