//! The folder of an authority: made whole or not at all, readable by its owner alone.

use crate::CaError;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Istio's names, so that a folder made for one reads in the other.
pub(crate) const CA_CERT: &str = "ca-cert.pem";
pub(crate) const CA_KEY: &str = "ca-key.pem";
pub(crate) const CERT_CHAIN: &str = "cert-chain.pem";
pub(crate) const ROOT_CERT: &str = "root-cert.pem";
/// Ours: further roots to publish (a coming one, or a leaving one). Optional.
pub(crate) const EXTRA_ROOTS: &str = "extra-roots.pem";
/// Ours: whose authority this is.
pub(crate) const TRUST_DOMAIN: &str = "trust-domain";

/// Most bytes of one file; a bundle of a hundred roots has a fifth of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Reads a text; an error names the file.
pub(crate) fn read(dir: &Path, name: &str) -> Result<Zeroizing<String>, CaError> {
    let path = dir.join(name);
    let fault = |cause: String| CaError::File {
        path: path.clone(),
        cause,
    };
    let file = File::open(&path).map_err(|error| fault(error.to_string()))?;
    let length = file.metadata().map_err(|error| fault(error.to_string()))?.len();
    if length > FILE_BYTES_MAX {
        return Err(fault("it has more than 1 MiB".to_owned()));
    }
    // Sized once, so that no outgrown copy of a key stays behind in freed memory.
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
    file.take(FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(|error| fault(error.to_string()))?;
    Ok(text)
}

/// As [`read`], but a missing file is none.
pub(crate) fn read_optional(dir: &Path, name: &str) -> Result<Option<Zeroizing<String>>, CaError> {
    if dir.join(name).try_exists().unwrap_or(true) {
        read(dir, name).map(Some)
    } else {
        Ok(None)
    }
}

/// Refuses a private key that others can read.
pub(crate) fn check_private(path: &Path) -> Result<(), CaError> {
    let metadata = fs::metadata(path).map_err(|error| CaError::File {
        path: path.to_owned(),
        cause: error.to_string(),
    })?;
    match metadata.permissions().mode() & 0o7777 {
        mode if mode & 0o077 != 0 => Err(CaError::Exposed {
            path: path.to_owned(),
            mode,
        }),
        _ => Ok(()),
    }
}

/// Refuses a folder with anything in it. A missing one and an empty one are free.
pub(crate) fn check_free(dir: &Path) -> Result<(), CaError> {
    match fs::read_dir(dir).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(CaError::AlreadyExists(dir.to_owned())),
        Ok(false) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(CaError::File {
            path: dir.to_owned(),
            cause: error.to_string(),
        }),
    }
}

/// Writes all files into a new folder beside `dir` (0700, files 0600, each on the disk), then renames it to `dir`.
/// Whatever happens in between, `dir` has all of them or was not touched. `suffix` makes the new folder's name unique.
pub(crate) fn write_new(dir: &Path, suffix: &str, files: &[(&str, &str)]) -> Result<(), CaError> {
    check_free(dir)?;
    let parent = dir
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let staging = parent.join(format!(".{name}.new-{suffix}"));
    let written = stage(&staging, files).and_then(|()| {
        fs::rename(&staging, dir).map_err(|error| {
            // Somebody else was quicker: a rename replaces only an empty folder.
            if matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
            ) {
                return CaError::AlreadyExists(dir.to_owned());
            }
            CaError::File {
                path: dir.to_owned(),
                cause: error.to_string(),
            }
        })?;
        sync_dir(parent)
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&staging);
    }
    written
}

fn stage(staging: &Path, files: &[(&str, &str)]) -> Result<(), CaError> {
    let fault = |path: PathBuf| {
        move |error: io::Error| CaError::File {
            path,
            cause: error.to_string(),
        }
    };
    DirBuilder::new()
        .mode(0o700)
        .create(staging)
        .map_err(fault(staging.to_owned()))?;
    for (name, content) in files {
        let path = staging.join(name);
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(content.as_bytes()).and_then(|()| file.sync_all()))
            .map_err(fault(path))?;
    }
    sync_dir(staging)
}

fn sync_dir(dir: &Path) -> Result<(), CaError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| CaError::File {
            path: dir.to_owned(),
            cause: error.to_string(),
        })
}
