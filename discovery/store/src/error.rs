use crate::Key;
use std::path::PathBuf;
use tombolo_types::Code;

/// Why a store could not be opened or a request was not done. Cheap to clone: every writer of a group gets its copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// No such object.
    #[error("{0} does not exist")]
    NotFound(Key),
    /// To be created, but it is there.
    #[error("{0} exists already")]
    AlreadyExists(Key),
    /// Somebody wrote it since it was read.
    #[error("{key} was changed by somebody else: version {expected} was read, now it is {found}")]
    Conflict {
        /// The object.
        key: Key,
        /// The version that the writer had read.
        expected: u64,
        /// The version there is.
        found: u64,
    },
    /// One transaction writes one object twice.
    #[error("{0} is written twice in one transaction")]
    Repeated(Key),
    /// A name that cannot be a key.
    #[error("{key}: {reason}")]
    InvalidKey {
        /// The name.
        key: Key,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The value is over the limit.
    #[error("{key} has {bytes} bytes, at most {limit} are allowed")]
    TooLarge {
        /// The object.
        key: Key,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The events since the asked revision are no longer all there, or it lies in the future: list again, then watch
    /// from the list's revision.
    #[error("the changes since that version are no longer kept; list again and watch from there")]
    TooOld,
    /// Another process has it open.
    #[error(
        "{0} is in use by another process. Next: stop the other tombolo-discovery, or look with `fuser {0}`"
    )]
    InUse(PathBuf),
    /// The file was written by a newer version. It was not touched.
    #[error(
        "{path} has schema {found}, this version reads up to {supported}; the file was left as it is. \
         Next: install the version that wrote it, or restore a backup made by this one"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its schema number.
        found: u64,
        /// The newest that this version knows.
        supported: u64,
    },
    /// The file is damaged. It was left where it is.
    #[error(
        "{path} is damaged ({cause}); the file was left as it is. \
         Next: keep a copy of it, then put the last backup back: docs/OPERATIONS.md, backup"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: String,
    },
    /// The file cannot be read, created or written.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        cause: String,
    },
    /// A write failed after the store was opened (disk full, device error); nothing more is written until it is
    /// opened again.
    #[error(
        "the store cannot be written: {0}. Next: make room or mend the disk, then restart tombolo-discovery"
    )]
    Failed(String),
    /// The store is being closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// The code that a user of the API sees, where the request is at fault.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::NotFound(_) => Some(Code::NotFound),
            Self::AlreadyExists(_) => Some(Code::AlreadyExists),
            Self::Conflict { .. } => Some(Code::Conflict),
            Self::InvalidKey { .. } | Self::TooLarge { .. } | Self::Repeated(_) => {
                Some(Code::InvalidResource)
            }
            Self::TooOld
            | Self::InUse(_)
            | Self::Newer { .. }
            | Self::Corrupt { .. }
            | Self::Io { .. }
            | Self::Failed(_)
            | Self::Closed => None,
        }
    }
}
