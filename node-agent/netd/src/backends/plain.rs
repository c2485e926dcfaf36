//! A plain `/etc/resolv.conf`, with the word of the host's owner: the mesh first, the old servers behind it.
//!
//! What is promised. A killed agent costs nothing: its address is unreachable at once, and the C library asks the next
//! server. A frozen one costs each query one second, for at most four seconds: then the agent's word has been missing
//! for too long, and the line is out again until the agent is back. A netd that is frozen or killed at the same time
//! takes nothing out: each query then waits its second until netd is back. After a power failure netd takes the line
//! out when it starts. No query fails, since the old servers are always behind.
//!
//! **Invariant:** the original is on disk, synced, before `/etc/resolv.conf` is replaced; what others wrote there is
//! never lost, only lines of ours are taken out.

use super::{Applied, Backend};
use crate::{bus::Line, file, resolv, seen::Seen};
use async_trait::async_trait;
use std::{
    collections::VecDeque,
    fs, io,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::Instant;
use tombolo_capture::netd::{DnsSettings, NamesMode};

/// An agent that has said nothing for so long is frozen or gone. Three of its words, each due after a second.
const DEAD_AFTER: Duration = Duration::from_secs(3);
/// So long the line of an earlier netd stays, until an agent has come: one that was only restarted finds its line.
const AGENT_WITHIN: Duration = Duration::from_secs(5);
/// Others write the file when an address changes. One that writes it more often than this writes against us.
const REWRITES_MAX: usize = 5;
const REWRITES_WITHIN: Duration = Duration::from_secs(60);

/// The file and what is known of it.
#[derive(Debug)]
pub(crate) struct Plain {
    file: PathBuf,
    /// netd's state directory.
    state: PathBuf,
    link: String,
    /// Set: the mesh shall be asked, for as long as the agent lives.
    wished: Option<IpAddr>,
    /// The line is in the file, by us or an earlier netd.
    in_place: bool,
    heard: Instant,
    rewrites: VecDeque<Instant>,
}

impl Plain {
    pub(crate) fn new(root: &Path, state: &Path, link: &str) -> Self {
        Self {
            file: root.join("etc/resolv.conf"),
            state: state.to_owned(),
            link: link.to_owned(),
            wished: None,
            in_place: false,
            heard: Instant::now(),
            rewrites: VecDeque::new(),
        }
    }

    fn saved(&self) -> PathBuf {
        self.state.join("resolv.conf")
    }

    /// The file's text, if it is one that can be replaced.
    fn read(&self) -> Result<(String, u32), String> {
        let shown = self.file.display();
        let failed = |error: io::Error| format!("{shown}: {error}");
        let found = fs::symlink_metadata(&self.file).map_err(failed)?;
        if found.is_symlink() {
            let target = fs::read_link(&self.file).map_err(failed)?;
            return Err(format!(
                "{shown} is a link to {}, which another program writes: point that program at the mesh, or make it \
                 a file of its own (cp --remove-destination {} {shown})",
                target.display(),
                target.display()
            ));
        }
        if found.uid() != 0 && found.uid() != nix::unistd::geteuid().as_raw() {
            return Err(format!(
                "{shown} belongs to user {}, which cannot be kept",
                found.uid()
            ));
        }
        let text = fs::read_to_string(&self.file).map_err(failed)?;
        Ok((text, found.permissions().mode() & 0o7777))
    }

    /// Puts the line in, on top of what the file has now.
    fn put(&mut self, server: IpAddr) -> Result<(), String> {
        let (text, mode) = self.read()?;
        let original = resolv::without(&text).unwrap_or(text);
        resolv::usable(&original)?;
        let with = resolv::with(&original, server);
        if !self.state.is_dir() {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.state);
            made.map_err(|error| format!("{}: {error}", self.state.display()))?;
        }
        // The disk has the way back before there is anything to come back from.
        file::replace(&self.saved(), resolv::saved(&original, server).as_bytes(), 0o600)?;
        if let Err(error) = file::replace(&self.file, with.as_bytes(), mode) {
            let _ = fs::remove_file(self.saved());
            if error.contains("read-only") {
                return Err(format!(
                    "{error}; tombolo up --names resolv-conf lets it write /etc"
                ));
            }
            return Err(error);
        }
        self.in_place = true;
        Ok(())
    }

    /// Takes the line out. The original comes back if the file is as we left it; of a file that somebody has changed
    /// since only our lines go; one without them is not touched.
    fn take_out(&mut self) {
        self.in_place = false;
        let saved = fs::read_to_string(self.saved()).ok();
        let Ok((text, mode)) = self.read() else {
            // A link, or gone: somebody else's by now.
            let _ = fs::remove_file(self.saved());
            return;
        };
        let original = saved
            .as_deref()
            .and_then(resolv::read_saved)
            .filter(|(original, server)| resolv::with(original, *server) == text)
            .map(|(original, _)| original);
        if let Some(original) = original.or_else(|| resolv::without(&text)) {
            if let Err(error) = file::replace(&self.file, original.as_bytes(), mode) {
                self.in_place = true;
                tracing::warn!(error, "the mesh's line stays in the host's resolver");
                return;
            }
            tracing::info!(file = %self.file.display(), "the mesh's line is out");
        }
        let _ = fs::remove_file(self.saved());
    }

    fn is_ours(&self) -> bool {
        self.read().is_ok_and(|(text, _)| resolv::is_whole(&text))
    }

    /// Somebody wrote the file anew, a DHCP client most likely: the line goes on top of what it has now.
    fn follow(&mut self, server: IpAddr) {
        let now = Instant::now();
        self.rewrites.push_back(now);
        self.rewrites
            .retain(|at| now.duration_since(*at) < REWRITES_WITHIN);
        if self.rewrites.len() > REWRITES_MAX {
            tracing::warn!("another program keeps writing /etc/resolv.conf; the mesh's line stays out");
            self.wished = None;
            self.take_out();
            return;
        }
        match self.put(server) {
            Ok(()) => tracing::info!("/etc/resolv.conf was written anew; the mesh's line is on top again"),
            Err(error) => {
                tracing::warn!(error, "/etc/resolv.conf was written anew; the mesh's line is out");
                self.in_place = false;
                let _ = fs::remove_file(self.saved());
            }
        }
    }
}

#[async_trait]
impl Backend for Plain {
    fn mode(&self) -> NamesMode {
        NamesMode::ResolvConf
    }

    fn detect(&self, _seen: &Seen, named: bool) -> Result<(), String> {
        if !named {
            return Err("only with the word of the host's owner: tombolo up --names resolv-conf".into());
        }
        let (text, _) = self.read()?;
        resolv::usable(&resolv::without(&text).unwrap_or(text))
    }

    async fn apply(&mut self, settings: &DnsSettings, _line: &mut Line) -> Result<Applied, String> {
        // One is enough, and leaves two places of three to the old ones.
        let server = *settings.servers.first().ok_or("mesh0 has no address")?;
        self.heard = Instant::now();
        if self.is_ours() && self.wished == Some(server) {
            return Ok(Applied::Known);
        }
        let known = self.wished == Some(server) || (self.in_place && self.is_ours());
        self.put(server)?;
        self.wished = Some(server);
        self.rewrites.clear();
        Ok(if known { Applied::Known } else { Applied::OnTrial })
    }

    async fn verify(&mut self, _line: &mut Line) -> Result<(), String> {
        if self.is_ours() {
            Ok(())
        } else {
            Err("the line is not in /etc/resolv.conf".into())
        }
    }

    async fn revert(&mut self, _line: &mut Line) {
        self.wished = None;
        let lines = |(text, _): (String, u32)| resolv::without(&text).is_some();
        if self.in_place || self.saved().exists() || self.read().is_ok_and(lines) {
            self.take_out();
        }
    }

    async fn repair(&mut self, _line: &mut Line) {
        if !self.saved().exists() && !self.is_ours() {
            return;
        }
        self.in_place = true;
        if nix::net::if_::if_nametoindex(self.link.as_str()).is_err() {
            // A boot: nobody answers there, and the address is not even ours yet.
            tracing::info!("the line of an earlier netd is taken out; the agent will have it put back");
            self.take_out();
        }
        self.heard = Instant::now();
    }

    async fn tick(&mut self) {
        let silent = self.heard.elapsed();
        let Some(server) = self.wished else {
            if self.in_place && silent > AGENT_WITHIN {
                self.take_out();
            }
            return;
        };
        if silent > DEAD_AFTER {
            if self.in_place {
                tracing::warn!("the agent is silent: the host's names go past it until it is back");
                self.take_out();
            }
        } else if !self.in_place {
            match self.put(server) {
                Ok(()) => tracing::info!("the agent is back, and the mesh's line with it"),
                Err(error) => tracing::debug!(error, "the line is not put back"),
            }
        } else if !self.is_ours() {
            self.follow(server);
        }
    }

    fn alive(&mut self) {
        self.heard = Instant::now();
    }

    fn stop(&mut self) {
        if self.in_place {
            self.take_out();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DHCP: &str = "# by dhclient\nsearch corp.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\n";

    struct Host(tempfile::TempDir);

    impl Host {
        fn new(text: &str) -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("etc")).unwrap();
            fs::create_dir_all(root.path().join("state")).unwrap();
            fs::write(root.path().join("etc/resolv.conf"), text).unwrap();
            Self(root)
        }
        fn plain(&self) -> Plain {
            Plain::new(self.0.path(), &self.0.path().join("state"), "no-such-link")
        }
        fn text(&self) -> String {
            fs::read_to_string(self.0.path().join("etc/resolv.conf")).unwrap()
        }
        fn write(&self, text: &str) {
            fs::write(self.0.path().join("etc/resolv.conf"), text).unwrap();
        }
        fn saved(&self) -> bool {
            self.0.path().join("state/resolv.conf").exists()
        }
    }

    fn settings() -> DnsSettings {
        DnsSettings {
            domain: "mesh.internal".into(),
            servers: vec!["240.240.255.254".parse().unwrap()],
        }
    }

    async fn applied(host: &Host) -> Plain {
        let mut plain = host.plain();
        let outcome = plain.apply(&settings(), &mut Line::default()).await;
        assert_eq!(outcome, Ok(Applied::OnTrial));
        plain
    }

    async fn pass(plain: &mut Plain, seconds: u64, alive: bool) {
        for _ in 0..seconds {
            tokio::time::advance(Duration::from_secs(1)).await;
            if alive {
                plain.alive();
            }
            plain.tick().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_agent_is_passed_by_and_comes_back() {
        let host = Host::new(DHCP);
        let mut plain = applied(&host).await;
        assert!(resolv::is_whole(&host.text()) && host.saved());
        pass(&mut plain, 30, true).await;
        assert!(resolv::is_whole(&host.text()));
        pass(&mut plain, 4, false).await;
        assert_eq!(host.text(), DHCP);
        assert!(!host.saved());
        pass(&mut plain, 60, false).await;
        plain.alive();
        plain.tick().await;
        assert!(resolv::is_whole(&host.text()));
        plain.revert(&mut Line::default()).await;
        assert_eq!((host.text().as_str(), host.saved()), (DHCP, false));
        pass(&mut plain, 2, true).await;
        assert_eq!(host.text(), DHCP, "nobody wishes it any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_lease_is_followed_and_a_fight_is_left() {
        let host = Host::new(DHCP);
        let mut plain = applied(&host).await;
        let lease = DHCP.replace("10.0.0.1", "10.9.9.9");
        host.write(&lease);
        pass(&mut plain, 1, true).await;
        assert_eq!(resolv::without(&host.text()).as_deref(), Some(lease.as_str()));
        // A line that was added by hand, around ours: only ours go.
        host.write(&(host.text() + "nameserver 10.0.0.3\n"));
        plain.revert(&mut Line::default()).await;
        assert_eq!(host.text(), lease + "nameserver 10.0.0.3\n");

        let mut plain = applied(&host).await;
        for _ in 0..REWRITES_MAX + 3 {
            host.write(DHCP);
            pass(&mut plain, 1, true).await;
        }
        assert_eq!((host.text().as_str(), host.saved()), (DHCP, false));
    }

    #[tokio::test(start_paused = true)]
    async fn repaired_after_a_crash() {
        for broken in [None, Some(""), Some("{\"half"), Some("x")] {
            let host = Host::new(DHCP);
            drop(applied(&host).await);
            if let Some(text) = broken {
                fs::write(host.0.path().join("state/resolv.conf"), text).unwrap();
            }
            host.plain().repair(&mut Line::default()).await;
            assert_eq!(host.text(), DHCP, "{broken:?}");
            assert!(!host.saved());
        }
        // netd alone was killed: mesh0 is there, and the agent comes, or does not.
        let host = Host::new(DHCP);
        drop(applied(&host).await);
        let mut plain = host.plain();
        plain.link = "lo".into();
        plain.repair(&mut Line::default()).await;
        pass(&mut plain, 4, false).await;
        assert!(resolv::is_whole(&host.text()));
        assert_eq!(
            plain.apply(&settings(), &mut Line::default()).await,
            Ok(Applied::Known)
        );
        drop(plain);
        let mut plain = host.plain();
        plain.link = "lo".into();
        plain.repair(&mut Line::default()).await;
        pass(&mut plain, 7, false).await;
        assert_eq!(host.text(), DHCP);
    }

    #[tokio::test]
    async fn what_is_refused() {
        let host = Host::new(DHCP);
        let named = |plain: &Plain| plain.detect(&Seen::default(), true);
        assert!(
            host.plain().detect(&Seen::default(), false).is_err(),
            "not without a word"
        );
        assert_eq!(named(&host.plain()), Ok(()));
        for (text, why) in [
            ("search x\n", "no server"),
            ("nameserver 10.0.0.1\noptions rotate\n", "rotate"),
        ] {
            host.write(text);
            assert!(named(&host.plain()).unwrap_err().contains(why), "{text}");
        }
        let path = host.0.path().join("etc/resolv.conf");
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("../run/stub", &path).unwrap();
        let error = named(&host.plain()).unwrap_err();
        assert!(error.contains("is a link to ../run/stub"), "{error}");
        assert!(
            host.plain()
                .apply(&settings(), &mut Line::default())
                .await
                .is_err()
        );
        assert!(path.is_symlink() && !host.saved());
    }
}
