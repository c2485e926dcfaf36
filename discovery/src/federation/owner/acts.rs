//! Carrying out what the core says.

use super::{
    Action, Arc, BTreeMap, Event, Instant, Owner, REFUSED_MAX, RETRY_INTERVAL, Refused, SAVE_INTERVAL,
    TrustBundle, WorkloadIdentity, convert, unix_ms,
};
use crate::{federation::dial, files, refusal::Refusal};
use std::collections::VecDeque;
use tombolo_types::{Code, TrustDomain};

impl Owner {
    /// Carries out actions in their order. False: the store refused, and the core starts anew soon.
    pub(super) async fn act(&mut self, actions: Vec<Action>) -> bool {
        let mut left = VecDeque::from(actions);
        let mut membership = false;
        while let Some(action) = left.pop_front() {
            match action {
                Action::Persist(writes) => {
                    membership = true;
                    if let Err(error) = self.keeper.commit(&writes).await {
                        tracing::error!(%error, "the membership cannot be written; federation starts anew");
                        self.broken = Some(Instant::now() + RETRY_INTERVAL);
                        for (_, outgoing) in std::mem::take(&mut self.outgoing) {
                            outgoing.closing.cancel();
                        }
                        return false;
                    }
                }
                Action::SaveImports { cluster } => {
                    self.saves.insert(cluster);
                    self.save_at.get_or_insert(Instant::now() + SAVE_INTERVAL);
                }
                Action::Send { conn, message } => {
                    let full = self
                        .outgoing
                        .get(&conn)
                        .is_some_and(|outgoing| outgoing.messages_tx.try_send(message).is_err());
                    if full && let Some(outgoing) = self.outgoing.remove(&conn) {
                        outgoing.closing.cancel();
                        let cause = "it does not read what is sent to it".into();
                        left.extend(self.core.handle(Event::Broken { conn, cause }, self.now()));
                    }
                }
                Action::Dial {
                    cluster,
                    endpoints,
                    names,
                    shown,
                    roots_pem,
                } => {
                    let target = dial::Target {
                        cluster,
                        endpoints,
                        names,
                        roots_pem,
                        identity: self.identity(&shown),
                    };
                    let dialling = dial::run(self.handle.clone(), target);
                    self.tasks.spawn_until_stopped("federation dial", dialling);
                }
                Action::Close { conn } => {
                    if let Some(outgoing) = self.outgoing.remove(&conn) {
                        outgoing.closing.cancel();
                    }
                }
                Action::Publish { world, changed } => {
                    membership = true;
                    let stale = world.clusters.values().filter(|imports| imports.stale).count();
                    self.config.metrics.set_clusters(world.clusters.len(), stale);
                    for cluster in changed {
                        match world.clusters.get(&cluster) {
                            Some(imports) => {
                                let names = std::iter::once(&imports.trust_domain).chain(&imports.also);
                                let ours = names.into_iter().any(|name| self.config.settings.is_own(name));
                                let shares = ours && self.shares(&cluster);
                                let imports = convert::imports(imports, shares);
                                self.imported.insert(cluster.clone());
                                self.config.fleet.set_imports(cluster, Some(imports)).await;
                            }
                            None => self.forget(&cluster).await,
                        }
                    }
                }
                Action::Audit(refusal) => self.refused(refusal),
            }
        }
        if membership {
            self.trust();
        }
        self.tell_refused().await;
        true
    }

    /// What is refused of the own exports is told to nobody, not to the own gateways either.
    async fn tell_refused(&mut self) {
        let refused = self.core.refused_exports();
        if Arc::ptr_eq(refused, &self.refused_exports) {
            return;
        }
        self.refused_exports = Arc::clone(refused);
        let messages = self.refused_exports.iter().map(|(name, refusal)| {
            let message = refusal.code.message(&refusal.cause);
            ((name.namespace.clone(), name.name.clone()), message)
        });
        let messages = messages.collect();
        self.config.fleet.set_refused_exports(messages).await;
    }

    /// Both sides agreed that the roots of each make identities of the other.
    fn shares(&self, cluster: &str) -> bool {
        let both = [cluster, self.config.cluster.as_str()];
        let members = self.core.members();
        both.iter().all(|name| {
            members.iter().any(|member| {
                *member.member.record.cluster == **name && member.member.record.share_trust_domain
            })
        })
    }

    /// The own certificate of a name of the own trust domain. While that is renamed the other members are not always
    /// shown the one that certificates are made for.
    fn identity(&self, name: &TrustDomain) -> Option<Arc<WorkloadIdentity>> {
        let current = self.config.live.current();
        let mut all = current.identity.iter().chain(&current.others);
        let shown = all.find(|identity| identity.id().trust_domain == *name);
        shown.or(current.identity.as_ref()).cloned()
    }

    /// A cluster is no member any more: nothing of it is served, and its roots are withdrawn.
    pub(super) async fn forget(&mut self, cluster: &Arc<str>) {
        self.imported.remove(cluster);
        self.heard.remove(cluster);
        self.dial_failures.remove(cluster);
        self.saves.remove(cluster);
        if let Some(path) = self.keeper.imports_path(cluster) {
            let _ = std::fs::remove_file(path); // there may be none
        }
        self.config.fleet.set_imports(cluster.clone(), None).await;
    }

    /// Puts the roots in force by which peers may come.
    pub(super) fn trust(&mut self) {
        let roots = self.core.peer_roots();
        if roots == self.roots && !std::mem::take(&mut self.roots_changed) {
            return;
        }
        let own = self.config.settings.own_names();
        let own = own.map(|name| (name.clone(), self.config.roots_pem.clone()));
        let mut merged: BTreeMap<TrustDomain, String> = own.collect();
        for (trust_domain, pem) in &roots {
            let known = merged.entry(trust_domain.clone()).or_default();
            if !(known.is_empty() || known.ends_with('\n')) {
                known.push('\n');
            }
            known.push_str(pem);
        }
        let bundles = merged.into_iter().filter_map(|(trust_domain, pem)| {
            match TrustBundle::from_pem(trust_domain.clone(), &pem) {
                Ok(bundle) => Some(Arc::new(bundle)),
                Err(error) => {
                    tracing::warn!(%error, %trust_domain, "the roots of a member cannot be used");
                    None
                }
            }
        });
        self.handle.trusted.set_bundles(bundles.collect());
        self.roots = roots;
    }

    fn refused(&mut self, refusal: tombolo_federation::Refusal) {
        let (cluster, code) = (refusal.cluster.clone(), refusal.code);
        let who = if cluster.is_empty() {
            crate::audit::ANONYMOUS.to_owned()
        } else {
            format!("cluster {cluster}")
        };
        let refusal = Refusal::from(refusal);
        tracing::warn!(%who, "{refusal}");
        self.config.metrics.federation_refused(code);
        self.audit(
            who,
            "federation".into(),
            "federate",
            format!("Cluster {cluster}"),
            Err(&refusal),
        );
        if code == Code::ClusterStale {
            return; // it is silent: that is a state, and nothing of it was refused
        }
        let of = self.refused.entry(cluster).or_default();
        if of.len() < REFUSED_MAX || of.contains_key(&code) {
            let last = of.entry(code).or_insert(Refused {
                message: String::new(),
                at_unix_ms: 0,
                count: 0,
            });
            (last.message, last.at_unix_ms) = (refusal.message, unix_ms());
            last.count += 1;
        }
    }

    /// Writes the imports that changed, for the next start.
    pub(super) fn save(&mut self) {
        self.save_at = None;
        let mut values = Vec::new();
        for cluster in std::mem::take(&mut self.saves) {
            if let (Some(path), Some(value)) = (
                self.keeper.imports_path(&cluster),
                self.core.imports_value(&cluster),
            ) {
                values.push((path, value));
            }
        }
        if values.is_empty() {
            return;
        }
        let write = move || {
            for (path, value) in values {
                if let Err(error) = files::write_secret(&path, &value) {
                    tracing::warn!(%error, path = %path.display(), "imports are not kept for the next start");
                }
            }
        };
        if self.tasks.is_stopping() {
            write();
        } else {
            drop(tokio::task::spawn_blocking(write));
        }
    }
}
