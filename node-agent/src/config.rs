use crate::bridge::Bridge;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    ops::Deref,
    path::PathBuf,
    time::Duration,
};
use tombolo_capture::netd::NamesMode;
use tombolo_config::file;
use tombolo_types::ports;

/// More worker threads than this rarely help one host's traffic; `workers` says otherwise.
const WORKERS_DEFAULT_MAX: usize = 4;
/// Where the packages put it. It need not exist.
const FILE: &str = "/etc/tombolo/agent.yaml";

/// Format of log lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

impl From<LogFormat> for tombolo_telemetry::LogFormat {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// Which connections are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AccessLogs {
    /// Refused and failed ones.
    #[default]
    Failures,
    /// All.
    All,
}

/// `/etc/tombolo/agent.yaml`: the word of the host's owner. Every key is optional.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Worker threads; 0: as many as cores, at most 4.
    pub(crate) workers: usize,
    /// Level directives, for example `info,tombolo_dataplane=debug`.
    pub(crate) log_filter: String,
    /// Format of log lines on stderr; the journal keeps fields by itself.
    pub(crate) log_format: LogFormat,
    /// Which connections are logged.
    pub(crate) access_log: AccessLogs,
    /// Where HBONE is served.
    pub(crate) hbone_listen: Vec<SocketAddr>,
    /// Where metrics are served.
    pub(crate) metrics_listen: SocketAddr,
    /// How often metrics are pushed to discovery, for a scraper that cannot reach this host; 0: never.
    pub(crate) metrics_push_seconds: u64,
    /// Where readiness is served.
    pub(crate) readiness_listen: SocketAddr,
    /// Longest wait for open connections on SIGTERM.
    pub(crate) drain_seconds: u64,
    /// Longest life of the process before a reload, for connections that were open then.
    pub(crate) reload_linger_seconds: u64,
    /// A gateway that did not answer over UDP is tried that way again after so long.
    pub(crate) quic_retry_seconds: u64,
    /// Offer mesh names and addresses in IPv4, where the host has it.
    pub(crate) ipv4: bool,
    /// In IPv6, where the host has it.
    pub(crate) ipv6: bool,
    /// Bridges, by name or prefix, whose containers or guests may use the mesh as this host.
    pub(crate) bridges: Vec<Bridge>,
    /// Close declared ports to plaintext where a policy says so.
    pub(crate) guard: bool,
    /// Run the health probe of the WorkloadGroup.
    pub(crate) probes: bool,
    /// Which resolver of the host is pointed at the mesh. netd reads it from the file by itself: here it is checked.
    pub(crate) names: NamesMode,
}

impl Default for Settings {
    fn default() -> Self {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        Self {
            workers: 0,
            log_filter: "info".to_owned(),
            log_format: LogFormat::Text,
            access_log: AccessLogs::Failures,
            hbone_listen: vec![
                (Ipv4Addr::UNSPECIFIED, ports::HBONE).into(),
                (Ipv6Addr::UNSPECIFIED, ports::HBONE).into(),
            ],
            metrics_listen: (loopback, ports::METRICS).into(),
            metrics_push_seconds: 15,
            readiness_listen: (loopback, ports::READINESS).into(),
            drain_seconds: 30,
            reload_linger_seconds: 24 * 3600,
            quic_retry_seconds: 60,
            ipv4: true,
            ipv6: true,
            bridges: Vec::new(),
            guard: true,
            probes: true,
            names: NamesMode::Auto,
        }
    }
}

impl Settings {
    pub(crate) const fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }

    /// At least a second: a way that drops UDP is not asked by every call.
    pub(crate) fn quic_retry(&self) -> Duration {
        Duration::from_secs(self.quic_retry_seconds.max(1))
    }

    pub(crate) const fn reload_linger(&self) -> Duration {
        Duration::from_secs(self.reload_linger_seconds)
    }
}

/// Flags that stand above the file.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Configuration file; a missing one is an empty one, unless it is named.
    #[arg(
        long,
        env = "TOMBOLO_AGENT_CONFIG",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub(crate) config: Option<PathBuf>,
    /// Worker threads.
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<NonZeroUsize>,
    /// Level directives, for example debug or info,tombolo_tunnel=trace.
    #[arg(long = "log", value_name = "FILTER")]
    pub(crate) log_filter: Option<String>,
}

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The command line.
    Flag,
    /// The file.
    File(PathBuf),
    /// Neither.
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => f.write_str("command line"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// Settings in force, and what was said where.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) value: Settings,
    file: PathBuf,
    in_file: Vec<String>,
    flags: Vec<&'static str>,
}

impl Deref for Loaded {
    type Target = Settings;
    fn deref(&self) -> &Settings {
        &self.value
    }
}

impl Loaded {
    /// Key, value and origin of every setting.
    pub(crate) fn rows(&self) -> Vec<(String, Value, Origin)> {
        let Ok(Value::Object(fields)) = serde_json::to_value(&self.value) else {
            return Vec::new();
        };
        let origin = |key: &String| {
            if self.flags.contains(&key.as_str()) {
                Origin::Flag
            } else if self.in_file.contains(key) {
                Origin::File(self.file.clone())
            } else {
                Origin::Default
            }
        };
        fields
            .into_iter()
            .map(|(key, value)| (key.clone(), value, origin(&key)))
            .collect()
    }
}

impl Args {
    /// Flag above file above default.
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        let path = self.config.clone().unwrap_or_else(|| FILE.into());
        // `tombolo up` names the file of the packages whether there is one or not.
        let text = file::text(&path, fs::read_to_string(&path)).map_err(anyhow::Error::msg)?;
        let mut value: Settings = file::settings(&path, &text).map_err(anyhow::Error::msg)?;
        let in_file = file::read(&text)
            .map(|fields: serde_json::Map<String, Value>| fields.into_iter().map(|(key, _)| key).collect());
        let mut flags = Vec::new();
        if let Some(workers) = self.workers {
            (value.workers, _) = (workers.get(), flags.push("workers"));
        }
        if let Some(filter) = &self.log_filter {
            (value.log_filter, _) = (filter.clone(), flags.push("log_filter"));
        }
        if value.workers == 0 {
            let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
            value.workers = cores.min(WORKERS_DEFAULT_MAX);
        }
        Ok(Loaded {
            value,
            file: path,
            in_file: in_file.unwrap_or_default(),
            flags,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, workers: Option<usize>) -> anyhow::Result<Loaded> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("agent.yaml");
        fs::write(&path, text)?;
        Args {
            config: Some(path),
            workers: workers.and_then(NonZeroUsize::new),
            log_filter: None,
        }
        .load()
    }

    #[test]
    fn flag_above_file_above_default() {
        let loaded = load(
            "workers: 2\ndrain_seconds: 5\nbridges: [172.17.0.0/16, docker0]\naccess_log: all\n",
            Some(3),
        )
        .unwrap();
        assert_eq!(
            (loaded.workers, loaded.drain(), loaded.access_log),
            (3, Duration::from_secs(5), AccessLogs::All)
        );
        let origin = |key: &str| {
            loaded
                .rows()
                .into_iter()
                .find(|row| row.0 == key)
                .unwrap()
                .2
                .to_string()
        };
        assert_eq!(
            (origin("workers").as_str(), origin("ipv6").as_str()),
            ("command line", "default")
        );
        assert!(origin("drain_seconds").ends_with("agent.yaml"));
        let default = load("", None).unwrap();
        assert!((1..=WORKERS_DEFAULT_MAX).contains(&default.workers));
        assert_eq!(default.metrics_listen.to_string(), "127.0.0.1:15020");
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (text, word) in [
            ("worker: 2", "did you mean workers?"),
            ("drain_seconds: soon", "drain_seconds"),
            ("bridges: [172.17.0.0/40]", "bridges"),
            ("metrics_listen: 15020", "metrics_listen"),
            ("a: [", "agent.yaml"),
        ] {
            let error = load(text, None).err().unwrap().to_string();
            assert!(
                error.starts_with("TMB0504") && error.contains(word),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn a_missing_file_is_an_empty_one() {
        let args = Args {
            config: Some("/nowhere/agent.yaml".into()),
            workers: None,
            log_filter: None,
        };
        assert_eq!(args.load().unwrap().log_filter, "info");
    }
}
