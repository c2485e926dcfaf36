//! What everybody may read of the fleet: an immutable snapshot, replaced by the owner after each change.

use super::liveness::Standing;
use imbl::{OrdMap, OrdSet};
use std::{net::IpAddr, sync::Arc};
use tombolo_config::{DeviceSpec, Object};
use tombolo_types::{Code, DeviceId};

/// What an agent said about its application.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Report {
    /// Well, or not.
    pub healthy: bool,
    /// Why not.
    #[serde(default)]
    pub message: String,
}

/// A device and how it stands.
#[derive(Debug, Clone)]
pub struct Member {
    /// As stored.
    pub device: Object<DeviceSpec>,
    /// Address of its WorkloadEntry.
    pub address: Option<IpAddr>,
    /// Locality of its WorkloadEntry, `region/zone/subzone`; empty if it has none.
    pub locality: String,
    /// Status of its WorkloadEntry, as stored.
    pub entry_status: Option<serde_json::Value>,
    /// By its control stream and the witness; `None` for a device without a WorkloadEntry.
    pub standing: Option<Standing>,
    /// The last report of its probe.
    pub report: Option<Report>,
    /// Its group has a probe, and nothing was reported yet.
    pub awaits_report: bool,
    /// Unix ms of the last change of its standing or report.
    pub since_unix_ms: i64,
}

/// State of a member, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberState {
    /// Healthy, Unhealthy, Suspect, Away, Revoked.
    pub state: &'static str,
    /// Why; empty if healthy.
    pub reason: String,
}

impl Member {
    /// One word and the reason.
    pub fn state(&self) -> MemberState {
        let made = |state, reason: String| MemberState { state, reason };
        if let Some(revoked) = &self.device.spec.revoked {
            return made("Revoked", revoked.reason.clone());
        }
        match &self.standing {
            Some(Standing::Out(reason)) => return made("Away", reason.clone()),
            None => return made("Away", "it has no WorkloadEntry".into()),
            Some(Standing::Connected | Standing::Suspect(_)) => {}
        }
        match &self.report {
            Some(report) if !report.healthy => {
                return made("Unhealthy", coded(&report.message));
            }
            None if self.awaits_report => return made("Unhealthy", "its probe has not reported yet".into()),
            _ => {}
        }
        match &self.standing {
            Some(Standing::Suspect(reason)) => made("Suspect", reason.clone()),
            _ => made("Healthy", String::new()),
        }
    }

    /// True if clients may choose it.
    pub fn is_chosen(&self) -> bool {
        matches!(self.state().state, "Healthy" | "Suspect")
    }

    /// True while its control stream is up.
    pub fn is_connected(&self) -> bool {
        self.standing == Some(Standing::Connected)
    }
}

/// What an agent said, under the code that it gave; without one it is what its probe has found.
fn coded(message: &str) -> String {
    match message.split_once(' ') {
        Some((code, _)) if Code::find(code).is_some() => message.to_owned(),
        _ => Code::ProbeFailing.message(message),
    }
}

/// The snapshot. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Everything that the store holds up to this version is in.
    pub resource_version: u64,
    /// All enrolled devices, revoked ones too; deleted ones only as [`Self::revoked`].
    pub members: OrdMap<DeviceId, Arc<Member>>,
    /// `(namespace, WorkloadEntry)` to its device.
    pub by_entry: OrdMap<(String, String), DeviceId>,
    /// `(network, address)` to `(namespace, WorkloadEntry)`.
    pub by_address: OrdMap<(String, IpAddr), (String, String)>,
    /// Namespace of each JoinToken by its name.
    pub tokens: OrdMap<String, String>,
    /// Devices whose certificates and keys are refused.
    pub revoked: OrdSet<DeviceId>,
    /// Networks whose brake is engaged.
    pub braked: Vec<Arc<str>>,
    /// The start grace holds.
    pub in_grace: bool,
}

impl View {
    /// Finds a member by device id or `namespace/name`.
    pub fn find(&self, vm: &str) -> Option<(DeviceId, &Arc<Member>)> {
        let id = match vm.split_once('/') {
            Some((namespace, name)) => *self.by_entry.get(&(namespace.to_owned(), name.to_owned()))?,
            None => vm.parse().ok()?,
        };
        self.members.get(&id).map(|member| (id, member))
    }

    /// The member of a WorkloadEntry.
    pub fn member_of_entry(&self, namespace: &str, entry: &str) -> Option<&Arc<Member>> {
        self.members
            .get(self.by_entry.get(&(namespace.to_owned(), entry.to_owned()))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_keeps_the_code_that_it_has() {
        let own = Code::ProbeRefused.message("exec");
        assert_eq!(coded(&own), own);
        assert_eq!(
            coded("connection refused"),
            Code::ProbeFailing.message("connection refused")
        );
        assert!(coded("TMB9999 x").starts_with("TMB0306 "), "no code of ours");
    }
}
