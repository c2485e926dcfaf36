use super::Namespaces;
use crate::{
    failure::Failure,
    objects::Admin,
    output::{self, Format, Output, Table},
    sockets::Sockets,
    text,
};
use serde_json::{Value, json};
use std::process::ExitCode;
use tombolo_config::nearest;
use tombolo_control_client::host;
use tombolo_proto::tombolo::admin::v1::{
    DeleteVmRequest, HealthRequest, ListVmsRequest, ReadmitVmRequest, RevokeVmRequest, Vm,
};
use tombolo_types::Code;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Every enrolled VM and how it is.
    #[command(visible_alias = "ls")]
    List(List),
    /// One VM.
    Describe(Describe),
    /// Cut a VM off: its connections end now, its key is refused from now on.
    Revoke(Revoke),
    /// Forget a VM and its WorkloadEntry.
    Delete(Named),
    /// Let a VM that was refused as a copy come back with its present key.
    Readmit(Named),
}

/// Every enrolled VM and how it is.
#[derive(Debug, clap::Args)]
pub(crate) struct List {
    #[command(flatten)]
    namespaces: Namespaces,
    #[command(flatten)]
    output: Output,
}

/// One VM.
#[derive(Debug, clap::Args)]
pub(crate) struct Describe {
    /// Device id, or NAMESPACE/NAME.
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    output: Output,
}

/// Cut a VM off.
#[derive(Debug, clap::Args)]
pub(crate) struct Revoke {
    /// Device ids, or NAMESPACE/NAME.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    /// Why; it goes into the audit log.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

/// VMs by name.
#[derive(Debug, clap::Args)]
pub(crate) struct Named {
    /// Device ids, or NAMESPACE/NAME.
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

/// The VM that was probably meant: of the same namespace, or of any by its bare name.
fn nearest_vm(vm: &str, found: &[Vm]) -> Option<String> {
    let full = |namespace: &str, name: &str| format!("{namespace}/{name}");
    match vm.split_once('/') {
        Some((namespace, name)) => {
            let there = found.iter().filter(|vm| vm.namespace == namespace);
            nearest(name, there.map(|vm| vm.name.as_str())).map(|name| full(namespace, &name))
        }
        None => found
            .iter()
            .find(|other| other.name == vm)
            .map(|other| full(&other.namespace, &other.name)),
    }
}

pub(crate) async fn run(verb: Verb, sockets: &Sockets) -> Result<ExitCode, Failure> {
    let mut admin = sockets.admin().await?;
    match verb {
        Verb::List(args) => show(&args, &mut admin).await?,
        Verb::Describe(args) => {
            let found = list(&mut admin, "").await?;
            let vm = found
                .iter()
                .find(|vm| vm.device_id == args.vm || format!("{}/{}", vm.namespace, vm.name) == args.vm);
            let vm = vm.ok_or_else(|| {
                let missing = match nearest_vm(&args.vm, &found) {
                    Some(meant) => format!("VM {}; did you mean {meant}?", args.vm),
                    None => format!("VM {}; tombolo vm list -A lists them", args.vm),
                };
                Failure::coded(Code::NotFound, missing)
            })?;
            match args.output.format() {
                format @ (Format::Json | Format::Yaml) => output::value(format, &value(vm))?,
                Format::Table | Format::Wide | Format::Name => output::print(&described(vm)),
            }
        }
        Verb::Revoke(args) => {
            for vm in args.vms {
                admin
                    .revoke_vm(RevokeVmRequest {
                        vm: vm.clone(),
                        reason: args.reason.clone(),
                    })
                    .await?;
                output::line(format!("vm {vm} revoked"));
            }
        }
        Verb::Delete(args) => {
            for vm in args.vms {
                admin.delete_vm(DeleteVmRequest { vm: vm.clone() }).await?;
                output::line(format!("vm {vm} deleted"));
            }
        }
        Verb::Readmit(args) => {
            for vm in args.vms {
                admin.readmit_vm(ReadmitVmRequest { vm: vm.clone() }).await?;
                output::line(format!("vm {vm} readmitted"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(admin: &mut Admin, namespace: &str) -> Result<Vec<Vm>, Failure> {
    let mut request = ListVmsRequest {
        namespace: namespace.to_owned(),
        limit: 500,
        continue_token: String::new(),
    };
    let mut found = Vec::new();
    loop {
        let page = admin.list_vms(request.clone()).await?.into_inner();
        found.extend(page.vms);
        if page.continue_token.is_empty() {
            return Ok(found);
        }
        request.continue_token = page.continue_token;
    }
}

async fn show(args: &List, admin: &mut Admin) -> Result<(), Failure> {
    // The fleet is one: without -n all of it is meant.
    let namespace = args.namespaces.given().unwrap_or_default();
    let vms = list(admin, namespace).await?;
    let format = args.output.format();
    match format {
        Format::Json | Format::Yaml => {
            output::value(format, &json!({"vms": vms.iter().map(value).collect::<Vec<_>>()}))?;
        }
        Format::Name => vms
            .iter()
            .for_each(|vm| output::line(format!("{}/{}", vm.namespace, vm.name))),
        Format::Table | Format::Wide => {
            output::print(&table(&vms, format == Format::Wide).render());
            let health = admin.health(HealthRequest {}).await?.into_inner();
            for condition in health
                .conditions
                .iter()
                .filter(|condition| condition.status == "True")
            {
                eprintln!("note: {}", condition.message);
            }
        }
    }
    Ok(())
}

fn table(vms: &[Vm], wide: bool) -> Table {
    let mut header = vec![
        "NAMESPACE",
        "NAME",
        "STATE",
        "ADDRESSES",
        "HOSTNAME",
        "AGE",
        "REASON",
    ];
    if wide {
        header.extend([
            "DEVICE",
            "GROUP",
            "SERVICE-ACCOUNT",
            "NETWORK",
            "CERTIFICATE",
            "AGENT",
        ]);
    }
    let mut table = Table::new(&header);
    let now = host::now_unix_ms();
    for vm in vms {
        let mut cells = vec![
            vm.namespace.clone(),
            vm.name.clone(),
            vm.state.clone(),
            vm.addresses.join(","),
            vm.hostname.clone(),
            text::age(now - vm.enrolled_unix_ms),
            if vm.reason.is_empty() {
                "-".to_owned()
            } else {
                vm.reason.clone()
            },
        ];
        if wide {
            cells.extend([
                vm.device_id.clone(),
                vm.workload_group.clone(),
                vm.service_account.clone(),
                vm.network.clone(),
                text::relative(vm.certificate_expires_unix_ms, now),
                vm.agent_version.clone(),
            ]);
        }
        table.row(cells);
    }
    table
}

fn value(vm: &Vm) -> Value {
    let conditions = vm.conditions.iter().map(|c| {
        json!({"type": c.r#type, "status": c.status, "reason": c.reason, "message": c.message,
            "lastTransitionTime": text::time(c.last_transition_unix_ms)})
    });
    json!({
        "deviceId": vm.device_id, "namespace": vm.namespace, "name": vm.name, "workloadGroup": vm.workload_group,
        "serviceAccount": vm.service_account, "hostname": vm.hostname, "addresses": vm.addresses, "state": vm.state,
        "reason": vm.reason, "connected": vm.connected, "enrolled": text::time(vm.enrolled_unix_ms),
        "certificateExpires": text::time(vm.certificate_expires_unix_ms), "agentVersion": vm.agent_version,
        "generation": vm.generation, "network": vm.network, "conditions": conditions.collect::<Vec<_>>(),
    })
}

fn described(vm: &Vm) -> String {
    let now = host::now_unix_ms();
    let reason = if vm.reason.is_empty() {
        String::new()
    } else {
        format!(" ({})", vm.reason)
    };
    let fields = [
        ("Name", format!("{}/{}", vm.namespace, vm.name)),
        ("Device", vm.device_id.clone()),
        ("State", format!("{}{reason}", vm.state)),
        ("Connected", if vm.connected { "yes" } else { "no" }.to_owned()),
        ("Group", vm.workload_group.clone()),
        ("Account", vm.service_account.clone()),
        ("Hostname", vm.hostname.clone()),
        ("Addresses", vm.addresses.join(", ")),
        (
            "Network",
            if vm.network.is_empty() {
                "(default)".to_owned()
            } else {
                vm.network.clone()
            },
        ),
        (
            "Enrolled",
            format!(
                "{} ({})",
                text::time(vm.enrolled_unix_ms),
                text::relative(vm.enrolled_unix_ms, now)
            ),
        ),
        (
            "Certificate",
            format!(
                "generation {}, expires {}",
                vm.generation,
                text::relative(vm.certificate_expires_unix_ms, now)
            ),
        ),
        ("Agent", vm.agent_version.clone()),
    ];
    let mut shown: String = fields
        .iter()
        .map(|(name, value)| format!("{:<13}{value}\n", format!("{name}:")))
        .collect();
    if !vm.conditions.is_empty() {
        let mut table = Table::new(&["TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"]);
        for c in &vm.conditions {
            let since = text::age(now - c.last_transition_unix_ms);
            table.row(vec![
                c.r#type.clone(),
                c.status.clone(),
                since,
                c.reason.clone(),
                c.message.clone(),
            ]);
        }
        shown.push_str("Conditions:\n");
        shown.push_str(&text::indented(&table.render(), 2));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fleet_at_a_glance() {
        let vm = Vm {
            device_id: "00000000000000ab".into(),
            namespace: "shop".into(),
            name: "catalog-00000000000000ab".into(),
            state: "Unhealthy".into(),
            reason: "connection refused".into(),
            addresses: vec!["10.0.0.1".into()],
            enrolled_unix_ms: host::now_unix_ms() - 90_000,
            ..Default::default()
        };
        let narrow = table(std::slice::from_ref(&vm), false).render();
        assert!(
            narrow.contains("Unhealthy") && narrow.contains("connection refused") && narrow.contains("90s"),
            "{narrow}"
        );
        assert!(
            !narrow.contains("   00000000000000ab")
                && table(std::slice::from_ref(&vm), true)
                    .render()
                    .contains("   00000000000000ab")
        );
        assert!(
            described(&vm).contains("State:       Unhealthy (connection refused)\n"),
            "{}",
            described(&vm)
        );
    }
}
