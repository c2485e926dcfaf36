//! dnsmasq (NetworkManager's or the host's own) and unbound: one file of ours in the folder that they read, and a
//! restart, on trial until lookups were seen to work.

use super::{Applied, Backend};
use crate::{bus::Line, file, seen::Seen};
use async_trait::async_trait;
use std::{
    fmt::Write as _,
    fs, io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};
use tombolo_capture::netd::{DnsSettings, NamesMode};

/// First line of a file of ours; others are never touched.
const HEADER: &str = "# Written by tombolo-netd, which takes it away again: tombolo down";
/// Second line while nobody has seen it work.
const TRIAL: &str = "# on trial";
const FILE: &str = "tombolo.conf";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    NetworkManager,
    Dnsmasq,
    Unbound,
}

/// A resolver with a folder for files of others.
#[derive(Debug)]
pub(crate) struct Folder {
    kind: Kind,
    root: PathBuf,
}

impl Folder {
    pub(crate) fn network_manager(root: &Path) -> Self {
        Self::new(Kind::NetworkManager, root)
    }

    pub(crate) fn dnsmasq(root: &Path) -> Self {
        Self::new(Kind::Dnsmasq, root)
    }

    pub(crate) fn unbound(root: &Path) -> Self {
        Self::new(Kind::Unbound, root)
    }

    fn new(kind: Kind, root: &Path) -> Self {
        let root = root.to_owned();
        Self { kind, root }
    }

    const fn folders(&self) -> &'static [&'static str] {
        match self.kind {
            Kind::NetworkManager => &["etc/NetworkManager/dnsmasq.d"],
            Kind::Dnsmasq => &["etc/dnsmasq.d"],
            // Debian's, and Fedora's.
            Kind::Unbound => &["etc/unbound/unbound.conf.d", "etc/unbound/conf.d"],
        }
    }

    const fn unit(&self) -> &'static str {
        match self.kind {
            Kind::NetworkManager => "NetworkManager.service",
            Kind::Dnsmasq => "dnsmasq.service",
            Kind::Unbound => "unbound.service",
        }
    }

    /// The folder that the resolver reads, by its own configuration.
    fn folder(&self, seen: &Seen) -> Option<PathBuf> {
        let read = |folder: &&&str| match self.kind {
            // It passes the folder to dnsmasq itself.
            Kind::NetworkManager => true,
            Kind::Dnsmasq => seen.dnsmasq_conf.lines().any(|line| names_folder(line, folder)),
            Kind::Unbound => seen
                .unbound_conf
                .lines()
                .any(|line| includes_folder(line, folder)),
        };
        let found = self.folders().iter().find(read)?;
        let path = self.root.join(found);
        path.is_dir().then_some(path)
    }

    fn text(&self, settings: &DnsSettings, trial: bool) -> String {
        let mut text = format!("{HEADER}\n");
        if trial {
            let _ = writeln!(text, "{TRIAL}");
        }
        let domain = &settings.domain;
        if self.kind == Kind::Unbound {
            let _ = write!(
                text,
                "server:\n  domain-insecure: \"{domain}\"\nforward-zone:\n  name: \"{domain}\"\n"
            );
            for server in &settings.servers {
                let _ = writeln!(text, "  forward-addr: {server}");
            }
        } else {
            for server in &settings.servers {
                let _ = writeln!(text, "server=/{domain}/{server}");
            }
            // Where private addresses in answers are refused, the mesh's are not.
            let _ = writeln!(text, "rebind-domain-ok=/{domain}/");
        }
        text
    }

    /// The file of ours that there is.
    fn ours(&self) -> Option<(PathBuf, String)> {
        let folders = self.folders().iter();
        folders
            .map(|folder| self.root.join(folder).join(FILE))
            .find_map(|path| {
                let text = fs::read_to_string(&path).ok()?;
                text.starts_with(HEADER).then_some((path, text))
            })
    }

    async fn again(&self, line: &mut Line) -> Result<(), String> {
        let bus = line.bus().await.ok_or("there is no system bus")?;
        match self.kind {
            Kind::NetworkManager => bus.network_manager_reload().await,
            // It reads its files only when it starts.
            Kind::Dnsmasq => bus.unit_job("RestartUnit", self.unit()).await,
            Kind::Unbound => bus.unit_job("ReloadOrRestartUnit", self.unit()).await,
        }
    }
}

/// True for `conf-dir=/etc/dnsmasq.d,…`, and for Debian's `CONFIG_DIR=/etc/dnsmasq.d,…` that its unit passes on.
fn names_folder(line: &str, folder: &str) -> bool {
    let Some((key, value)) = line.trim().split_once('=') else {
        return false;
    };
    let path = value
        .trim()
        .trim_matches('"')
        .split(',')
        .next()
        .unwrap_or_default();
    matches!(key.trim(), "conf-dir" | "CONFIG_DIR") && path.trim_matches('/') == folder
}

/// True for `include: "/etc/unbound/unbound.conf.d/*.conf"` and the like.
fn includes_folder(line: &str, folder: &str) -> bool {
    let Some((key, value)) = line.trim().split_once(':') else {
        return false;
    };
    let path = value.trim().trim_matches('"').trim_matches('/');
    matches!(key, "include" | "include-toplevel") && path.strip_suffix("/*.conf") == Some(folder)
}

#[async_trait]
impl Backend for Folder {
    fn mode(&self) -> NamesMode {
        match self.kind {
            Kind::NetworkManager => NamesMode::NetworkManager,
            Kind::Dnsmasq => NamesMode::Dnsmasq,
            Kind::Unbound => NamesMode::Unbound,
        }
    }

    fn detect(&self, seen: &Seen, named: bool) -> Result<(), String> {
        let mode = self.mode();
        if self.kind == Kind::NetworkManager && seen.network_manager.as_deref() != Some("dnsmasq") {
            return Err("NetworkManager does not run dnsmasq (dns=dnsmasq under [main])".into());
        }
        let first = seen.servers().first().copied();
        let first = first.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        // One that runs in another network namespace, or beside the host's real resolver, is not its resolver.
        if !(named || first.is_loopback() && seen.listens_at(first)) {
            return Err(format!(
                "{mode} is not what programs of this host ask: nothing listens at {first}"
            ));
        }
        if self.folder(seen).is_none() {
            return Err(format!(
                "the configuration of {mode} does not read {}",
                self.folders().join(" or ")
            ));
        }
        Ok(())
    }

    async fn apply(&mut self, settings: &DnsSettings, line: &mut Line) -> Result<Applied, String> {
        let seen = Seen::read(&self.root, false, None);
        let folder = self.folder(&seen).ok_or("its folder is gone")?;
        let path = folder.join(FILE);
        match fs::read_to_string(&path) {
            Ok(text) if text == self.text(settings, false) => return Ok(Applied::Known),
            Ok(text) if !text.starts_with(HEADER) => {
                return Err(format!(
                    "{} is there already and is not of tombolo-netd",
                    path.display()
                ));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(format!("{}: {error}", path.display())),
        }
        let bus = line.bus().await.ok_or("there is no system bus")?;
        let state = bus.unit_state(self.unit()).await;
        if state != "active" {
            return Err(format!(
                "{} is {state}: it is not systemd's, or does not run",
                self.unit()
            ));
        }
        file::replace(&path, self.text(settings, true).as_bytes(), 0o644)?;
        tracing::info!(file = %path.display(), unit = self.unit(), "told of the mesh, on trial");
        if let Err(error) = self.again(line).await {
            self.revert(line).await;
            return Err(error);
        }
        Ok(Applied::OnTrial)
    }

    async fn verify(&mut self, line: &mut Line) -> Result<(), String> {
        if self.ours().is_none() {
            return Err("its file is gone".into());
        }
        let bus = line.bus().await.ok_or("there is no system bus")?;
        match bus.unit_state(self.unit()).await.as_str() {
            "active" | "reloading" => Ok(()),
            state => Err(format!("{} is {state}", self.unit())),
        }
    }

    fn keep(&mut self) -> Result<(), String> {
        let (path, text) = self.ours().ok_or("its file is gone")?;
        let tried = text.replacen(&format!("{TRIAL}\n"), "", 1);
        // The resolver need not read it again: a comment is gone.
        if tried == text {
            Ok(())
        } else {
            file::replace(&path, tried.as_bytes(), 0o644)
        }
    }

    async fn revert(&mut self, line: &mut Line) {
        let Some((path, _)) = self.ours() else { return };
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(file = %path.display(), %error, "the resolver's file stays");
            return;
        }
        tracing::info!(file = %path.display(), unit = self.unit(), "taken back");
        let running = match line.bus().await {
            Some(bus) => bus.unit_state(self.unit()).await == "active",
            None => false,
        };
        if running && let Err(error) = self.again(line).await {
            tracing::warn!(error, "the resolver did not start again");
        }
    }

    async fn repair(&mut self, line: &mut Line) {
        let trial = |text: &str| text.lines().nth(1) == Some(TRIAL);
        if self.ours().is_some_and(|(_, text)| trial(&text)) {
            tracing::warn!(
                unit = self.unit(),
                "an earlier netd ended before its change was tried"
            );
            self.revert(line).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> DnsSettings {
        DnsSettings {
            domain: "mesh.internal".into(),
            servers: vec!["240.240.255.254".parse().unwrap()],
        }
    }

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A host where dnsmasq is the resolver.
    fn host() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "etc/resolv.conf", "nameserver 127.0.0.1\n");
        write(root.path(), "proc/net/udp", "1: 0100007F:0035 0:0 07\n");
        write(
            root.path(),
            "etc/default/dnsmasq",
            "CONFIG_DIR=/etc/dnsmasq.d,.dpkg-dist,.dpkg-old\n",
        );
        fs::create_dir_all(root.path().join("etc/dnsmasq.d")).unwrap();
        root
    }

    #[test]
    fn only_where_it_is_the_resolver_and_reads_the_folder() {
        let root = host();
        let dnsmasq = Folder::dnsmasq(root.path());
        let detect = |named| dnsmasq.detect(&Seen::read(root.path(), false, None), named);
        assert_eq!(detect(false), Ok(()));
        // It listens in another network namespace.
        write(root.path(), "proc/net/udp", "");
        assert!(detect(false).unwrap_err().contains("127.0.0.1") && detect(true).is_ok());
        write(root.path(), "proc/net/udp", "1: 00000000:0035 0:0 07\n");
        write(root.path(), "etc/resolv.conf", "nameserver 10.0.0.1\n");
        assert!(detect(false).is_err());
        write(root.path(), "etc/default/dnsmasq", "#CONFIG_DIR=/etc/dnsmasq.d\n");
        assert!(detect(true).unwrap_err().contains("does not read etc/dnsmasq.d"));
        write(
            root.path(),
            "etc/dnsmasq.conf",
            "#conf-dir=/etc/dnsmasq.d\nconf-dir=/etc/dnsmasq.d/,*.conf\n",
        );
        assert!(detect(true).is_ok());
    }

    #[test]
    fn folders_that_are_read() {
        for line in [
            "conf-dir=/etc/dnsmasq.d",
            "conf-dir=/etc/dnsmasq.d,.rpmnew",
            "CONFIG_DIR=\"/etc/dnsmasq.d\"",
        ] {
            assert!(names_folder(line, "etc/dnsmasq.d"), "{line}");
        }
        for line in [
            "#conf-dir=/etc/dnsmasq.d",
            "conf-dir=/etc/dnsmasq.d.old",
            "conf-file=/etc/dnsmasq.d",
            "",
        ] {
            assert!(!names_folder(line, "etc/dnsmasq.d"), "{line}");
        }
        let folder = "etc/unbound/unbound.conf.d";
        assert!(includes_folder(
            "include-toplevel: \"/etc/unbound/unbound.conf.d/*.conf\"",
            folder
        ));
        assert!(includes_folder(
            "  include: /etc/unbound/unbound.conf.d/*.conf",
            folder
        ));
        for line in [
            "# include: \"/etc/unbound/unbound.conf.d/*.conf\"",
            "include: \"/etc/unbound/local.d/*.conf\"",
        ] {
            assert!(!includes_folder(line, folder), "{line}");
        }
    }

    #[test]
    fn what_is_written() {
        let text = Folder::dnsmasq(Path::new("/")).text(&settings(), true);
        assert_eq!(
            text,
            format!(
                "{HEADER}\n{TRIAL}\nserver=/mesh.internal/240.240.255.254\nrebind-domain-ok=/mesh.internal/\n"
            )
        );
        let text = Folder::unbound(Path::new("/")).text(&settings(), false);
        assert!(text.ends_with(
            "server:\n  domain-insecure: \"mesh.internal\"\nforward-zone:\n  name: \"mesh.internal\"\n  forward-addr: 240.240.255.254\n"
        ));
    }

    #[tokio::test]
    async fn files_of_others_stay_and_a_trial_that_nobody_ended_goes() {
        let root = host();
        let file = root.path().join("etc/dnsmasq.d").join(FILE);
        let mut dnsmasq = Folder::dnsmasq(root.path());
        let mut line = Line::default();
        fs::write(&file, "server=/corp.example/10.0.0.9\n").unwrap();
        let error = dnsmasq.apply(&settings(), &mut line).await.unwrap_err();
        assert!(error.contains("not of tombolo-netd"), "{error}");
        dnsmasq.revert(&mut line).await;
        dnsmasq.repair(&mut line).await;
        assert!(file.exists());

        fs::write(&file, dnsmasq.text(&settings(), true)).unwrap();
        dnsmasq.keep().unwrap();
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            dnsmasq.text(&settings(), false)
        );
        dnsmasq.repair(&mut line).await;
        assert_eq!(
            dnsmasq.apply(&settings(), &mut line).await,
            Ok(Applied::Known),
            "tried before"
        );
        fs::write(&file, dnsmasq.text(&settings(), true)).unwrap();
        dnsmasq.repair(&mut line).await;
        assert!(!file.exists());
    }
}
