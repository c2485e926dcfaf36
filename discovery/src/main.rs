//! `tombolo-discovery`: arguments and wiring.

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use std::{io::Write as _, path::PathBuf, process::ExitCode, time::Duration};
use tombolo_discovery::{
    config::{Config, DEFAULT_PATH, DEFAULT_STATE_DIR, LogFormat},
    init::{Founding, found},
    server,
};

/// How often it is tried to start anew within the process, and how long is waited between.
const ANEW_TRIES: u32 = 50;
const ANEW_PAUSE: Duration = Duration::from_millis(100);

/// The control plane of a Tombolo mesh.
#[derive(Parser)]
#[command(name = "tombolo-discovery", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one per process")]
enum Command {
    /// Founds a mesh: writes configuration, CA and store. Once per host.
    Init(Init),
    /// Serves until SIGTERM.
    Run {
        /// Configuration file.
        #[arg(long, env = "TOMBOLO_DISCOVERY_CONFIG", default_value = DEFAULT_PATH)]
        config: PathBuf,
    },
}

#[derive(Args)]
struct Init {
    /// Trust domain of every identity, for example mesh.example. Changed later with tombolo trust migrate.
    #[arg(long)]
    trust_domain: String,
    /// host:port under which agents reach this discovery; several in order of preference.
    #[arg(long, required = true)]
    advertise: Vec<String>,
    /// Services are SERVICE.NAMESPACE.svc.MESH_DOMAIN.
    #[arg(long, default_value = "mesh.internal")]
    mesh_domain: String,
    /// Istio's name of this cluster.
    #[arg(long, default_value = "Kubernetes")]
    cluster_id: String,
    /// Network of workloads whose group names none.
    #[arg(long, default_value = "")]
    network: String,
    /// Name of this cluster among those that it will be joined with; the first label of the trust domain unless given.
    #[arg(long, default_value = "")]
    cluster_name: String,
    /// Prefix for virtual addresses, IPv4 /8 to /20 or IPv6 /32 to /48; one of each family.
    #[arg(long = "vip-prefix")]
    vip_prefixes: Vec<String>,
    /// Deny what no policy allows.
    #[arg(long)]
    default_deny: bool,
    /// Take the CA from a folder with Istio's cacerts files.
    #[arg(long)]
    ca_dir: Option<PathBuf>,
    /// Where CA, store and audit log go.
    #[arg(long, env = "TOMBOLO_DISCOVERY_STATE_DIR", default_value = DEFAULT_STATE_DIR)]
    state_dir: PathBuf,
    /// Where the configuration goes.
    #[arg(long, env = "TOMBOLO_DISCOVERY_CONFIG", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

fn main() -> ExitCode {
    match act(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // For people: the sentence and its causes, never a backtrace.
            let _ = writeln!(std::io::stderr(), "Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn act(command: Command) -> Result<()> {
    match command {
        Command::Init(init) => {
            let text = found(&founding(init)?)?;
            std::io::stdout().write_all(text.as_bytes())?;
            Ok(())
        }
        Command::Run { config } => run(&Config::open(&config)?),
    }
}

fn founding(init: Init) -> Result<Founding> {
    let mut config = Config::new(&init.trust_domain, init.advertise);
    (config.mesh_domain, config.cluster_id, config.network) =
        (init.mesh_domain, init.cluster_id, init.network);
    // A family that is not named keeps its default: the file shows both.
    let plan = tombolo_types::AddressPlan::from_prefixes(&init.vip_prefixes).context("--vip-prefix")?;
    config.vip_prefixes = plan.prefixes().to_vec();
    config.default_deny = init.default_deny;
    config.cluster_name = init.cluster_name;
    config.cluster_name = config.cluster_name();
    config.state_dir = init.state_dir;
    Ok(Founding {
        config,
        config_path: init.config,
        ca_dir: init.ca_dir,
    })
}

fn run(config: &Config) -> Result<()> {
    let mut log = tombolo_telemetry::LogConfig::new("tombolo-discovery");
    log.filter.clone_from(&config.log_level);
    log.format = match config.log_format {
        LogFormat::Text => tombolo_telemetry::LogFormat::Text,
        LogFormat::Json => tombolo_telemetry::LogFormat::Json,
    };
    tombolo_telemetry::log::init(&log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signal = std::pin::pin!(tombolo_runtime::stop_signal());
        let mut running = server::start(config).await?;
        loop {
            tracing::info!(address = %running.address, trust_domain = %running.trust_domain, "discovery serves");
            sd_notify::notify(&[
                sd_notify::NotifyState::Ready,
                sd_notify::NotifyState::Status("serving"),
            ])?;
            let signal = tokio::select! {
                signal = &mut signal => signal?,
                () = running.outdated() => {
                    tracing::info!("discovery opens itself anew");
                    sd_notify::notify(&[sd_notify::NotifyState::Status("opens itself anew")])?;
                    running.stop().await;
                    running = anew(config).await?;
                    continue;
                }
            };
            tracing::info!(signal, "discovery stops");
            sd_notify::notify(&[sd_notify::NotifyState::Stopping])?;
            running.stop().await;
            return Ok(());
        }
    })
}

/// Starts discovery again. A call that is still being answered may hold the store for a moment; when it is held for
/// longer the service manager starts the process anew.
async fn anew(config: &Config) -> Result<server::Running> {
    let mut left = ANEW_TRIES;
    loop {
        match server::start(config).await {
            Ok(running) => return Ok(running),
            Err(error) if left == 0 => return Err(error.context("discovery could not open itself anew")),
            Err(error) => {
                left -= 1;
                tracing::debug!(%error, "not yet");
                tokio::time::sleep(ANEW_PAUSE).await;
            }
        }
    }
}
