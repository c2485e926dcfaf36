use super::{
    Namespace,
    apply::{self, DryRun},
};
use crate::{failure::Failure, output::Output, sockets::Sockets};
use std::{collections::BTreeMap, process::ExitCode};
use tombolo_config::{NewPort, NewWorkloadGroup, Resource};
use tombolo_proto::tombolo::admin::v1::MeshRequest;

/// Where the mesh is not asked for its name: `--dry-run=client`.
const DEFAULT_MESH_DOMAIN: &str = "mesh.internal";

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Make a WorkloadGroup, and the ServiceEntry under which it is called.
    Create(Create),
}

/// Make a WorkloadGroup, and the ServiceEntry under which it is called.
#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// Name of the group and of its service.
    #[arg(
        required_unless_present = "long_name",
        conflicts_with = "long_name",
        value_name = "NAME"
    )]
    name: Option<String>,
    /// The same, as istioctl has it.
    #[arg(long = "name", value_name = "NAME")]
    long_name: Option<String>,
    #[command(flatten)]
    namespace: Namespace,
    /// Service account: the identity of its members.
    #[arg(
        long,
        alias = "serviceAccount",
        value_name = "NAME",
        default_value = "default"
    )]
    service_account: String,
    /// NAME=PORT or NAME=SERVICE-PORT:PORT-ON-THE-VM; may be given several times, or as a list with commas.
    #[arg(long = "port", visible_alias = "ports", value_name = "NAME=PORT", value_delimiter = ',', value_parser = port)]
    ports: Vec<NewPort>,
    /// KEY=VALUE labels of the members, with commas.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = label)]
    labels: Vec<(String, String)>,
    /// Network of the members.
    #[arg(long, value_name = "NETWORK", default_value = "")]
    network: String,
    /// Export the service: joined clusters can call it (label istio.io/global).
    #[arg(long, conflicts_with = "no_service")]
    export: bool,
    /// The VMs only dial out, for example behind NAT: they are called through the gateways of their network (annotation
    /// tombolo.io/reach: outbound).
    #[arg(long)]
    outbound: bool,
    /// Only the WorkloadGroup.
    #[arg(long)]
    no_service: bool,
    /// Do everything but the write.
    #[arg(long, value_enum, value_name = "WHERE", default_value = "none", num_args = 0..=1, default_missing_value = "server", require_equals = true)]
    dry_run: DryRun,
    #[command(flatten)]
    output: Output,
}

fn port(text: &str) -> Result<NewPort, String> {
    text.parse::<NewPort>().map_err(|error| error.to_string())
}

/// Reads `key=value`.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not KEY=VALUE")),
    }
}

pub(crate) async fn run(verb: &Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let Verb::Create(args) = verb;
    let mesh_domain = if args.dry_run == DryRun::Client {
        DEFAULT_MESH_DOMAIN.to_owned()
    } else {
        sockets
            .admin()
            .await?
            .mesh(MeshRequest {})
            .await?
            .into_inner()
            .mesh_domain
    };
    let resources = args.resources(mesh_domain)?;
    apply::write(&resources, args.dry_run, true, args.output.format(), sockets).await
}

impl Create {
    fn resources(&self, mesh_domain: String) -> Result<Vec<Resource>, Failure> {
        let new = NewWorkloadGroup {
            name: self
                .name
                .clone()
                .or_else(|| self.long_name.clone())
                .unwrap_or_default(),
            namespace: self.namespace.or_default().to_owned(),
            service_account: self.service_account.clone(),
            ports: self.ports.clone(),
            labels: self.labels.iter().cloned().collect::<BTreeMap<_, _>>(),
            network: self.network.clone(),
            mesh_domain,
            exported: self.export,
            outbound_only: self.outbound,
        };
        let (group, service) = new
            .objects()
            .map_err(|findings| Failure::findings("workload-group create", &findings))?;
        let mut resources = vec![Resource::from(group)];
        if !self.no_service {
            resources.push(service.into());
        }
        Ok(resources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(subcommand)]
        verb: Verb,
    }

    fn resources(line: &str) -> Vec<serde_json::Value> {
        let Verb::Create(create) = Line::parse_from(line.split(' ')).verb;
        create
            .resources("mesh.internal".into())
            .unwrap()
            .iter()
            .map(Resource::to_json)
            .collect()
    }

    #[test]
    fn ours_and_istioctls_flags_say_the_same() {
        let ours = resources(
            "wg create catalog -n shop --service-account cat --port http=80:8080 --port x=1 --labels a=b",
        );
        let theirs = resources(
            "wg create --name catalog -n shop --serviceAccount cat --ports http=80:8080,x=1 --labels a=b",
        );
        assert_eq!(ours, theirs);
        assert_eq!(ours.len(), 2);
        assert_eq!(ours[0]["spec"]["template"]["serviceAccount"], "cat");
        assert_eq!(ours[0]["spec"]["template"]["ports"]["http"], 8080);
        assert_eq!(ours[1]["spec"]["hosts"][0], "catalog.shop.svc.mesh.internal");
        assert_eq!(ours[1]["spec"]["ports"][0]["number"], 80);
        assert_eq!(resources("wg create catalog --no-service").len(), 1);
        let told = resources("wg create catalog --export --outbound");
        assert_eq!(told[0]["metadata"]["annotations"]["tombolo.io/reach"], "outbound");
        assert_eq!(told[1]["metadata"]["labels"]["istio.io/global"], "true");
    }
}
