use anyhow::{Context as _, Result};
use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tombolo_packages::Yard;
use tombolo_testkit::wait_for;

/// A web server of the site, at the switch, with a certificate of the site's own authority.
#[derive(Debug)]
pub struct Web {
    child: Child,
    dir: TempDir,
}

/// Serves a folder over TLS; standard library alone.
const SERVER: &str = "import functools, http.server, ssl, sys\n\
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])\n\
    server = http.server.ThreadingHTTPServer(('10.77.0.1', 8443), handler)\n\
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n\
    context.load_cert_chain(sys.argv[2], sys.argv[3])\n\
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)\n\
    server.serve_forever()\n";

impl Web {
    /// Where machines on the switch find it.
    pub const AUTHORITY: &'static str = "10.77.0.1:8443";

    /// Serves a folder.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start(yard: &Yard, folder: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let (ca, key, csr, cert) = (at("ca.pem"), at("key.pem"), at("csr.pem"), at("cert.pem"));
        std::fs::write(at("extensions"), "subjectAltName=IP:10.77.0.1\n")?;
        let openssl = |line: &str| crate::output(Command::new("openssl").args(line.split(' ')));
        openssl(&format!(
            "req -x509 -newkey rsa:2048 -nodes -subj /CN=site -days 2 -keyout {key}.ca -out {ca}"
        ))?;
        openssl(&format!(
            "req -newkey rsa:2048 -nodes -subj /CN=web -keyout {key} -out {csr}"
        ))?;
        openssl(&format!(
            "x509 -req -in {csr} -CA {ca} -CAkey {key}.ca -CAcreateserial -days 1 -extfile {} -out {cert}",
            at("extensions")
        ))?;
        let log = std::fs::File::create(at("log"))?;
        let child = Command::new("ip")
            .args(["netns", "exec", &yard.hub(), "python3", "-c", SERVER])
            .arg(folder)
            .args([&cert, &key])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("python3")?;
        let web = Self { child, dir };
        wait_for("the web server", Duration::from_secs(20), || {
            crate::output(
                Command::new("ip")
                    .args(["netns", "exec", &yard.hub(), "curl", "-fsS", "--cacert"])
                    .arg(web.ca())
                    .arg(format!("https://{}/tombolo.asc", Self::AUTHORITY)),
            )
        })?;
        Ok(web)
    }

    /// Certificate of the site's authority.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// The requests so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
