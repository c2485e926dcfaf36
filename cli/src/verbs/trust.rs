use crate::{
    failure::Failure,
    output::{self, Format, Output, Table},
    sockets::Sockets,
    text,
};
use serde_json::json;
use std::process::ExitCode;
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{ListTrustRequest, TrustedRoot};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// The roots that are believed, by trust domain, and which cluster says so.
    Show(Show),
}

/// The roots that are believed.
#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let Verb::Show(args) = verb;
    let mut admin = sockets.admin().await?;
    let roots = admin.list_trust(ListTrustRequest {}).await?.into_inner().roots;
    match args.output.format() {
        format @ (Format::Json | Format::Yaml) => {
            let roots: Vec<_> = roots
                .iter()
                .map(|root| {
                    json!({
                        "trustDomain": root.trust_domain, "cluster": root.cluster, "pin": pin(root),
                        "subject": root.subject, "notBefore": text::time(root.not_before_unix_ms),
                        "notAfter": text::time(root.not_after_unix_ms), "pem": root.pem,
                    })
                })
                .collect();
            output::value(format, &json!({ "roots": roots }))?;
        }
        Format::Name => roots.iter().for_each(|root| output::line(pin(root))),
        format @ (Format::Table | Format::Wide) => {
            output::print(&table(&roots, format == Format::Wide, host::now_unix_ms()).render());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn pin(root: &TrustedRoot) -> String {
    let hex: String = root.pin.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn table(roots: &[TrustedRoot], wide: bool, now_unix_ms: i64) -> Table {
    let mut header = vec!["TRUST DOMAIN", "CLUSTER", "EXPIRES", "PIN OF ROOT"];
    if wide {
        header.push("SUBJECT");
    }
    let mut table = Table::new(&header);
    for root in roots {
        let mut cells = vec![
            root.trust_domain.clone(),
            root.cluster.clone(),
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
        assert!(text.contains("east.example"), "{text}");
    }
}
