use super::{Namespace, apply::DryRun};
use crate::{failure::Failure, files::Files, objects, output, sockets::Sockets};
use std::{path::PathBuf, process::ExitCode};
use tombolo_config::Kind;
use tombolo_proto::tombolo::admin::v1::DeleteRequest;
use tombolo_types::Code;

/// Delete objects by name or from files.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// KIND NAME... or KIND/NAME...
    #[arg(
        required_unless_present = "files",
        conflicts_with = "files",
        value_name = "KIND NAME"
    )]
    words: Vec<String>,
    /// File, directory, or - for standard input; may be given several times.
    #[arg(short = 'f', long = "filename", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Look into the directories below, too.
    #[arg(short = 'R', long)]
    recursive: bool,
    #[command(flatten)]
    namespace: Namespace,
    /// All objects of the kind in the namespace.
    #[arg(long)]
    all: bool,
    /// An object that is not there is no error.
    #[arg(long)]
    ignore_not_found: bool,
    /// Do everything but the write.
    #[arg(long, value_enum, value_name = "WHERE", default_value = "none", num_args = 0..=1, default_missing_value = "server", require_equals = true)]
    dry_run: DryRun,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let mut doomed: Vec<(Kind, String, String)> = Vec::new();
    let mut admin = sockets.admin().await?;
    if args.words.is_empty() {
        let files = Files {
            files: args.files.clone(),
            recursive: args.recursive,
        };
        let resources = files.read(args.namespace.given())?;
        doomed.extend(
            resources
                .iter()
                .map(|r| (r.kind(), r.namespace().to_owned(), r.name().to_owned())),
        );
    } else {
        let namespace = args.namespace.or_default();
        for target in objects::targets(&args.words)? {
            let names = match target.name {
                Some(name) => vec![name],
                None if args.all => {
                    let found = objects::list(&mut admin, target.kind, namespace).await?;
                    found
                        .iter()
                        .map(|object| objects::at(object, "/metadata/name").to_owned())
                        .collect()
                }
                None => {
                    return Err(Failure::usage(
                        "a name is missing; --all deletes all of the kind in the namespace",
                    ));
                }
            };
            doomed.extend(
                names
                    .into_iter()
                    .map(|name| (target.kind, namespace.to_owned(), name)),
            );
        }
    }
    let note = match args.dry_run {
        DryRun::None => "",
        DryRun::Client => " (dry run)",
        DryRun::Server => " (server dry run)",
    };
    let mut failed = None;
    for (kind, namespace, name) in doomed {
        if args.dry_run != DryRun::Client {
            let request = DeleteRequest {
                kind: kind.name().to_owned(),
                namespace,
                name: name.clone(),
                dry_run: args.dry_run == DryRun::Server,
            };
            if let Err(status) = admin.delete(request).await {
                let failure = Failure::from(status);
                match failure.code() {
                    Some(Code::NotFound) if args.ignore_not_found => {}
                    Some(Code::NotFound) => {
                        let _ = failure.report(); // the others are deleted all the same, as kubectl does
                        failed = Some(failure.exit());
                    }
                    _ => return Err(failure),
                }
                continue;
            }
        }
        // As kubectl: the core group has no name.
        let kind = objects::title(kind, "");
        let kind = kind.trim_end_matches('/');
        output::line(format!("{kind} {name:?} deleted{note}"));
    }
    Ok(failed.map_or(ExitCode::SUCCESS, ExitCode::from))
}
