//! The files of the log: `audit.log`, and older ones `audit.log.1` to `audit.log.9`.

use crate::files::sync_dir;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// How much a reader looks at.
const TAIL_BYTES_MAX: u64 = 32 << 20;

/// When a new file is begun, and how many are kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes of one file.
    pub(super) file_max: u64,
    /// Older files.
    pub(super) kept: u32,
}

impl Default for Limits {
    /// 10 files of 32 MiB: about a million lines.
    fn default() -> Self {
        Self {
            file_max: 32 << 20,
            kept: 9,
        }
    }
}

/// The file that is written.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    file: File,
    length: u64,
    limits: Limits,
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

impl Log {
    pub(super) fn open(path: &Path, limits: Limits) -> io::Result<Self> {
        let (file, length) = open(path)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            length,
            limits,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole lines; they are on the disk when it returns. After an error nothing of them is in the file.
    pub(super) fn append(&mut self, text: &str) -> io::Result<()> {
        let bytes = text.len() as u64;
        if self.length > 0 && self.length + bytes > self.limits.file_max {
            self.rotate()?;
        }
        let written = self
            .file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => {
                self.length += bytes;
                Ok(())
            }
            Err(error) => {
                // Half a line would spoil the next one. If even this fails, a reader passes over the half.
                let _ = self.file.set_len(self.length);
                Err(error)
            }
        }
    }

    fn rotate(&mut self) -> io::Result<()> {
        for number in (1..self.limits.kept).rev() {
            match fs::rename(numbered(&self.path, number), numbered(&self.path, number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        fs::rename(&self.path, numbered(&self.path, 1))?;
        (self.file, self.length) = open(&self.path)?;
        sync_dir(self.path.parent().unwrap_or(Path::new("/")))
    }
}

/// The newest lines for which `recent` holds, newest last: from the end of the newest file backwards, until one line
/// is not recent, `limit` is reached, or 32 MiB are read.
pub(super) fn tail(path: &Path, limit: usize, recent: impl Fn(&str) -> bool) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut left = TAIL_BYTES_MAX;
    for number in 0.. {
        let at = if number == 0 {
            path.to_owned()
        } else {
            numbered(path, number)
        };
        let mut file = match File::open(&at) {
            Ok(file) => file,
            Err(error) if number > 0 && error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        let start = length.saturating_sub(left);
        file.seek(SeekFrom::Start(start))?;
        let mut text = Vec::new();
        file.take(left).read_to_end(&mut text)?;
        left -= (length - start).min(left);
        let text = String::from_utf8_lossy(&text);
        let skip = usize::from(start > 0); // the first line may be cut
        for line in text.lines().skip(skip).collect::<Vec<_>>().into_iter().rev() {
            if lines.len() >= limit || (line.starts_with('{') && line.ends_with('}') && !recent(line)) {
                lines.reverse();
                return Ok(lines);
            }
            if recent(line) {
                lines.push(line.to_owned());
            }
        }
        if left == 0 {
            break;
        }
    }
    lines.reverse();
    Ok(lines)
}
