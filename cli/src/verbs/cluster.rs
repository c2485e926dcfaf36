//! Other clusters: invite, join, list, status, grant, remove.

mod grant;
mod invite;
mod show;

pub(crate) use invite::{inspect, invite_table, invite_value, invites, revoke};

use crate::{failure::Failure, objects::Admin, output, sockets::Sockets};
use std::{
    io::{self, BufRead as _, IsTerminal as _, Read as _, Write as _},
    path::PathBuf,
    process::ExitCode,
};
use tombolo_proto::tombolo::admin::v1::{JoinClusterRequest, ListClustersRequest, RemoveClusterRequest};
use tombolo_types::{Code, InviteToken};
use zeroize::Zeroizing;

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
    Invite(invite::Invite),
    /// Join the clusters of an invite. What fails is taken back.
    Join(Join),
    /// All clusters of the set and how they are.
    #[command(visible_alias = "ls")]
    List(show::List),
    /// One cluster, or all, with everything that is known.
    Status(show::Status),
    /// Change what a member may do, and the names of its trust domain, without a join.
    Grant(grant::Grant),
    /// End the membership of a cluster, for all: its connections are cut.
    Remove(Remove),
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
        Verb::Invite(args) => invite::invite(&args, &mut admin).await?,
        Verb::Join(args) => join(&args, &mut admin).await?,
        Verb::List(args) => show::list(&args, &mut admin).await?,
        Verb::Status(args) => show::status(&args, &mut admin).await?,
        Verb::Grant(args) => grant::grant(&args, &mut admin).await?,
        Verb::Remove(args) => remove(&args, &mut admin).await?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a person; what is no terminal says it by --yes.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<(), Failure> {
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
    let found = admin
        .list_clusters(ListClustersRequest::default())
        .await?
        .into_inner();
    output::print(&show::table(&found, false, false).render());
    Ok(())
}

fn namespaces(list: &[String]) -> String {
    match list {
        [all] if all == "*" => "every namespace".into(),
        [] => "nothing".into(),
        list => list.join(", "),
    }
}

async fn remove(args: &Remove, admin: &mut Admin) -> Result<(), Failure> {
    let cluster = show::find(admin, &args.cluster).await?;
    let plan = match cluster.state.as_str() {
        "Removed" => {
            output::line(format!(
                "nothing to do: cluster {} was removed before",
                cluster.name
            ));
            return Ok(());
        }
        "Own" => "this cluster leaves the others: what it exports goes there, and what they export goes here"
            .into(),
        "Joining" => "it was admitted and has not come yet: it is not let in any more".into(),
        _ => format!(
            "its {} services go, its roots are withdrawn and its connections cut, in all clusters",
            cluster.imported_services
        ),
    };
    eprintln!(
        "To be removed: cluster {} of {}: {plan}.",
        cluster.name, cluster.trust_domain
    );
    confirm("Remove it?", args.yes)?;
    let request = RemoveClusterRequest {
        cluster: args.cluster.clone(),
    };
    admin.remove_cluster(request).await?;
    output::line(format!("cluster {} removed", args.cluster));
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

    fn parse(line: &str) -> Verb {
        Line::parse_from(format!("cluster {line}").split_whitespace()).verb
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
}
