//! `tombolo-gateway join`.

use crate::config;
use anyhow::Context as _;
use std::{
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use tombolo_control_client::{Claims, Enroller, GatewayClaims, State, host};
use tombolo_types::{Code, JoinToken, ports};

/// Longest text that is read as a token.
const TOKEN_BYTES_MAX: u64 = 16 << 10;
/// Whose the state becomes when root enrols.
const USER: &str = "tombolo-gateway";

/// Enrolment of a gateway.
#[derive(Debug, clap::Args)]
#[group(id = "join")]
pub(crate) struct Args {
    /// File with the token; - is standard input. Without it the variable TOMBOLO_TOKEN is read.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// HOST:PORT under which other networks reach this gateway; none: the address that discovery sees, port 15008.
    #[arg(long = "address", value_name = "HOST:PORT", value_parser = address)]
    addresses: Vec<String>,
    /// Port of QUIC at the same hosts: that of the first address unless given; 0 if UDP does not reach this gateway.
    #[arg(long, value_name = "PORT")]
    quic_port: Option<u16>,
    #[command(flatten)]
    settings: config::Args,
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
    let settings = args.settings.load()?;
    let text = token(args.token_file.as_deref())?;
    let token =
        JoinToken::decode(&text).map_err(|error| anyhow::anyhow!(Code::TokenMalformed.message(error)))?;
    let enroller = Enroller::connect(&token).await?;
    let preflight = enroller.preflight().await?;
    if let Some(problem) = preflight.clock_problem() {
        return Err(problem.into());
    }
    let state = State::open(&args.state_dir, owner()).map_err(|error| error.problem())?;
    let claims = Claims {
        addresses: host::addresses(Some(&preflight.plan)),
        gateway: Some(GatewayClaims {
            quic_port: quic_port(args.quic_port, &args.addresses, settings.quic),
            addresses: args.addresses,
        }),
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

/// QUIC is served at the ports of TCP, unless it is switched off.
fn quic_port(given: Option<u16>, addresses: &[String], served: bool) -> Option<u16> {
    let same = addresses
        .first()
        .and_then(|address| address.rsplit_once(':')?.1.parse().ok())
        .unwrap_or(ports::HBONE);
    Some(given.unwrap_or(same)).filter(|port| served && *port != 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_can_be_said() {
        for (text, fits) in [
            ("gw.example.com:443", true),
            ("[2001:db8::1]:443", true),
            ("gw.example.com", false),
            ("gw.example.com:0", false),
            (":443", false),
            ("a,b:443", false),
            ("https://gw.example.com:443", false),
        ] {
            assert_eq!(address(text).is_ok(), fits, "{text}");
        }
    }

    #[test]
    fn quic_is_where_tcp_is() {
        let at = ["gw.example.com:443".to_owned()];
        assert_eq!(quic_port(None, &at, true), Some(443));
        assert_eq!(quic_port(None, &[], true), Some(15008));
        assert_eq!(quic_port(Some(8443), &at, true), Some(8443));
        assert_eq!(quic_port(Some(0), &at, true), None);
        assert_eq!(quic_port(None, &at, false), None);
    }
}
