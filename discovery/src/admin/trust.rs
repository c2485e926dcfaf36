//! The roots that are believed, the rotation of the own one, and the renaming of the own trust domain.

use super::{AdminService, Call};
use crate::{
    refusal::Refusal,
    roles::{Thing, Verb},
    trust::{Asked, AskedName, Migration, NameStatus, Named, OwnNames, Rotation, Status},
};
use std::collections::BTreeMap;
use tombolo_federation::Standing;
use tombolo_identity::{TrustBundle, certificates_to_pem, root_facts, root_pin};
use tombolo_proto::tombolo::admin::v1 as pb;
use tombolo_types::TrustDomain;

/// Characters of a name that are kept in the audit log.
const NAME_MAX: usize = 253;

impl AdminService {
    pub(super) async fn trust(&self, call: &Call) -> Result<pb::ListTrustResponse, Refusal> {
        self.authorize(call, Verb::Read, Thing::Cluster, None, "Trust *")?;
        let mesh = &self.context.mesh;
        let status = mesh.trust.show().await?;
        let shown = self.context.federation.show().await?;
        let own_domain = mesh.settings.trust_domain.clone();
        let mut roots = own_roots(
            &own_domain,
            &shown.own,
            &mesh.trust.authority().bundle_pem(),
            &status,
        );
        for member in &shown.members {
            let member = &member.status.member;
            let record = &member.record;
            if member.standing == Standing::Live && *record.cluster != *shown.own {
                let none = BTreeMap::new();
                roots.extend(listed(
                    &record.trust_domain,
                    &record.cluster,
                    member.roots_pem(),
                    &none,
                    "",
                ));
            }
        }
        Ok(pb::ListTrustResponse {
            roots,
            rotation: Some(rotation(status)),
            names: Some(names(mesh.trust.names().await?)),
        })
    }

    pub(super) async fn rotate(
        &self,
        call: &Call,
        request: &pb::RotateTrustRequest,
    ) -> Result<pb::RotateTrustResponse, Refusal> {
        let trust = &self.context.mesh.trust;
        let object = format!("Trust {}", self.context.mesh.settings.trust_domain);
        self.authorize(call, Verb::Update, Thing::Cluster, None, &object)?;
        let step = Rotation::find(&request.step)
            .ok_or_else(|| Refusal::invalid("a step is start, switch, finish, abort or cut"))?;
        let asked = Asked {
            rotation: step,
            force: request.force,
            dry_run: request.dry_run,
            by: call.caller.to_string(),
        };
        let verb = match (step, request.force) {
            (Rotation::Switch | Rotation::Finish, true) => format!("rotate-{} --force", step.as_str()),
            _ => format!("rotate-{}", step.as_str()),
        };
        let before = trust.authority().root_pin();
        let result = trust.rotate(asked).await;
        // What was only asked for changes nothing; a refusal is told.
        if !request.dry_run || result.is_err() {
            let pin = |pin: [u8; 32]| crate::audit::sha256(&pin);
            let after = result.as_ref().ok().map(|_| pin(trust.authority().root_pin()));
            self.record(
                call,
                &verb,
                &object,
                (Some(pin(before)), after),
                result.as_ref().map(|_| ()),
            );
        }
        Ok(pb::RotateTrustResponse {
            rotation: Some(rotation(result?)),
        })
    }
}

impl AdminService {
    pub(super) async fn migrate(
        &self,
        call: &Call,
        request: &pb::MigrateTrustRequest,
    ) -> Result<pb::MigrateTrustResponse, Refusal> {
        let mesh = &self.context.mesh;
        let object = format!("Trust {}", mesh.settings.trust_domain);
        self.authorize(call, Verb::Update, Thing::Cluster, None, &object)?;
        let step = Migration::find(&request.step)
            .ok_or_else(|| Refusal::invalid("a step is start, switch, finish or abort"))?;
        let asked = AskedName {
            migration: step,
            name: request.trust_domain.clone(),
            force: request.force,
            dry_run: request.dry_run,
            by: call.caller.to_string(),
        };
        let mut verb = format!("migrate-{}", step.as_str());
        if step == Migration::Start {
            let name: String = request.trust_domain.chars().take(NAME_MAX).collect();
            verb = format!("{verb} {name}");
        }
        if matches!(step, Migration::Switch | Migration::Finish) && request.force {
            verb.push_str(" --force");
        }
        let digest = |names: &OwnNames| {
            let all: Vec<&str> = names.all().map(TrustDomain::as_str).collect();
            crate::audit::sha256(all.join(" ").as_bytes())
        };
        let before = mesh.trust.names().await?.names;
        let result = mesh.trust.migrate(asked).await;
        // What was only asked for changes nothing; a refusal is told.
        if !request.dry_run || result.is_err() {
            let after = result.as_ref().ok().map(|status| digest(&status.names));
            let outcome = result.as_ref().map(|_| ());
            self.record(call, &verb, &object, (Some(digest(&before)), after), outcome);
        }
        Ok(pb::MigrateTrustResponse {
            names: Some(names(result?)),
        })
    }
}

fn names(status: NameStatus) -> pb::NamesStatus {
    let texts = |all: &[TrustDomain]| all.iter().map(ToString::to_string).collect();
    pb::NamesStatus {
        trust_domain: status.names.signing.to_string(),
        also: texts(&status.names.also),
        former: texts(&status.names.former),
        migration: Some(rotation(status.status)),
    }
}

/// Own roots with what each is for.
fn own_roots(
    trust_domain: &TrustDomain,
    cluster: &str,
    bundle_pem: &str,
    status: &Status,
) -> Vec<pb::TrustedRoot> {
    let beside = if status.step == "started" {
        "coming"
    } else {
        "leaving"
    };
    let mut states = BTreeMap::new();
    for (pem, state) in [(&status.beside_pem, beside), (&status.retired_pem, "retired")] {
        // The empty text of a step without one is no bundle.
        let found = TrustBundle::from_pem(trust_domain.clone(), pem);
        for root in found.iter().flat_map(TrustBundle::roots) {
            states.insert(root.to_vec(), state);
        }
    }
    listed(trust_domain, cluster, bundle_pem, &states, "signing")
}

/// Roots of a text, retired ones last. What cannot be read is believed by nobody.
fn listed(
    trust_domain: &TrustDomain,
    cluster: &str,
    pem: &str,
    states: &BTreeMap<Vec<u8>, &str>,
    otherwise: &str,
) -> Vec<pb::TrustedRoot> {
    let Ok(bundle) = TrustBundle::from_pem(trust_domain.clone(), pem) else {
        return Vec::new();
    };
    let ms = |seconds: u64| i64::try_from(seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
    let live = bundle.roots().iter().map(|root| (root, otherwise));
    let all = live.chain(bundle.retired().iter().map(|root| (root, "retired")));
    all.filter_map(|(root, otherwise)| {
        let (Ok(pin), Ok(facts)) = (root_pin(root), root_facts(root)) else {
            return None;
        };
        let state = states.get(root.as_ref()).copied().unwrap_or(otherwise);
        Some(pb::TrustedRoot {
            trust_domain: trust_domain.to_string(),
            cluster: cluster.to_owned(),
            pin: pin.to_vec(),
            subject: facts.subject,
            not_before_unix_ms: ms(facts.not_before),
            not_after_unix_ms: ms(facts.not_after),
            pem: certificates_to_pem([root]),
            state: state.to_owned(),
        })
    })
    .collect()
}

fn rotation(status: Status) -> pb::RotationStatus {
    let named = |list: Vec<Named>| {
        let one = |Named { who, why }| pb::NamedReason { who, why };
        list.into_iter().map(one).collect()
    };
    pb::RotationStatus {
        step: status.step.into(),
        since_unix_ms: status.since_unix_ms,
        by: status.by,
        next: status.next.into_iter().map(str::to_owned).collect(),
        holding: u32::try_from(status.holders.holding).unwrap_or(u32::MAX),
        behind: named(status.holders.behind),
        away: named(status.holders.away),
        by_certificate: named(status.holders.by_certificate),
        blockers: named(status.blockers),
        notes: status.notes,
    }
}
