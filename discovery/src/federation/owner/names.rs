//! Names of trust domains: of members, by whoever admitted them, and what a migration of the own one needs.

use super::{Code, Owner, Refusal};
use tombolo_federation::{NameChange, Standing};
use tombolo_types::TrustDomain;

impl Owner {
    pub(super) async fn change_names(&mut self, cluster: &str, change: &NameChange) -> Result<(), Refusal> {
        let now = self.usable()?;
        let actions = self.core.change_names(cluster, change, now)?;
        if self.act(actions).await {
            Ok(())
        } else {
            Err(Refusal::busy(
                "the store cannot be written at the moment; try again",
            ))
        }
    }

    /// Who says what the own record is: the own cluster if it is the founder.
    fn speaker(&self) -> String {
        let members = self.core.members();
        let own = members.iter().map(|status| &status.member.record);
        let own = own
            .filter(|record| *record.cluster == *self.config.cluster)
            .find(|record| !record.removed);
        own.map_or_else(|| self.config.cluster.clone(), |own| own.admitted_by.to_string())
    }

    pub(super) async fn prepare_name(&mut self, name: TrustDomain) -> Result<(), Refusal> {
        let own = self.config.cluster.clone();
        if !self.core.is_member() || self.core.is_listed(&name) {
            return Ok(()); // a member that was removed is nobody's, and may call itself as it likes
        }
        let speaker = self.speaker();
        if speaker == own {
            return self.change_names(&own, &NameChange::Add(name)).await;
        }
        Err(Refusal::new(
            Code::TrustDomainUnlisted,
            format_args!("run on {speaker}: tombolo cluster grant {own} --trust-domain {name}"),
        ))
    }

    pub(super) fn behind_name(&self, name: &TrustDomain) -> Vec<(String, String)> {
        let own = &self.config.cluster;
        if !self.core.is_member() {
            return Vec::new();
        }
        if !self.core.is_listed(name) {
            let speaker = self.speaker();
            let say = format!("run on {speaker}: tombolo cluster grant {own} --trust-domain {name}");
            return vec![("all other clusters".into(), say)];
        }
        let members = self.core.members().into_iter();
        let others = members.filter(|status| {
            let member = &status.member;
            *member.record.cluster != **own && member.standing == Standing::Live
        });
        let behind = others.filter(|status| !(status.connected && status.in_step));
        let named = behind.map(|status| {
            let why = if status.connected {
                format!(
                    "it has not taken that {name} is a name of {own}; its release is {}",
                    status.version
                )
            } else {
                format!("it cannot be reached, and may not know {name}")
            };
            (format!("cluster {}", status.member.record.cluster), why)
        });
        named.collect()
    }

    pub(super) async fn release_name(&mut self, name: TrustDomain) -> Result<Option<String>, Refusal> {
        let own = self.config.cluster.clone();
        if !self.core.is_listed(&name) {
            return Ok(None);
        }
        let speaker = self.speaker();
        if speaker == own {
            let drop = NameChange::Drop { name, force: true };
            self.change_names(&own, &drop).await?;
            return Ok(None);
        }
        Ok(Some(format!(
            "the other clusters still take {name} for a name of this one; run on {speaker}: tombolo cluster grant {own} \
             --drop-trust-domain {name}"
        )))
    }
}
