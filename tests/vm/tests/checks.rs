//! What can be checked of the VM's files without a VM, in seconds: part of every run.

use anyhow::{Result, ensure};
use std::{path::Path, process::Command};
use tombolo_packages::workspace;
use tombolo_vm::{has, output};

/// `vagrant validate`, where Vagrant is; with the settings of libvirt too where its plugin is.
#[test]
fn the_vagrantfile_is_valid() -> Result<()> {
    let folder = workspace().join("vagrant");
    if has("ruby") {
        // The one that goes into the box names no box, so that `validate` would refuse it.
        for file in [
            "vagrant/Vagrantfile",
            "vagrant/mesh.rb",
            "packaging/box/Vagrantfile",
        ] {
            output(Command::new("ruby").arg("-c").arg(workspace().join(file)))?;
        }
    }
    if !has("vagrant") {
        ensure!(
            std::env::var_os("TOMBOLO_REQUIRE_VAGRANT").is_none_or(|value| value != "1"),
            "vagrant is required (TOMBOLO_REQUIRE_VAGRANT) but not installed"
        );
        tombolo_testkit::skip(
            "vagrant validate",
            "vagrant is not installed (apt-get install vagrant)",
        );
        return Ok(());
    }
    // The machines share the folder that `make packages` makes, and Vagrant looks for it.
    std::fs::create_dir_all(workspace().join("target/packages"))?;
    let home = tempfile::tempdir()?;
    let vagrant = |args: &[&str], variables: &[(&str, &str)]| {
        let mut command = Command::new("vagrant");
        command
            .args(args)
            .current_dir(&folder)
            .env("VAGRANT_HOME", home.path());
        command.env("VAGRANT_DOTFILE_PATH", home.path().join("dotfile"));
        output(command.envs(variables.iter().copied()))
    };
    let mut said = vec![vagrant(&["validate", "--ignore-provider"], &[])?];
    if vagrant(&["plugin", "list"], &[])?.contains("vagrant-libvirt") {
        for tcg in ["0", "1"] {
            let variables = [("VAGRANT_DEFAULT_PROVIDER", "libvirt"), ("TOMBOLO_TCG", tcg)];
            said.push(vagrant(&["validate"], &variables)?);
        }
    }
    for said in said {
        ensure!(said.contains("validated successfully"), "{said}");
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
