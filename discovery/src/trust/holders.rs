//! Who is ready for the next step: members, other clusters, and certificates that are still out.

use crate::{
    enroll::{expiry, trust_domain_of},
    federation::Shown,
    fleet::{DRAINING, View, liveness::Standing},
    xds::{SubscriberState, TypeState},
};
use std::collections::BTreeMap;
use tombolo_ca::Authority;
use tombolo_federation::Standing as Membership;
use tombolo_identity::utc;
use tombolo_proto::type_url;
use tombolo_types::{DeviceId, TrustDomain};

/// Names that are shown of each kind at most.
const NAMES_MAX: usize = 20;
/// A member whose control stream is lost is expected back for so long: a restart of its agent, another address.
const LOST_MAX_MS: i64 = 5_000;

/// Somebody, and what is to be known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// `namespace/name` of a VM, `cluster NAME`, or the identity of a client of another kind.
    pub who: String,
    /// Why it is listed.
    pub why: String,
}

/// Who holds the roots that are published now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holders {
    /// Connected members and clusters that have said that they hold them.
    pub holding: usize,
    /// Connected ones that have not: in the way of a switch.
    pub behind: Vec<Named>,
    /// Enrolled VMs that are not connected. They follow when they come back.
    pub away: Vec<Named>,
    /// Clients of other kinds (ztunnel, Envoy): roots come to them with their next certificate.
    pub by_certificate: Vec<Named>,
}

fn bundle(row: &SubscriberState) -> Option<&TypeState> {
    row.types.get(type_url::TRUST_BUNDLE)
}

/// Who of those who are there holds the bundle of this version.
pub(super) fn holders(
    view: &View,
    rows: &[SubscriberState],
    version: &str,
    clusters: &Shown,
    now_unix_ms: i64,
) -> Holders {
    let mut found = Holders::default();
    let name_of = |device: &str| {
        let member = device
            .parse()
            .ok()
            .and_then(|id: DeviceId| view.members.get(&id))?;
        let (namespace, spec) = (&member.device.metadata.namespace, &member.device.spec);
        Some(format!("{namespace}/{}", spec.workload_entry))
    };
    // A device may have two streams for a moment: it holds what one of them does.
    let mut devices: BTreeMap<&str, Option<String>> = BTreeMap::new();
    for row in rows {
        let holds = bundle(row).is_some_and(|state| state.own.as_deref() == Some(version));
        match (&row.device, bundle(row)) {
            (Some(device), state) => {
                let why = match state.and_then(|state| state.last_nack.as_deref()) {
                    Some(nack) => format!("it refused them: {nack}"),
                    None => "it has not acknowledged them yet".to_owned(),
                };
                let slot = devices.entry(device).or_insert_with(|| Some(why));
                if holds {
                    *slot = None;
                }
            }
            (None, Some(_)) if holds => found.holding += 1,
            (None, Some(_)) => found.behind.push(Named {
                who: row.identity.clone(),
                why: "it has not acknowledged them yet".into(),
            }),
            (None, None) => found.by_certificate.push(Named {
                who: row.identity.clone(),
                why: format!("from {}", row.from),
            }),
        }
    }
    for (device, behind) in &devices {
        match behind {
            None => found.holding += 1,
            Some(why) => found.behind.push(Named {
                who: name_of(device).unwrap_or_else(|| format!("device {device}")),
                why: why.clone(),
            }),
        }
    }
    for (id, member) in &view.members {
        let there = devices.contains_key(id.to_string().as_str());
        if there || member.device.spec.revoked.is_some() {
            continue;
        }
        let (namespace, spec) = (&member.device.metadata.namespace, &member.device.spec);
        let who = format!("{namespace}/{}", spec.workload_entry);
        // Stopped on purpose it says so, and stays in the list of endpoints until its time is over.
        let stopped = member
            .report
            .as_ref()
            .is_some_and(|report| report.message == DRAINING);
        match &member.standing {
            _ if stopped => found.away.push(Named {
                who,
                why: "it was stopped".into(),
            }),
            None | Some(Standing::Out(_)) => found.away.push(Named {
                who,
                why: member.state().reason,
            }),
            // Alive as far as is known, and not told: soon after a start of discovery, or its network was just cut. Of
            // hosts that nobody can dial discovery never knows more than that: they do not hold a rotation up for ever.
            Some(Standing::Connected | Standing::Suspect(_))
                if view.in_grace || now_unix_ms < member.since_unix_ms + LOST_MAX_MS =>
            {
                found.behind.push(Named {
                    who,
                    why: "its control stream is not back yet".into(),
                });
            }
            Some(Standing::Connected | Standing::Suspect(_)) => found.away.push(Named {
                who,
                why: "its control stream is lost".into(),
            }),
        }
    }
    for member in &clusters.members {
        let (status, record) = (&member.status, &member.status.member.record);
        if *record.cluster == *clusters.own || status.member.standing != Membership::Live {
            continue;
        }
        if status.in_step {
            found.holding += 1;
        } else {
            let why = if status.connected {
                "it has not confirmed them yet"
            } else {
                "it cannot be reached"
            };
            found.behind.push(Named {
                who: format!("cluster {}", record.cluster),
                why: why.into(),
            });
        }
    }
    found
}

/// Certificates that only the old root vouches for and that are still good.
pub(super) fn outstanding(view: &View, signs: &Authority, others_until: u64, now_unix: u64) -> Vec<Named> {
    let mut found = Vec::new();
    for member in view.members.values() {
        let spec = &member.device.spec;
        if spec.revoked.is_some() || signs.has_signed(&spec.cert_chain) {
            continue;
        }
        if let Some(until) = expiry(&spec.cert_chain).filter(|until| *until > now_unix) {
            let where_ = if member.is_connected() {
                ""
            } else {
                "; the VM is away"
            };
            found.push(Named {
                who: format!("{}/{}", member.device.metadata.namespace, spec.workload_entry),
                why: format!(
                    "its certificate of the old root is good until {}{where_}",
                    utc(until)
                ),
            });
        }
    }
    if others_until > now_unix {
        found.push(Named {
            who: "clients without a device (ztunnel, Envoy)".into(),
            why: format!(
                "certificates of the old root may be out until {}",
                utc(others_until)
            ),
        });
    }
    found
}

/// Certificates for a name that the trust domain is about to lose, and that are still good.
pub(super) fn named_after(view: &View, old: &TrustDomain, others_until: u64, now_unix: u64) -> Vec<Named> {
    let mut found = Vec::new();
    for member in view.members.values() {
        let spec = &member.device.spec;
        if spec.revoked.is_some() || trust_domain_of(&spec.cert_chain).is_none_or(|name| name != *old) {
            continue;
        }
        if let Some(until) = expiry(&spec.cert_chain).filter(|until| *until > now_unix) {
            let where_ = if member.is_connected() {
                ""
            } else {
                "; the VM is away"
            };
            found.push(Named {
                who: format!("{}/{}", member.device.metadata.namespace, spec.workload_entry),
                why: format!("its certificate for {old} is good until {}{where_}", utc(until)),
            });
        }
    }
    if others_until > now_unix {
        found.push(Named {
            who: "clients without a device (ztunnel, Envoy)".into(),
            why: format!("certificates for {old} may be out until {}", utc(others_until)),
        });
    }
    found
}

/// A list as one sentence, cut where it gets long.
pub(super) fn told(list: &[Named]) -> String {
    let shown = list.iter().take(NAMES_MAX);
    let mut text: Vec<String> = shown
        .map(|named| format!("{} ({})", named.who, named.why))
        .collect();
    if list.len() > NAMES_MAX {
        text.push(format!("and {} more", list.len() - NAMES_MAX));
    }
    text.join(", ")
}
