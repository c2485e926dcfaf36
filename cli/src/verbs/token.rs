use super::{Namespace, Namespaces, cluster};
use crate::{
    failure::Failure,
    objects::{self, Admin},
    output::{self, Format, Output},
    sockets::Sockets,
    text,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rand::TryRng as _;
use serde_json::json;
use std::{process::ExitCode, time::Duration};
use tombolo_config::{JoinTokenSpec, Kind, Metadata, Object, annotation};
use tombolo_control_client::host;
use tombolo_identity::JoinKey;
use tombolo_proto::tombolo::admin::v1::{
    CreateBearerRequest, CreateGatewayTokenRequest, DeleteRequest, MeshRequest, MeshResponse,
};
use tombolo_types::{Code, InviteToken, JoinToken};
use zeroize::Zeroizing;

/// A token that may stand in an argument, where everybody on the host can read it: one use and an hour.
const ARGUMENT_TTL_MAX: Duration = Duration::from_secs(3600);
/// Life of a join token: long enough to walk to the VM.
const JOIN_TTL: Duration = Duration::from_secs(15 * 60);
/// Endpoints in a token.
const ENDPOINTS_MAX: usize = 8;
/// Life of a bearer token.
const BEARER_TTL: Duration = Duration::from_secs(3600);

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Make a join token for a WorkloadGroup, or a bearer token for a client without a certificate.
    Create(Create),
    /// List join tokens and invites for clusters. None of them can be shown again.
    List(List),
    /// Revoke join tokens, or invites for clusters.
    Revoke(Revoke),
    /// Show what a token says, without redeeming it. The secret is not shown.
    Inspect(Inspect),
}

/// Make a token.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    #[command(flatten)]
    namespace: Namespace,
    /// WorkloadGroup to join.
    #[arg(
        long,
        value_name = "GROUP",
        required_unless_present_any = ["bearer", "gateway"],
        conflicts_with = "bearer"
    )]
    workload_group: Option<String>,
    /// Make a token for east-west gateways. Only a mesh-admin may.
    #[arg(long, conflicts_with_all = ["workload_group", "bearer"])]
    gateway: bool,
    /// Network that the gateways lead into; discovery's own unless given.
    #[arg(long, value_name = "NETWORK", requires = "gateway")]
    network: Option<String>,
    /// Life of the token, at most 7d: 15m unless given; of a bearer token at most 24h: 1h unless given.
    #[arg(long, value_name = "DURATION", value_parser = text::life)]
    ttl: Option<Duration>,
    /// How many hosts may use it, at most 1000.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1000), conflicts_with = "bearer")]
    uses: u32,
    /// Networks it may be used from; may be given several times.
    #[arg(long, value_name = "CIDR", value_delimiter = ',', conflicts_with = "bearer")]
    cidr: Vec<ipnet::IpNet>,
    /// Print the command to run on the VM instead of the token alone.
    #[arg(long, conflicts_with = "bearer")]
    print_join_command: bool,
    /// Make a JWT for a client that comes without a certificate, such as ztunnel.
    #[arg(long, requires = "service_account")]
    bearer: bool,
    /// Service account of the bearer token.
    #[arg(long, value_name = "NAME", requires = "bearer")]
    service_account: Option<String>,
    /// Let the client believe the roots of every member cluster, so that it can call services of other trust domains.
    /// A client such as ztunnel cannot tell them apart: for it each of them makes every identity. Only a mesh-admin may.
    #[arg(long, requires = "bearer")]
    all_roots: bool,
    #[command(flatten)]
    output: Output,
}

/// List join tokens.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    namespaces: Namespaces,
    #[command(flatten)]
    output: Output,
}

/// Revoke join tokens.
#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// Name (the id), or the token itself.
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    #[command(flatten)]
    namespace: Namespace,
}

/// Show what a token says.
#[derive(Debug, clap::Args)]
pub(crate) struct Inspect {
    /// The token, or - for standard input.
    #[arg(value_name = "TOKEN")]
    token: String,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Create(args) if args.bearer => bearer(&args, &mut sockets.admin().await?).await?,
        Verb::Create(args) if args.gateway => gateway(&args, &mut sockets.admin().await?).await?,
        Verb::Create(args) => create(&args, &mut sockets.admin().await?).await?,
        Verb::List(args) => list(&args, &mut sockets.admin().await?).await?,
        Verb::Revoke(args) => {
            let mut admin = sockets.admin().await?;
            for name in &args.names {
                if let Ok(invite) = InviteToken::decode(name) {
                    cluster::revoke(&mut admin, &invite.id_text()).await?;
                    continue;
                }
                // Whoever has the token at hand need not look up its id.
                let name = JoinToken::decode(name).map_or_else(|_| name.clone(), |token| token.id_text());
                let name = name.rsplit('/').next().unwrap_or(&name).to_owned();
                let request = DeleteRequest {
                    kind: Kind::JoinToken.name().to_owned(),
                    namespace: args.namespace.or_default().to_owned(),
                    name: name.clone(),
                    dry_run: false,
                };
                match admin.delete(request).await.map_err(Failure::from) {
                    Ok(_) => output::line(format!("{} revoked", objects::title(Kind::JoinToken, &name))),
                    // The id of an invite, or of nothing: then the first answer tells more.
                    Err(failure) if failure.code() == Some(Code::NotFound) => {
                        cluster::revoke(&mut admin, &name).await.map_err(|_| failure)?;
                    }
                    Err(failure) => return Err(failure),
                }
            }
        }
        Verb::Inspect(args) => inspect(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Discovery's own addresses, and those of gateways that lead to it: first where a host only dials out.
fn endpoints(mesh: &MeshResponse, outbound_only: bool) -> Vec<String> {
    let (own, through) = (&mesh.endpoints, &mesh.gateway_endpoints);
    let (first, then) = if outbound_only {
        (through, own)
    } else {
        (own, through)
    };
    let mut all: Vec<String> = Vec::new();
    for endpoint in first.iter().chain(then) {
        if !all.contains(endpoint) && all.len() < ENDPOINTS_MAX {
            all.push(endpoint.clone());
        }
    }
    all
}

/// A token with a new secret.
fn fresh(mesh: &MeshResponse, endpoints: Vec<String>) -> Result<JoinToken, Failure> {
    let random = |buffer: &mut [u8]| {
        let filled = rand::rngs::SysRng.try_fill_bytes(buffer);
        filled.map_err(|error| Failure::plain(format!("the operating system gives no randomness: {error}")))
    };
    let broken = |what: &str| Failure::plain(format!("discovery sent {what} that cannot be used"));
    let (mut id, mut seed) = ([0; 16], Zeroizing::new([0; 32]));
    random(&mut id)?;
    random(&mut *seed)?;
    Ok(JoinToken {
        id,
        root_pin: mesh.root_pin.as_slice().try_into().map_err(|_| broken("a pin"))?,
        seed,
        trust_domain: mesh.trust_domain.parse().map_err(|_| broken("a trust domain"))?,
        endpoints,
    })
}

/// The token, and the object with its public half.
fn make(
    args: &Create,
    mesh: &MeshResponse,
    outbound_only: bool,
    now_unix_ms: i64,
) -> Result<(JoinToken, Object<JoinTokenSpec>), Failure> {
    let token = fresh(mesh, endpoints(mesh, outbound_only))?;
    let life = i64::try_from(args.ttl.unwrap_or(JOIN_TTL).as_millis()).unwrap_or(i64::MAX);
    let spec = JoinTokenSpec {
        public_key: STANDARD.encode(JoinKey::from_seed(&token.seed).public_key()),
        workload_group: args.workload_group.clone().unwrap_or_default(),
        uses: args.uses,
        expires: tombolo_config::rfc3339(now_unix_ms.saturating_add(life)),
        cidr: args.cidr.iter().map(ToString::to_string).collect(),
    };
    let metadata = Metadata::named(args.namespace.or_default(), token.id_text());
    Ok((token, Object::<JoinTokenSpec>::new(metadata, spec)))
}

async fn create(args: &Create, admin: &mut Admin) -> Result<(), Failure> {
    let group = args.workload_group.as_deref().unwrap_or_default();
    let namespace = args.namespace.or_default();
    let found = objects::get(admin, Kind::WorkloadGroup, namespace, group).await;
    let found = found.map_err(|failure| {
        match failure.code() {
            Some(Code::NotFound) => {
                // Its own words: they name the group that was probably meant.
                let missing = match &failure {
                    Failure::Problem(problem) => problem.cause.as_str(),
                    Failure::Plain { text, .. } => text.as_str(),
                };
                let cause =
                    format!("{missing}; tombolo workload-group create {group} -n {namespace} makes it");
                Failure::coded(Code::NotFound, cause)
            }
            _ => failure,
        }
    })?;
    let reach = found["metadata"]["annotations"][annotation::REACH].as_str();
    let mesh = admin.mesh(MeshRequest {}).await?.into_inner();
    let (token, object) = make(args, &mesh, reach == Some("outbound"), host::now_unix_ms())?;
    let expires = object.spec.expires.clone();
    objects::apply(admin, &[object.into()], false, true).await?;
    let members = format!("{namespace}/{group}");
    let made = Made {
        token,
        namespace,
        group,
        expires: &expires,
    };
    made.print(args, &members, join_command)
}

/// A token of gateways: discovery writes the group and the token.
async fn gateway(args: &Create, admin: &mut Admin) -> Result<(), Failure> {
    let mesh = admin.mesh(MeshRequest {}).await?.into_inner();
    let token = fresh(&mesh, endpoints(&mesh, false))?;
    let life = args.ttl.unwrap_or(JOIN_TTL);
    let request = CreateGatewayTokenRequest {
        network: args.network.clone().unwrap_or_default(),
        token_id: token.id.to_vec(),
        public_key: JoinKey::from_seed(&token.seed).public_key().to_vec(),
        uses: args.uses,
        ttl_seconds: i64::try_from(life.as_secs()).unwrap_or(i64::MAX),
        cidr: args.cidr.iter().map(ToString::to_string).collect(),
    };
    let answer = admin.create_gateway_token(request).await?.into_inner();
    let stored = answer.token.as_ref().map(objects::json).transpose()?;
    let stored = stored.unwrap_or_default();
    let network = match args.network.as_deref().unwrap_or_default() {
        "" => "gateways of discovery's network".to_owned(),
        network => format!("gateways of network {network}"),
    };
    let made = Made {
        token,
        namespace: &answer.namespace,
        group: &answer.workload_group,
        expires: objects::at(&stored, "/spec/expires"),
    };
    made.print(args, &network, gateway_command)
}

/// A token that was made, to be shown once.
struct Made<'a> {
    token: JoinToken,
    namespace: &'a str,
    group: &'a str,
    expires: &'a str,
}

impl Made<'_> {
    fn print(
        self,
        args: &Create,
        members: &str,
        command: fn(&Create, &str) -> Zeroizing<String>,
    ) -> Result<(), Failure> {
        let Self {
            token,
            namespace,
            group,
            expires,
        } = self;
        let encoded = token.encode();
        // Made and readable back: what is printed works.
        if JoinToken::decode(&encoded).is_err() {
            return Err(Failure::plain(
                "discovery advertises endpoints that do not fit into a token",
            ));
        }
        let command = command(args, &encoded);
        match args.output.format() {
            format @ (Format::Json | Format::Yaml) => output::value(
                format,
                &json!({
                    "id": token.id_text(), "token": *encoded, "namespace": namespace, "workloadGroup": group,
                    "uses": args.uses, "expires": expires, "endpoints": token.endpoints, "joinCommand": *command,
                }),
            )?,
            Format::Name => output::line(objects::title(Kind::JoinToken, &token.id_text())),
            Format::Table | Format::Wide if args.print_join_command => output::line(&*command),
            Format::Table | Format::Wide => {
                output::line(&*encoded);
                let uses = if args.uses == 1 {
                    "1 host".to_owned()
                } else {
                    format!("{} hosts", args.uses)
                };
                eprintln!("For {uses} of {members}, until {expires}. It is not shown again.");
            }
        }
        Ok(())
    }
}

/// The address is the operator's to know; the token goes by standard input.
fn gateway_command(_: &Create, token: &str) -> Zeroizing<String> {
    Zeroizing::new(format!(
        "sudo tombolo-gateway join --address HOST:443 --token-file - <<'TOKEN'\n{token}\nTOKEN"
    ))
}

/// A token that lives long or for many is never put into an argument: those are seen by everybody on a host.
fn join_command(args: &Create, token: &str) -> Zeroizing<String> {
    Zeroizing::new(
        if args.uses == 1 && args.ttl.unwrap_or(JOIN_TTL) <= ARGUMENT_TTL_MAX {
            format!("sudo tombolo up {token}")
        } else {
            format!("sudo tombolo up - <<'TOKEN'\n{token}\nTOKEN")
        },
    )
}

async fn bearer(args: &Create, admin: &mut Admin) -> Result<(), Failure> {
    let request = CreateBearerRequest {
        namespace: args.namespace.or_default().to_owned(),
        service_account: args.service_account.clone().unwrap_or_default(),
        ttl_seconds: i64::try_from(args.ttl.unwrap_or(BEARER_TTL).as_secs()).unwrap_or(i64::MAX),
        all_roots: args.all_roots,
    };
    let answer = admin.create_bearer(request).await?.into_inner();
    let expires = text::time(answer.expires_unix_ms);
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            output::value(format, &json!({"token": answer.token, "expires": expires}))
        }
        Format::Table | Format::Wide | Format::Name => {
            // No line end within a file that a client sends verbatim as a header.
            output::print(&answer.token);
            eprintln!("\nUntil {expires}. It is not shown again.");
            if args.all_roots {
                eprintln!(
                    "Whoever uses it believes every member cluster about every identity, those of this trust domain too."
                );
            }
            Ok(())
        }
    }
}

async fn list(args: &List, admin: &mut Admin) -> Result<(), Failure> {
    let found = objects::list(admin, Kind::JoinToken, args.namespaces.filter()).await?;
    // Invites are of the mesh, not of a namespace.
    let invites = cluster::invites(admin).await?;
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let invites: Vec<_> = invites.iter().map(cluster::invite_value).collect();
            output::value(
                format,
                &json!({"apiVersion": "v1", "kind": "List", "items": found, "invites": invites}),
            )?;
        }
        Format::Name => {
            found.iter().for_each(|t| {
                output::line(objects::title(Kind::JoinToken, objects::at(t, "/metadata/name")))
            });
        }
        format @ (Format::Table | Format::Wide) => {
            let all = args.namespaces.is_all();
            output::print(
                &objects::table(Kind::JoinToken, &found, all, format == Format::Wide, false).render(),
            );
            output::print(&cluster::invite_table(&invites, host::now_unix_ms()));
        }
    }
    Ok(())
}

fn inspect(args: &Inspect) -> Result<(), Failure> {
    let text = if args.token == "-" {
        let mut text = Zeroizing::new(String::new());
        let read = std::io::Read::read_to_string(&mut std::io::stdin(), &mut text);
        read.map_err(|error| Failure::plain(format!("standard input: {error}")))?;
        text
    } else {
        Zeroizing::new(args.token.clone())
    };
    if let Ok(invite) = InviteToken::decode(&text) {
        return cluster::inspect(&invite, args.output.format());
    }
    let token = JoinToken::decode(&text).map_err(|error| Failure::coded(Code::TokenMalformed, error))?;
    let pin: String = token.root_pin.iter().map(|byte| format!("{byte:02x}")).collect();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => output::value(
            format,
            &json!({"id": token.id_text(), "trustDomain": token.trust_domain.as_str(), "endpoints": token.endpoints, "rootPin": pin}),
        )?,
        Format::Table | Format::Wide | Format::Name => {
            output::line(format!("Id:            {}", token.id_text()));
            output::line(format!("Trust domain:  {}", token.trust_domain));
            output::line(format!("Endpoints:     {}", token.endpoints.join(", ")));
            output::line(format!("Pin of root:   sha256:{pin}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    fn args(line: &str) -> Create {
        let Verb::Create(create) = Line::parse_from(format!("token create {line}").split_whitespace()).verb
        else {
            panic!("not create: {line}")
        };
        create
    }

    fn mesh() -> MeshResponse {
        MeshResponse {
            trust_domain: "mesh.example".into(),
            endpoints: vec!["d.example:15012".into()],
            root_pin: vec![7; 32],
            ..Default::default()
        }
    }

    #[test]
    fn the_object_has_only_the_public_half() {
        let args = args("-n shop --workload-group catalog --ttl 1h --uses 3 --cidr 10.0.0.0/8,2001:db8::/32");
        let (token, object) = make(&args, &mesh(), false, 0).unwrap();
        let (again, _) = make(&args, &mesh(), false, 0).unwrap();
        assert!(
            token.seed != again.seed && token.id != again.id,
            "each token is its own"
        );
        let JoinTokenSpec {
            public_key,
            workload_group,
            uses,
            expires,
            cidr,
        } = &object.spec;
        assert_eq!(
            (workload_group.as_str(), *uses, expires.as_str()),
            ("catalog", 3, "1970-01-01T01:00:00Z")
        );
        assert_eq!(cidr, &["10.0.0.0/8", "2001:db8::/32"]);
        assert_eq!(
            (object.metadata.name.as_str(), object.metadata.namespace.as_str()),
            (&*token.id_text(), "shop")
        );
        let written = tombolo_config::Resource::from(object.clone())
            .to_json()
            .to_string();
        assert!(!written.contains(&STANDARD.encode(*token.seed)));
        // Redeeming, as the host and discovery do it.
        let read = JoinToken::decode(&token.encode()).unwrap();
        let signature = JoinKey::from_seed(&read.seed).sign(b"proof");
        let public = STANDARD.decode(public_key).unwrap();
        tombolo_identity::verify_join_signature(&public, b"proof", &signature).unwrap();
        assert!(tombolo_identity::verify_join_signature(&public, b"other", &signature).is_err());
    }

    #[test]
    fn only_short_lived_single_tokens_stand_in_arguments() {
        for (line, argument) in [
            ("--workload-group a", true),
            ("--workload-group a --ttl 1h", true),
            ("--workload-group a --ttl 61m", false),
            ("--workload-group a --uses 2", false),
        ] {
            let command = join_command(&args(line), "tmb1_x");
            assert_eq!(command.contains("up tmb1_x"), argument, "{line}");
            assert!(
                argument || command.contains("up - <<'TOKEN'\ntmb1_x\nTOKEN"),
                "{}",
                *command
            );
        }
    }

    #[test]
    fn gateways_are_a_way_to_discovery() {
        let mesh = MeshResponse {
            gateway_endpoints: ["gw.example:443", "d.example:15012"].map(String::from).to_vec(),
            ..mesh()
        };
        let args = args("--workload-group a");
        let order = |outbound_only| make(&args, &mesh, outbound_only, 0).unwrap().0.endpoints;
        assert_eq!(order(false), ["d.example:15012", "gw.example:443"]);
        assert_eq!(order(true), ["gw.example:443", "d.example:15012"]);
    }

    #[test]
    fn what_discovery_sends_is_checked() {
        let args = args("--workload-group a");
        for spoil in [
            |m: &mut MeshResponse| m.root_pin.truncate(31),
            |m: &mut MeshResponse| m.trust_domain.clear(),
        ] {
            let mut mesh = mesh();
            spoil(&mut mesh);
            assert!(make(&args, &mesh, false, 0).is_err());
        }
    }
}
