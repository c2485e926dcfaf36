//! Other clusters: invite, join, list, remove; and the roots that are believed.

use super::{AdminService, Call};
use crate::{
    audit::sha256,
    federation::{ClusterInvite, JoinOptions, Shown, ShownMember},
    refusal::Refusal,
    roles::{Thing, Verb},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use std::collections::BTreeSet;
use tombolo_federation::{Grant, Joining, NameChange, Standing};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_types::{Code, InviteToken, TrustDomain, check_label};

/// Life of an invite that names none.
const TTL_DEFAULT_SECONDS: i64 = 3600;
/// Longest life of an invite.
const TTL_MAX_SECONDS: i64 = 7 * 24 * 3600;

fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(100).collect()
}

impl AdminService {
    pub(super) async fn create_invite(
        &self,
        call: &Call,
        request: &pb::CreateClusterInviteRequest,
    ) -> Result<pb::CreateClusterInviteResponse, Refusal> {
        let object = format!("ClusterInvite for {}", shortened(&request.cluster));
        self.authorize(call, Verb::Create, Thing::Cluster, None, &object)?;
        let made = self.invite_checked(call, request).await;
        if !request.dry_run || made.is_err() {
            let after = made.as_ref().ok().map(|(_, digest)| digest.clone());
            let result = made.as_ref().map(|_| ()).map_err(|refusal| refusal as &Refusal);
            self.record(call, "create", &object, (None, after), result);
        }
        let (expires_unix_ms, _) = made?;
        let mesh = &self.context.mesh;
        let shown = self.context.federation.show().await?;
        Ok(pb::CreateClusterInviteResponse {
            expires_unix_ms,
            endpoints: shown.endpoints,
            root_pin: mesh.trust.authority().root_pin().to_vec(),
            trust_domain: mesh.settings.trust_domain.to_string(),
            cluster: shown.own,
        })
    }

    async fn invite_checked(
        &self,
        call: &Call,
        request: &pb::CreateClusterInviteRequest,
    ) -> Result<(i64, String), Refusal> {
        check_label("cluster", &request.cluster).map_err(Refusal::invalid)?;
        let trust_domain: TrustDomain = request.trust_domain.parse().map_err(Refusal::invalid)?;
        let id: [u8; 16] = request
            .invite_id
            .as_slice()
            .try_into()
            .map_err(|_| Refusal::invalid("an invite id is 16 bytes"))?;
        if request.public_key.len() != 32 {
            return Err(Refusal::invalid("the key of an invite is 32 bytes"));
        }
        if request.namespaces.is_empty() {
            return Err(Refusal::invalid("name the namespaces that it may export, or *"));
        }
        Grant::from_list(request.namespaces.iter().map(String::as_str))?;
        let ttl = match request.ttl_seconds {
            0 => TTL_DEFAULT_SECONDS,
            ttl if (1..=TTL_MAX_SECONDS).contains(&ttl) => ttl,
            _ => return Err(Refusal::invalid("an invite lives at most 7 days")),
        };
        let expires_unix_ms = jiff::Timestamp::now().as_millisecond() + ttl * 1000;
        let invite = ClusterInvite {
            public_key: STANDARD.encode(&request.public_key),
            cluster: request.cluster.clone(),
            trust_domain: trust_domain.to_string(),
            namespaces: request.namespaces.clone(),
            may_admit: request.may_admit,
            share_trust_domain: request.share_trust_domain,
            expires_unix_ms,
            created_by: call.caller.to_string(),
            used_by: None,
        };
        let digest = sha256(&serde_json::to_vec(&invite).unwrap_or_default());
        self.context
            .federation
            .invite(id, invite, request.dry_run)
            .await?;
        Ok((expires_unix_ms, digest))
    }

    pub(super) async fn invites(&self, call: &Call) -> Result<pb::ListClusterInvitesResponse, Refusal> {
        self.authorize(call, Verb::Read, Thing::Cluster, None, "ClusterInvite *")?;
        let invites = self.context.federation.invites().await?;
        let shown = |(id, invite): (String, ClusterInvite)| pb::ClusterInvite {
            id,
            cluster: invite.cluster,
            trust_domain: invite.trust_domain,
            namespaces: invite.namespaces,
            expires_unix_ms: invite.expires_unix_ms,
            used: invite.used_by.is_some(),
            created_by: invite.created_by,
            may_admit: invite.may_admit,
            share_trust_domain: invite.share_trust_domain,
        };
        Ok(pb::ListClusterInvitesResponse {
            invites: invites.into_iter().map(shown).collect(),
        })
    }

    pub(super) async fn revoke_invite(&self, call: &Call, id: &str) -> Result<(), Refusal> {
        let object = format!("ClusterInvite {}", shortened(id));
        self.authorize(call, Verb::Delete, Thing::Cluster, None, &object)?;
        let result = self.context.federation.revoke_invite(id.to_owned()).await;
        self.record(
            call,
            "delete",
            &object,
            (None, None),
            result.as_ref().map(|&()| ()),
        );
        result
    }

    pub(super) async fn join(
        &self,
        call: &Call,
        request: pb::JoinClusterRequest,
    ) -> Result<pb::JoinClusterResponse, Refusal> {
        self.authorize(call, Verb::Create, Thing::Cluster, None, "Cluster (join)")?;
        let token = zeroize::Zeroizing::new(request.token);
        let token =
            InviteToken::decode(&token).map_err(|error| Refusal::new(Code::InviteMalformed, error))?;
        let settings = &self.context.mesh.settings;
        let shown = self.context.federation.show().await?;
        let object = format!("Cluster of {} by invite {}", token.trust_domain, token.id_text());
        let plan = check_join(&token, &shown, request.share_trust_domain);
        let mut response = pb::JoinClusterResponse {
            cluster: shown.own.clone(),
            trust_domain: settings.trust_domain.to_string(),
            inviter_trust_domain: token.trust_domain.to_string(),
            endpoints: token.endpoints.clone(),
            ..Default::default()
        };
        if let Err(refusal) = plan {
            self.record(call, "join", &object, (None, None), Err(&refusal));
            return Err(refusal);
        }
        if request.dry_run {
            return Ok(response);
        }
        // Half a join is worse than one whose caller has gone: it is carried on to its end, or taken back.
        let federation = self.context.federation.clone();
        let options = JoinOptions {
            share_trust_domain: request.share_trust_domain,
            from_argument: request.from_argument,
        };
        let joining =
            self.context.tasks.spawn(
                "cluster join",
                async move { federation.join(&token, options).await },
            );
        let result = joining.await.map_err(Refusal::internal)?;
        self.record(call, "join", &object, (None, None), result.as_ref().map(|_| ()));
        response.inviter = result?;
        let shown = self.context.federation.show().await?;
        response.namespaces = own_of(&shown).map(granted).unwrap_or_default();
        Ok(response)
    }

    pub(super) async fn clusters(
        &self,
        call: &Call,
        request: &pb::ListClustersRequest,
    ) -> Result<pb::ListClustersResponse, Refusal> {
        self.authorize(call, Verb::Read, Thing::Cluster, None, "Cluster *")?;
        let shown = self.context.federation.show_all(request.services).await?;
        let clusters = shown.members.iter().map(|member| cluster(member, &shown));
        let is_member = |name: &str| {
            let mut live = shown.members.iter().map(|member| &member.status.member);
            live.any(|member| *member.record.cluster == *name && member.standing != Standing::Removed)
        };
        let joining = shown.joining.iter();
        let joining = joining.filter(|joining| !is_member(&joining.record.cluster));
        // A name that was a member once and is invited again is shown once.
        let names: BTreeSet<&str> = joining.clone().map(|joining| &*joining.record.cluster).collect();
        let clusters = clusters.filter(|cluster| !names.contains(cluster.name.as_str()));
        let mut clusters: Vec<pb::Cluster> = clusters.chain(joining.map(comes)).collect();
        clusters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pb::ListClustersResponse {
            clusters,
            exported_services: u32::try_from(shown.exported).unwrap_or(u32::MAX),
            seq: shown.seq,
            cluster: shown.own.clone(),
        })
    }

    pub(super) async fn remove(&self, call: &Call, cluster: &str) -> Result<(), Refusal> {
        let object = format!("Cluster {}", shortened(cluster));
        self.authorize(call, Verb::Delete, Thing::Cluster, None, &object)?;
        let result = self.context.federation.remove(cluster.to_owned()).await;
        self.record(
            call,
            "delete",
            &object,
            (None, None),
            result.as_ref().map(|&()| ()),
        );
        result
    }

    pub(super) async fn grant(&self, call: &Call, request: &pb::GrantClusterRequest) -> Result<(), Refusal> {
        let object = granting(request);
        self.authorize(call, Verb::Update, Thing::Cluster, None, &object)?;
        let result = self.grant_checked(request).await;
        self.record(
            call,
            "update",
            &object,
            (None, None),
            result.as_ref().map(|&()| ()),
        );
        result
    }

    async fn grant_checked(&self, request: &pb::GrantClusterRequest) -> Result<(), Refusal> {
        let federation = &self.context.federation;
        let name = |text: &str| text.parse::<TrustDomain>().map_err(Refusal::invalid);
        let add = (!request.add_trust_domain.is_empty()).then(|| name(&request.add_trust_domain));
        let drop = (!request.drop_trust_domain.is_empty()).then(|| name(&request.drop_trust_domain));
        let (add, drop) = (add.transpose()?, drop.transpose()?);
        let renames = add.is_some() || drop.is_some();
        if request.namespaces.is_empty() && !renames {
            return Err(Refusal::invalid("name the namespaces that it may export, or *"));
        }
        if !request.namespaces.is_empty() || request.may_admit.is_some() {
            let mut namespaces = request.namespaces.clone();
            if namespaces.is_empty() {
                let shown = federation.show().await?;
                let mut members = shown.members.iter();
                let member = members.find(|member| *member.status.member.record.cluster == *request.cluster);
                namespaces = member.map(granted).unwrap_or_default();
            }
            let namespaces = Grant::from_list(namespaces.iter().map(String::as_str))?;
            federation
                .grant(request.cluster.clone(), namespaces, request.may_admit)
                .await?;
        }
        let force = request.force;
        let changes = [
            add.map(NameChange::Add),
            drop.map(|name| NameChange::Drop { name, force }),
        ];
        for change in changes.into_iter().flatten() {
            federation.change_names(request.cluster.clone(), change).await?;
        }
        Ok(())
    }
}

/// What a grant is about, for the audit log.
fn granting(request: &pb::GrantClusterRequest) -> String {
    let mut object = format!("Cluster {}", shortened(&request.cluster));
    if !request.namespaces.is_empty() {
        object += &format!(" may export {}", shortened(&request.namespaces.join(",")));
    }
    if !request.add_trust_domain.is_empty() {
        object += &format!(" is also {}", shortened(&request.add_trust_domain));
    }
    if !request.drop_trust_domain.is_empty() {
        let forced = if request.force { ", forced" } else { "" };
        object += &format!(" is no longer {}{forced}", shortened(&request.drop_trust_domain));
    }
    object
}

fn own_of(shown: &Shown) -> Option<&ShownMember> {
    let own = |member: &&ShownMember| *member.status.member.record.cluster == *shown.own;
    shown.members.iter().find(own)
}

fn granted(member: &ShownMember) -> Vec<String> {
    let namespaces = member.status.member.record.namespaces.list();
    namespaces.into_iter().map(str::to_owned).collect()
}

/// What can be said of an invite before anybody is called.
fn check_join(token: &InviteToken, shown: &Shown, share_trust_domain: bool) -> Result<(), Refusal> {
    if token.cluster != shown.own {
        return Err(Refusal::new(
            Code::InviteMismatch,
            format_args!("it is for {}, this cluster is {}", token.cluster, shown.own),
        ));
    }
    if token.trust_domain == shown.trust_domain && !share_trust_domain {
        return Err(Refusal::new(
            Code::TrustDomainTaken,
            format_args!("{} is that of both clusters", token.trust_domain),
        ));
    }
    let live = shown
        .members
        .iter()
        .filter(|member| member.status.member.standing == Standing::Live)
        .count();
    let is_member = own_of(shown).is_some_and(|own| own.status.member.standing == Standing::Live);
    // From a join whose process ended in the middle the same invite goes on.
    let spoke = |member: &ShownMember| member.status.connected || member.status.seq > 0;
    if is_member && live > 1 && shown.members.iter().any(spoke) {
        return Err(Refusal::new(
            Code::FederatedAlready,
            format_args!("{live} clusters"),
        ));
    }
    Ok(())
}

/// A cluster that was admitted and has not come yet: the other half of a join that failed.
fn comes(joining: &Joining) -> pb::Cluster {
    let record = &joining.record;
    let namespaces = record.namespaces.list();
    let until = jiff::Timestamp::from_millisecond(joining.expires_unix_ms);
    let until = until
        .map(|until| format!(", until {until:.0}"))
        .unwrap_or_default();
    pb::Cluster {
        name: record.cluster.to_string(),
        trust_domain: record.trust_domain.to_string(),
        also_trust_domains: record.aliases.iter().map(ToString::to_string).collect(),
        state: "Joining".into(),
        reason: Code::JoinPending.message(format_args!("{}{until}", record.cluster)),
        namespaces: namespaces.into_iter().map(str::to_owned).collect(),
        may_admit: record.may_admit,
        share_trust_domain: record.share_trust_domain,
        admitted_by: record.admitted_by.to_string(),
        endpoints: record.endpoints.clone(),
        incarnation: record.incarnation,
        record_version: record.version,
        ..pb::Cluster::default()
    }
}

fn cluster(shown: &ShownMember, all: &Shown) -> pb::Cluster {
    let (status, member) = (&shown.status, &shown.status.member);
    let record = &member.record;
    let is_own = *record.cluster == *all.own;
    let (state, reason) = match member.standing {
        Standing::Removed => ("Removed", Code::MemberRemoved.message(&record.cluster)),
        Standing::Contested => ("Contested", Code::MemberContested.message(&record.cluster)),
        Standing::Live if is_own => ("Own", String::new()),
        // Whoever is removed itself hears of the others no more.
        Standing::Live if own_of(all).is_some_and(|own| own.status.member.standing == Standing::Removed) => {
            ("Parted", Code::MemberRemoved.message(&all.own))
        }
        Standing::Live if status.stale => {
            let said = [status.said.as_str(), shown.dial_failure.as_str()];
            let said = said.into_iter().find(|said| !said.is_empty());
            let mut cause = match (status.connected, said) {
                (true, _) => format!("{} has come back and is watched for some seconds", record.cluster),
                (false, None) => record.cluster.to_string(),
                (false, Some(said)) => format!("{}: {said}", record.cluster),
            };
            if !status.connected && status.seq == 0 {
                // It was admitted, and perhaps it never learned so.
                cause.push_str(
                    "; it has never said anything: if its join failed there, repeat it with the same invite",
                );
            }
            ("Stale", Code::ClusterStale.message(cause))
        }
        Standing::Live => ("Connected", String::new()),
    };
    let refused = shown.refused.iter().map(|refused| pb::RefusedStatement {
        message: refused.message.clone(),
        last_unix_ms: refused.at_unix_ms,
        count: refused.count,
    });
    pb::Cluster {
        name: record.cluster.to_string(),
        trust_domain: record.trust_domain.to_string(),
        also_trust_domains: record.aliases.iter().map(ToString::to_string).collect(),
        contested_trust_domains: if member.standing == Standing::Live {
            let contested = record.aliases.difference(&member.aliases);
            contested.map(ToString::to_string).collect()
        } else {
            Vec::new()
        },
        state: state.into(),
        reason,
        connected: status.connected,
        last_heard_unix_ms: shown.heard_unix_ms,
        imported_services: u32::try_from(status.services).unwrap_or(u32::MAX),
        gateways: u32::try_from(shown.gateways).unwrap_or(u32::MAX),
        seq: status.seq,
        namespaces: granted(shown),
        may_admit: record.may_admit,
        share_trust_domain: record.share_trust_domain,
        admitted_by: record.admitted_by.to_string(),
        endpoints: member.endpoints().to_vec(),
        incarnation: record.incarnation,
        record_version: record.version,
        refused: refused.collect(),
        version: if is_own {
            all.version.clone()
        } else {
            status.version.to_string()
        },
        services: shown.services.clone(),
        refused_exports: if is_own {
            all.refused_exports.clone()
        } else {
            Vec::new()
        },
    }
}
