use crate::{
    failure::Failure,
    objects::Admin,
    output::{self, Format, Output, Table},
    sockets::Sockets,
    text,
};
use rand::TryRng as _;
use serde_json::{Value, json};
use std::{
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};
use tombolo_control_client::host;
use tombolo_identity::JoinKey;
use tombolo_proto::tombolo::admin::v1::{
    Cluster, ClusterInvite, CreateClusterInviteRequest, CreateClusterInviteResponse, JoinClusterRequest,
    ListClusterInvitesRequest, ListClustersRequest, ListClustersResponse, RemoveClusterRequest,
    RevokeClusterInviteRequest,
};
use tombolo_types::{Code, InviteToken};
use zeroize::Zeroizing;

/// An invite that may stand in an argument, where everybody on the host can read it.
const ARGUMENT_TTL_MAX: Duration = Duration::from_secs(3600);
/// Longest text that is read as an invite.
const TOKEN_BYTES_MAX: u64 = 16 << 10;
/// Environment variable.
const VARIABLE: &str = "TOMBOLO_TOKEN";
/// What sharing a trust domain gives away.
const SHARING: &str = "\
Sharing a trust domain gives away: the CA of each of the clusters that share it can then make every identity of all of
them, discovery and gateways included. A policy cannot tell whose identity it is. Whoever takes one CA has them all.
Different trust domains need none of this: policies name the principals of the other one.";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Make an invite for one named cluster.
    Invite(Invite),
    /// Join the clusters of an invite. What fails is taken back.
    Join(Join),
    /// All clusters of the set and how they are.
    #[command(visible_alias = "ls")]
    List(List),
    /// One cluster, or all, with everything that is known.
    Status(Status),
    /// End the membership of a cluster, for all: its connections are cut.
    Remove(Remove),
}

/// Make an invite.
#[derive(Debug, clap::Args)]
pub(crate) struct Invite {
    /// Name of the cluster that is invited.
    #[arg(value_name = "NAME")]
    cluster: String,
    /// Its trust domain.
    #[arg(long, value_name = "DOMAIN")]
    trust_domain: String,
    /// Namespaces whose services it may export; * for every one that is not reserved.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "*")]
    namespaces: Vec<String>,
    /// Life of the invite.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = text::duration)]
    ttl: Duration,
    /// It may invite others itself.
    #[arg(long)]
    may_admit: bool,
    /// Its trust domain is that of another member, and both know what that gives away.
    #[arg(long)]
    share_trust_domain: bool,
    #[command(flatten)]
    output: Output,
}

/// Join the clusters of an invite.
///
/// The invite is an argument, `-` (standard input), --token-file or the variable TOMBOLO_TOKEN. Arguments can be read
/// by everybody on the host: use them for invites of an hour at most.
#[derive(Debug, clap::Args)]
pub(crate) struct Join {
    /// The invite, or - for standard input.
    #[arg(value_name = "TOKEN", conflicts_with = "token_file")]
    token: Option<String>,
    /// File with the invite.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
    /// The trust domain is that of another member, and both know what that gives away.
    #[arg(long)]
    share_trust_domain: bool,
}

/// All clusters.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    /// Removed ones too.
    #[arg(long)]
    removed: bool,
    #[command(flatten)]
    output: Output,
}

/// One cluster, or all.
#[derive(Debug, clap::Args)]
pub(crate) struct Status {
    /// Which; all unless given.
    #[arg(value_name = "NAME")]
    cluster: Option<String>,
    #[command(flatten)]
    output: Output,
}

/// End a membership.
#[derive(Debug, clap::Args)]
pub(crate) struct Remove {
    /// Which.
    #[arg(value_name = "NAME")]
    cluster: String,
    /// Do not ask for confirmation.
    #[arg(long)]
    yes: bool,
}

pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let mut admin = sockets.admin().await?;
    match verb {
        Verb::Invite(args) => invite(&args, &mut admin).await?,
        Verb::Join(args) => join(&args, &mut admin).await?,
        Verb::List(args) => list(&args, &mut admin).await?,
        Verb::Status(args) => status(&args, &mut admin).await?,
        Verb::Remove(args) => remove(&args, &mut admin).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a person; what is no terminal says it by --yes.
fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::plain(
            "nothing was changed: this asks for confirmation, and there is no terminal; add --yes",
        ));
    }
    eprint!("{question} [y/N] ");
    let _ = io::stderr().flush();
    let mut answer = String::new();
    let read = io::stdin().lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::plain("nothing was changed"))
    }
}

/// The key of a new invite, which stays here, and what discovery is told.
fn make(args: &Invite) -> Result<(Zeroizing<[u8; 32]>, CreateClusterInviteRequest), Failure> {
    let random = |buffer: &mut [u8]| {
        let filled = rand::rngs::SysRng.try_fill_bytes(buffer);
        filled.map_err(|error| Failure::plain(format!("the operating system gives no randomness: {error}")))
    };
    let (mut id, mut seed) = ([0; 16], Zeroizing::new([0; 32]));
    random(&mut id)?;
    random(&mut *seed)?;
    let request = CreateClusterInviteRequest {
        invite_id: id.to_vec(),
        public_key: JoinKey::from_seed(&seed).public_key().to_vec(),
        cluster: args.cluster.clone(),
        trust_domain: args.trust_domain.clone(),
        namespaces: args.namespaces.clone(),
        ttl_seconds: i64::try_from(args.ttl.as_secs()).unwrap_or(i64::MAX),
        may_admit: args.may_admit,
        share_trust_domain: args.share_trust_domain,
        dry_run: false,
    };
    Ok((seed, request))
}

fn token(
    request: &CreateClusterInviteRequest,
    seed: Zeroizing<[u8; 32]>,
    made: &CreateClusterInviteResponse,
) -> Result<Zeroizing<String>, Failure> {
    let broken = |what: &str| Failure::plain(format!("discovery sent {what} that cannot be used"));
    let token = InviteToken {
        id: request
            .invite_id
            .as_slice()
            .try_into()
            .map_err(|_| broken("an id"))?,
        root_pin: made.root_pin.as_slice().try_into().map_err(|_| broken("a pin"))?,
        seed,
        trust_domain: made.trust_domain.parse().map_err(|_| broken("a trust domain"))?,
        cluster: request.cluster.clone(),
        endpoints: made.endpoints.clone(),
    };
    let encoded = token.encode();
    // Readable back: what is printed works.
    InviteToken::decode(&encoded).map_err(|_| broken("endpoints"))?;
    Ok(encoded)
}

async fn invite(args: &Invite, admin: &mut Admin) -> Result<(), Failure> {
    if args.share_trust_domain {
        eprintln!("{SHARING}");
    }
    let (seed, request) = make(args)?;
    let made = admin.create_cluster_invite(request.clone()).await?.into_inner();
    let encoded = token(&request, seed, &made)?;
    let share = if args.share_trust_domain {
        " --share-trust-domain"
    } else {
        ""
    };
    let command = if args.ttl <= ARGUMENT_TTL_MAX {
        format!("tombolo cluster join{share} {}", *encoded)
    } else {
        format!(
            "tombolo cluster join{share} --yes - <<'TOKEN'\n{}\nTOKEN",
            *encoded
        )
    };
    let command = Zeroizing::new(command);
    let expires = text::time(made.expires_unix_ms);
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => output::value(
            format,
            &json!({
                "token": *encoded, "cluster": args.cluster, "trustDomain": args.trust_domain,
                "namespaces": args.namespaces, "expires": expires, "endpoints": made.endpoints,
                "joinCommand": *command,
            }),
        )?,
        Format::Table | Format::Wide | Format::Name => {
            output::line(&*encoded);
            eprintln!(
                "For cluster {} of {}, once, until {expires}. It is not shown again.\nThere: {}",
                args.cluster,
                args.trust_domain,
                command.replace(&**encoded, "TOKEN"),
            );
        }
    }
    Ok(())
}

/// The text of the invite, by the first way that has one, and whether it stood in an argument.
fn source(
    args: &Join,
    env: impl Fn(&str) -> Option<String>,
    stdin: &mut dyn io::Read,
) -> Result<(Zeroizing<String>, bool), Failure> {
    let mut text = Zeroizing::new(String::new());
    if let Some(path) = &args.token_file {
        let failed = |error: io::Error| Failure::plain(format!("{}: {error}", path.display()));
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(TOKEN_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(failed)?;
        return Ok((text, false));
    }
    match args.token.as_deref() {
        Some("-") => {
            let read = stdin.take(TOKEN_BYTES_MAX).read_to_string(&mut text);
            read.map_err(|error| Failure::plain(format!("standard input: {error}")))?;
            Ok((text, false))
        }
        Some(token) => Ok((Zeroizing::new(token.to_owned()), true)),
        None => match env(VARIABLE).filter(|token| !token.is_empty()) {
            Some(token) => Ok((Zeroizing::new(token), false)),
            None => Err(Failure::usage(
                "no invite was given: as an argument, -, --token-file or TOMBOLO_TOKEN",
            )),
        },
    }
}

async fn join(args: &Join, admin: &mut Admin) -> Result<(), Failure> {
    let (text, from_argument) = source(args, |name| std::env::var(name).ok(), &mut io::stdin())?;
    let token = InviteToken::decode(&text).map_err(|error| Failure::coded(Code::InviteMalformed, error))?;
    if args.share_trust_domain {
        output::line(SHARING);
    }
    let request = JoinClusterRequest {
        token: token.encode().to_string(),
        share_trust_domain: args.share_trust_domain,
        dry_run: true,
        from_argument,
    };
    let plan = admin.join_cluster(request.clone()).await?.into_inner();
    output::line(format!(
        "Cluster {} ({}) joins the clusters of {} at {}.",
        plan.cluster,
        plan.trust_domain,
        plan.inviter_trust_domain,
        plan.endpoints.join(", ")
    ));
    output::line(
        "Services marked for export are then callable in all of them, and their roots are believed for",
    );
    output::line("identities of their own trust domains. tombolo cluster remove ends it.");
    confirm("Join?", args.yes)?;
    let request = JoinClusterRequest {
        dry_run: false,
        ..request
    };
    let joined = admin.join_cluster(request).await?.into_inner();
    output::line(format!(
        "Joined: {} admitted {}, which may export {}.",
        joined.inviter,
        joined.cluster,
        namespaces(&joined.namespaces)
    ));
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    output::print(&table(&found, false, false).render());
    Ok(())
}

fn namespaces(list: &[String]) -> String {
    match list {
        [all] if all == "*" => "every namespace".into(),
        [] => "nothing".into(),
        list => list.join(", "),
    }
}

async fn list(args: &List, admin: &mut Admin) -> Result<(), Failure> {
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let shown = found
                .clusters
                .iter()
                .filter(|c| args.removed || c.state != "Removed");
            output::value(format, &json!({"clusters": shown.map(value).collect::<Vec<_>>()}))?;
        }
        Format::Name => found.clusters.iter().for_each(|c| output::line(&c.name)),
        format @ (Format::Table | Format::Wide) => {
            output::print(&table(&found, format == Format::Wide, args.removed).render());
        }
    }
    Ok(())
}

async fn status(args: &Status, admin: &mut Admin) -> Result<(), Failure> {
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    let wanted = |cluster: &&Cluster| args.cluster.as_ref().is_none_or(|name| *name == cluster.name);
    let shown: Vec<&Cluster> = found.clusters.iter().filter(wanted).collect();
    if let (Some(name), true) = (&args.cluster, shown.is_empty()) {
        return Err(Failure::coded(
            Code::MemberUnknown,
            format!("{name}; tombolo cluster list names them"),
        ));
    }
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let clusters: Vec<Value> = shown.into_iter().map(value).collect();
            output::value(
                format,
                &json!({"cluster": found.cluster, "exportedServices": found.exported_services,
                        "exportsVersion": found.seq, "clusters": clusters}),
            )?;
        }
        Format::Name => shown.iter().for_each(|c| output::line(&c.name)),
        Format::Table | Format::Wide => {
            let described: Vec<String> = shown
                .iter()
                .map(|cluster| described(cluster, &found, host::now_unix_ms()))
                .collect();
            output::print(&described.join("\n"));
        }
    }
    Ok(())
}

async fn remove(args: &Remove, admin: &mut Admin) -> Result<(), Failure> {
    let found = admin.list_clusters(ListClustersRequest {}).await?.into_inner();
    if let Some(cluster) = found.clusters.iter().find(|c| c.name == args.cluster) {
        let own = if cluster.state == "Own" {
            " (this cluster itself)"
        } else {
            ""
        };
        eprintln!(
            "Cluster {}{own} of {}: its {} services go, its roots are withdrawn and its connections cut, in all clusters.",
            cluster.name, cluster.trust_domain, cluster.imported_services
        );
    }
    confirm("Remove it?", args.yes)?;
    let request = RemoveClusterRequest {
        cluster: args.cluster.clone(),
    };
    admin.remove_cluster(request).await?;
    output::line(format!("cluster {} removed", args.cluster));
    Ok(())
}

/// For `tombolo token revoke`.
pub(crate) async fn revoke(admin: &mut Admin, id: &str) -> Result<(), Failure> {
    let request = RevokeClusterInviteRequest { id: id.to_owned() };
    admin.revoke_cluster_invite(request).await?;
    output::line(format!("invite {id} revoked"));
    Ok(())
}

/// For `tombolo token inspect`.
pub(crate) fn inspect(invite: &InviteToken, format: Format) -> Result<(), Failure> {
    let pin: String = invite.root_pin.iter().map(|byte| format!("{byte:02x}")).collect();
    if matches!(format, Format::Json | Format::Yaml) {
        return output::value(
            format,
            &json!({"id": invite.id_text(), "cluster": invite.cluster, "endpoints": invite.endpoints,
                    "trustDomain": invite.trust_domain.as_str(), "rootPin": pin}),
        );
    }
    output::line(format!("Invite:        {}", invite.id_text()));
    output::line(format!("For cluster:   {}", invite.cluster));
    output::line(format!("Trust domain:  {} (of the inviter)", invite.trust_domain));
    output::line(format!("Endpoints:     {}", invite.endpoints.join(", ")));
    output::line(format!("Pin of root:   sha256:{pin}"));
    Ok(())
}

/// The invites, for `tombolo token list`.
pub(crate) async fn invites(admin: &mut Admin) -> Result<Vec<ClusterInvite>, Failure> {
    let request = ListClusterInvitesRequest {};
    Ok(admin.list_cluster_invites(request).await?.into_inner().invites)
}

/// Invites as a table; empty text if there is none.
pub(crate) fn invite_table(invites: &[ClusterInvite], now_unix_ms: i64) -> String {
    if invites.is_empty() {
        return String::new();
    }
    let mut table = Table::new(&["INVITE", "CLUSTER", "TRUST DOMAIN", "EXPORTS", "USED", "EXPIRES"]);
    for invite in invites {
        table.row(vec![
            invite.id.clone(),
            invite.cluster.clone(),
            invite.trust_domain.clone(),
            namespaces(&invite.namespaces),
            if invite.used { "yes" } else { "no" }.into(),
            text::relative(invite.expires_unix_ms, now_unix_ms),
        ]);
    }
    format!("\n{}", table.render())
}

/// An invite as JSON.
pub(crate) fn invite_value(invite: &ClusterInvite) -> Value {
    json!({
        "id": invite.id, "cluster": invite.cluster, "trustDomain": invite.trust_domain,
        "namespaces": invite.namespaces, "expires": text::time(invite.expires_unix_ms), "used": invite.used,
        "createdBy": invite.created_by, "mayAdmit": invite.may_admit,
        "shareTrustDomain": invite.share_trust_domain,
    })
}

fn heard(cluster: &Cluster, now_unix_ms: i64) -> String {
    match cluster.last_heard_unix_ms {
        _ if cluster.state == "Own" => "-".into(),
        0 => "never".into(),
        at => text::relative(at.min(now_unix_ms), now_unix_ms),
    }
}

fn table(found: &ListClustersResponse, wide: bool, removed: bool) -> Table {
    let mut header = vec!["NAME", "TRUST DOMAIN", "STATE", "HEARD", "SERVICES", "GATEWAYS"];
    if wide {
        header.extend(["EXPORTS", "ADMITTED BY", "MAY ADMIT", "ENDPOINTS", "REFUSED"]);
    }
    let mut table = Table::new(&header);
    let now = host::now_unix_ms();
    for cluster in found.clusters.iter().filter(|c| removed || c.state != "Removed") {
        let services = if cluster.state == "Own" {
            found.exported_services
        } else {
            cluster.imported_services
        };
        let mut cells = vec![
            cluster.name.clone(),
            cluster.trust_domain.clone(),
            cluster.state.clone(),
            heard(cluster, now),
            services.to_string(),
            cluster.gateways.to_string(),
        ];
        if wide {
            let refused: u64 = cluster.refused.iter().map(|refused| refused.count).sum();
            cells.extend([
                namespaces(&cluster.namespaces),
                cluster.admitted_by.clone(),
                if cluster.may_admit { "yes" } else { "no" }.into(),
                cluster.endpoints.join(","),
                refused.to_string(),
            ]);
        }
        table.row(cells);
    }
    table
}

fn value(cluster: &Cluster) -> Value {
    let refused = cluster.refused.iter().map(|refused| {
        json!({"message": refused.message, "last": text::time(refused.last_unix_ms), "count": refused.count})
    });
    json!({
        "name": cluster.name, "trustDomain": cluster.trust_domain, "state": cluster.state, "reason": cluster.reason,
        "connected": cluster.connected,
        "lastHeard": (cluster.last_heard_unix_ms > 0).then(|| text::time(cluster.last_heard_unix_ms)),
        "importedServices": cluster.imported_services, "gateways": cluster.gateways, "exportsVersion": cluster.seq,
        "namespaces": cluster.namespaces, "mayAdmit": cluster.may_admit,
        "shareTrustDomain": cluster.share_trust_domain, "admittedBy": cluster.admitted_by,
        "endpoints": cluster.endpoints, "incarnation": cluster.incarnation, "recordVersion": cluster.record_version,
        "refused": refused.collect::<Vec<_>>(),
    })
}

fn described(cluster: &Cluster, found: &ListClustersResponse, now_unix_ms: i64) -> String {
    let own = cluster.state == "Own";
    let services = if own {
        format!("{} exported, version {}", found.exported_services, found.seq)
    } else {
        format!(
            "{} imported, version {}; {} gateways",
            cluster.imported_services, cluster.seq, cluster.gateways
        )
    };
    let yes = |flag: bool| if flag { "yes" } else { "no" }.to_owned();
    let mut fields = vec![
        ("Name", cluster.name.clone()),
        ("Trust domain", cluster.trust_domain.clone()),
        ("State", cluster.state.clone()),
    ];
    if !cluster.reason.is_empty() {
        fields.push(("Reason", cluster.reason.clone()));
    }
    if !own {
        fields.push(("Connected", yes(cluster.connected)));
        fields.push(("Last heard", heard(cluster, now_unix_ms)));
    }
    fields.extend([
        ("Services", services),
        ("May export", namespaces(&cluster.namespaces)),
        ("May admit", yes(cluster.may_admit)),
        ("Admitted by", cluster.admitted_by.clone()),
        (
            "Record",
            format!(
                "incarnation {}, version {}",
                cluster.incarnation, cluster.record_version
            ),
        ),
        ("Endpoints", cluster.endpoints.join(", ")),
    ]);
    let mut shown: String = fields
        .iter()
        .map(|(name, value)| format!("{:<14}{value}\n", format!("{name}:")))
        .collect();
    if !cluster.refused.is_empty() {
        shown.push_str("Refused since discovery started:\n");
        for refused in &cluster.refused {
            let line = format!(
                "{} times, last {}: {}",
                refused.count,
                text::relative(refused.last_unix_ms, now_unix_ms),
                refused.message
            );
            shown.push_str(&text::indented(&format!("{line}\n"), 2));
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use tombolo_proto::tombolo::admin::v1::RefusedStatement;

    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    fn parse(line: &str) -> Verb {
        Line::parse_from(format!("cluster {line}").split_whitespace()).verb
    }

    #[test]
    fn discovery_gets_the_public_half_only() {
        let Verb::Invite(args) = parse("invite east --trust-domain east.example --namespaces shop,bank")
        else {
            panic!("not invite")
        };
        let (seed, request) = make(&args).unwrap();
        assert_eq!(request.namespaces, ["shop", "bank"]);
        assert_eq!(request.ttl_seconds, 3600);
        assert_ne!(request.public_key.as_slice(), seed.as_slice());
        let made = CreateClusterInviteResponse {
            trust_domain: "west.example".into(),
            root_pin: vec![7; 32],
            endpoints: vec!["w.example:443".into()],
            ..Default::default()
        };
        let text = token(&request, seed.clone(), &made).unwrap();
        let read = InviteToken::decode(&text).unwrap();
        assert_eq!((read.cluster.as_str(), &*read.seed), ("east", &*seed));
        let short = CreateClusterInviteResponse {
            root_pin: vec![7; 31],
            ..made
        };
        assert!(token(&request, seed, &short).is_err());
    }

    #[test]
    fn where_an_invite_comes_from() {
        let Verb::Join(join) = parse("join tmi1_x") else {
            panic!("not join")
        };
        let none = |_: &str| None;
        let (text, argument) = source(&join, none, &mut io::empty()).unwrap();
        assert_eq!((text.as_str(), argument), ("tmi1_x", true));
        let Verb::Join(join) = parse("join -") else {
            panic!("not join")
        };
        let (text, argument) = source(&join, none, &mut &b"tmi1_y"[..]).unwrap();
        assert_eq!((text.as_str(), argument), ("tmi1_y", false));
        let Verb::Join(join) = parse("join --yes") else {
            panic!("not join")
        };
        let from_env = |name: &str| (name == VARIABLE).then(|| "tmi1_z".to_owned());
        let (text, argument) = source(&join, from_env, &mut io::empty()).unwrap();
        assert_eq!((text.as_str(), argument), ("tmi1_z", false));
        assert!(source(&join, none, &mut io::empty()).is_err());
    }

    #[test]
    fn a_stale_member_at_a_glance() {
        let east = Cluster {
            name: "east".into(),
            trust_domain: "east.example".into(),
            state: "Stale".into(),
            reason: "TMB0724 x".into(),
            last_heard_unix_ms: 1000,
            imported_services: 7,
            namespaces: vec!["*".into()],
            refused: vec![RefusedStatement {
                message: "TMB0716 y".into(),
                last_unix_ms: 1000,
                count: 3,
            }],
            ..Default::default()
        };
        let found = ListClustersResponse {
            cluster: "west".into(),
            clusters: vec![east.clone()],
            ..Default::default()
        };
        let text = described(&east, &found, 61_000);
        for part in [
            "Stale",
            "TMB0724",
            "7 imported",
            "every namespace",
            "3 times",
            "TMB0716 y",
            "ago",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(table(&found, false, false).render().contains("Stale"));
    }
}
