//! `tombolo-discovery init`: founds a mesh. All or nothing, and only once.

use crate::{
    audit::{Audit, Line},
    bearer::Bearer,
    config::{Config, DEFAULT_PATH},
    files,
    state::StateDir,
};
use anyhow::{Context as _, Result, bail};
use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt as _, chown},
    path::{Path, PathBuf},
    time::SystemTime,
};
use tombolo_ca::Authority;
use tombolo_store::{RedbStore, StoreOptions};
use tombolo_types::TrustDomain;

/// The user that discovery runs as where a package made it.
const USER: &str = "tombolo-discovery";

/// What init is told.
#[derive(Debug, Clone)]
pub struct Founding {
    /// What will be written.
    pub config: Config,
    /// Where to.
    pub config_path: PathBuf,
    /// A folder with Istio's cacerts files to take the CA from.
    pub ca_dir: Option<PathBuf>,
}

/// Founds the mesh and returns what to tell the user.
///
/// # Errors
/// When a value is refused, when this host has a discovery already, or when something cannot be written: then nothing
/// is left behind.
pub fn found(founding: &Founding) -> Result<String> {
    let (config, config_path) = (&founding.config, &founding.config_path);
    let settings = config.settings()?;
    let state = StateDir::new(&config.state_dir);
    let yaml = serde_saphyr::to_string(config).context("the configuration cannot be written as YAML")?;
    if let Some(told) = already(founding, &state)? {
        return Ok(told);
    }
    let parent = config
        .state_dir
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let etc = config_path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    for dir in [parent, etc] {
        fs::create_dir_all(dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let name = config
        .state_dir
        .file_name()
        .context("the state folder has no name")?
        .to_string_lossy();
    let draft = Draft(parent.join(format!(".{name}.init-{}", std::process::id())));
    fill(&draft.0, founding, &settings.trust_domain, &yaml)
        .with_context(|| format!("the state of discovery cannot be made in {}", parent.display()))?;
    give_away(&draft.0);
    // The state first: with it there, an init that is cut here is completed by the next one.
    fs::rename(&draft.0, state.path())
        .with_context(|| format!("{} cannot be put in place", state.path().display()))?;
    files::sync_dir(parent)?;
    write_config(config_path, &yaml)?;
    Ok(told(founding, "The mesh is founded."))
}

/// Refuses where there is something; completes an init that was cut between its two last steps.
fn already(founding: &Founding, state: &StateDir) -> Result<Option<String>> {
    let (config, config_path) = (&founding.config, &founding.config_path);
    let occupied = match fs::read_dir(state.path()) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            return Err(error).with_context(|| format!("{} cannot be read", state.path().display()));
        }
    };
    if !config_path.exists() && occupied && Config::open(&state.founding()).is_ok_and(|made| made == *config)
    {
        let yaml = fs::read_to_string(state.founding())?;
        write_config(config_path, &yaml)?;
        return Ok(Some(told(
            founding,
            "An init that was interrupted is complete now.",
        )));
    }
    let found = match (config_path.exists(), occupied) {
        (false, false) => return Ok(None),
        (true, true) => format!("{} and {} exist", config_path.display(), state.path().display()),
        (true, false) => format!("{} exists", config_path.display()),
        (false, true) => format!("{} is not empty", state.path().display()),
    };
    bail!(
        "this host has a discovery already: {found}. Nothing was changed.\n\
         Next: tombolo-discovery run. To found another mesh here, first move both away; every VM then enrols anew."
    )
}

/// Removes the draft when init fails.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0); // gone already when it was renamed
    }
}

fn fill(dir: &Path, founding: &Founding, trust_domain: &TrustDomain, yaml: &str) -> Result<()> {
    let draft = StateDir::new(dir);
    if dir.exists() {
        fs::remove_dir_all(dir)?; // of a crashed process with the same number
    }
    files::make_private_dir(dir)?;
    match &founding.ca_dir {
        Some(from) => Authority::import(&draft.ca(), from, trust_domain)
            .with_context(|| format!("the CA in {} is refused", from.display()))?,
        None => Authority::create(&draft.ca(), trust_domain, SystemTime::now())?,
    };
    drop(RedbStore::open(&draft.store(), StoreOptions::default())?);
    Bearer::open(&draft.bearer_key(), trust_domain.clone(), &[])?;
    let audit = Audit::open(&draft.audit())?;
    audit.write(Line {
        who: format!("local user {}", nix::unistd::Uid::current()),
        from: format!("local pid {}", std::process::id()),
        verb: "init".into(),
        object: format!("Mesh {trust_domain}"),
        after: Some(crate::audit::sha256(yaml.as_bytes())),
        result: "ok".into(),
        ..Line::default()
    });
    files::write_secret(&draft.founding(), yaml.as_bytes())?;
    Ok(())
}

/// As root: the state belongs to the user that discovery runs as, if a package made one.
fn give_away(dir: &Path) {
    if !nix::unistd::Uid::effective().is_root() {
        return;
    }
    let Ok(Some(user)) = nix::unistd::User::from_name(USER) else {
        return;
    };
    let (uid, gid) = (Some(user.uid.as_raw()), Some(user.gid.as_raw()));
    let mut left = vec![dir.to_path_buf()];
    while let Some(path) = left.pop() {
        if let Err(error) = chown(&path, uid, gid) {
            tracing::warn!(%error, path = %path.display(), "cannot be given to user {USER}");
        }
        if path.is_dir()
            && let Ok(entries) = fs::read_dir(&path)
        {
            left.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
}

fn write_config(path: &Path, yaml: &str) -> Result<()> {
    let text = format!(
        "# Discovery of this mesh. `tombolo-discovery run` refuses keys that it does not know.\n{yaml}"
    );
    files::write(path, text.as_bytes(), 0o644)
        .with_context(|| format!("{} cannot be written", path.display()))
}

fn told(founding: &Founding, first: &str) -> String {
    let config = &founding.config;
    let mut text = String::new();
    if config.trust_domain == "cluster.local" {
        text.push_str(
            "Warning: cluster.local is the trust domain of most Istio clusters. Meshes that share it cannot be told apart\n\
             when they are joined. Choose a name of your own unless this mesh extends such a cluster.\n",
        );
    }
    text.push_str(first);
    text.push_str(&format!(
        "\n  trust domain   {}\n  names          <service>.<namespace>.svc.{}\n  agents dial    {}\n  configuration  {}\n  state          {}\n",
        config.trust_domain,
        config.mesh_domain,
        config.advertise.join(", "),
        founding.config_path.display(),
        config.state_dir.display(),
    ));
    let run = if founding.config_path == Path::new(DEFAULT_PATH) {
        "tombolo-discovery run".to_owned()
    } else {
        format!(
            "tombolo-discovery run --config {}",
            founding.config_path.display()
        )
    };
    let unit = [
        "/lib/systemd/system",
        "/usr/lib/systemd/system",
        "/etc/systemd/system",
    ]
    .iter()
    .any(|dir| Path::new(dir).join("tombolo-discovery.service").exists());
    if unit && founding.config_path == Path::new(DEFAULT_PATH) {
        text.push_str("Next: systemctl enable --now tombolo-discovery\n");
    } else {
        text.push_str(&format!("Next: {run}\n"));
    }
    text
}

/// The folder of the admin socket; systemd makes it where a unit starts us.
///
/// # Errors
/// When it cannot be made.
pub fn make_runtime_dir(socket: &Path) -> io::Result<()> {
    match socket.parent() {
        Some(parent) if !parent.exists() => fs::DirBuilder::new().recursive(true).mode(0o755).create(parent),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn founding(dir: &Path) -> Founding {
        let mut config = Config::new("mesh.example", vec!["d.example:15012".into()]);
        config.state_dir = dir.join("state/discovery");
        Founding {
            config,
            config_path: dir.join("etc/discovery.yaml"),
            ca_dir: None,
        }
    }

    #[test]
    fn once_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let founding = founding(dir.path());
        let text = found(&founding).unwrap();
        assert!(text.contains("Next: tombolo-discovery run --config"), "{text}");
        let config = Config::open(&founding.config_path).unwrap();
        assert_eq!(config, founding.config);
        let state = StateDir::new(&config.state_dir);
        state.check(&config).unwrap();
        assert_eq!(
            fs::metadata(state.path()).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let key = fs::read(state.bearer_key()).unwrap();
        let error = found(&founding).unwrap_err().to_string();
        assert!(error.contains("already") && error.contains("Next:"), "{error}");
        assert_eq!(fs::read(state.bearer_key()).unwrap(), key, "nothing was changed");
        assert_eq!(
            fs::read_dir(dir.path().join("state")).unwrap().count(),
            1,
            "no draft is left"
        );
    }

    #[test]
    fn cut_between_its_last_steps_it_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let founding = founding(dir.path());
        found(&founding).unwrap();
        fs::remove_file(&founding.config_path).unwrap();
        let mut other = founding.clone();
        other.config.trust_domain = "other.example".into();
        assert!(found(&other).unwrap_err().to_string().contains("already"));
        assert!(found(&founding).unwrap().contains("interrupted"));
        assert!(Config::open(&founding.config_path).is_ok());
    }

    #[test]
    fn a_failure_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut founding = founding(dir.path());
        founding.ca_dir = Some(dir.path().join("no-such-ca"));
        assert!(found(&founding).is_err());
        assert_eq!(fs::read_dir(dir.path().join("state")).unwrap().count(), 0);
        assert!(!founding.config_path.exists());
        // An empty folder made by a package is no obstacle.
        fs::create_dir_all(&founding.config.state_dir).unwrap();
        founding.ca_dir = None;
        found(&founding).unwrap();
    }

    #[test]
    fn the_state_is_for_one_mesh() {
        let dir = tempfile::tempdir().unwrap();
        let founding = founding(dir.path());
        found(&founding).unwrap();
        let mut config = founding.config.clone();
        config.vip_prefixes = vec!["10.240.0.0/16".into()];
        let error = StateDir::new(&config.state_dir)
            .check(&config)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("vip_prefixes") && error.contains("founded"),
            "{error}"
        );
        config = founding.config.clone();
        config.default_deny = true;
        StateDir::new(&config.state_dir).check(&config).unwrap();
    }
}
