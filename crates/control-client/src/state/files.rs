use super::{FILE_BYTES_MAX, State, StateError};
use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Single files: each write is a new file, fsync, rename, fsync of the directory.
impl State {
    pub(super) fn set_aside(&self, name: &str) -> Result<PathBuf, StateError> {
        let (from, to) = (self.dir.join(name), self.dir.join(format!("{name}.bad")));
        match fs::rename(&from, &to) {
            Ok(()) => Ok(to),
            Err(source) => Err(StateError::Io {
                action: "setting aside",
                path: from,
                source,
            }),
        }
    }

    pub(super) fn damaged(&self, name: &str, reason: impl fmt::Display) -> StateError {
        StateError::Damaged {
            path: self.dir.join(name),
            reason: reason.to_string(),
        }
    }

    pub(super) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, StateError> {
        let path = self.dir.join(name);
        let io = |source| StateError::Io {
            action: "reading",
            path: path.clone(),
            source,
        };
        let file = match OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
        {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io(source)),
        };
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(io)?;
        Ok(Some(bytes))
    }

    pub(super) fn read_text(&self, name: &str) -> Result<Option<String>, StateError> {
        let Some(bytes) = self.read(name)? else {
            return Ok(None);
        };
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|error| self.damaged(name, error.utf8_error()))
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        let (path, part) = (self.dir.join(name), self.dir.join(format!(".{name}.part")));
        let io = |action, source| StateError::Io {
            action,
            path: path.clone(),
            source,
        };
        self.step().map_err(|source| io("writing", source))?;
        let _ = fs::remove_file(&part); // left by a crash
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)
            .map_err(|source| io("writing", source))?;
        let written = file
            .write_all(bytes)
            .and_then(|()| give_to_owner(&self.dir, &file))
            .and_then(|()| file.sync_all());
        written.map_err(|source| {
            let _ = fs::remove_file(&part); // on a full disk it would take room for nothing
            io("writing", source)
        })?;
        self.step().map_err(|source| io("renaming", source))?;
        fs::rename(&part, &path)
            .and_then(|()| self.sync())
            .map_err(|source| io("renaming", source))
    }

    pub(super) fn remove(&self, name: &str) -> Result<(), StateError> {
        let path = self.dir.join(name);
        let removed = self.step().and_then(|()| match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.and_then(|()| self.sync()),
        });
        removed.map_err(|source| StateError::Io {
            action: "removing",
            path,
            source,
        })
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// In tests: the place where a crash happens. Nothing otherwise.
    #[cfg(test)]
    pub(super) fn step(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering;
        match self
            .steps_left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
        {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("killed by the test")),
        }
    }

    #[cfg(not(test))]
    #[allow(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "in tests this is where a crash happens"
    )]
    pub(super) const fn step(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that root made belongs to the owner of its directory.
pub(super) fn give_to_owner(dir: &Path, file: &File) -> io::Result<()> {
    let (of_dir, of_file) = (fs::metadata(dir)?, file.metadata()?);
    if of_dir.uid() != of_file.uid() && nix::unistd::geteuid().is_root() {
        std::os::unix::fs::fchown(file, Some(of_dir.uid()), Some(of_dir.gid()))?;
    }
    Ok(())
}
