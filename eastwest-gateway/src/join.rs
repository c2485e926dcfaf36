//! `tombolo-gateway join`.

use anyhow::Context as _;
use std::{
    collections::HashMap,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use tombolo_control_client::{Claims, Enroller, State, host};
use tombolo_types::{Code, JoinToken};

/// Label of a gateway's entry: where callers of other networks reach it.
pub(crate) const ADDRESS_LABEL: &str = "tombolo.io/gateway-address";
/// Longest text that is read as a token.
const TOKEN_BYTES_MAX: u64 = 16 << 10;
/// Whose the state becomes when root enrols.
const USER: &str = "tombolo-gateway";

/// Enrolment of a gateway.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File with the token; - is standard input. Without it the variable TOMBOLO_TOKEN is read.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// HOST:PORT under which other networks reach this gateway; none: the address that discovery sees, port 15008.
    #[arg(long = "address", value_name = "HOST:PORT", value_parser = address)]
    addresses: Vec<String>,
    /// Keys, certificate, registration and snapshot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/tombolo/gateway")]
    state_dir: PathBuf,
}

fn address(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').ok_or("HOST:PORT")?;
    let port_fits = port.parse::<u16>().is_ok_and(|port| port != 0);
    let host_fits = !host.is_empty() && !host.contains([',', ' ', '/']);
    if host_fits && port_fits {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("HOST:PORT, for example gateway.example.com:443 or [2001:db8::1]:443".to_owned())
    }
}

/// Enrols, once.
pub(crate) async fn join(args: Args) -> anyhow::Result<()> {
    let text = token(args.token_file.as_deref())?;
    let token =
        JoinToken::decode(&text).map_err(|error| anyhow::anyhow!(Code::TokenMalformed.message(error)))?;
    let enroller = Enroller::connect(&token).await?;
    let preflight = enroller.preflight().await?;
    if let Some(problem) = preflight.clock_problem() {
        return Err(problem.into());
    }
    let state = State::open(&args.state_dir, owner()).map_err(|error| error.problem())?;
    let mut labels = HashMap::new();
    if !args.addresses.is_empty() {
        labels.insert(ADDRESS_LABEL.to_owned(), args.addresses.join(","));
    }
    let claims = Claims {
        addresses: host::addresses(None),
        labels,
        ..Claims::of_this_host()
    };
    let registration = enroller.enroll(&state, claims).await?;
    #[allow(clippy::print_stdout, reason = "the answer of a command")]
    {
        println!(
            "Enrolled: {} is a gateway of network {:?}. Start it: systemctl enable --now tombolo-gateway",
            registration.workload_name, registration.network
        );
    }
    Ok(())
}

fn token(file: Option<&Path>) -> anyhow::Result<String> {
    let mut text = String::new();
    match file {
        Some(path) if path == Path::new("-") => {
            std::io::stdin().take(TOKEN_BYTES_MAX).read_to_string(&mut text)?;
        }
        Some(path) => {
            std::fs::File::open(path)
                .with_context(|| path.display().to_string())?
                .take(TOKEN_BYTES_MAX)
                .read_to_string(&mut text)?;
        }
        None => {
            text = std::env::var("TOMBOLO_TOKEN").map_err(|_| {
                anyhow::anyhow!(
                    Code::NotEnrolled.message("no token: --token-file FILE, or - for standard input")
                )
            })?;
        }
    }
    Ok(text)
}

/// Root enrols for the user that the service runs as.
fn owner() -> Option<(u32, u32)> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let user = nix::unistd::User::from_name(USER).ok().flatten();
    match user {
        Some(user) => Some((user.uid.as_raw(), user.gid.as_raw())),
        // No packages here: whoever owns the process.
        None => std::fs::metadata("/proc/self")
            .ok()
            .map(|own| (own.uid(), own.gid())),
    }
}
