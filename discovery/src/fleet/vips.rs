//! The highest virtual addresses ever given, kept over a restart: a small file beside the store.

use serde::{Deserialize, Serialize};
use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};
use tombolo_registry::Watermark;

#[derive(Debug, Serialize, Deserialize)]
struct File {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

/// Reads the file. A missing one is that of a new mesh, or of a version that wrote none; a damaged one is said and
/// passed over: the addresses that objects hold still count.
pub(super) fn read(path: &Path) -> Option<Watermark> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the highest virtual address is not known");
            return None;
        }
    };
    match serde_json::from_str::<File>(&text) {
        Ok(File { v4, v6 }) => Some(Watermark { v4, v6 }),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the highest virtual address is unreadable");
            None
        }
    }
}

/// Writes the file, durably.
pub(super) fn write(path: &Path, watermark: Watermark) -> io::Result<()> {
    let file = File {
        v4: watermark.v4,
        v6: watermark.v6,
    };
    let text = serde_json::to_string(&file).map_err(io::Error::other)?;
    crate::files::write_secret(path, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_back_and_a_damaged_one_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vips.json");
        assert_eq!(read(&path), None);
        let watermark = Watermark {
            v4: "240.240.0.9".parse().unwrap(),
            v6: "2001:2::9".parse().unwrap(),
        };
        write(&path, watermark).unwrap();
        assert_eq!(read(&path), Some(watermark));
        std::fs::write(&path, "{\"v4\":").unwrap();
        assert_eq!(read(&path), None);
    }
}
