use std::{io, path::PathBuf};
use tombolo_types::Code;

/// Why the state directory could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The operating system said no.
    #[error("{action} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Its reason.
        source: io::Error,
    },
    /// Another agent, or a command that changes the state, runs on the same directory.
    #[error("{path} is in use by process {pid}", path = path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
        /// As the holder wrote it.
        pid: String,
    },
    /// A file that cannot be replaced by asking discovery again.
    #[error("{path} is damaged: {reason}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of a newer version. It was not touched.
    #[error("{path}: {reason}", path = path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Both formats.
        reason: String,
    },
    /// There is one already.
    #[error("{path} exists: a device key is never replaced", path = path.display())]
    DeviceKeyExists {
        /// The file.
        path: PathBuf,
    },
}

impl StateError {
    /// As operators see it.
    pub fn problem(&self) -> crate::Problem {
        let code = match self {
            Self::Locked { .. } => Code::StateLocked,
            Self::Damaged { .. } => Code::StateLost,
            Self::Newer { .. } => Code::StateNewer,
            Self::Io { .. } | Self::DeviceKeyExists { .. } => Code::StateUnusable,
        };
        crate::Problem::new(code, self)
    }
}

impl From<StateError> for crate::Problem {
    fn from(error: StateError) -> Self {
        error.problem()
    }
}
