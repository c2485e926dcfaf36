use crate::{Host, Process, wait_for};
use anyhow::{Result, bail};
use std::time::Duration;

/// Longest start of an application: PostgreSQL's initdb on a busy machine.
const START: Duration = Duration::from_secs(60);

fn listening(host: &Host, port: u16) -> Result<()> {
    wait_for(&format!("{} to listen on {port}", host.name()), START, || {
        let found = host.sh(&format!("ss -Hltn 'sport = {port}'"))?;
        if found.stdout.trim().is_empty() {
            bail!("nobody listens")
        } else {
            Ok(())
        }
    })
}

/// nginx with one page, on the host's own addresses.
#[derive(Debug)]
pub struct Nginx(#[allow(dead_code, reason = "kept for its drop")] Process);

impl Nginx {
    /// Starts it on `port` with `body` as the answer of every path.
    ///
    /// # Errors
    /// When nginx is missing or does not listen in time.
    pub fn start(host: &Host, port: u16, body: &str) -> Result<Self> {
        host.write(
            "/etc/tombolo-nginx.conf",
            &format!(
                "worker_processes 1; pid /run/nginx.pid; error_log /var/log/tombolo/nginx.err warn; daemon off; worker_rlimit_nofile 8192;\n\
                 events {{ worker_connections 4096; }}\n\
                 http {{ access_log /var/log/tombolo/nginx.log; keepalive_requests 1000000; client_body_temp_path /run/nginx-body; \
                 proxy_temp_path /run/nginx-proxy; fastcgi_temp_path /run/nginx-f; uwsgi_temp_path /run/nginx-u; scgi_temp_path /run/nginx-s;\n\
                 server {{ listen {port}; listen [::]:{port}; location / {{ default_type text/plain; return 200 \"{body}\\n\"; }} \
                 location = /echo {{ default_type text/plain; return 200 \"$http_x_canary\\n\"; }} }} }}\n"
            ),
        )?;
        let process = host.spawn("nginx", &["-c", "/etc/tombolo-nginx.conf"])?;
        listening(host, port)?;
        Ok(Self(process))
    }

    /// Stops it at once.
    pub fn kill(&mut self) {
        let _ = self.0.signal(nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait(Duration::from_secs(5));
        self.0.kill();
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.kill(); // SIGTERM: the workers of a killed master would go on
    }
}

/// redis-server without persistence.
#[derive(Debug)]
pub struct Redis(#[allow(dead_code, reason = "kept for its drop")] Process);

impl Redis {
    /// Starts it on `port` of every address.
    ///
    /// # Errors
    /// When redis-server is missing or does not listen in time.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        let port_text = port.to_string();
        let args = [
            "--port",
            &port_text,
            "--save",
            "",
            "--protected-mode",
            "no",
            "--bind",
            "0.0.0.0",
            "--dir",
            "/run",
        ];
        let process = host.spawn("redis-server", &args)?;
        listening(host, port)?;
        Ok(Self(process))
    }
}

/// A PostgreSQL with one database `shop` that trusts the network (the mesh is what protects it here).
#[derive(Debug)]
pub struct Postgres(Process);

impl Postgres {
    /// Makes a cluster and starts it on `port` of every address.
    ///
    /// # Errors
    /// When PostgreSQL is missing or does not listen in time.
    pub fn start(host: &Host, port: u16) -> Result<Self> {
        let bin = host
            .sh("ls -d /usr/lib/postgresql/*/bin /usr/local/pgsql/bin 2>/dev/null | tail -1 || true; command -v initdb | xargs -r dirname")?
            .stdout
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        host.sh(&format!(
            "install -d -o postgres -g postgres -m 0700 /run/pg && install -d -o postgres /run/pgsock && \
             setpriv --reuid postgres --regid postgres --clear-groups {bin}/initdb -D /run/pg -A trust -U postgres --no-sync >/dev/null && \
             echo 'host all all all trust' >> /run/pg/pg_hba.conf"
        ))?
        .checked()?;
        let port_text = port.to_string();
        let server = format!("{bin}/postgres");
        let process = host.spawn(
            "setpriv",
            &[
                "--reuid",
                "postgres",
                "--regid",
                "postgres",
                "--clear-groups",
                &server,
                "-D",
                "/run/pg",
                "-k",
                "/run/pgsock",
                "-p",
                &port_text,
                "-c",
                "listen_addresses=*",
                "-c",
                "fsync=off",
                "-c",
                "shared_buffers=16MB",
                "-c",
                "max_connections=20",
            ],
        )?;
        listening(host, port)?;
        let create = format!("psql -h 127.0.0.1 -p {port} -U postgres -c 'create database shop'");
        wait_for("the database", START, || host.sh(&create)?.checked())?;
        Ok(Self(process))
    }

    /// What the server printed.
    pub fn log(&self) -> String {
        self.0.log()
    }
}

/// The repository's own small TCP peer (`tombolo-peer`) in one of its server modes.
#[derive(Debug)]
pub struct EchoServer(#[allow(dead_code, reason = "kept for its drop")] Process);

impl EchoServer {
    /// Starts `tombolo-peer serve MODE PORT`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start(host: &Host, mode: &str, port: u16) -> Result<Self> {
        let process = host.spawn("tombolo-peer", &["serve", mode, &port.to_string()])?;
        listening(host, port)?;
        Ok(Self(process))
    }
}
