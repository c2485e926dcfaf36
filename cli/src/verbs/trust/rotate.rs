//! One root after another: plan, confirm, apply, verify.

use super::{pin, state_of};
use crate::{failure::Failure, objects::Admin, output, verbs::cluster::confirm};
use std::time::{Duration, Instant};
use tombolo_proto::tombolo::admin::v1::{
    ListTrustRequest, NamedReason, RotateTrustRequest, RotationStatus, TrustedRoot,
};

/// How long a step is watched until everybody who is there has confirmed it.
const VERIFY_MAX: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Names that are shown of a list.
const SHOWN_MAX: usize = 10;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Step {
    /// Make a new root, cross-signed by the old one, and have everybody believe both. The old one signs on.
    Start(Plain),
    /// Sign with the new root. Certificates are renewed soon after; both roots are believed.
    Switch(Forced),
    /// The old root lets nobody in any more, and its key is removed. Connections that it let in run on.
    Finish(Forced),
    /// Take a start back: the new root is forgotten.
    Abort(Plain),
    /// After finish: cut the connections that the old root let in.
    Cut(Plain),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Plain {
    /// Do not ask for confirmation.
    #[arg(long)]
    pub(super) yes: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Forced {
    /// Do not ask for confirmation.
    #[arg(long)]
    pub(super) yes: bool,
    /// Go on although not everybody is ready; the plan says who is left behind.
    #[arg(long)]
    pub(super) force: bool,
}

impl Step {
    /// Name, what it does, `--yes`, `--force`.
    fn parts(&self) -> (&'static str, &'static str, bool, bool) {
        match self {
            Self::Start(Plain { yes }) => (
                "start",
                "A new root is made, cross-signed by the one that signs now. Both are believed by every agent, gateway and\n\
                 cluster; the old one goes on signing. tombolo trust rotate abort takes it back.",
                *yes,
                false,
            ),
            Self::Switch(Forced { yes, force }) => (
                "switch",
                "The new root signs from now on, and members renew their certificates within minutes. Both roots are believed;\n\
                 new join tokens and invites name the new one. There is no way back but another rotation.",
                *yes,
                *force,
            ),
            Self::Finish(Forced { yes, force }) => (
                "finish",
                "The old root lets nobody in from now on and its key is removed. Connections that it let in run on: for a root\n\
                 that was stolen, cut them after this. Join tokens and invites made before the switch end. A VM that was away\n\
                 follows within 90 days.",
                *yes,
                *force,
            ),
            Self::Abort(Plain { yes }) => (
                "abort",
                "The new root is forgotten and its key removed.",
                *yes,
                false,
            ),
            Self::Cut(Plain { yes }) => (
                "cut",
                "Connections that a retired root let in are cut at once; their callers connect anew.",
                *yes,
                false,
            ),
        }
    }
}

pub(super) async fn rotate(step: &Step, admin: &mut Admin) -> Result<(), Failure> {
    let (name, what, yes, force) = step.parts();
    let request = RotateTrustRequest {
        step: name.into(),
        force,
        dry_run: true,
    };
    let plan = admin.rotate_trust(request.clone()).await?.into_inner().rotation;
    output::line(what);
    output::print(&told(&plan.unwrap_or_default(), force));
    confirm(&format!("Rotate: {name}?"), yes)?;
    let request = RotateTrustRequest {
        dry_run: false,
        ..request
    };
    admin.rotate_trust(request).await?;
    let (roots, status) = verify(admin).await?;
    for root in roots.iter().filter(|root| !root.state.is_empty()) {
        output::line(format!("  {} {}", pin(root), state_of(root)));
    }
    output::line(format!("Done: {name}."));
    output::print(&told(&status, true));
    if let Some(next) = status.next.first().filter(|_| status.step != "steady") {
        output::line(format!("Next: tombolo trust rotate {next}"));
    }
    Ok(())
}

/// Looks until everybody who is there has confirmed, or the time is up: then it is said who has not.
async fn verify(admin: &mut Admin) -> Result<(Vec<TrustedRoot>, RotationStatus), Failure> {
    let end = Instant::now() + VERIFY_MAX;
    loop {
        let found = admin.list_trust(ListTrustRequest {}).await?.into_inner();
        let status = found.rotation.unwrap_or_default();
        if status.behind.is_empty() || Instant::now() >= end {
            return Ok((found.roots, status));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn list(title: &str, names: &[NamedReason]) -> String {
    let mut text = String::new();
    if names.is_empty() {
        return text;
    }
    text.push_str(&format!("{title}:\n"));
    for NamedReason { who, why } in names.iter().take(SHOWN_MAX) {
        text.push_str(&format!("  {who}: {why}\n"));
    }
    if names.len() > SHOWN_MAX {
        text.push_str(&format!("  and {} more\n", names.len() - SHOWN_MAX));
    }
    text
}

/// Who is ready and who is not.
pub(super) fn told(status: &RotationStatus, force: bool) -> String {
    let mut text = format!(
        "{} connected members and clusters hold the published roots and names.\n",
        status.holding
    );
    let waiting = match (status.step.as_str(), force) {
        ("steady", _) => "Not yet",
        (_, true) => "Not ready for the next step",
        (_, false) => "In the way",
    };
    let blockers = if status.step == "steady" {
        &status.behind
    } else {
        &status.blockers
    };
    text.push_str(&list(waiting, blockers));
    text.push_str(&list("Away", &status.away));
    text.push_str(&list(
        "Clients that take roots with their certificates",
        &status.by_certificate,
    ));
    for note in &status.notes {
        text.push_str(&format!("Note: {note}.\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_the_way_is_named() {
        let named = |who: &str| NamedReason {
            who: who.into(),
            why: "it has not acknowledged them yet".into(),
        };
        let status = RotationStatus {
            step: "started".into(),
            holding: 3,
            blockers: vec![named("shop/catalog-1")],
            away: (0..12).map(|n| named(&format!("shop/away-{n}"))).collect(),
            notes: vec!["one thing".into()],
            ..RotationStatus::default()
        };
        let text = told(&status, false);
        assert!(
            text.contains("3 connected") && text.contains("In the way:\n  shop/catalog-1: it has"),
            "{text}"
        );
        assert!(
            text.contains("and 2 more") && text.ends_with("Note: one thing.\n"),
            "{text}"
        );
        assert!(told(&status, true).contains("Not ready for the next step"));
    }
}
