//! One name of the trust domain after another: plan, confirm, apply, verify.

use super::rotate::{Forced, Plain, told};
use crate::{failure::Failure, output, sockets::Sockets, verbs::cluster::confirm};
use std::time::{Duration, Instant};
use tombolo_proto::tombolo::admin::v1::{ListTrustRequest, MigrateTrustRequest, NamesStatus};

/// How long a step is watched until discovery is open anew and everybody who is there has confirmed.
const VERIFY_MAX: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Step {
    /// Have everybody believe identities of NEW beside those of the present trust domain. Certificates stay as they are.
    Start(Start),
    /// Make certificates for the new name. They are renewed soon after; both names are believed.
    Switch(Forced),
    /// The old name lets nobody in any more. Connections that it let in run on.
    Finish(Forced),
    /// Take a start back: the new name is forgotten.
    Abort(Plain),
}

/// Have everybody believe a second name.
#[derive(Debug, clap::Args)]
pub(crate) struct Start {
    /// The new trust domain.
    #[arg(value_name = "NEW")]
    name: String,
    #[command(flatten)]
    plain: Plain,
}

impl Step {
    fn request(&self) -> MigrateTrustRequest {
        let step = match self {
            Self::Start(_) => "start",
            Self::Switch(_) => "switch",
            Self::Finish(_) => "finish",
            Self::Abort(_) => "abort",
        };
        MigrateTrustRequest {
            step: step.into(),
            trust_domain: match self {
                Self::Start(start) => start.name.clone(),
                Self::Switch(_) | Self::Finish(_) | Self::Abort(_) => String::new(),
            },
            force: match self {
                Self::Switch(forced) | Self::Finish(forced) => forced.force,
                Self::Start(_) | Self::Abort(_) => false,
            },
            dry_run: true,
        }
    }

    fn yes(&self) -> bool {
        match self {
            Self::Start(start) => start.plain.yes,
            Self::Switch(forced) | Self::Finish(forced) => forced.yes,
            Self::Abort(plain) => plain.yes,
        }
    }

    /// What it does, for people.
    fn text(&self) -> &'static str {
        match self {
            Self::Start(_) => {
                "Every agent and gateway believes identities of the new name as well, by the same roots; a policy that names\n\
                 one of the two means both. Certificates stay as they are. tombolo trust migrate abort takes it back."
            }
            Self::Switch(_) => {
                "Certificates are made for the new name from now on, and members renew theirs within minutes. Both names are\n\
                 believed; new join tokens are of the new one. There is no way back but another renaming."
            }
            Self::Finish(_) => {
                "The old name lets nobody in from now on, and a policy that names it alone matches nobody. Connections that it\n\
                 let in run on. For 90 days discovery is found under the old name too: a VM that was away follows."
            }
            Self::Abort(_) => "The new name is forgotten.",
        }
    }
}

pub(super) async fn migrate(step: &Step, sockets: &Sockets) -> Result<(), Failure> {
    let request = step.request();
    let mut admin = sockets.admin().await?;
    let plan = admin.migrate_trust(request.clone()).await?.into_inner().names;
    let plan = plan.unwrap_or_default();
    output::line(step.text());
    output::print(&told(&plan.migration.unwrap_or_default(), request.force));
    confirm(&format!("Migrate: {}?", request.step), step.yes())?;
    let request = MigrateTrustRequest {
        dry_run: false,
        ..request
    };
    let name = request.step.clone();
    let done = admin
        .migrate_trust(request)
        .await?
        .into_inner()
        .names
        .unwrap_or_default();
    drop(admin);
    let names = verify(sockets, &done).await?;
    let status = names.migration.clone().unwrap_or_default();
    output::line(format!("Done: {name}. {}", names_of(&names)));
    output::print(&told(&status, true));
    for note in done.migration.iter().flat_map(|made| &made.notes) {
        output::line(format!("To do: {note}"));
    }
    if let Some(next) = status.next.first().filter(|_| status.step != "steady") {
        output::line(format!("Next: tombolo trust migrate {next}"));
    }
    Ok(())
}

/// Looks until discovery is open anew and everybody who is there has confirmed, or the time is up: then it is said who
/// has not. The step is made whatever comes of this.
async fn verify(sockets: &Sockets, wanted: &NamesStatus) -> Result<NamesStatus, Failure> {
    let end = Instant::now() + VERIFY_MAX;
    loop {
        let shown = async {
            let answer = sockets.admin().await?.list_trust(ListTrustRequest {}).await?;
            Ok::<_, Failure>(answer.into_inner().names.unwrap_or_default())
        };
        let late = Instant::now() >= end;
        match shown.await {
            Ok(names) if is_in_force(&names, wanted) || late => return Ok(names),
            Err(failure) if late => return Err(failure),
            Ok(_) | Err(_) => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

fn is_in_force(names: &NamesStatus, wanted: &NamesStatus) -> bool {
    let behind = names
        .migration
        .as_ref()
        .is_some_and(|status| !status.behind.is_empty());
    (&names.trust_domain, &names.also) == (&wanted.trust_domain, &wanted.also) && !behind
}

/// The names in one sentence.
pub(super) fn names_of(names: &NamesStatus) -> String {
    let mut text = format!("Trust domain: {}", names.trust_domain);
    if !names.also.is_empty() {
        text.push_str(&format!("; believed too: {}", names.also.join(", ")));
    }
    if !names.former.is_empty() {
        text.push_str(&format!(
            "; discovery is still found under {}",
            names.former.join(", ")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_and_waited_for() {
        let mut names = NamesStatus {
            trust_domain: "new.example".into(),
            also: vec!["old.example".into()],
            former: vec!["first.example".into()],
            ..NamesStatus::default()
        };
        assert_eq!(
            names_of(&names),
            "Trust domain: new.example; believed too: old.example; discovery is still found under first.example"
        );
        let wanted = names.clone();
        assert!(is_in_force(&names, &wanted));
        names.also.clear();
        assert!(!is_in_force(&names, &wanted));
    }
}
