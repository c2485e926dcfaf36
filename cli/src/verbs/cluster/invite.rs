//! Invites: made, shown among the tokens, revoked.

use super::{SHARING, namespaces};
use crate::{
    failure::Failure,
    objects::Admin,
    output::{self, Format, Output, Table},
    text,
};
use rand::TryRng as _;
use serde_json::{Value, json};
use std::time::Duration;
use tombolo_identity::JoinKey;
use tombolo_proto::tombolo::admin::v1::{
    ClusterInvite, CreateClusterInviteRequest, CreateClusterInviteResponse, ListClusterInvitesRequest,
    RevokeClusterInviteRequest,
};
use tombolo_types::InviteToken;
use zeroize::Zeroizing;

/// An invite that may stand in an argument, where everybody on the host can read it.
const ARGUMENT_TTL_MAX: Duration = Duration::from_secs(3600);

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
    /// Life of the invite, for example 30m or 2d; at most 7d.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = text::life)]
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

pub(super) async fn invite(args: &Invite, admin: &mut Admin) -> Result<(), Failure> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        invite: Invite,
    }

    #[test]
    fn discovery_gets_the_public_half_only() {
        let line = "invite east --trust-domain east.example --namespaces shop,bank";
        let args = Line::parse_from(line.split(' ')).invite;
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
}
