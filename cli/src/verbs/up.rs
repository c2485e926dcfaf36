use crate::{
    failure::Failure,
    host_names, output, routes,
    services::{self, Layout, Service},
    sockets::Sockets,
    text,
};
use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};
use tombolo_capture::netd::NamesMode;
use tombolo_control_client::{Claims, Enroller, Registration, State, host};
use tombolo_proto::tombolo::agent::v1::{StatusRequest, StatusResponse};
use tombolo_types::{Code, JoinToken};
use zeroize::Zeroizing;

/// Enrolment is done by then; this is netd, mesh0, the first connection and the first snapshot.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// How often is looked.
const INTERVAL: Duration = Duration::from_millis(50);
/// Longest text that is read as a token.
const TOKEN_BYTES_MAX: u64 = 16 << 10;
/// Name of the systemd credential.
const CREDENTIAL: &str = "tombolo-token";
/// Environment variable.
const VARIABLE: &str = "TOMBOLO_TOKEN";

/// Join the mesh with a token, or start again what was stopped.
///
/// The token is an argument, `-` (standard input), --token-file, the variable TOMBOLO_TOKEN or the systemd credential
/// tombolo-token. Arguments can be read by everybody on the host: use them for tokens of one use and an hour at most.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The join token, or - for standard input.
    #[arg(value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<String>,
    /// File with the join token.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// KEY=VALUE label of this host; taken if its WorkloadGroup lists the key.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = super::workload_group::label)]
    labels: Vec<(String, String)>,
    /// How programs of this host come to names of the mesh: auto, resolved, networkmanager, dnsmasq, unbound,
    /// resolv-conf or none; recorded in the agent's configuration.
    ///
    /// auto changes what looks up names here where that can be done for the mesh's names alone. resolv-conf puts the
    /// agent before the servers of a plain /etc/resolv.conf: it says what that costs and asks.
    #[arg(long, value_name = "MODE", value_parser = names_mode)]
    names: Option<NamesMode>,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    layout: Layout,
}

fn names_mode(text: &str) -> Result<NamesMode, String> {
    let known = NamesMode::ALL.map(NamesMode::as_str).join(", ");
    text.parse().map_err(|()| format!("one of {known}"))
}

/// Steps with the time that each took.
struct Progress(Instant);

impl Progress {
    fn step(&mut self, what: impl std::fmt::Display) {
        output::line(format!(
            "  ok  {:>7}  {what}",
            format!("{} ms", self.0.elapsed().as_millis())
        ));
        self.0 = Instant::now();
    }
}

pub(crate) async fn run(args: Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let begun = Instant::now();
    let token = source(&args, |name| std::env::var(name).ok())?
        .map(|text| read(&text))
        .transpose()?;
    services::need_root()?;
    let layout = &args.layout;
    let user = layout.user()?;
    let mut progress = Progress(Instant::now());
    let held = State::peek(&layout.state_dir).registration()?;
    let registration = match (held, token) {
        (Some(registration), token) => {
            if let Some(token) = token.filter(|token| !registration.is_name(&token.trust_domain)) {
                let cause = format!(
                    "it is in {}, the token is for {}",
                    registration.trust_domain, token.trust_domain
                );
                return Err(Failure::coded(Code::AlreadyEnrolled, cause));
            }
            output::line(format!(
                "This host is enrolled already, as {}.",
                registration.workload_name
            ));
            registration
        }
        (None, Some(token)) => {
            let owner = (user.uid.as_raw(), user.gid.as_raw());
            enroll(&args, &token, owner, &mut progress).await?
        }
        (None, None) => {
            return Err(Failure::coded(
                Code::NotEnrolled,
                "no token was given, and there is no earlier enrolment",
            ));
        }
    };
    if let Some((prefix, route)) = routes::conflict(&registration.plan) {
        return Err(Failure::coded(
            Code::PrefixTaken,
            format!("{prefix} is in use: {route}"),
        ));
    }
    let chosen = match args.names {
        Some(mode) => host_names::choose(mode, args.yes, layout)?,
        None => false,
    };
    if host_names::fit(layout)? || chosen {
        services::renew_netd(layout).await?;
    }
    let mut started = services::start(layout)?;
    let status = ready(sockets, layout, &registration, &mut started).await?;
    progress.step("netd and agent run; traffic can flow");
    report(&registration, &status, begun.elapsed());
    Ok(ExitCode::SUCCESS)
}

/// The text of the token, by the first way that has one.
fn source(args: &Args, env: impl Fn(&str) -> Option<String>) -> Result<Option<Zeroizing<String>>, Failure> {
    let file = |path: &Path| {
        let failed = |error: std::io::Error| Failure::plain(format!("{}: {error}", path.display()));
        let mut text = Zeroizing::new(String::new());
        std::fs::File::open(path)
            .map_err(failed)?
            .take(TOKEN_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(failed)?;
        Ok(text)
    };
    if let Some(path) = &args.token_file {
        return file(path).map(Some);
    }
    match args.token.as_deref() {
        Some("-") => {
            let mut text = Zeroizing::new(String::new());
            let read = std::io::stdin().take(TOKEN_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|error| Failure::plain(format!("standard input: {error}")))?;
            return Ok(Some(text));
        }
        Some(token) => return Ok(Some(Zeroizing::new(token.to_owned()))),
        None => {}
    }
    if let Some(token) = env(VARIABLE).filter(|token| !token.is_empty()) {
        return Ok(Some(Zeroizing::new(token)));
    }
    let credential = env("CREDENTIALS_DIRECTORY").map(|dir| Path::new(&dir).join(CREDENTIAL));
    credential
        .filter(|path| path.is_file())
        .map(|path| file(&path))
        .transpose()
}

fn read(text: &str) -> Result<JoinToken, Failure> {
    JoinToken::decode(text).map_err(|error| {
        let what = if text.trim().is_empty() {
            "it is empty".to_owned()
        } else {
            error.to_string()
        };
        Failure::coded(Code::TokenMalformed, what)
    })
}

async fn enroll(
    args: &Args,
    token: &JoinToken,
    owner: (u32, u32),
    progress: &mut Progress,
) -> Result<Registration, Failure> {
    let enroller = Enroller::connect(token).await?;
    progress.step(format!(
        "{} is discovery of {}: pin and identity hold",
        enroller.endpoint(),
        token.trust_domain
    ));
    let preflight = enroller.preflight().await?;
    if let Some(problem) = preflight.clock_problem() {
        return Err(problem.into());
    }
    if let Some((prefix, route)) = routes::conflict(&preflight.plan) {
        return Err(Failure::coded(
            Code::PrefixTaken,
            format!("{prefix} is in use: {route}"),
        ));
    }
    let argument = args.token.as_deref().is_some_and(|token| token != "-");
    if let Some(problem) = preflight
        .token
        .filter(|_| argument)
        .and_then(|token| token.argument_problem())
    {
        return Err(problem.into());
    }
    if let Some(token) = preflight.token {
        progress.step(format!("the token holds: {}", token.left_text()));
    }
    progress.step(format!(
        "clocks agree ({} ms); the mesh's addresses are free",
        preflight.clock_difference_ms
    ));
    let layout = &args.layout;
    let state = State::open(&layout.state_dir, Some(owner))?;
    let claims = Claims {
        addresses: host::addresses(Some(&preflight.plan)),
        labels: args.labels.iter().cloned().collect(),
        ..Claims::of_this_host()
    };
    let registration = enroller.enroll(&state, claims).await?;
    progress.step(format!("enrolled: {}", registration.identity));
    Ok(registration)
}

/// Waits until the agent says that it serves.
async fn ready(
    sockets: &Sockets,
    layout: &Layout,
    registration: &Registration,
    started: &mut services::Started,
) -> Result<StatusResponse, Failure> {
    let deadline = Instant::now() + READY_TIMEOUT;
    let mut last = "the agent does not answer yet".to_owned();
    loop {
        if let Some(text) = started.ended(layout) {
            return Err(Failure::coded(Code::NotReady, text));
        }
        if let Ok(mut agent) = sockets.agent().await
            && let Ok(Ok(answer)) =
                tokio::time::timeout(Duration::from_secs(2), agent.status(StatusRequest {})).await
        {
            let status = answer.into_inner();
            let own = status.device_id == registration.device.to_string();
            if own && matches!(status.state.as_str(), "Serving" | "Degraded") {
                return Ok(status);
            }
            let findings = status
                .findings
                .iter()
                .map(|f| format!("{} {}", f.code, f.cause))
                .collect::<Vec<_>>();
            last = format!("the agent is {}; {}", status.state, findings.join("; "));
        }
        if Instant::now() >= deadline {
            let log = layout.log_file(Service::Agent);
            let log = if log.is_file() {
                format!("; its log: {}", log.display())
            } else {
                String::new()
            };
            let cause = format!(
                "within {} s: {last}{log}. The host is enrolled: tombolo up tries again",
                READY_TIMEOUT.as_secs()
            );
            return Err(Failure::coded(Code::NotReady, cause));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn report(registration: &Registration, status: &StatusResponse, took: Duration) {
    output::line("");
    output::line(format!(
        "This host is in the mesh after {:.1} s.",
        took.as_secs_f64()
    ));
    output::line(format!("  identity  {}", registration.identity));
    output::line(format!(
        "  workload  {}/{}",
        registration.namespace, registration.workload_name
    ));
    let names = if status.hostnames.is_empty() {
        &registration.hostnames
    } else {
        &status.hostnames
    };
    if !names.is_empty() {
        output::line(format!("  called    {}", names.join(", ")));
    }
    if status.certificate_expires_unix_ms > 0 {
        let expires = text::relative(status.certificate_expires_unix_ms, status.now_unix_ms);
        output::line(format!("  renews by itself; the certificate expires {expires}"));
    }
    if let Some(line) = super::status::resolver(status) {
        output::line(format!("  names     {line}"));
    }
    for finding in &status.findings {
        output::line(format!(
            "  note      {} {}; next: {}",
            finding.code, finding.cause, finding.next
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn found(line: &[&str], env: &[(&str, &str)]) -> Option<String> {
        let args = Line::parse_from(std::iter::once("up").chain(line.iter().copied())).args;
        let env = |name: &str| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        source(&args, env).unwrap().map(|text| text.trim().to_owned())
    }

    #[test]
    fn every_way_to_give_a_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let file = path("t", "tmb1_file\n");
        path(CREDENTIAL, "tmb1_credential");
        let credentials = ("CREDENTIALS_DIRECTORY", dir.path().to_str().unwrap());
        let all = [(VARIABLE, "tmb1_env"), credentials];
        assert_eq!(found(&["tmb1_arg"], &all).as_deref(), Some("tmb1_arg"));
        assert_eq!(
            found(&["--token-file", &file], &all).as_deref(),
            Some("tmb1_file")
        );
        assert_eq!(found(&[], &all).as_deref(), Some("tmb1_env"));
        assert_eq!(found(&[], &[credentials]).as_deref(), Some("tmb1_credential"));
        assert_eq!(
            found(&[], &[(VARIABLE, ""), ("CREDENTIALS_DIRECTORY", "/nowhere")]),
            None
        );
    }

    #[test]
    fn a_damaged_token_is_refused_without_repeating_it() {
        for text in ["", "hello", "tmb1_", "tmb1_secret!", "tmb1_c2VjcmV0"] {
            let failure = read(text).unwrap_err();
            assert_eq!(failure.code(), Some(Code::TokenMalformed), "{text}");
            let Failure::Problem(problem) = failure else {
                panic!("no code")
            };
            assert!(
                !problem.cause.contains("secret") && !problem.cause.contains("c2VjcmV0"),
                "{problem}"
            );
        }
    }
}
