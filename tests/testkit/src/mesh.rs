use crate::{Clock, Host, Lab, Lan, Process, Shape, wait_for};
use anyhow::{Context as _, Result, bail};
use std::{sync::Arc, time::Duration};

/// Longest wait for something that should take a second, on a machine that builds at the same time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The DNS VIP of the default address plan: the one line of ours in the hosts' dnsmasq.
const DNS_VIP: &str = "240.240.255.254";

/// What a mesh is made of.
#[derive(Debug, Clone)]
pub struct MeshOptions {
    /// Trust domain.
    pub trust_domain: String,
    /// More arguments of `tombolo-discovery init`.
    pub init: Vec<String>,
    /// Domains that the hosts' own resolver leaves to their agents.
    pub mesh_domains: Vec<String>,
    /// Links of every host.
    pub shape: Shape,
    /// The programs of all hosts follow [`Mesh::clock`].
    pub clock: bool,
}

impl Default for MeshOptions {
    fn default() -> Self {
        Self {
            trust_domain: "mesh.example".into(),
            init: Vec::new(),
            mesh_domains: vec!["mesh.internal".into()],
            shape: Shape::default(),
            clock: false,
        }
    }
}

/// A lab with a discovery and, through [`Mesh::vm`], enrolled hosts: all by the commands that a user types.
#[derive(Debug)]
pub struct Mesh {
    // Dropped in this order: programs first, the namespaces last.
    discovery: Option<Process>,
    upstream_dns: Process,
    /// The host of discovery.
    pub control: Host,
    /// What it is.
    pub options: MeshOptions,
    clock: Arc<Clock>,
    /// Router and namespaces.
    pub lab: Lab,
}

/// An enrolled host.
#[derive(Debug)]
pub struct Vm {
    dnsmasq: Option<Process>,
    /// The host.
    pub host: Host,
}

impl Mesh {
    /// Makes the lab and starts discovery on a host of its own.
    ///
    /// # Errors
    /// When a step fails; the text has the command's output.
    pub fn start(name: &str, options: MeshOptions) -> Result<Self> {
        let mut mesh = Self::prepare(name, options)?;
        mesh.found()?;
        Ok(mesh)
    }

    /// Founds the mesh on what [`Self::prepare`] made, and starts discovery.
    ///
    /// # Errors
    /// When a step fails; the text has the command's output.
    pub fn found(&mut self) -> Result<()> {
        let advertise = self.control.at(15012);
        let mut init = vec![
            "init",
            "--trust-domain",
            &self.options.trust_domain,
            "--advertise",
            &advertise,
        ];
        init.extend(self.options.init.iter().map(String::as_str));
        self.control
            .run("tombolo-discovery", &init)?
            .checked()
            .context("tombolo-discovery init")?;
        self.start_discovery()
    }

    /// Makes the lab with the host of discovery, where nothing of ours has run yet.
    ///
    /// # Errors
    /// When the namespaces cannot be made.
    pub fn prepare(name: &str, options: MeshOptions) -> Result<Self> {
        let mut lab = Lab::new(name)?;
        let control = lab.host_shaped("discovery", options.shape)?;
        let clock = Arc::new(Clock::new(lab.dir(), "mesh")?);
        if options.clock {
            control.follow(&clock);
        }
        // The "internet's" DNS: ordinary names, so that tests see whether those still work.
        let mut command = lab.router_command("dnsmasq");
        command.args([
            "--no-daemon",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
        ]);
        command.args([
            "--address=/ordinary.example/192.0.2.7",
            "--no-poll",
            "--user=root",
        ]);
        let upstream_dns = Process::start("dnsmasq", command, &lab.dir().join("upstream-dns.log"))?;
        Ok(Self {
            discovery: None,
            upstream_dns,
            control,
            options,
            clock,
            lab,
        })
    }

    /// Starts discovery (again) and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready in time.
    pub fn start_discovery(&mut self) -> Result<()> {
        self.discovery = Some(self.control.spawn("tombolo-discovery", &["run"])?);
        wait_for("discovery to be ready", PATIENCE, || {
            self.control
                .sh("curl -sf -m 2 http://127.0.0.1:15021/healthz/ready")?
                .checked()
        })
        .with_context(|| self.discovery.as_ref().map(Process::log).unwrap_or_default())
        .map(drop)
    }

    /// The clock of every host, with [`MeshOptions::clock`].
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// The running discovery.
    ///
    /// # Panics
    /// When it was killed and not started again.
    pub fn discovery(&mut self) -> &mut Process {
        self.discovery.as_mut().expect("discovery runs")
    }

    /// SIGKILL.
    pub fn kill_discovery(&mut self) {
        if let Some(mut process) = self.discovery.take() {
            process.kill();
        }
    }

    /// Runs the CLI on the discovery host, as its operator.
    ///
    /// # Errors
    /// When it cannot be started or fails; the text has its output.
    pub fn tombolo(&self, line: &str) -> Result<String> {
        let args: Vec<&str> = line.split_whitespace().collect();
        let output = self.control.run("tombolo", &args)?.checked();
        Ok(output.with_context(|| format!("tombolo {line}"))?.stdout)
    }

    /// Applies YAML.
    ///
    /// # Errors
    /// When it is refused.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.control.write("/run/apply.yaml", yaml)?;
        self.tombolo("apply -f /run/apply.yaml")
    }

    /// Makes a WorkloadGroup with its service: `ports` as `http=80:8080,redis=6379`.
    ///
    /// # Errors
    /// When it is refused.
    pub fn group(&self, name: &str, ports: &str) -> Result<()> {
        let ports: String = ports
            .split(',')
            .filter(|p| !p.is_empty())
            .map(|p| format!(" --port {p}"))
            .collect();
        self.tombolo(&format!(
            "workload-group create {name} -n shop --service-account {name}{ports}"
        ))
        .map(drop)
    }

    /// A new token for a group.
    ///
    /// # Errors
    /// When it is refused.
    pub fn token(&self, group: &str) -> Result<String> {
        Ok(self
            .tombolo(&format!("token create -n shop --workload-group {group}"))?
            .trim()
            .to_owned())
    }

    /// A host with dnsmasq, as many have it, that is not enrolled yet.
    ///
    /// # Errors
    /// When the namespace cannot be made.
    pub fn bare(&mut self, name: &str) -> Result<Vm> {
        let shape = self.options.shape;
        let host = self.lab.host_shaped(name, shape)?;
        let upstream = format!("server={}\n", host.router());
        self.dress(host, &upstream)
    }

    /// As [`Self::bare`] in a private network, as `10.0.0.LAST`. Nothing but port 443 leads out of there: ordinary names
    /// are refused at once.
    ///
    /// # Errors
    /// As [`Self::bare`].
    pub fn bare_in(&mut self, lan: &mut Lan, name: &str, last: u8) -> Result<Vm> {
        let host = self.lab.lan_host(lan, name, last)?;
        self.dress(host, "")
    }

    fn dress(&self, host: Host, upstream: &str) -> Result<Vm> {
        let shape = self.options.shape;
        if self.options.clock {
            host.follow(&self.clock);
        }
        let dns_vip = if shape.ipv4 { DNS_VIP } else { "2001:2:0:ffff::254" };
        let domains = self.options.mesh_domains.iter();
        let domains: String = domains
            .map(|domain| format!("server=/{domain}/{dns_vip}\n"))
            .collect();
        host.write(
            "/etc/tombolo-dnsmasq.conf",
            &format!(
                "no-resolv\nno-hosts\nno-poll\nuser=root\npid-file=\nlisten-address=127.0.0.1\nbind-interfaces\ncache-size=0\n\
                 {upstream}{domains}"
            ),
        )?;
        // The word of the host's owner: log every connection, not only the refused.
        host.write("/etc/tombolo/agent.yaml", "access_log: all\n")?;
        let mut vm = Vm { dnsmasq: None, host };
        vm.start_dnsmasq()?;
        Ok(vm)
    }

    /// A host that is enrolled into a group and ready.
    ///
    /// # Errors
    /// When enrolment fails.
    pub fn vm(&mut self, name: &str, group: &str) -> Result<Vm> {
        let vm = self.bare(name)?;
        let token = self.token(group)?;
        vm.up(&token)?;
        Ok(vm)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- discovery\n{}",
                self.discovery
                    .as_ref()
                    .map(|p| tail(&p.log()))
                    .unwrap_or_default()
            );
        }
        self.upstream_dns.kill();
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

impl Vm {
    /// `tombolo up TOKEN`.
    ///
    /// # Errors
    /// With everything it printed.
    pub fn up(&self, token: &str) -> Result<String> {
        let output = self.host.run("tombolo", &["up", token])?;
        if !output.ok() {
            bail!(
                "tombolo up on {}: {}\n--- agent\n{}",
                self.host.name(),
                output.text(),
                self.agent_log()
            );
        }
        Ok(output.stdout)
    }

    /// What the agent and netd have logged.
    pub fn agent_log(&self) -> String {
        self.host
            .sh("cat /var/log/tombolo/*.log")
            .map(|output| tail(&output.stdout))
            .unwrap_or_default()
    }

    /// `curl` of a URL in the mesh: exit code and body.
    ///
    /// # Errors
    /// When curl cannot be started.
    pub fn curl(&self, url: &str) -> Result<crate::Output> {
        self.host.run("curl", &["-sS", "-m", "12", url])
    }

    /// Waits until a URL answers.
    ///
    /// # Errors
    /// At the deadline.
    pub fn curl_until(&self, url: &str, deadline: Duration) -> Result<String> {
        wait_for(url, deadline, || Ok(self.curl(url)?.checked()?.stdout)).with_context(|| self.agent_log())
    }

    /// Process id of the agent.
    ///
    /// # Errors
    /// When it is not running.
    pub fn agent_pid(&self) -> Result<i32> {
        self.host
            .pids_of("tombolo-agent")?
            .first()
            .copied()
            .context("the agent is not running")
    }

    /// Starts the host's dnsmasq (again).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_dnsmasq(&mut self) -> Result<()> {
        let arguments = ["--keep-in-foreground", "--conf-file=/etc/tombolo-dnsmasq.conf"];
        self.dnsmasq = Some(self.host.spawn("dnsmasq", &arguments)?);
        Ok(())
    }

    /// Stops the host's dnsmasq.
    pub fn stop_dnsmasq(&mut self) {
        self.dnsmasq = None;
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.host.name(), self.agent_log());
        }
    }
}
