//! The files themselves: the same bytes twice, clean for both linters, small, and complete.

use crate::needs_machines;
use anyhow::{Context as _, Result, ensure};
use std::{collections::BTreeMap, fs, path::Path, process::Command};
use tombolo_packages::{build, packaging, revision};
use tombolo_testkit::binaries;

fn run(command: &mut Command) -> Result<(bool, String)> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

/// What a package would put on a host, by `dpkg-deb` or `rpm`: path to mode, without folders.
fn listing(package: &Path) -> Result<BTreeMap<String, String>> {
    let deb = package.extension().is_some_and(|ending| ending == "deb");
    let (tool, option) = if deb { ("dpkg-deb", "-c") } else { ("rpm", "-qplv") };
    let (ok, text) = run(Command::new(tool).arg(option).arg(package))?;
    ensure!(ok, "{text}");
    let entry = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (mode, path) = (*words.first()?, words.last()?.trim_start_matches('.'));
        (!mode.starts_with('d')).then(|| (path.to_owned(), mode.to_owned()))
    };
    Ok(text.lines().filter_map(entry).collect())
}

/// The name of the package in a file name: up to the version.
fn package_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let version = name.find(|c: char| c.is_ascii_digit())?;
    name.get(..version)?.strip_suffix(['-', '_'])
}

#[test]
fn one_commit_gives_one_set_of_bytes() -> Result<()> {
    needs_machines!();
    let first = revision(1)?;
    let again = tempfile::tempdir()?;
    build(1, again.path())?;
    for file in [first.files("deb")?, first.files("rpm")?].concat() {
        let name = file.file_name().context("a file")?;
        ensure!(
            fs::read(&file)? == fs::read(again.path().join(name))?,
            "{} differs",
            name.display()
        );
    }
    Ok(())
}

#[test]
fn linters_have_nothing_to_say() -> Result<()> {
    needs_machines!();
    let built = revision(1)?;
    // Whether random letters of compiled code are a misspelt word changes with each build: an override that has nothing
    // to override just now is none to take away.
    let of_letters = |line: &&str| line.contains("unused-override spelling-error-in-binary");
    let (ok, text) = run(Command::new("lintian")
        .args(["--allow-root", "--pedantic", "--display-info"])
        .args(built.files("deb")?))?;
    let mut said = text
        .lines()
        .filter(|line| !of_letters(line) && !line.starts_with("N: "));
    ensure!(ok && said.all(|line| line.trim().is_empty()), "lintian:\n{text}");
    // An override that overrides nothing hides the next finding.
    let (_, text) = run(Command::new("lintian")
        .args(["--allow-root", "--show-overrides"])
        .args(built.files("deb")?))?;
    let idle = |line: &str| line.contains("unused-override") || line.contains("mismatched-override");
    ensure!(
        !text.lines().filter(|line| !of_letters(line)).any(idle),
        "lintian:\n{text}"
    );
    let signed: Vec<_> = fs::read_dir(built.repo().join("yum"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "rpm"))
        .collect();
    ensure!(signed.len() == 4, "{signed:?}");
    let (_, text) = run(Command::new("rpmlint")
        .arg("-c")
        .arg(packaging().join("rpm/rpmlint.toml"))
        .args(signed))?;
    // The key is nobody's, and made for this run.
    let findings: Vec<_> = text
        .lines()
        .filter(|line| line.contains(": E: ") || line.contains(": W: "))
        .collect();
    let others: Vec<_> = findings
        .iter()
        .filter(|line| !line.contains("unknown-key"))
        .collect();
    ensure!(others.is_empty(), "rpmlint: {others:#?}");
    Ok(())
}

#[test]
fn both_formats_carry_the_same_files() -> Result<()> {
    needs_machines!();
    let built = revision(1)?;
    // Documents and completions have other places by custom.
    let own = |path: &str| {
        !["/usr/share/doc/", "/usr/share/zsh/", "/usr/share/lintian/"]
            .iter()
            .any(|place| path.starts_with(place))
    };
    let kept = |path: &Path| -> Result<Vec<(String, String)>> {
        Ok(listing(path)?.into_iter().filter(|(path, _)| own(path)).collect())
    };
    let rpms = built.files("rpm")?;
    for deb in built.files("deb")? {
        let package = package_of(&deb).context("a name")?;
        let rpm = rpms
            .iter()
            .find(|rpm| package_of(rpm) == Some(package))
            .with_context(|| format!("no rpm of {package}"))?;
        let (deb, rpm) = (kept(&deb)?, kept(rpm)?);
        ensure!(deb == rpm, "{package}:\n{deb:#?}\n{rpm:#?}");
    }
    Ok(())
}

#[test]
fn small_enough_for_a_small_host() -> Result<()> {
    needs_machines!();
    for file in [revision(1)?.files("deb")?, revision(1)?.files("rpm")?].concat() {
        let bytes = fs::metadata(&file)?.len();
        ensure!(bytes <= 15 << 20, "{} has {bytes} bytes", file.display());
    }
    Ok(())
}

#[test]
fn man_page_and_completion_know_every_verb() -> Result<()> {
    needs_machines!();
    let (ok, help) = run(Command::new(binaries().join("tombolo")).arg("--help"))?;
    ensure!(ok, "{help}");
    let verbs: Vec<_> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|verb| verb.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    ensure!(verbs.len() > 10, "{help}");
    let page = fs::read_to_string(packaging().join("man/tombolo.1"))?.replace('\\', "");
    for verb in &verbs {
        ensure!(
            page.lines()
                .any(|line| line.starts_with(".B") && line.contains(verb)),
            "tombolo(1) does not name {verb}"
        );
    }
    for shell in ["bash", "zsh", "fish"] {
        let (ok, script) = run(Command::new(binaries().join("tombolo")).args(["completion", shell]))?;
        ensure!(ok && verbs.iter().all(|verb| script.contains(verb)), "{shell}");
    }
    Ok(())
}

#[test]
fn arm64_is_built_or_says_what_is_missing() -> Result<()> {
    let out = tempfile::tempdir()?;
    // As on a machine without a cross toolchain, whatever this one has.
    let tools = tempfile::tempdir()?;
    for tool in ["bash", "dirname", "sed", "git", "uname", "mkdir"] {
        let (found, path) = run(Command::new("bash").args(["-c", &format!("command -v {tool}")]))?;
        ensure!(found, "{tool} is missing");
        std::os::unix::fs::symlink(path.trim(), tools.path().join(tool))?;
    }
    let mut script = Command::new(packaging().join("arm64.sh"));
    let (ok, text) = run(script
        .arg(out.path())
        .env("PATH", tools.path())
        .env("SOURCE_DATE_EPOCH", "1"))?;
    ensure!(
        ok && text.starts_with("SKIPPED arm64 packages: no aarch64-linux-gnu-gcc"),
        "{text}"
    );
    // Programs of this machine are not taken for others: the ELF header decides what a package is called.
    ensure!(fs::read_dir(out.path())?.next().is_none());
    Ok(())
}

#[test]
fn examples_are_yaml_and_name_verbs_that_exist() -> Result<()> {
    let examples = packaging().join("examples");
    for file in ["cloud-init/user-data.yaml", "ansible/site.yml"] {
        let text = fs::read_to_string(examples.join(file))?;
        let _: serde_json::Value = serde_saphyr::from_str(&text).with_context(|| file.to_owned())?;
        ensure!(text.contains("tombolo up -"), "{file}");
    }
    // Terraform hands the cloud-init file over as it is: the two must agree on the name of the one variable.
    let terraform = fs::read_to_string(examples.join("terraform/main.tf"))?;
    ensure!(
        terraform.contains("cloud-init/user-data.yaml") && terraform.contains("@TOKEN@"),
        "{terraform}"
    );
    ensure!(fs::read_to_string(examples.join("cloud-init/user-data.yaml"))?.contains("@TOKEN@"));
    Ok(())
}
