use super::Namespace;
use crate::{
    failure::Failure,
    files::Files,
    objects,
    output::{self, Format, Output},
    sockets::Sockets,
};
use serde_json::{Value, json};
use std::process::ExitCode;
use tombolo_config::{Kind, Resource};
use tombolo_proto::tombolo::admin::v1::Applied;

/// Where a dry run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DryRun {
    /// Write.
    None,
    /// Only print what would be sent.
    Client,
    /// Everything but the write.
    Server,
}

/// Create or change objects from files. One transaction: all or none.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    namespace: Namespace,
    /// Do everything but the write.
    #[arg(long, value_enum, value_name = "WHERE", default_value = "none", num_args = 0..=1, default_missing_value = "server", require_equals = true)]
    dry_run: DryRun,
    #[command(flatten)]
    output: Output,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let resources = args.files.read(args.namespace.given())?;
    write(&resources, args.dry_run, false, args.output.format(), sockets).await
}

/// Writes resources and prints what came of each, in kubectl's words.
pub(crate) async fn write(
    resources: &[Resource],
    dry_run: DryRun,
    create_only: bool,
    format: Format,
    sockets: &Sockets,
) -> Result<ExitCode, Failure> {
    if dry_run == DryRun::Client {
        let outcome = |resource: &Resource| Applied {
            object: Some(tombolo_proto::tombolo::admin::v1::Object {
                json: resource.to_json().to_string(),
            }),
            outcome: "created".to_owned(),
            warnings: vec![],
        };
        print(
            &resources.iter().map(outcome).collect::<Vec<_>>(),
            " (dry run)",
            format,
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut admin = sockets.admin().await?;
    let applied = objects::apply(&mut admin, resources, dry_run == DryRun::Server, create_only).await?;
    print(
        &applied,
        if dry_run == DryRun::Server {
            " (server dry run)"
        } else {
            ""
        },
        format,
    )?;
    Ok(ExitCode::SUCCESS)
}

fn print(applied: &[Applied], note: &str, format: Format) -> Result<(), Failure> {
    let mut values: Vec<Value> = Vec::new();
    for one in applied {
        let object = match &one.object {
            Some(object) => objects::json(object)?,
            None => Value::Null,
        };
        let kind = Kind::find(objects::at(&object, "/kind"));
        let title = kind.map_or_else(
            |_| objects::at(&object, "/metadata/name").to_owned(),
            |kind| objects::title(kind, objects::at(&object, "/metadata/name")),
        );
        one.warnings
            .iter()
            .for_each(|warning| eprintln!("warning: {title}: {warning}"));
        match format {
            Format::Table | Format::Wide => output::line(format!("{title} {}{note}", one.outcome)),
            Format::Name => output::line(title),
            Format::Json | Format::Yaml => values.push(object),
        }
    }
    if matches!(format, Format::Json | Format::Yaml) {
        let value = match values.pop() {
            Some(object) if values.is_empty() => object,
            last => {
                values.extend(last);
                json!({"apiVersion": "v1", "kind": "List", "items": values})
            }
        };
        output::value(format, &value)?;
    }
    Ok(())
}
