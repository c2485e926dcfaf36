//! The state folder: what is in it, and what it was made for.

use crate::{
    config::{Config, ConfigError},
    trust::OwnNames,
};
use std::path::{Path, PathBuf};
use tombolo_types::TrustDomain;

/// Paths below the state folder.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Over a folder; nothing is read.
    pub fn new(path: &Path) -> Self {
        Self(path.into())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Keys and certificates of the CA.
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.0.join("store.redb")
    }

    /// The audit log.
    pub fn audit(&self) -> PathBuf {
        self.0.join("audit.log")
    }

    /// The key of bearer tokens.
    pub fn bearer_key(&self) -> PathBuf {
        self.0.join("bearer.key")
    }

    /// What is remembered of members.
    pub fn members(&self) -> PathBuf {
        self.0.join("members.json")
    }

    /// The highest virtual address ever given.
    pub fn vips(&self) -> PathBuf {
        self.0.join("vips.json")
    }

    /// The virtual addresses of other clusters' services.
    pub fn imported_vips(&self) -> PathBuf {
        self.0.join("imported-vips.json")
    }

    /// Member key and imports of other clusters.
    pub fn federation(&self) -> PathBuf {
        self.0.join("federation")
    }

    /// The configuration that the state was made with.
    pub fn founding(&self) -> PathBuf {
        self.0.join("init.yaml")
    }

    /// Checks that a configuration is for this state, and gives the trust domain that the mesh was founded with: how it
    /// is called now the store knows ([`check_name`]).
    ///
    /// # Errors
    /// When there is no state, or it was made for another mesh.
    pub fn check(&self, config: &Config) -> Result<TrustDomain, ConfigError> {
        let founding = Config::open(&self.founding())?;
        let pairs = [
            ("mesh_domain", &config.mesh_domain, &founding.mesh_domain),
            ("cluster_id", &config.cluster_id, &founding.cluster_id),
            ("network", &config.network, &founding.network),
            ("cluster_name", &config.cluster_name(), &founding.cluster_name()),
            (
                "vip_prefixes",
                &config.vip_prefixes.join(","),
                &founding.vip_prefixes.join(","),
            ),
        ];
        match pairs.into_iter().find(|(_, is, was)| is != was) {
            None => Ok(founding.settings()?.trust_domain),
            Some((field, is, was)) => Err(other(field, is, was)),
        }
    }
}

fn other(field: &'static str, is: &str, was: &str) -> ConfigError {
    ConfigError::Value {
        field,
        cause: format!(
            "it is {is:?}, but this mesh was founded with {was:?} and every identity and name rests on it. Next: put {was:?} back"
        ),
    }
}

/// Checks the trust domain of a configuration: the one that the mesh was founded with, or one that it has now.
///
/// # Errors
/// When it is neither.
pub fn check_name(
    configured: &TrustDomain,
    founding: &TrustDomain,
    names: &OwnNames,
) -> Result<(), ConfigError> {
    if configured == founding || names.all().any(|name| name == configured) {
        return Ok(());
    }
    Err(other("trust_domain", configured.as_str(), founding.as_str()))
}
