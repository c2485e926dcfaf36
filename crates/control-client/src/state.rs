use crate::{Registration, RegistrationError};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

mod error;
mod files;

pub use error::StateError;
use files::give_to_owner;

const LOCK: &str = "lock";
const DEVICE_KEY: &str = "device.key";
const REGISTRATION: &str = "registration.json";
const IDENTITY: &str = "identity.pem";
const ROOTS: &str = "roots.pem";
const PENDING: &str = "pending.json";
const SNAPSHOT: &str = "snapshot.bin";
/// In the order of deletion: the registration first, so that a wipe that is cut short leaves a host that is not
/// enrolled, never half of one; the device key last.
const FILES: [&str; 6] = [REGISTRATION, IDENTITY, PENDING, ROOTS, SNAPSHOT, DEVICE_KEY];
/// Largest file that is read: a snapshot of 100,000 workloads has about 40 MB.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// A new TLS key and the request for its certificate, on disk before the request is sent. A lost answer is asked for
/// again with exactly this request: discovery then gives the same certificate and the device stays one device.
#[derive(Clone)]
pub struct Pending {
    /// Generation that it is for: 0 at enrolment.
    pub generation: u64,
    /// PEM.
    pub key_pem: Zeroizing<String>,
    /// PEM.
    pub csr_pem: String,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending")
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

#[derive(Serialize, Deserialize)]
struct PendingFile<T> {
    generation: u64,
    key_pem: T,
    csr_pem: T,
}

/// The agent's state directory (0700, files 0600), locked for one process.
///
/// | file | what | lost |
/// |---|---|---|
/// | device.key | the device's own key | a new token is needed |
/// | registration.json | what discovery said this node is | re-enrol |
/// | identity.pem | certificate chain and its key, in one file so that they cannot part | renewed with the device key |
/// | roots.pem | roots of the own trust domain | re-enrol |
/// | pending.json | a new key whose certificate is not here yet | - |
/// | snapshot.bin | the last snapshot | received again |
///
/// Every write is a new file, fsync, rename, fsync of the directory. Files written by root belong to the owner of the
/// directory, so that `up` prepares what the unprivileged agent then uses.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    /// Locked for as long as this or a shared descriptor of it is open; none if it was opened to look only.
    lock: Option<File>,
    #[cfg(test)]
    steps_left: std::sync::atomic::AtomicU32,
}

impl State {
    /// Opens the directory, makes it where it is missing, and locks it. `owner` (uid, gid) is who a directory made
    /// here belongs to; only root can give one away.
    ///
    /// # Errors
    /// When it cannot be made or is in use.
    pub fn open(dir: &Path, owner: Option<(u32, u32)>) -> Result<Self, StateError> {
        let io = |action, source| StateError::Io {
            action,
            path: dir.to_owned(),
            source,
        };
        let fresh = !dir.exists();
        if let (true, Some(parent)) = (fresh, dir.parent()) {
            fs::create_dir_all(parent).map_err(|source| io("making the parent of", source))?;
        }
        match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(io("making", source)),
        }
        if let Some((uid, gid)) = owner {
            std::os::unix::fs::chown(dir, Some(uid), Some(gid))
                .map_err(|source| io("giving away", source))?;
        }
        let mode = fs::metadata(dir).map_err(|source| io("reading", source))?.mode();
        if mode & 0o077 != 0 {
            fs::set_permissions(dir, Permissions::from_mode(0o700))
                .map_err(|source| io("closing", source))?;
        }
        let path = dir.join(LOCK);
        let io = |action, source| StateError::Io {
            action,
            path: path.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|source| io("opening", source))?;
        give_to_owner(dir, &file).map_err(|source| io("giving away", source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid); // only for the message
                return Err(StateError::Locked {
                    path: dir.to_owned(),
                    pid: pid.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io("locking", source)),
        }
        Ok(Self::locked(dir, file))
    }

    /// Takes over the lock of another process from [`Self::share_lock`]; it is never open in between.
    ///
    /// # Errors
    /// When the descriptor is not that of this directory's lock.
    pub fn adopt(dir: &Path, lock: OwnedFd) -> Result<Self, StateError> {
        let path = dir.join(LOCK);
        let file = File::from(lock);
        let same = file.metadata().and_then(|ours| {
            fs::metadata(&path).map(|there| (ours.dev(), ours.ino()) == (there.dev(), there.ino()))
        });
        let io = |source| StateError::Io {
            action: "taking over",
            path: path.clone(),
            source,
        };
        if same.map_err(io)? {
            Ok(Self::locked(dir, file))
        } else {
            Err(io(io::ErrorKind::InvalidInput.into()))
        }
    }

    /// The lock for another process of this host: the directory stays locked until both have let go of it.
    ///
    /// # Errors
    /// When there is no descriptor left, or nothing is locked.
    pub fn share_lock(&self) -> io::Result<OwnedFd> {
        let lock = self.lock.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok(lock.try_clone()?.into())
    }

    fn locked(dir: &Path, mut lock: File) -> Self {
        // The number is for a message only: with a full disk the host serves what it has.
        let _ = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        Self {
            dir: dir.to_owned(),
            lock: Some(lock),
            #[cfg(test)]
            steps_left: std::sync::atomic::AtomicU32::new(u32::MAX),
        }
    }

    /// Looks at a directory that another process may be using: nothing is locked or made, nothing must be written.
    pub fn peek(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            lock: None,
            #[cfg(test)]
            steps_left: std::sync::atomic::AtomicU32::new(u32::MAX),
        }
    }

    /// True if this process holds the directory's lock.
    pub const fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The registration; `None` while the host is not enrolled.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn registration(&self) -> Result<Option<Registration>, StateError> {
        let Some(text) = self.read_text(REGISTRATION)? else {
            return Ok(None);
        };
        let damaged = |error: RegistrationError| {
            if matches!(error, RegistrationError::Version(_)) {
                StateError::Newer {
                    path: self.dir.join(REGISTRATION),
                    reason: error.to_string(),
                }
            } else {
                self.damaged(REGISTRATION, error)
            }
        };
        Registration::from_json(&text).map(Some).map_err(damaged)
    }

    /// The device key, PEM; `None` if there is none yet.
    ///
    /// # Errors
    /// When it cannot be read. A damaged key is never set aside or replaced.
    pub fn device_key(&self) -> Result<Option<Zeroizing<String>>, StateError> {
        Ok(self.read_text(DEVICE_KEY)?.map(Zeroizing::new))
    }

    /// Stores a new device key.
    ///
    /// # Errors
    /// When there is one, or it cannot be written.
    pub fn create_device_key(&self, pem: &str) -> Result<(), StateError> {
        let path = self.dir.join(DEVICE_KEY);
        if path.symlink_metadata().is_ok() {
            return Err(StateError::DeviceKeyExists { path });
        }
        self.write(DEVICE_KEY, pem.as_bytes())
    }

    /// Certificate chain and key, PEM.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn identity(&self) -> Result<Option<(String, Zeroizing<String>)>, StateError> {
        let Some(text) = self.read_text(IDENTITY)?.map(Zeroizing::new) else {
            return Ok(None);
        };
        let Some(key) = text
            .find("PRIVATE KEY-----")
            .and_then(|at| text.get(..at)?.rfind("-----BEGIN "))
        else {
            return Err(self.damaged(IDENTITY, "there is no private key in it"));
        };
        let (chain, key) = text.split_at(key);
        Ok(Some((chain.to_owned(), Zeroizing::new(key.to_owned()))))
    }

    /// Roots of the own trust domain, PEM.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn roots(&self) -> Result<Option<String>, StateError> {
        self.read_text(ROOTS)
    }

    /// Replaces the roots of the own trust domain.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save_roots(&self, pem: &str) -> Result<(), StateError> {
        self.write(ROOTS, pem.as_bytes())
    }

    /// What waits for an answer, if anything does.
    ///
    /// # Errors
    /// When it cannot be read: without it a new key would be sent at a used generation.
    pub fn pending(&self) -> Result<Option<Pending>, StateError> {
        let Some(text) = self.read_text(PENDING)?.map(Zeroizing::new) else {
            return Ok(None);
        };
        let file: PendingFile<String> =
            serde_json::from_str(&text).map_err(|error| self.damaged(PENDING, error))?;
        let PendingFile {
            generation,
            key_pem,
            csr_pem,
        } = file;
        Ok(Some(Pending {
            generation,
            key_pem: Zeroizing::new(key_pem),
            csr_pem,
        }))
    }

    /// The request to send for `generation`: the one on disk if it is for this generation, else a new one from `make`,
    /// which is on disk when this returns.
    ///
    /// # Errors
    /// When the disk does not take it, or `make` fails.
    pub fn begin<E: From<StateError>>(
        &self,
        generation: u64,
        make: impl FnOnce() -> Result<(Zeroizing<String>, String), E>,
    ) -> Result<Pending, E> {
        if let Some(pending) = self.pending()?.filter(|pending| pending.generation == generation) {
            return Ok(pending);
        }
        let (key_pem, csr_pem) = make()?;
        let file = PendingFile {
            generation,
            key_pem: key_pem.as_str(),
            csr_pem: &csr_pem,
        };
        let text =
            Zeroizing::new(serde_json::to_string(&file).map_err(|error| self.damaged(PENDING, error))?);
        self.write(PENDING, text.as_bytes())?;
        Ok(Pending {
            generation,
            key_pem,
            csr_pem,
        })
    }

    /// Stores the answer to a request. The certificate goes first and the registration, with the new generation,
    /// after it: cut anywhere in between, the request is still there and is sent again.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn commit(
        &self,
        registration: &Registration,
        chain_pem: &str,
        key_pem: &str,
        roots_pem: Option<&str>,
    ) -> Result<(), StateError> {
        if let Some(roots_pem) = roots_pem {
            self.write(ROOTS, roots_pem.as_bytes())?;
        }
        let newline = if chain_pem.ends_with('\n') { "" } else { "\n" };
        let identity = Zeroizing::new(format!("{chain_pem}{newline}{key_pem}"));
        self.write(IDENTITY, identity.as_bytes())?;
        self.write(REGISTRATION, registration.to_json().as_bytes())?;
        self.remove(PENDING)
    }

    /// After a refused enrolment: takes back what it left, so that nothing is half done. An enrolled host is kept.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn discard_unregistered(&self) -> Result<(), StateError> {
        if self.dir.join(REGISTRATION).exists() {
            return Ok(());
        }
        FILES.into_iter().try_for_each(|name| self.remove(name))
    }

    /// Removes everything but the lock: the host is not enrolled afterwards.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn wipe(&self) -> Result<(), StateError> {
        FILES.into_iter().try_for_each(|name| self.remove(name))?;
        for name in [SNAPSHOT, IDENTITY] {
            self.remove(&format!("{name}.bad"))?;
        }
        // The lock itself is held until this value is dropped; its file goes now, so that nothing is left.
        self.remove(LOCK)
    }

    /// The last snapshot as stored.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn snapshot(&self) -> Result<Option<Vec<u8>>, StateError> {
        self.read(SNAPSHOT)
    }

    /// When the snapshot was stored, Unix milliseconds; 0 if there is none.
    pub fn snapshot_unix_ms(&self) -> i64 {
        let modified = fs::metadata(self.dir.join(SNAPSHOT))
            .and_then(|metadata| metadata.modified())
            .ok();
        let since = modified.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        since.map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
    }

    /// Stores a snapshot.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_snapshot(&self, bytes: &[u8]) -> Result<(), StateError> {
        self.write(SNAPSHOT, bytes)
    }

    /// Closes key files that others can read, and says which those were.
    ///
    /// # Errors
    /// When one cannot be closed.
    pub fn close_exposed(&self) -> Result<Vec<PathBuf>, StateError> {
        let mut exposed = Vec::new();
        for name in [DEVICE_KEY, IDENTITY, PENDING] {
            let path = self.dir.join(name);
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue; // there is none
            };
            if metadata.is_file() && metadata.mode() & 0o077 != 0 {
                fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(|source| {
                    StateError::Io {
                        action: "closing",
                        path: path.clone(),
                        source,
                    }
                })?;
                exposed.push(path);
            }
        }
        Ok(exposed)
    }

    /// Keeps an unreadable snapshot beside the place of the next one, and says where.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn set_aside_snapshot(&self) -> Result<PathBuf, StateError> {
        self.set_aside(SNAPSHOT)
    }

    /// Keeps an unreadable certificate beside the place of the next one, and says where.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn set_aside_identity(&self) -> Result<PathBuf, StateError> {
        self.set_aside(IDENTITY)
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
