use crate::{Host, Lan, Mesh, Process, mesh::PATIENCE, wait_for};
use anyhow::{Context as _, Result};

/// An east-west gateway with a foot on the internet.
#[derive(Debug)]
pub struct Gateway {
    process: Option<Process>,
    /// The host.
    pub host: Host,
}

impl Mesh {
    /// Enrols a gateway of a network (empty: discovery's) with a token of its own, and starts it. It is reached from
    /// outside at port 443, and inside of `lan` as `10.0.0.LAST`.
    ///
    /// # Errors
    /// When a step fails; the text has the command's output.
    pub fn gateway(&mut self, name: &str, network: &str, lan: &mut Lan, last: u8) -> Result<Gateway> {
        self.gateway_set(name, network, lan, last, "")
    }

    /// As [`Self::gateway`], with lines of `gateway.yaml`.
    ///
    /// # Errors
    /// As [`Self::gateway`].
    pub fn gateway_set(
        &mut self,
        name: &str,
        network: &str,
        lan: &mut Lan,
        last: u8,
        settings: &str,
    ) -> Result<Gateway> {
        let config = format!("log_calls: true\n{settings}");
        self.gateway_with(name, network, lan, last, &config, &[])
    }

    /// As [`Self::gateway`], over TCP alone.
    ///
    /// # Errors
    /// As [`Self::gateway`].
    pub fn gateway_tcp(&mut self, name: &str, network: &str, lan: &mut Lan, last: u8) -> Result<Gateway> {
        let config = "log_calls: true\nquic: false\n";
        self.gateway_with(name, network, lan, last, config, &["--quic-port", "0"])
    }

    /// As [`Self::gateway`], but port 443, where the others look for it, is left to a stand-in: itself it listens at
    /// port 15008, over TCP alone, and for sidecars that ask for `sidecar.shop.svc.mesh.internal` at 15443.
    ///
    /// # Errors
    /// As [`Self::gateway`].
    pub fn gateway_behind(&mut self, name: &str, network: &str, lan: &mut Lan, last: u8) -> Result<Gateway> {
        let config = "log_calls: true\nlisten: ['0.0.0.0:15008']\nquic: false\n\
             passthrough_listen: ['0.0.0.0:15443']\npassthrough_hosts: [sidecar.shop.svc.mesh.internal]\n";
        self.gateway_with(name, network, lan, last, config, &["--quic-port", "0"])
    }

    fn gateway_with(
        &mut self,
        name: &str,
        network: &str,
        lan: &mut Lan,
        last: u8,
        config: &str,
        more: &[&str],
    ) -> Result<Gateway> {
        let host = self.lab.host(name)?;
        self.lab.attach(&host, lan, last)?;
        let which = if network.is_empty() {
            String::new()
        } else {
            format!(" --network {network}")
        };
        let token = self.tombolo(&format!("token create --gateway{which}"))?;
        host.write("/run/token", &token)?;
        host.write("/etc/tombolo/gateway.yaml", config)?;
        let address = host.at(443);
        let mut join = vec!["join", "--token-file", "/run/token", "--address", &address];
        join.extend_from_slice(more);
        host.run("tombolo-gateway", &join)?
            .checked()
            .context("tombolo-gateway join")?;
        let mut gateway = Gateway { process: None, host };
        gateway.start()?;
        Ok(gateway)
    }
}

impl Gateway {
    /// Starts it (again) and waits until it serves.
    ///
    /// # Errors
    /// When it does not become ready in time.
    pub fn start(&mut self) -> Result<()> {
        self.process = Some(self.host.spawn("tombolo-gateway", &["run"])?);
        wait_for("the gateway to be ready", PATIENCE, || {
            self.host
                .sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
                .checked()
        })
        .with_context(|| self.log())
        .map(drop)
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    /// Nothing of it comes out any more, and nothing comes in: no end of a connection is said to anybody.
    ///
    /// # Errors
    /// When the rules cannot be made.
    pub fn fall_silent(&self) -> Result<()> {
        let rules = "iptables -I INPUT ! -i lo -j DROP && iptables -I OUTPUT ! -o lo -j DROP";
        self.host.sh(rules)?.checked().map(drop)
    }

    /// The end of [`Self::fall_silent`].
    ///
    /// # Errors
    /// When the rules are not there.
    pub fn speak(&self) -> Result<()> {
        let rules = "iptables -D INPUT ! -i lo -j DROP && iptables -D OUTPUT ! -o lo -j DROP";
        self.host.sh(rules)?.checked().map(drop)
    }

    /// The running program.
    ///
    /// # Panics
    /// When it was killed and not started again.
    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("the gateway runs")
    }

    /// What it has logged since its last start.
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// The value of one of its metrics, 0 if there is none: `line` is its name with the labels.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metric(&self, line: &str) -> Result<u64> {
        let metrics = self.metrics()?;
        let value = metrics
            .lines()
            .find_map(|one| one.strip_prefix(line)?.strip_prefix(' '));
        Ok(value.and_then(|value| value.trim().parse().ok()).unwrap_or(0))
    }

    /// Its metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self) -> Result<String> {
        let answer = self.host.sh("curl -sf -m 2 http://127.0.0.1:15020/metrics")?;
        Ok(answer.checked()?.stdout)
    }
}
