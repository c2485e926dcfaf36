//! The file: made whole or not at all, checked before it is believed, never overwritten.

use crate::{
    StoreError,
    redb_store::{Failure, META, OBJECTS, REVISION, revision},
};
use redb::{
    Builder, Database, DatabaseError, Durability, ReadableDatabase as _, StorageError, backends::FileBackend,
};
use std::{
    fs::{self, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};
use uuid::Uuid;

/// Number of the schema that this version writes and the newest that it reads.
pub(crate) const SCHEMA: u64 = 1;
const SCHEMA_KEY: &str = "schema";

/// Page cache of redb; its default of 1 GiB is meant for larger stores.
const CACHE_BYTES: usize = 16 << 20;

/// Opens or makes the file; gives the revision it stands at.
pub(crate) fn open(path: &Path) -> Result<(Database, u64), StoreError> {
    let io_error = |error: io::Error| StoreError::Io {
        path: path.to_owned(),
        cause: error.to_string(),
    };
    match fs::metadata(path) {
        Ok(found) => {
            if found.permissions().mode() & 0o077 != 0 {
                fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(io_error)?;
            }
            if found.len() == 0 {
                // redb would take it for a new store: an emptied file must not look like an empty mesh.
                return Err(StoreError::Corrupt {
                    path: path.to_owned(),
                    cause: "it is empty".to_owned(),
                });
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path)?,
        Err(error) => return Err(io_error(error)),
    }
    let database = open_checked(path)?;
    let found = read_meta(&database).map_err(|failure| failure.at(path))?;
    match found {
        (None, _) => Err(StoreError::Corrupt {
            path: path.to_owned(),
            cause: "it has no schema number".to_owned(),
        }),
        (Some(found), _) if found > SCHEMA => Err(StoreError::Newer {
            path: path.to_owned(),
            found,
            supported: SCHEMA,
        }),
        (Some(_), revision) => Ok((database, revision)),
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Reads the whole file and compares every checksum: without that a damaged page is found later, by a panic.
fn open_checked(path: &Path) -> Result<Database, StoreError> {
    let corrupt = |cause: String| StoreError::Corrupt {
        path: path.to_owned(),
        cause,
    };
    let opened = catch_unwind(AssertUnwindSafe(|| {
        builder().set_check_integrity_on_open(true).open(path)
    }));
    let error = match opened {
        Ok(Ok(database)) => return Ok(database),
        Ok(Err(error)) => error,
        Err(_panic) => return Err(corrupt("its pages contradict each other".to_owned())),
    };
    #[allow(clippy::wildcard_enum_match_arm, reason = "redb's list is open")]
    match error {
        DatabaseError::DatabaseAlreadyOpen => Err(StoreError::InUse(path.to_owned())),
        DatabaseError::Storage(StorageError::Io(error))
            if !matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
            ) =>
        {
            Err(StoreError::Io {
                path: path.to_owned(),
                cause: error.to_string(),
            })
        }
        other => Err(corrupt(other.to_string())),
    }
}

fn read_meta(database: &Database) -> Result<(Option<u64>, u64), Failure> {
    let transaction = database.begin_read()?;
    let schema = match transaction.open_table(META) {
        Ok(meta) => meta.get(SCHEMA_KEY)?.map(|value| value.value()),
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok((None, 0)),
        Err(error) => return Err(error.into()),
    };
    Ok((schema, revision(&transaction)?))
}

/// Makes the file under another name and links it into place when it is complete and on the disk.
fn create(path: &Path) -> Result<(), StoreError> {
    let io_error = |error: io::Error| StoreError::Io {
        path: path.to_owned(),
        cause: error.to_string(),
    };
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".new-{}", Uuid::new_v4().simple()));
    let fresh = PathBuf::from(name);
    let made = fill(&fresh).map_err(|failure| failure.at(path)).and_then(|()| {
        // A link, not a rename: it never replaces a store that somebody else has made meanwhile.
        match fs::hard_link(&fresh, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(error)),
            _ => {}
        }
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(io_error)
    });
    let _ = fs::remove_file(&fresh);
    made
}

fn fill(fresh: &Path) -> Result<(), Failure> {
    let io_error = |error: io::Error| Failure::Storage(StorageError::Io(error).into());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(fresh)
        .map_err(io_error)?;
    let synced = file.try_clone().map_err(io_error)?;
    let database = builder().create_with_backend(FileBackend::new(file)?)?;
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    transaction.set_two_phase_commit(true);
    transaction.open_table(OBJECTS)?;
    {
        let mut meta = transaction.open_table(META)?;
        meta.insert(SCHEMA_KEY, SCHEMA)?;
        meta.insert(REVISION, 0)?;
    }
    transaction.commit()?;
    drop(database);
    synced.sync_all().map_err(io_error)
}
