use crate::{
    Key, Listing, Page, Select, Store, StoreError, Stored, Watch, Write, file, record,
    window::Window,
    writer::{self, Request, Writer},
};
use async_trait::async_trait;
use redb::{Database, ReadableDatabase as _, TableDefinition};
use std::{
    fmt,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::{mpsc, oneshot};

pub(crate) const OBJECTS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("objects");
pub(crate) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");
pub(crate) const REVISION: &str = "revision";

/// Transactions that may wait for the writer; the next ones wait for a place.
const QUEUE_MAX: usize = 256;

/// Settings of a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Most past events that watchers can catch up with. 8,192 is a minute of 130 writes a second.
    pub window_events: usize,
    /// Most bytes of past events. The newest event is kept whatever its size.
    pub window_bytes: usize,
    /// The clock for creation times, Unix milliseconds.
    pub now_unix_ms: fn() -> i64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            window_events: 8192,
            window_bytes: 32 << 20,
            now_unix_ms: system_unix_ms,
        }
    }
}

fn system_unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The embedded store: one redb file, mode 0600, one writer thread.
///
/// Dropping it waits for the transactions that were accepted, then closes the file.
pub struct RedbStore {
    path: PathBuf,
    database: Arc<Database>,
    window: Arc<Window>,
    commits: Arc<AtomicU64>,
    requests_tx: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

impl fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbStore")
            .field("path", &self.path)
            .field("resource_version", &self.window.head())
            .finish_non_exhaustive()
    }
}

impl RedbStore {
    /// Opens the store, or makes it if there is no file. The folder must be there. Blocks while the file is checked
    /// (it is read whole); past events are not kept over a restart, so watchers list again.
    ///
    /// # Errors
    /// When another process has it open, it was written by a newer version, it is damaged (also when it is empty), or
    /// the system refuses. The file is left in place in each case.
    pub fn open(path: &Path, options: StoreOptions) -> Result<Arc<Self>, StoreError> {
        let (database, revision) = file::open(path)?;
        let database = Arc::new(database);
        let (window, head_tx) = Window::new(revision, options.window_events, options.window_bytes);
        let (requests_tx, requests) = mpsc::channel(QUEUE_MAX);
        let commits = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            database: Arc::clone(&database),
            window: Arc::clone(&window),
            head_tx,
            now_unix_ms: options.now_unix_ms,
            commits: Arc::clone(&commits),
        };
        // A thread of its own: it waits for the disk nearly all the time, and outlives no runtime.
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(requests))
            .map_err(|error| StoreError::Io {
                path: path.to_owned(),
                cause: error.to_string(),
            })?;
        let path = path.to_owned();
        Ok(Arc::new(Self {
            path,
            database,
            window,
            commits,
            requests_tx: Some(requests_tx),
            writer: Some(writer),
        }))
    }

    /// Commits to the disk since it was opened: fewer than transactions when those come together.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::Relaxed)
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Database) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let database = Arc::clone(&self.database);
        let done = tokio::task::spawn_blocking(move || read(&database)).await;
        // The task is only lost when the runtime ends.
        done.map_err(|_| StoreError::Closed)?
            .map_err(|failure| failure.at(&self.path))
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        drop(self.requests_tx.take());
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// What can go wrong while reading.
pub(crate) enum Failure {
    Storage(redb::Error),
    Record(Key),
    Key,
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Storage(error.into())
    }
}

impl Failure {
    pub(crate) fn at(self, path: &Path) -> StoreError {
        let corrupt = |cause| StoreError::Corrupt {
            path: path.to_owned(),
            cause,
        };
        match self {
            Self::Record(key) => corrupt(format!("{key} is stored in an unknown form")),
            Self::Key => corrupt("a key is stored in an unknown form".to_owned()),
            Self::Storage(redb::Error::Corrupted(cause)) => corrupt(cause),
            Self::Storage(error) => StoreError::Io {
                path: path.to_owned(),
                cause: error.to_string(),
            },
        }
    }
}

/// The revision of the last commit that is visible to readers.
pub(crate) fn revision(transaction: &redb::ReadTransaction) -> Result<u64, Failure> {
    Ok(transaction
        .open_table(META)?
        .get(REVISION)?
        .map_or(0, |value| value.value()))
}

fn list(database: &Database, select: &Select, page: &Page) -> Result<Listing, Failure> {
    let transaction = database.begin_read()?;
    let resource_version = revision(&transaction)?;
    let objects = transaction.open_table(OBJECTS)?;
    let prefix = select.prefix();
    let after = page
        .after
        .as_ref()
        .map(Key::to_bytes)
        .filter(|after| *after >= prefix);
    let start = after
        .as_deref()
        .map_or(Bound::Included(prefix.as_slice()), Bound::Excluded);
    let mut listing = Listing {
        items: Vec::new(),
        resource_version,
        next: None,
    };
    for entry in objects.range::<&[u8]>((start, Bound::Unbounded))? {
        let (key, value) = entry?;
        if !key.value().starts_with(&prefix) {
            break;
        }
        let key = Key::from_bytes(key.value()).ok_or(Failure::Key)?;
        if !select.takes(&key) {
            continue;
        }
        if listing.items.len() >= page.limit.max(1) {
            listing.next = listing.items.last().map(|stored| stored.key.clone());
            break;
        }
        let (stored, _) = record::decode(key.clone(), value.value()).ok_or(Failure::Record(key))?;
        listing.items.push(stored);
    }
    Ok(listing)
}

#[async_trait]
impl Store for RedbStore {
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError> {
        let key = key.clone();
        self.read(move |database| {
            let objects = database.begin_read()?.open_table(OBJECTS)?;
            let Some(bytes) = objects.get(key.to_bytes().as_slice())? else {
                return Ok(None);
            };
            let (stored, _) = record::decode(key.clone(), bytes.value()).ok_or(Failure::Record(key))?;
            Ok(Some(stored))
        })
        .await
    }

    async fn list(&self, select: &Select, page: Page) -> Result<Listing, StoreError> {
        let select = select.clone();
        self.read(move |database| list(database, &select, &page)).await
    }

    async fn commit(&self, writes: Vec<Write>) -> Result<Vec<Stored>, StoreError> {
        writer::check_form(&writes)?;
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let (reply, answer) = oneshot::channel();
        let queue = self.requests_tx.as_ref().ok_or(StoreError::Closed)?;
        queue
            .send(Request { writes, reply })
            .await
            .map_err(|_| StoreError::Closed)?;
        answer.await.map_err(|_| StoreError::Closed)?
    }

    fn watch(&self, since: u64) -> Result<Watch, StoreError> {
        // A reader can see a commit a moment before the window has its events. Beyond that is another store's past.
        if since > self.window.head() {
            let visible = self
                .database
                .begin_read()
                .map_err(Failure::from)
                .and_then(|t| revision(&t));
            if since > visible.map_err(|failure| failure.at(&self.path))? {
                return Err(StoreError::TooOld);
            }
        }
        self.window.watch(since)
    }

    fn resource_version(&self) -> u64 {
        self.window.head()
    }
}
