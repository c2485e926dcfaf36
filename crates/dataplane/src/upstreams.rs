use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Most name servers taken from a file. Source: the C library takes three.
const SERVERS_MAX: usize = 8;
/// How often the file is looked at, at most.
const LOOK: Duration = Duration::from_secs(1);

/// The host's own name servers and search domains, followed when their file changes.
#[derive(Debug)]
pub(crate) struct Upstreams {
    path: PathBuf,
    own: Vec<IpAddr>,
    port: u16,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    looked: Option<Instant>,
    /// Inode, modification time and length of what was read.
    version: Option<(u64, i64, i64, u64)>,
    servers: Arc<[SocketAddr]>,
    search: Arc<[String]>,
}

impl Upstreams {
    /// `own`: our own addresses, which are never asked; `port`: 53 but in tests.
    pub(crate) fn new(path: PathBuf, own: Vec<IpAddr>, port: u16) -> Self {
        Self {
            path,
            own,
            port,
            state: Mutex::default(),
        }
    }

    /// The servers in order of preference.
    pub(crate) fn servers(&self, now: Instant) -> Arc<[SocketAddr]> {
        Arc::clone(&self.look(now).servers)
    }

    /// The search domains, without dots at the ends.
    pub(crate) fn search(&self, now: Instant) -> Arc<[String]> {
        Arc::clone(&self.look(now).search)
    }

    /// Looks at the file at most once a second: a small file that is in memory.
    fn look(&self, now: Instant) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state
            .looked
            .is_none_or(|looked| now.duration_since(looked) >= LOOK)
        {
            state.looked = Some(now);
            let version = version(&self.path);
            if version.is_some() && version != state.version {
                // A file that is being written anew is read again at the next look.
                if let Ok(text) = fs::read_to_string(&self.path) {
                    state.version = version;
                    state.servers = parse(&text, &self.own, self.port).into();
                    state.search = search_domains(&text).into();
                    tracing::info!(servers = ?state.servers, search = ?state.search, "the host's resolver");
                }
            }
        }
        state
    }
}

fn version(path: &Path) -> Option<(u64, i64, i64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((
        metadata.ino(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.len(),
    ))
}

/// The `nameserver` lines of a resolver configuration.
///
/// Source: resolv.conf(5).
fn parse(text: &str, own: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver"))
                .then(|| words.next())
                .flatten()
        })
        // Addresses with a zone need an interface that may change: passed over.
        .filter_map(|word| word.parse::<IpAddr>().ok())
        .filter(|address| !own.contains(address))
        .map(|address| SocketAddr::new(address, port))
        .take(SERVERS_MAX)
        .collect()
}

/// The search domains of a resolver configuration; the last `search` or `domain` line counts.
///
/// Source: resolv.conf(5).
fn search_domains(text: &str) -> Vec<String> {
    let mut domains = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if matches!(words.next(), Some("search" | "domain")) {
            let names = words.map(|domain| domain.trim_matches('.').to_ascii_lowercase());
            domains = names.filter(|domain| !domain.is_empty()).collect();
        }
    }
    domains
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_lines() {
        assert_eq!(
            search_domains("nameserver 1.1.1.1\nsearch a.example B.example.\n"),
            ["a.example", "b.example"]
        );
        assert_eq!(search_domains("search x\ndomain y\n# search z\n"), ["y"]);
        assert!(search_domains("search .\n").is_empty() && search_domains("").is_empty());
    }

    #[test]
    fn name_servers_are_read() {
        let own = ["240.240.255.254".parse().unwrap()];
        let text = "# nameserver 9.9.9.9\nsearch x\nnameserver 10.0.0.1 # first\n nameserver\t2001:db8::1\n\
                    nameserver 240.240.255.254\nnameserver fe80::1%eth0\nnameserver\nnameserver x\n";
        assert_eq!(
            parse(text, &own, 53),
            [
                "10.0.0.1:53".parse().unwrap(),
                "[2001:db8::1]:53".parse().unwrap()
            ]
        );
        assert_eq!(
            parse(&"nameserver 10.0.0.1\n".repeat(100), &[], 53).len(),
            SERVERS_MAX
        );
    }

    #[test]
    fn a_changed_file_is_followed_and_a_missing_one_keeps_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        fs::write(&path, "nameserver 10.0.0.1\n").unwrap();
        let upstreams = Upstreams::new(path.clone(), Vec::new(), 53);
        let start = Instant::now();
        let first: SocketAddr = "10.0.0.1:53".parse().unwrap();
        assert_eq!(*upstreams.servers(start), [first]);
        // Replaced as most programs do it.
        let new = folder.path().join("new");
        assert!(upstreams.search(start).is_empty());
        fs::write(&new, "nameserver 10.0.0.22\nsearch corp.example\n").unwrap();
        fs::rename(&new, &path).unwrap();
        assert_eq!(
            *upstreams.servers(start),
            [first],
            "not looked at again within the second"
        );
        let second: SocketAddr = "10.0.0.22:53".parse().unwrap();
        assert_eq!(*upstreams.servers(start + LOOK), [second]);
        assert_eq!(*upstreams.search(start + LOOK), ["corp.example"]);
        fs::remove_file(&path).unwrap();
        assert_eq!(*upstreams.servers(start + 2 * LOOK), [second]);
    }
}
