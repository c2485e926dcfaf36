//! The steps of a renaming, by the owner of the own trust.

use super::{
    AskedName, Migration, NameStatus, Named, Status,
    holders::{named_after, told},
    keeper::{KEPT, Owner, now_unix, now_unix_ms},
    names::{Left, Names, Renaming},
    record::{Record, Step},
};
use crate::refusal::Refusal;
use std::time::SystemTime;
use tombolo_config::{Kind, Resource};
use tombolo_federation::Standing;
use tombolo_identity::control_server_name;
use tombolo_registry::{policy_needs_name, service_needs_name};
use tombolo_types::{Code, TrustDomain};

impl Owner {
    /// How a renaming stands, by the names that are in force.
    pub(super) async fn name_status(&self) -> Result<NameStatus, Refusal> {
        let holders = self.holders().await?;
        let renaming = &self.record.names.step;
        let (since_unix_ms, by) = renaming.made();
        let mut status = Status {
            step: renaming.name(),
            since_unix_ms,
            by: by.to_owned(),
            ..Status::default()
        };
        match renaming {
            Renaming::Steady => status.next = vec!["start"],
            Renaming::Started { next, .. } => {
                status.next = vec!["switch", "abort"];
                status.blockers.clone_from(&holders.behind);
                let next: TrustDomain = next.parse().map_err(Refusal::internal)?;
                for (who, why) in self.config.federation.behind_name(next).await? {
                    // Once is enough for a cluster that cannot be reached.
                    if !status.blockers.iter().any(|named| named.who == who) {
                        status.blockers.push(Named { who, why });
                    }
                }
                if !holders.away.is_empty() {
                    status.notes.push(format!(
                        "{} enrolled VMs are away: they follow when they come back, within 90 days of finish",
                        holders.away.len()
                    ));
                }
                if !holders.by_certificate.is_empty() {
                    status.notes.push(format!(
                        "{} clients of other kinds (ztunnel, Envoy) take the new name with their next certificate; a ztunnel admits only callers of its own trust domain",
                        holders.by_certificate.len()
                    ));
                }
            }
            Renaming::Switched {
                previous,
                since_unix_ms,
                others_until,
                ..
            } => {
                status.next = vec!["finish"];
                status.blockers.clone_from(&holders.behind);
                let old: TrustDomain = previous.parse().map_err(Refusal::internal)?;
                let view = self.config.fleet.view();
                status
                    .blockers
                    .extend(named_after(&view, &old, *others_until, now_unix()));
                status.blockers.extend(self.objects_of(&old).await?);
                let tokens = self.tokens_before(*since_unix_ms).await?;
                if tokens > 0 {
                    status.notes.push(format!(
                        "{tokens} join tokens were made before the switch and name {old}: they enrol for as long as discovery answers to it, 90 days after finish"
                    ));
                }
            }
        }
        status.holders = holders;
        Ok(NameStatus {
            status,
            names: self.names.clone(),
        })
    }

    /// Objects that say something of a name, and would say something else without it.
    async fn objects_of(&self, old: &TrustDomain) -> Result<Vec<Named>, Refusal> {
        let new = &self.names.signing;
        let mut found = Vec::new();
        for kind in [Kind::AuthorizationPolicy, Kind::ServiceEntry] {
            let (objects, _) = self.config.objects.list(Some(kind), None).await?;
            for object in &objects {
                let needs = if let Resource::AuthorizationPolicy(policy) = object {
                    policy_needs_name(&policy.spec, old, new).then_some(&policy.metadata)
                } else if let Resource::ServiceEntry(service) = object {
                    service_needs_name(&service.spec, old, new).then_some(&service.metadata)
                } else {
                    None
                };
                found.extend(needs.map(|metadata| Named {
                    who: format!("{kind} {}/{}", metadata.namespace, metadata.name),
                    why: format!("it names {old} and not {new}"),
                }));
            }
        }
        Ok(found)
    }

    /// Makes a step of a renaming, or says what is in its way.
    pub(super) async fn migrate(&mut self, asked: AskedName) -> Result<NameStatus, Refusal> {
        if self.record.step != Step::Steady {
            return Err(Refusal::new(
                Code::TrustStep,
                "the root is being rotated: finish or abort that first (tombolo trust rotate)",
            ));
        }
        let status = self.name_status().await?;
        let (verb, shown) = (asked.migration.as_str(), &status.status);
        if !shown.next.contains(&verb) {
            let next = shown.next.join(" or ");
            return Err(Refusal::new(
                Code::TrustStep,
                format_args!(
                    "the renaming is {}, after which {next} may come, not {verb}",
                    shown.step
                ),
            ));
        }
        let names = self.step(&asked).await?;
        if asked.dry_run {
            return Ok(status);
        }
        let waits = matches!(asked.migration, Migration::Switch | Migration::Finish);
        if waits && !shown.blockers.is_empty() && !asked.force {
            return Err(Refusal::new(Code::TrustBehind, told(&shown.blockers)));
        }
        let notes: Vec<String> = self.tell_clusters(&asked).await?.into_iter().collect();
        let record = Record {
            names,
            ..self.record.clone()
        };
        // What cannot be opened is not written.
        let authority = self.place.open(&record, now_unix()).map_err(Refusal::internal)?;
        let served = record.names.own(&self.place.founding);
        let issued = self
            .config
            .names
            .named(&served)
            .issue(&authority, SystemTime::now());
        issued.map_err(Refusal::internal)?;
        let version = self.place.save(&record, self.version).await?;
        (self.record, self.version) = (record, Some(version));
        // From here on nothing of what is in force is true any more: discovery opens anew.
        self.closing = true;
        tracing::info!(step = verb, trust_domain = %served.signing, also = ?served.also, "the trust domain is renamed");
        let (since_unix_ms, by) = self.record.names.step.made();
        Ok(NameStatus {
            status: Status {
                step: self.record.names.step.name(),
                since_unix_ms,
                by: by.to_owned(),
                notes,
                ..Status::default()
            },
            names: served,
        })
    }

    /// Has the record of this cluster say what the step needs, before the step is written: both may be repeated. Returns
    /// what is to be done elsewhere, for people.
    async fn tell_clusters(&self, asked: &AskedName) -> Result<Option<String>, Refusal> {
        let federation = &self.config.federation;
        let gone = match (asked.migration, &self.record.names.step) {
            (Migration::Start, _) => {
                let name = asked.name.parse().map_err(Refusal::invalid)?;
                return federation.prepare_name(name).await.map(|()| None);
            }
            (Migration::Abort, Renaming::Started { next, .. }) => next,
            (Migration::Finish, Renaming::Switched { previous, .. }) => previous,
            (Migration::Switch | Migration::Abort | Migration::Finish, _) => return Ok(None),
        };
        let gone = gone.parse().map_err(Refusal::internal)?;
        federation.release_name(gone).await
    }

    /// The names after a step.
    async fn step(&self, asked: &AskedName) -> Result<Names, Refusal> {
        let mut names = self.record.names.clone();
        let wrong = |what: &str| Refusal::internal(format_args!("no name is {what}"));
        let since_unix_ms = now_unix_ms();
        match asked.migration {
            Migration::Start => {
                let next = self.check_new(&asked.name).await?;
                names.step = Renaming::Started {
                    next: next.to_string(),
                    since_unix_ms,
                    by: asked.by.clone(),
                };
            }
            Migration::Abort => names.step = Renaming::Steady,
            Migration::Switch => {
                let Renaming::Started { next, .. } = &self.record.names.step else {
                    return Err(wrong("coming"));
                };
                names.signing = Some(next.clone());
                names.step = Renaming::Switched {
                    previous: self.names.signing.to_string(),
                    since_unix_ms,
                    by: asked.by.clone(),
                    others_until: self.record.others_until,
                };
            }
            Migration::Finish => {
                let Renaming::Switched { previous, .. } = &self.record.names.step else {
                    return Err(wrong("leaving"));
                };
                let (old, signing) = (previous.clone(), self.names.signing.as_str());
                names.left.retain(|left| left.name != old && left.name != signing);
                names.left.push(Left {
                    name: old,
                    until: now_unix() + KEPT.as_secs(),
                });
                names.step = Renaming::Steady;
            }
        }
        Ok(names)
    }

    /// A name that nobody else has, and that the other clusters know to be ours.
    async fn check_new(&self, text: &str) -> Result<TrustDomain, Refusal> {
        let name: TrustDomain = text.parse().map_err(Refusal::invalid)?;
        control_server_name(&name).map_err(Refusal::invalid)?;
        if name == self.names.signing {
            return Err(Refusal::invalid(format_args!(
                "{name} is the trust domain of this mesh already"
            )));
        }
        let shown = self.config.federation.show().await?;
        let live = shown.members.iter().map(|member| &member.status.member);
        let (own, others): (Vec<_>, Vec<_>) = live
            .filter(|member| member.standing == Standing::Live)
            .partition(|member| *member.record.cluster == *shown.own);
        if let Some(other) = others.iter().find(|member| member.record.has_name(&name)) {
            return Err(Refusal::new(
                Code::TrustDomainTaken,
                format_args!("{name} is that of {}", other.record.cluster),
            ));
        }
        let listed = own.iter().any(|member| member.record.has_name(&name));
        let by = own.first().map_or("", |member| &member.record.admitted_by);
        // The founder says it of itself.
        if !others.is_empty() && !listed && *by != *shown.own {
            return Err(Refusal::new(
                Code::TrustDomainUnlisted,
                format_args!(
                    "run on a discovery host of {by}: tombolo cluster grant {} --trust-domain {name}",
                    shown.own
                ),
            ));
        }
        Ok(name)
    }
}
