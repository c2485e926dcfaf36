//! The configuration file, /etc/tombolo/discovery.yaml: typed, unknown keys refused.

use crate::fleet::liveness::GRACE;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tombolo_registry::MeshSettings;
use tombolo_types::{AddressPlan, TrustDomain, check_label, ports};

/// Where the file is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/tombolo/discovery.yaml";
/// Where state is unless the file says otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/tombolo/discovery";
/// Where the admin socket is unless the file says otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/tombolo/discovery/admin.sock";

/// A listener that can be turned off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `off`.
    Off,
    /// An address; port 0 takes any that is free.
    At(SocketAddr),
}

impl Endpoint {
    /// The address, unless it is off.
    pub fn address(self) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::At(address) => Some(address),
        }
    }
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // YAML 1.1 readers take a bare `off` for false.
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Flag(bool),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Flag(false) => Ok(Self::Off),
            Form::Text(text) if text == "off" => Ok(Self::Off),
            Form::Text(text) => text
                .parse()
                .map(Self::At)
                .map_err(|_| D::Error::custom(format!("{text:?} is neither address:port nor off"))),
            Form::Flag(true) => Err(D::Error::custom("write address:port, or off")),
        }
    }
}

impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_str("off"),
            Self::At(address) => serializer.serialize_str(&address.to_string()),
        }
    }
}

/// A time as `24h` or `90m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life(pub Duration);

impl<'de> Deserialize<'de> for Life {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text
            .parse::<jiff::SignedDuration>()
            .ok()
            .and_then(|span| Duration::try_from(span).ok());
        parsed
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("{text:?} is no time such as 24h or 90m")))
    }
}

impl Serialize for Life {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let seconds = self.0.as_secs();
        let text = match seconds {
            s if s.is_multiple_of(3600) => format!("{}h", s / 3600),
            s if s.is_multiple_of(60) => format!("{}m", s / 60),
            s => format!("{s}s"),
        };
        serializer.serialize_str(&text)
    }
}

/// The file. What a mesh is founded with (trust domain, mesh domain, cluster id, network, VIP prefixes) is fixed at
/// init: `run` refuses a file that differs from what the state was made with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Trust domain of every identity.
    pub trust_domain: String,
    /// Services are `<service>.<namespace>.svc.<mesh domain>`.
    #[serde(default = "default_mesh_domain")]
    pub mesh_domain: String,
    /// Istio's name of this cluster.
    #[serde(default = "default_cluster_id")]
    pub cluster_id: String,
    /// Network of workloads whose group names none; empty is the default network.
    #[serde(default)]
    pub network: String,
    /// Name of this cluster among those that it is joined with; empty: the first label of the trust domain.
    #[serde(default)]
    pub cluster_name: String,
    /// Where services have their virtual addresses.
    #[serde(default = "default_vip_prefixes")]
    pub vip_prefixes: Vec<String>,
    /// Deny what no policy allows.
    #[serde(default)]
    pub default_deny: bool,
    /// `host:port` under which agents reach this discovery, in order of preference.
    pub advertise: Vec<String>,
    /// `host:port` under which discoveries of other clusters reach this one, for example that of its gateways; empty:
    /// the addresses of its gateways, then `advertise`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub federation_endpoints: Vec<String>,
    /// Namespaces whose services are all exported to other clusters; `*`: every one that is not reserved. The label
    /// istio.io/global of a service says otherwise for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub export_namespaces: Vec<String>,
    /// CA, store, audit log.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// ADS, certificates, enrolment.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Metrics and debug, read-only, without authentication: keep it on loopback.
    #[serde(default = "default_debug_listen")]
    pub debug_listen: Endpoint,
    /// Readiness.
    #[serde(default = "default_readiness_listen")]
    pub readiness_listen: Endpoint,
    /// Admin API for operators on this host.
    #[serde(default = "default_admin_socket")]
    pub admin_socket: PathBuf,
    /// Life of workload certificates.
    #[serde(default = "default_certificate_life")]
    pub certificate_life: Life,
    /// Longest life that a client may ask for.
    #[serde(default = "default_certificate_life_max")]
    pub certificate_life_max: Life,
    /// Log format on stderr: text or json. The journal keeps fields anyway.
    #[serde(default)]
    pub log_format: LogFormat,
    /// Log level, for example `info,tombolo_discovery=debug`.
    #[serde(default = "default_log_level")]
    pub log_level: String,
    /// Port of members that the second witness dials.
    #[serde(default = "default_witness_port", skip_serializing_if = "is_hbone")]
    pub witness_port: u16,
    /// After a start nobody is taken out by suspicion for so long.
    #[serde(default = "default_start_grace", skip_serializing_if = "is_default_grace")]
    pub start_grace: Life,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

fn default_mesh_domain() -> String {
    "mesh.internal".into()
}
fn default_cluster_id() -> String {
    "Kubernetes".into()
}
fn default_vip_prefixes() -> Vec<String> {
    AddressPlan::default().prefixes().to_vec()
}
fn default_state_dir() -> PathBuf {
    DEFAULT_STATE_DIR.into()
}
fn default_listen() -> SocketAddr {
    SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, ports::DISCOVERY))
}
fn default_debug_listen() -> Endpoint {
    Endpoint::At(SocketAddr::from(([127, 0, 0, 1], ports::DISCOVERY_DEBUG)))
}
fn default_readiness_listen() -> Endpoint {
    Endpoint::At(SocketAddr::from(([127, 0, 0, 1], ports::READINESS)))
}
fn default_admin_socket() -> PathBuf {
    DEFAULT_ADMIN_SOCKET.into()
}
fn default_certificate_life() -> Life {
    Life(Duration::from_secs(24 * 3600))
}
fn default_certificate_life_max() -> Life {
    Life(Duration::from_secs(7 * 24 * 3600))
}
fn default_log_level() -> String {
    "info".into()
}
fn default_start_grace() -> Life {
    Life(GRACE)
}
fn is_default_grace(grace: &Life) -> bool {
    *grace == default_start_grace()
}
fn default_witness_port() -> u16 {
    ports::HBONE
}
#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde wants")]
fn is_hbone(port: &u16) -> bool {
    *port == ports::HBONE
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path} cannot be read; tombolo-discovery init makes it")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its content is refused.
    #[error("{path} is not valid:\n{findings}")]
    Invalid {
        /// Which.
        path: PathBuf,
        /// One line each.
        findings: String,
    },
    /// A value is refused.
    #[error("{field}: {cause}")]
    Value {
        /// Which key.
        field: &'static str,
        /// Why.
        cause: String,
    },
}

fn value(field: &'static str, cause: impl ToString) -> ConfigError {
    ConfigError::Value {
        field,
        cause: cause.to_string(),
    }
}

impl Config {
    /// With defaults for all that init does not ask.
    pub fn new(trust_domain: &str, advertise: Vec<String>) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            mesh_domain: default_mesh_domain(),
            cluster_id: default_cluster_id(),
            network: String::new(),
            cluster_name: String::new(),
            vip_prefixes: default_vip_prefixes(),
            default_deny: false,
            advertise,
            federation_endpoints: Vec::new(),
            export_namespaces: Vec::new(),
            state_dir: default_state_dir(),
            listen: default_listen(),
            debug_listen: default_debug_listen(),
            readiness_listen: default_readiness_listen(),
            admin_socket: default_admin_socket(),
            certificate_life: default_certificate_life(),
            certificate_life_max: default_certificate_life_max(),
            log_format: LogFormat::default(),
            log_level: default_log_level(),
            witness_port: default_witness_port(),
            start_grace: default_start_grace(),
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// With every unknown key and bad value.
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.into(),
            source,
        })?;
        let config: Self = tombolo_config::file::read(&text).map_err(|findings| ConfigError::Invalid {
            path: path.into(),
            findings: findings
                .iter()
                .map(|finding| format!("  {finding}"))
                .collect::<Vec<_>>()
                .join("\n"),
        })?;
        config.settings()?;
        Ok(config)
    }

    /// What the registry needs, checked.
    ///
    /// # Errors
    /// With the first bad value.
    pub fn settings(&self) -> Result<MeshSettings, ConfigError> {
        let trust_domain: TrustDomain = self.trust_domain.parse().map_err(|e| value("trust_domain", e))?;
        self.mesh_domain
            .split('.')
            .try_for_each(|label| check_label("mesh domain", label))
            .map_err(|e| value("mesh_domain", e))?;
        if !self.mesh_domain.contains('.') {
            return Err(value("mesh_domain", "a single label is never a mesh domain"));
        }
        if self.cluster_id.is_empty() || self.cluster_id.contains('/') {
            return Err(value("cluster_id", "it must be a name without '/'"));
        }
        if !self.network.is_empty() {
            check_label("network", &self.network).map_err(|e| value("network", e))?;
        }
        check_label("cluster", &self.cluster_name()).map_err(|e| value("cluster_name", e))?;
        if !self.cluster_name.is_empty() && self.cluster_name == self.network {
            return Err(value("cluster_name", "a network of this cluster has this name"));
        }
        for namespace in self.export_namespaces.iter().filter(|name| *name != "*") {
            check_label("namespace", namespace).map_err(|e| value("export_namespaces", e))?;
        }
        if self.federation_endpoints.len() > 8 {
            return Err(value(
                "federation_endpoints",
                "name at most eight endpoints, host:port",
            ));
        }
        for endpoint in &self.federation_endpoints {
            host_of(endpoint)
                .ok_or_else(|| value("federation_endpoints", format!("{endpoint:?} is not host:port")))?;
        }
        if self.advertise.is_empty() || self.advertise.len() > 8 {
            return Err(value("advertise", "name one to eight endpoints, host:port"));
        }
        for endpoint in &self.advertise {
            host_of(endpoint).ok_or_else(|| value("advertise", format!("{endpoint:?} is not host:port")))?;
        }
        let plan = AddressPlan::from_prefixes(&self.vip_prefixes).map_err(|e| value("vip_prefixes", e))?;
        let hour = Duration::from_secs(3600);
        let (life, max) = (self.certificate_life.0, self.certificate_life_max.0);
        // Shorter lives are for tests of rotation; nothing breaks, but renewals become frequent.
        if life < Duration::from_secs(60) || life > max || max > hour * 24 * 7 {
            return Err(value(
                "certificate_life",
                "use 1h to 7d, and not more than certificate_life_max",
            ));
        }
        Ok(MeshSettings {
            trust_domain,
            cluster_id: self.cluster_id.clone(),
            network: self.network.clone(),
            mesh_domain: self.mesh_domain.clone(),
            plan,
            default_deny: self.default_deny,
            ..MeshSettings::new(self.trust_domain.parse().map_err(|e| value("trust_domain", e))?)
        })
    }

    /// Name of this cluster among those that it is joined with.
    pub fn cluster_name(&self) -> String {
        if self.cluster_name.is_empty() {
            // A trust domain may hold what a name may not.
            let first = self.trust_domain.split('.').next().unwrap_or_default();
            let name: String = first.replace('_', "-").chars().take(63).collect();
            let name = name.trim_matches('-');
            if name.is_empty() { "cluster" } else { name }.to_owned()
        } else {
            self.cluster_name.clone()
        }
    }

    /// Hosts of the advertised endpoints, without brackets.
    pub fn hosts(&self) -> Vec<String> {
        self.advertise
            .iter()
            .filter_map(|endpoint| host_of(endpoint))
            .map(str::to_owned)
            .collect()
    }
}

/// The host of `host:port` or `[address]:port`.
pub fn host_of(endpoint: &str) -> Option<&str> {
    let (host, port) = endpoint.rsplit_once(':')?;
    port.parse::<u16>().ok().filter(|port| *port != 0)?;
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    match bare {
        Some(address) => address.parse::<std::net::Ipv6Addr>().ok().map(|_| address),
        None if host.is_empty() || host.contains([':', '/', ' ', '[', ']']) => None,
        None => Some(host),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for (text, host) in [
            ("discovery.example:15012", Some("discovery.example")),
            ("10.0.0.1:443", Some("10.0.0.1")),
            ("[2001:db8::1]:15012", Some("2001:db8::1")),
            ("2001:db8::1:15012", None),
            ("host", None),
            (":15012", None),
            ("host:0", None),
            ("https://host:1", None),
            ("[x]:1", None),
        ] {
            assert_eq!(host_of(text), host, "{text}");
        }
    }

    #[test]
    fn a_file_is_read_back_as_it_was_written() {
        let mut config = Config::new("mesh.example", vec!["d.example:15012".into()]);
        config.debug_listen = Endpoint::Off;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("discovery.yaml");
        std::fs::write(&path, serde_saphyr::to_string(&config).unwrap()).unwrap();
        assert_eq!(Config::open(&path).unwrap(), config);
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("discovery.yaml");
        let refused = |text: &str| {
            std::fs::write(
                &path,
                format!("trust_domain: mesh.example\nadvertise: [\"d.example:15012\"]\n{text}\n"),
            )
            .unwrap();
            Config::open(&path).unwrap_err().to_string()
        };
        let text = refused("debug_lisen: off");
        assert!(
            text.contains("debug_lisen") && text.contains("debug_listen"),
            "{text}"
        );
        for (line, word) in [
            ("debug_listen: nowhere", "debug_listen"),
            ("mesh_domain: svc", "mesh_domain"),
            ("vip_prefixes: [10.0.0.0/24]", "vip_prefixes"),
            ("certificate_life: 400d", "certificate_life"),
            ("certificate_life: soon", "certificate_life"),
            ("network: Bad Name", "network"),
            ("cluster_name: Bad_Name", "cluster_name"),
            ("federation_endpoints: [here]", "federation_endpoints"),
            ("export_namespaces: [Bad_Name]", "export_namespaces"),
        ] {
            assert!(refused(line).contains(word), "{line}: {}", refused(line));
        }
    }
}
