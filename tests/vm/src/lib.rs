//! The VM suite's tools: one virtual machine with a kernel of its own, started from the image of `packaging/box`, first
//! set up by cloud-init with the example of `packaging/examples`, on the switch of a [`tombolo_packages::Yard`].
//!
//! Position: above the packages suite, whose machines (systemd on this kernel) are the mesh's other members. Everything
//! is emulated, so that it runs where there is no KVM: times are far above those of a real processor.
//!
//! **Invariant:** the machine's own network is not used: the VM is on a tap device in the switch's namespace. All of it
//! ends when a value is dropped, also when a test panics.

mod record;
mod seed;
mod vm;
mod web;

pub use record::Record;
pub use seed::Seed;
pub use vm::Vm;
pub use web::Web;

use anyhow::{Result, bail};
use std::{path::PathBuf, process::Command};

/// Runs a command to its end; gives its standard output.
///
/// # Errors
/// When it fails; the text has its output.
pub fn output(command: &mut Command) -> Result<String> {
    let result = command.output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if !result.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            result.status,
            text(&result.stdout),
            text(&result.stderr)
        );
    }
    Ok(text(&result.stdout))
}

/// True where a program is in the path.
pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let known = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(known)
        .any(|dir| dir.join(program).is_file())
}

/// Path of a file that `packaging/box/build.sh` makes, which it does now if it is not there: a minute and a half.
///
/// # Errors
/// When it cannot be made.
pub fn built(what: &str) -> Result<PathBuf> {
    let script = tombolo_packages::packaging().join("box/build.sh");
    let said = output(Command::new(script).arg(what))?;
    let last = said.lines().last().unwrap_or_default();
    Ok(PathBuf::from(last))
}
