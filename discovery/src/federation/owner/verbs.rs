//! What others ask of the owner.

use super::{BTreeSet, Code, Command, Event, Now, Owner, Refusal, Shown, ShownMember, stopping, unix_ms};
use crate::federation::{
    ClusterInvite, join,
    keep::{INVITES_MAX, hex},
};
use tombolo_federation::{Ed25519, Grant, Record};
use tombolo_proto::tombolo::{admin::v1::RefusedExport, federation::v1 as pb};

/// Used and expired invites are shown for so long.
const INVITE_KEPT_MS: i64 = 8 * 24 * 3600 * 1000;

impl Owner {
    pub(super) async fn take(&mut self, command: Command) {
        // Nobody waits for an answer any more when `send` fails: the caller has gone.
        match command {
            Command::Opened {
                conn,
                dialled,
                trust_domain,
                exporter,
                outgoing,
            } => {
                if self.broken.is_some() {
                    outgoing.closing.cancel();
                    return;
                }
                if let Some(cluster) = &dialled {
                    self.dial_failures.remove(cluster);
                }
                self.outgoing.insert(conn, outgoing);
                self.feed(Event::Connected {
                    conn,
                    dialled,
                    trust_domain,
                    exporter,
                })
                .await;
            }
            Command::Received(conn, message) => {
                let peer = self.core.connections().find(|(of, _)| *of == conn);
                if let Some(cluster) = peer.and_then(|(_, peer)| peer.cloned()) {
                    self.heard.insert(cluster, unix_ms());
                }
                if self.outgoing.contains_key(&conn) {
                    self.feed(Event::Received {
                        conn,
                        message: *message,
                    })
                    .await;
                }
            }
            Command::Closed(conn) => {
                if self.outgoing.remove(&conn).is_some() {
                    self.feed(Event::Closed { conn }).await;
                }
            }
            Command::Broken(conn, cause) => {
                // What is said to it is in its queue when the stream ends.
                if self.outgoing.contains_key(&conn) {
                    self.feed(Event::Broken { conn, cause }).await;
                }
            }
            Command::DialFailed(cluster, cause) => {
                self.dial_failures.insert(cluster.clone(), cause);
                self.feed(Event::DialFailed { cluster }).await;
            }
            Command::Redeem {
                request,
                exporter,
                from,
                reply,
            } => drop(reply.send(self.redeem(&request, &exporter, from).await)),
            Command::Invite {
                id,
                invite,
                dry_run,
                reply,
            } => drop(reply.send(self.invite(id, &invite, dry_run).await)),
            Command::RevokeInvite(name, reply) => {
                drop(reply.send(self.keeper.delete_invite(&name).await.map_err(Refusal::from)));
            }
            Command::Invites(reply) => drop(reply.send(self.keeper.invites().await.map_err(Refusal::from))),
            Command::PrepareJoin {
                token,
                exporter,
                share_trust_domain,
                reply,
            } => {
                let key = Ed25519::from_seed(&token.seed);
                let made = self
                    .core
                    .join_request(&token, &key, &exporter, share_trust_domain);
                drop(reply.send(made.map_err(Refusal::from)));
            }
            Command::Accept(response, reply) => drop(reply.send(self.accept(&response).await)),
            Command::Rollback(reply) => drop(reply.send(self.rollback().await)),
            Command::Settled => self.before_join = None,
            Command::Remove(cluster, reply) => drop(reply.send(self.remove(&cluster).await)),
            Command::Grant(cluster, namespaces, may_admit, reply) => {
                drop(reply.send(self.grant(&cluster, namespaces, may_admit).await));
            }
            Command::Name(cluster, change, reply) => {
                drop(reply.send(self.change_names(&cluster, &change).await));
            }
            Command::PrepareName(name, reply) => drop(reply.send(self.prepare_name(name).await)),
            Command::BehindName(name, reply) => drop(reply.send(Ok(self.behind_name(&name)))),
            Command::ReleaseName(name, reply) => drop(reply.send(self.release_name(name).await)),
            Command::Roots(roots_pem, reply) => drop(reply.send(self.set_roots(roots_pem).await)),
            Command::Show(services, reply) => drop(reply.send(Ok(self.show(services)))),
        }
    }

    pub(super) fn usable(&self) -> Result<Now, Refusal> {
        match self.broken {
            None => Ok(self.now()),
            Some(_) => Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            )),
        }
    }

    /// Names that a cluster may not have: foreign networks are called after their cluster.
    fn local_names(&self) -> BTreeSet<String> {
        let settings = &self.config.settings;
        let view = self.config.fleet.view();
        let addresses = view.by_address.keys().map(|(network, _)| network.clone());
        let offered = self.offered.load();
        let gateways = offered.gateways.iter().map(|gateway| gateway.network.clone());
        let own = [settings.network.clone(), settings.cluster_id.clone()];
        addresses.chain(gateways).chain(own).collect()
    }

    fn check_name(&self, cluster: &str) -> Result<(), Refusal> {
        if self.local_names().contains(cluster) {
            return Err(Refusal::new(
                Code::MemberExists,
                format_args!(
                    "{cluster} is the name of a network of {} itself",
                    self.config.cluster
                ),
            ));
        }
        Ok(())
    }

    async fn redeem(
        &mut self,
        request: &pb::JoinRequest,
        exporter: &[u8; 32],
        from: String,
    ) -> Result<pb::JoinResponse, Refusal> {
        let result = self.redeem_checked(request, exporter).await;
        let cluster: String = request.cluster.chars().take(64).collect();
        let (who, result_line) = match &result {
            Ok(_) => (format!("cluster {cluster}"), Ok(())),
            Err(refusal) => (crate::audit::ANONYMOUS.to_owned(), Err(refusal)),
        };
        let id: String = request
            .invite_id
            .iter()
            .take(16)
            .map(|b| format!("{b:02x}"))
            .collect();
        self.audit(
            who,
            from,
            "join",
            format!("Cluster {cluster} by invite {id}"),
            result_line,
        );
        result
    }

    async fn redeem_checked(
        &mut self,
        request: &pb::JoinRequest,
        exporter: &[u8; 32],
    ) -> Result<pb::JoinResponse, Refusal> {
        let now = self.usable()?;
        let unknown = || Refusal::new(Code::InviteUnknown, "");
        let id: [u8; 16] = request.invite_id.as_slice().try_into().map_err(|_| unknown())?;
        let stored = self.keeper.invite(&id).await?.ok_or_else(unknown)?;
        let invite = stored.to_core(id).ok_or_else(unknown)?;
        join::check_argument(&request.features, invite.expires_unix_ms, now.unix_ms)?;
        let (response, actions) = self.core.redeem(&invite, request, exporter, now)?;
        if self.act(actions).await {
            // The joining side comes with a certificate by these roots next.
            self.trust();
            Ok(response)
        } else {
            Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            ))
        }
    }

    async fn invite(&mut self, id: [u8; 16], invite: &ClusterInvite, dry_run: bool) -> Result<(), Refusal> {
        let now = self.usable()?;
        self.check_name(&invite.cluster)?;
        let core = invite.to_core(id).ok_or_else(|| {
            Refusal::invalid("the invite names no trust domain, or namespaces that are none")
        })?;
        let shares_ours = core.share_trust_domain && self.config.settings.is_own(&core.trust_domain);
        if shares_ours && !dry_run {
            let actions = self.core.set_share_trust_domain(true, now)?;
            if !self.act(actions).await {
                return Err(stopping());
            }
        }
        if !(shares_ours && dry_run) {
            self.core
                .check_invite(&core.cluster, &core.trust_domain, core.share_trust_domain)?;
        }
        let all = self.keeper.invites().await?;
        if all.len() >= INVITES_MAX {
            return Err(Refusal::busy(format_args!(
                "there are {INVITES_MAX} invites; revoke some"
            )));
        }
        if dry_run {
            return Ok(());
        }
        for (name, old) in all {
            if old.expires_unix_ms + INVITE_KEPT_MS < now.unix_ms {
                self.keeper.delete_invite(&name).await?;
            }
        }
        self.keeper.add_invite(&id, invite).await?;
        tracing::info!(cluster = %invite.cluster, invite = hex(&id), "a cluster is invited");
        Ok(())
    }

    async fn accept(&mut self, response: &pb::JoinResponse) -> Result<(), Refusal> {
        let now = self.usable()?;
        for signed in &response.records {
            if let Ok(record) = Record::decode(&signed.body)
                && !record.removed
                && *record.cluster != *self.config.cluster
            {
                self.check_name(&record.cluster)?;
            }
        }
        let before = self.keeper.load().await.map_err(Refusal::from)?;
        let actions = self.core.accept(response, now)?;
        self.before_join = Some(before);
        if self.act(actions).await {
            Ok(())
        } else {
            Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            ))
        }
    }

    /// Takes a join back of which nothing came.
    async fn rollback(&mut self) -> Result<(), Refusal> {
        let Some(before) = self.before_join.take() else {
            return Ok(());
        };
        let restored = self.keeper.restore(&before).await;
        self.restart().await;
        restored.map_err(Refusal::from)
    }

    async fn set_roots(&mut self, roots_pem: String) -> Result<(), Refusal> {
        self.config.roots_pem = roots_pem;
        // Also where no member's roots have changed: the own ones are among them.
        self.roots_changed = true;
        self.trust();
        self.exported().await;
        self.usable().map(drop)
    }

    async fn remove(&mut self, cluster: &str) -> Result<(), Refusal> {
        let now = self.usable()?;
        let actions = if cluster == self.config.cluster {
            self.core.leave(now)?
        } else {
            self.core.remove(cluster, now)?
        };
        if self.act(actions).await {
            Ok(())
        } else {
            Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            ))
        }
    }

    async fn grant(
        &mut self,
        cluster: &str,
        namespaces: Grant,
        may_admit: Option<bool>,
    ) -> Result<(), Refusal> {
        let now = self.usable()?;
        let members = self.core.members();
        let member = members.iter().find(|m| *m.member.record.cluster == *cluster);
        let may_admit = may_admit.unwrap_or(member.is_some_and(|m| m.member.record.may_admit));
        let actions = self.core.set_grant(cluster, namespaces, may_admit, now)?;
        if self.act(actions).await {
            Ok(())
        } else {
            Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            ))
        }
    }

    fn show(&self, services: bool) -> Shown {
        let world = self.core.world();
        let (exports, seq) = self.core.exports();
        let members = self.core.members().into_iter().map(|status| {
            let cluster = &status.member.record.cluster;
            let gateways = world
                .clusters
                .get(cluster)
                .map_or(0, |imports| imports.gateways.len());
            let refused = self.refused.get(cluster).into_iter().flatten();
            let named = match world.clusters.get(cluster) {
                _ if !services => None,
                Some(imports) => Some(&imports.services),
                None if **cluster == *self.config.cluster => Some(&exports.services),
                None => None,
            };
            ShownMember {
                heard_unix_ms: self.heard.get(cluster).copied().unwrap_or_default(),
                gateways,
                refused: refused.map(|(_, refused)| refused.clone()).collect(),
                services: named
                    .into_iter()
                    .flatten()
                    .map(|(name, _)| name.to_string())
                    .collect(),
                dial_failure: self.dial_failures.get(cluster).cloned().unwrap_or_default(),
                status,
            }
        });
        Shown {
            own: self.config.cluster.clone(),
            trust_domain: self.config.settings.trust_domain.clone(),
            members: members.collect(),
            joining: self.core.joining(),
            exported: exports.services.len(),
            seq,
            endpoints: super::endpoints(&self.config, &self.offered.load()),
            refused_exports: self
                .core
                .refused_exports()
                .iter()
                .map(|(name, refusal)| RefusedExport {
                    namespace: name.namespace.to_string(),
                    name: name.name.to_string(),
                    message: refusal.code.message(&refusal.cause),
                })
                .collect(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}
