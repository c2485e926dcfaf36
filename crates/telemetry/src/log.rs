//! Where log lines go: the journal with its fields where this process is connected to it, stderr otherwise.

use crate::journal::JournalLayer;
use systemd_journal_logger::{JournalLog, connected_to_journal};
use tracing_subscriber::{
    Layer as _, filter::Targets, layer::SubscriberExt as _, registry, util::SubscriberInitExt as _,
};

/// How lines on stderr look. The journal keeps the fields and needs no format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, fields at the top level.
    Json,
}

/// How a program logs.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// SYSLOG_IDENTIFIER in the journal, for example `tombolo-agent`.
    pub identifier: &'static str,
    /// Format on stderr.
    pub format: LogFormat,
    /// Use the journal if stderr or stdout is connected to it. `false` keeps to stderr always.
    pub journald: bool,
    /// Level directives, for example `info,tombolo_dataplane=debug`.
    pub filter: String,
}

impl LogConfig {
    /// Text, the journal where there is one, level `info`.
    pub fn new(identifier: &'static str) -> Self {
        Self {
            identifier,
            format: LogFormat::Text,
            journald: true,
            filter: "info".to_owned(),
        }
    }
}

/// Why logging could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The level directives are wrong.
    #[error("log filter {filter:?}: {source}")]
    Filter {
        /// As given.
        filter: String,
        /// What is wrong.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The journal's socket cannot be used.
    #[error("the journal cannot be reached: {0}")]
    Journal(#[from] std::io::Error),
    /// Called twice.
    #[error("logging has been set up already: {0}")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Starts logging for this process; call it once, first thing in `main`. Lines of crates that use `log` come too.
///
/// # Errors
/// When the filter is wrong, the journal cannot be reached, or logging has been set up already.
pub fn init(config: &LogConfig) -> Result<(), LogError> {
    let filter: Targets = config.filter.parse().map_err(|source| LogError::Filter {
        filter: config.filter.clone(),
        source,
    })?;
    let journal = if config.journald && connected_to_journal() {
        let log = JournalLog::new()?
            .with_syslog_identifier(config.identifier.to_owned())
            .with_extra_fields([("TOMBOLO_VERSION", env!("CARGO_PKG_VERSION"))]);
        Some(JournalLayer::new(log))
    } else {
        None
    };
    let stderr = journal.is_none().then(|| {
        // Colours are for a person at a terminal, not for a file.
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_writer(std::io::stderr);
        match config.format {
            LogFormat::Text => layer.with_target(false).boxed(),
            LogFormat::Json => layer.json().flatten_event(true).with_current_span(false).boxed(),
        }
    });
    // `try_init` installs the bridge from `log` as well: nothing else may.
    registry().with(filter).with(journal).with(stderr).try_init()?;
    Ok(())
}

/// Says who this process is in the mesh: every line in the journal has it as IDENTITY from then on. The first word
/// counts.
pub fn identify(identity: impl std::fmt::Display) {
    crate::journal::identify(identity.to_string());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_filter_is_named_and_a_second_start_refused() {
        let config = LogConfig {
            filter: "tombolo=loud".to_owned(),
            ..LogConfig::new("test")
        };
        let error = init(&config).unwrap_err();
        assert!(error.to_string().contains("tombolo=loud"), "{error}");
        let config = LogConfig {
            journald: false,
            ..LogConfig::new("test")
        };
        init(&config).unwrap();
        assert!(matches!(init(&config), Err(LogError::Twice(_))));
    }
}
