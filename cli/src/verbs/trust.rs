//! The roots that are believed, the rotation of the own one, and the renaming of the own trust domain.

mod migrate;
mod rotate;

use crate::{
    failure::Failure,
    output::{self, Format, Output, Table},
    sockets::Sockets,
    text,
};
use serde_json::json;
use std::process::ExitCode;
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{ListTrustRequest, NamedReason, RotationStatus, TrustedRoot};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// The roots that are believed, by trust domain, and how far a rotation or a renaming is.
    Show(Show),
    /// Replace the root of this mesh, step by step: start, switch, finish. Nobody is interrupted.
    Rotate(Rotate),
    /// Rename the trust domain of this mesh, step by step: start NEW, switch, finish. Nobody is interrupted.
    Migrate(Migrate),
}

/// The roots that are believed.
#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    #[command(flatten)]
    output: Output,
}

/// Replace the root of this mesh.
#[derive(Debug, clap::Args)]
pub(crate) struct Rotate {
    #[command(subcommand)]
    step: rotate::Step,
}

/// Rename the trust domain of this mesh.
#[derive(Debug, clap::Args)]
pub(crate) struct Migrate {
    #[command(subcommand)]
    step: migrate::Step,
}

pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let mut admin = sockets.admin().await?;
    let args = match verb {
        Verb::Show(args) => args,
        Verb::Rotate(args) => {
            rotate::rotate(&args.step, &mut admin).await?;
            return Ok(ExitCode::SUCCESS);
        }
        Verb::Migrate(args) => {
            migrate::migrate(&args.step, sockets).await?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let found = admin.list_trust(ListTrustRequest {}).await?.into_inner();
    let (roots, rotation) = (found.roots, found.rotation.unwrap_or_default());
    let names = found.names.unwrap_or_default();
    let migration = names.migration.clone().unwrap_or_default();
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let roots: Vec<_> = roots
                .iter()
                .map(|root| {
                    json!({
                        "trustDomain": root.trust_domain, "cluster": root.cluster, "pin": pin(root),
                        "subject": root.subject, "notBefore": text::time(root.not_before_unix_ms),
                        "notAfter": text::time(root.not_after_unix_ms), "pem": root.pem, "state": root.state,
                    })
                })
                .collect();
            let shown = json!({
                "trustDomain": names.trust_domain, "also": names.also, "former": names.former,
                "roots": roots, "rotation": value(&rotation), "migration": value(&migration),
            });
            output::value(format, &shown)?;
        }
        Format::Name => roots.iter().for_each(|root| output::line(pin(root))),
        format @ (Format::Table | Format::Wide) => {
            output::print(&table(&roots, format == Format::Wide, host::now_unix_ms()).render());
            if !names.also.is_empty() || !names.former.is_empty() {
                output::line(migrate::names_of(&names));
            }
            for (what, status) in [("Rotation", &rotation), ("Migration", &migration)] {
                if matches!(status.step.as_str(), "" | "steady") {
                    continue;
                }
                output::line(format!(
                    "{what}: {} since {} by {}; next: {}",
                    status.step,
                    text::time(status.since_unix_ms),
                    status.by,
                    status.next.join(" or ")
                ));
                output::print(&rotate::told(status, false));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn value(rotation: &RotationStatus) -> serde_json::Value {
    let named = |list: &[NamedReason]| -> Vec<_> {
        list.iter()
            .map(|NamedReason { who, why }| json!({ "who": who, "why": why }))
            .collect()
    };
    json!({
        "step": rotation.step, "since": text::time(rotation.since_unix_ms), "by": rotation.by, "next": rotation.next,
        "holding": rotation.holding, "behind": named(&rotation.behind), "away": named(&rotation.away),
        "byCertificate": named(&rotation.by_certificate), "blockers": named(&rotation.blockers),
        "notes": rotation.notes,
    })
}

fn pin(root: &TrustedRoot) -> String {
    let hex: String = root.pin.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// What a root is for.
fn state_of(root: &TrustedRoot) -> &str {
    match root.state.as_str() {
        "" => "believed",
        state => state,
    }
}

fn table(roots: &[TrustedRoot], wide: bool, now_unix_ms: i64) -> Table {
    let mut header = vec!["TRUST DOMAIN", "CLUSTER", "STATE", "EXPIRES", "PIN OF ROOT"];
    if wide {
        header.push("SUBJECT");
    }
    let mut table = Table::new(&header);
    for root in roots {
        let mut cells = vec![
            root.trust_domain.clone(),
            root.cluster.clone(),
            state_of(root).to_owned(),
            text::relative(root.not_after_unix_ms, now_unix_ms),
            pin(root),
        ];
        if wide {
            cells.push(root.subject.clone());
        }
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_written_as_tokens_show_it() {
        let root = TrustedRoot {
            trust_domain: "east.example".into(),
            cluster: "east".into(),
            pin: vec![0xab; 32],
            not_after_unix_ms: 3_600_000,
            ..Default::default()
        };
        let text = table(&[root], false, 0).render();
        assert!(text.contains(&format!("sha256:{}", "ab".repeat(32))), "{text}");
        assert!(
            text.contains("east.example") && text.contains("believed"),
            "{text}"
        );
    }
}
