//! `tombolo config from-istio DIR`: an Istio VM's files in our words.

use crate::{
    failure::Failure,
    output::{self, Format},
    sockets::Sockets,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};
use tombolo_config::{IstioVm, IstioVmFiles, NewPort, Note, Resource, read_istio_vm};
use tombolo_proto::tombolo::admin::v1::MeshRequest;
use tombolo_types::Code;

/// Where Istio's package has them on a VM, below the folder that is named; the folder that istioctl wrote has them flat.
const CLUSTER_ENV: [&str; 2] = ["cluster.env", "var/lib/istio/envoy/cluster.env"];
const MESH_YAML: [&str; 2] = ["mesh.yaml", "etc/istio/config/mesh"];
const HOSTS: [&str; 1] = ["hosts"];
/// Longest file that is read; istioctl's have a few KiB.
const FILE_MAX: u64 = 1 << 20;
/// Without discovery at hand.
const DEFAULT_MESH_DOMAIN: &str = "mesh.internal";

/// Take an Istio VM over: print its WorkloadGroup and service, and what has no counterpart.
///
/// Reads cluster.env, mesh.yaml and hosts as `istioctl x workload entry configure` writes them; `/` reads them where
/// they are on a VM. The objects go to standard output (pipe them to `tombolo apply -f -`), the rest to standard error.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with the files, or / on the VM.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// The WorkloadGroup that istioctl was given; it says more than the files.
    #[arg(long, value_name = "FILE")]
    workload_group: Option<PathBuf>,
    /// NAME=SERVICE_PORT:VM_PORT: what clients connect to; the files say only where the application listens.
    #[arg(long = "port", value_name = "PORT")]
    ports: Vec<NewPort>,
    /// Mesh domain; asked of discovery if it runs here.
    #[arg(long, value_name = "DOMAIN")]
    mesh_domain: Option<String>,
    /// Write the settings of the agent into this file (a new one, else /etc/tombolo/agent.yaml is named in a note).
    #[arg(long, value_name = "FILE")]
    agent_file: Option<PathBuf>,
    /// yaml or json.
    #[arg(short, long, value_enum, default_value = "yaml")]
    output: Objects,
}

/// Form of the objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Objects {
    /// YAML documents.
    Yaml,
    /// A JSON list, with the notes.
    Json,
}

pub(crate) async fn run(args: &Args, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let mesh_domain = match &args.mesh_domain {
        Some(domain) => domain.clone(),
        None => asked(sockets)
            .await
            .unwrap_or_else(|| DEFAULT_MESH_DOMAIN.to_owned()),
    };
    let vm = read(args, &mesh_domain)?;
    if let Some(path) = &args.agent_file {
        write_settings(path, &vm)?;
    }
    match args.output {
        Objects::Yaml => {
            let documents: Result<Vec<String>, Failure> = vm
                .resources()
                .iter()
                .map(|resource| output::rendered(Format::Yaml, &resource.to_json()))
                .collect();
            output::print(&documents?.join("---\n"));
            eprint!("{}", report(&vm, args.agent_file.as_deref()));
        }
        Objects::Json => {
            let notes = |notes: &[Note]| -> Vec<serde_json::Value> {
                notes
                    .iter()
                    .map(|note| serde_json::json!({"file": note.file, "key": note.key, "text": note.text}))
                    .collect()
            };
            let agent: serde_json::Map<String, serde_json::Value> = vm.agent.iter().cloned().collect();
            output::value(
                Format::Json,
                &serde_json::json!({
                    "objects": vm.resources().iter().map(Resource::to_json).collect::<Vec<_>>(),
                    "agent": agent, "trustDomain": vm.trust_domain,
                    "taken": notes(&vm.notes), "lost": notes(&vm.lost),
                }),
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn asked(sockets: &Sockets) -> Option<String> {
    let mut admin = sockets.admin().await.ok()?;
    Some(admin.mesh(MeshRequest {}).await.ok()?.into_inner().mesh_domain)
}

fn refused(cause: impl std::fmt::Display) -> Failure {
    Failure::coded(Code::IstioFiles, cause)
}

fn text_of(path: &Path) -> Result<Option<String>, Failure> {
    let named = |error: io::Error| refused(format_args!("{}: {error}", path.display()));
    match fs::metadata(path) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(named(error)),
        Ok(metadata) if metadata.len() > FILE_MAX => {
            return Err(refused(format_args!("{}: longer than 1 MiB", path.display())));
        }
        Ok(metadata) if !metadata.is_file() => return Ok(None),
        Ok(_) => {}
    }
    fs::read_to_string(path).map(Some).map_err(named)
}

fn first(dir: &Path, names: &[&str]) -> Result<Option<String>, Failure> {
    for name in names {
        if let Some(text) = text_of(&dir.join(name))? {
            return Ok(Some(text));
        }
    }
    Ok(None)
}

fn read(args: &Args, mesh_domain: &str) -> Result<IstioVm, Failure> {
    let cluster_env = first(&args.dir, &CLUSTER_ENV)?
        .ok_or_else(|| refused(format_args!("{} has no cluster.env", args.dir.display())))?;
    let (mesh_yaml, hosts) = (first(&args.dir, &MESH_YAML)?, first(&args.dir, &HOSTS)?);
    let workload_group = match &args.workload_group {
        Some(path) => {
            Some(text_of(path)?.ok_or_else(|| refused(format_args!("{} is not there", path.display())))?)
        }
        None => None,
    };
    let files = IstioVmFiles {
        cluster_env: &cluster_env,
        mesh_yaml: mesh_yaml.as_deref(),
        hosts: hosts.as_deref(),
        workload_group: workload_group.as_deref(),
        mesh_domain,
    };
    read_istio_vm(&files, &args.ports).map_err(|findings| {
        let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
        refused(format_args!("{}: {}", args.dir.display(), lines.join("; ")))
    })
}

fn settings(vm: &IstioVm) -> String {
    vm.agent
        .iter()
        .map(|(key, value)| format!("{key}: {value}\n"))
        .collect()
}

/// Never over a file that is there: it is the word of the host's owner.
fn write_settings(path: &Path, vm: &IstioVm) -> Result<(), Failure> {
    use std::io::Write as _;
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .and_then(|mut file| file.write_all(settings(vm).as_bytes()));
    written.map_err(|error| {
        refused(format_args!(
            "{}: {error}; add to it: {}",
            path.display(),
            settings(vm).trim().replace('\n', ", ")
        ))
    })
}

fn report(vm: &IstioVm, written: Option<&Path>) -> String {
    let mut text = String::new();
    let table = |title: &str, notes: &[Note]| {
        let rows = notes
            .iter()
            .map(|note| format!("  {:<11} {:<30} {}\n", note.file, note.key, note.text))
            .collect::<String>();
        if rows.is_empty() {
            rows
        } else {
            format!("{title}\n{rows}")
        }
    };
    text.push_str(&table("Taken over, or not needed any more:", &vm.notes));
    text.push_str(&table("WITHOUT A COUNTERPART:", &vm.lost));
    if !vm.agent.is_empty() {
        let place = written.map_or_else(
            || "Add to /etc/tombolo/agent.yaml on the VM:".to_owned(),
            |path| format!("Written to {}:", path.display()),
        );
        text.push_str(&format!("{place}\n"));
        for line in settings(vm).lines() {
            text.push_str(&format!("  {line}\n"));
        }
    }
    if !vm.trust_domain.is_empty() {
        text.push_str(&format!(
            "Policies that name principals of {0} must name the trust domain of this mesh: {0}/ns/x/sa/y becomes */ns/x/sa/y or TRUST_DOMAIN/ns/x/sa/y.\n",
            vm.trust_domain
        ));
    }
    text.push_str("istio-token and root-cert.pem are not needed: the VM joins with `tombolo up TOKEN`.\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(dir: &Path) -> Args {
        Args {
            dir: dir.into(),
            workload_group: None,
            ports: Vec::new(),
            mesh_domain: None,
            agent_file: None,
            output: Objects::Yaml,
        }
    }

    #[test]
    fn a_folder_of_istioctl_and_a_vm() {
        let dir = tempfile::tempdir().unwrap();
        let code = |result: Result<IstioVm, Failure>| result.unwrap_err().code();
        assert_eq!(
            code(read(&args(dir.path()), "mesh.internal")),
            Some(Code::IstioFiles)
        );
        let env = "ISTIO_SERVICE='a.b'\nISTIO_NAMESPACE='b'\nSERVICE_ACCOUNT='c'\nODD='1'\n";
        for (n, name) in CLUSTER_ENV.iter().rev().enumerate() {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, env.replace("'c'", &format!("'c{n}'"))).unwrap();
            let vm = read(&args(dir.path()), "mesh.internal").unwrap();
            assert_eq!(vm.group.spec.template.service_account, format!("c{n}"));
            let text = report(&vm, None);
            assert!(
                text.contains("WITHOUT A COUNTERPART") && text.contains("ODD"),
                "{text}"
            );
        }
        fs::write(dir.path().join("cluster.env"), "no line of a shell").unwrap();
        assert_eq!(
            code(read(&args(dir.path()), "mesh.internal")),
            Some(Code::IstioFiles)
        );
    }

    #[test]
    fn a_file_of_the_owner_is_never_written_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("cluster.env"),
            "ISTIO_SERVICE=a.b\nISTIO_NAMESPACE=b\n",
        )
        .unwrap();
        fs::write(dir.path().join("mesh.yaml"), "defaultConfig: {concurrency: 3}\n").unwrap();
        let vm = read(&args(dir.path()), "mesh.internal").unwrap();
        let path = dir.path().join("agent.yaml");
        write_settings(&path, &vm).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "workers: 3\n");
        let Failure::Problem(problem) = write_settings(&path, &vm).unwrap_err() else {
            panic!()
        };
        assert!(problem.cause.contains("add to it: workers: 3"), "{problem}");
    }
}
