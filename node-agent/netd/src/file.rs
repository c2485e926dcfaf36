//! Files of the host that are replaced as a whole.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::Path,
};

/// Replaces a file by another in one step: whoever reads sees the old or the new one, also after a power failure. It
/// belongs to root; netd, which has root's user but its own group, is a member of root's group for that.
pub(crate) fn replace(path: &Path, content: &[u8], mode: u32) -> Result<(), String> {
    put(path, content, mode).map_err(|error| {
        let path = path.display();
        if error.kind() == io::ErrorKind::ReadOnlyFilesystem {
            format!(
                "{path}: the file system is read-only, or tombolo-netd's unit does not let it write there; after a change \
                 of the host: systemctl restart tombolo-netd"
            )
        } else if error.kind() == io::ErrorKind::ResourceBusy {
            format!("{path}: it is a mount of its own and cannot be replaced")
        } else {
            format!("{path}: {error}")
        }
    })
}

fn put(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let unnamed = || io::Error::new(io::ErrorKind::InvalidInput, "no file name");
    let folder = path.parent().ok_or_else(unnamed)?;
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(unnamed)?;
    // A hidden name: no resolver reads it as configuration.
    let beside = folder.join(format!(".{name}.tombolo"));
    let _ = fs::remove_file(&beside); // of a netd that was killed
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(content)?;
        // In another group it still does all it must.
        let _ = fchown(&file, Some(0), Some(0));
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(folder)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.conf");
        fs::write(dir.path().join(".x.conf.tombolo"), "stale").unwrap();
        for content in ["one", "two"] {
            replace(&path, content.as_bytes(), 0o640).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = replace(&dir.path().join("no/x.conf"), b"", 0o644).unwrap_err();
        assert!(error.contains("no/x.conf"), "{error}");
    }
}
