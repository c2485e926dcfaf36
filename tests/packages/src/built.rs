use anyhow::{Context as _, Result, bail};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
};
use tombolo_testkit::binaries;

/// One run of the build scripts: packages, and the signed repositories of them.
#[derive(Debug)]
pub struct Built {
    dir: PathBuf,
}

/// Folder of the workspace.
pub fn workspace() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The `packaging` folder.
pub fn packaging() -> PathBuf {
    workspace().join("packaging")
}

/// Builds packages of a revision into a folder.
///
/// # Errors
/// When a script fails; the text has its output.
pub fn build(revision: u32, into: &Path) -> Result<()> {
    let mut command = Command::new(packaging().join("build.sh"));
    command.arg(into).env("TOMBOLO_BIN_DIR", binaries());
    command.env("TOMBOLO_PACKAGE_REVISION", revision.to_string());
    command.env("SOURCE_DATE_EPOCH", commit_time()?);
    output(&mut command).map(drop)
}

/// Time of the commit, as the scripts find it. Once per run: a commit in the middle of it is no difference.
fn commit_time() -> Result<&'static str> {
    static TIME: OnceLock<String> = OnceLock::new();
    if let Some(time) = TIME.get() {
        return Ok(time);
    }
    let script = format!(
        "source {}/lib.sh && echo $SOURCE_DATE_EPOCH",
        packaging().display()
    );
    let time = output(Command::new("bash").args(["-c", &script]))?;
    Ok(TIME.get_or_init(|| time.trim().to_owned()))
}

/// Runs a command to its end; gives its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let result = command.output().with_context(|| format!("{command:?}"))?;
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

/// A folder for what this process builds. Statics are never dropped: the next run removes it.
fn shelf() -> Result<PathBuf> {
    let all = Path::new("/var/tmp/tombolo-boxes");
    std::fs::create_dir_all(all)?;
    for entry in std::fs::read_dir(all)? {
        let path = entry?.path();
        let process = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_prefix("built-"));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            std::fs::remove_dir_all(&path)?;
        }
    }
    Ok(all.join(format!("built-{}", std::process::id())))
}

/// Packages and repositories of revision 1 or 2, which stand for a version and its successor. Built once per run.
///
/// # Errors
/// When a script fails.
pub fn revision(number: u32) -> Result<&'static Built> {
    static BUILT: [OnceLock<Built>; 2] = [OnceLock::new(), OnceLock::new()];
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let cell = BUILT
        .get(number.wrapping_sub(1) as usize)
        .context("there are revisions 1 and 2")?;
    if let Some(built) = cell.get() {
        return Ok(built);
    }
    let dir = shelf()?.join(number.to_string());
    build(number, &dir.join("packages"))?;
    let mut repo = Command::new(packaging().join("repo.sh"));
    output(repo.arg(dir.join("packages")).arg(dir.join("repo")))?;
    Ok(cell.get_or_init(|| Built { dir }))
}

impl Built {
    /// Folder of the deb and rpm files, as `make packages` leaves them.
    pub fn packages(&self) -> PathBuf {
        self.dir.join("packages")
    }

    /// Folder of the repositories, as `make repo` leaves them.
    pub fn repo(&self) -> PathBuf {
        self.dir.join("repo")
    }

    /// Files with an ending, in order.
    ///
    /// # Errors
    /// When the folder cannot be read, or has none.
    pub fn files(&self, ending: &str) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.packages())? {
            let path = entry?.path();
            if path.extension().is_some_and(|found| found == ending) {
                files.push(path);
            }
        }
        files.sort();
        if files.is_empty() {
            bail!("no {ending} files")
        } else {
            Ok(files)
        }
    }
}
