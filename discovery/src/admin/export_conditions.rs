//! What became of an export, as conditions of the object that asks for it.
//!
//! | object | condition | meaning |
//! |---|---|---|
//! | ServiceExport | Valid | there is such a service, it may be exported, and the set of clusters takes it |
//! | ServiceExport | Ready | it is offered to the other clusters |
//! | ServiceExport | Conflict | another cluster exports the same service with other ports |
//! | ServiceEntry | Exported | as Ready; only where something asks for the export |
//!
//! Source: sigs.k8s.io/mcs-api v1alpha1 ServiceExport; Ready is of its v1beta1.

use crate::{
    conditions::{self, Condition},
    fleet::{Fleet, ShownExport},
};
use serde_json::Value;
use tombolo_config::{Kind, Resource};
use tombolo_registry::ExportVerdict;
use tombolo_types::Code;

const VALID: &str = "Valid";
const READY: &str = "Ready";
const CONFLICT: &str = "Conflict";
const EXPORTED: &str = "Exported";

/// Writes them into the status of an object that is answered.
pub(super) fn set(resource: &mut Resource, fleet: &Fleet) {
    let kind = resource.kind();
    if !matches!(kind, Kind::ServiceEntry | Kind::ServiceExport) {
        return;
    }
    let key = (kind, resource.namespace().into(), resource.name().into());
    let exported = fleet.exported();
    let shown = exported.get(&key);
    let status = resource.status_mut();
    match (kind, shown) {
        (Kind::ServiceExport, Some(shown)) => service_export(status, shown),
        (Kind::ServiceExport, None) => pending(status),
        (_, Some(shown)) => service(status, shown),
        (_, None) => conditions::clear(status, EXPORTED),
    }
}

/// Reason and message of a verdict, and whether it is good.
fn told(verdict: &ExportVerdict, good: &'static str) -> (bool, String, String) {
    match verdict {
        ExportVerdict::Exported(by) => (true, good.to_owned(), format!("exported by {}", by.text())),
        ExportVerdict::Invalid { reason, message } => (false, (*reason).to_owned(), message.clone()),
        ExportVerdict::Refused(message) => {
            let code = message.split_whitespace().next().unwrap_or_default();
            let reason = Code::find(code).map_or("Refused", |_| code);
            (false, reason.to_owned(), message.clone())
        }
    }
}

fn service_export(status: &mut Option<Value>, shown: &ShownExport) {
    let mut put = |kind: &'static str, (status_is, reason, message): (bool, String, String)| {
        let condition = Condition {
            kind,
            status: status_is,
            reason,
            message,
            since_unix_ms: shown.since_unix_ms,
        };
        conditions::set(status, &condition);
    };
    let verdict = &shown.state.verdict;
    put(VALID, told(verdict, VALID));
    let (ready, reason, message) = told(verdict, EXPORTED);
    let reason = if ready { reason } else { "Failed".to_owned() };
    put(READY, (ready, reason, message));
    put(
        CONFLICT,
        match &shown.state.conflict {
            Some(conflict) => (true, "PortConflict".to_owned(), conflict.clone()),
            None => (false, "NoConflicts".to_owned(), String::new()),
        },
    );
}

/// It was written just now.
fn pending(status: &mut Option<Value>) {
    let condition = Condition {
        kind: READY,
        status: false,
        reason: "Pending".to_owned(),
        message: "not looked at yet".to_owned(),
        since_unix_ms: jiff::Timestamp::now().as_millisecond(),
    };
    conditions::set(status, &condition);
}

fn service(status: &mut Option<Value>, shown: &ShownExport) {
    let (exported, reason, mut message) = told(&shown.state.verdict, EXPORTED);
    if let Some(conflict) = &shown.state.conflict {
        message = format!("{message}; {conflict}");
    }
    let condition = Condition {
        kind: EXPORTED,
        status: exported,
        reason,
        message,
        since_unix_ms: shown.since_unix_ms,
    };
    conditions::set(status, &condition);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_registry::{ExportState, ExportedBy};

    fn shown(verdict: ExportVerdict, conflict: Option<&str>) -> ShownExport {
        ShownExport {
            state: ExportState {
                verdict,
                conflict: conflict.map(str::to_owned),
            },
            since_unix_ms: 1000,
        }
    }

    fn of_export(shown: &ShownExport) -> Vec<String> {
        let mut status = None;
        service_export(&mut status, shown);
        let all = conditions::list(status.as_ref());
        all.into_iter()
            .map(|(kind, status, reason, ..)| format!("{kind}={status} {reason}"))
            .collect()
    }

    #[test]
    fn conditions_of_a_service_export() {
        assert_eq!(
            of_export(&shown(ExportVerdict::Exported(ExportedBy::ServiceExport), None)),
            [
                "Valid=True Valid",
                "Ready=True Exported",
                "Conflict=False NoConflicts"
            ]
        );
        let refused = Code::ExportOutsideGrant.message("shop/catalog");
        assert_eq!(
            of_export(&shown(ExportVerdict::Refused(refused), Some("port http"))),
            [
                "Valid=False TMB0716",
                "Ready=False Failed",
                "Conflict=True PortConflict"
            ]
        );
        let invalid = ExportVerdict::Invalid {
            reason: "NoService",
            message: "x".into(),
        };
        assert_eq!(of_export(&shown(invalid, None))[0], "Valid=False NoService");
    }

    #[test]
    fn a_service_says_who_exports_it() {
        let mut status = None;
        service(
            &mut status,
            &shown(ExportVerdict::Exported(ExportedBy::Namespace), None),
        );
        let (kind, status, reason, message, since) = conditions::list(status.as_ref()).remove(0);
        assert_eq!(
            (kind.as_str(), status.as_str(), reason.as_str(), since),
            ("Exported", "True", "Exported", 1000)
        );
        assert!(message.contains("Namespace"), "{message}");
    }
}
