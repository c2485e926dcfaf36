//! The files of an Istio VM, read so that it can be taken over: a WorkloadGroup, its service, settings of the agent, and
//! a word about every key that has no counterpart.
//!
//! Source: `istioctl x workload entry configure` (istio/istioctl/pkg/workload): `cluster.env` has one `KEY='value'` a
//! line, `mesh.yaml` a ProxyConfig under `defaultConfig`.

mod keys;
#[cfg(test)]
mod tests;

use crate::{
    Diagnostic, NewPort, NewWorkloadGroup, Object, Probe, Resource, ServiceEntrySpec, WorkloadGroupSpec,
    annotation, typed, yaml,
};
use keys::{Fate, fate};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The texts. Only `cluster_env` must be there.
#[derive(Debug, Clone, Copy, Default)]
pub struct IstioVmFiles<'a> {
    /// `cluster.env`, on the VM in `/var/lib/istio/envoy`.
    pub cluster_env: &'a str,
    /// `mesh.yaml`, on the VM `/etc/istio/config/mesh`.
    pub mesh_yaml: Option<&'a str>,
    /// `hosts`, on the VM the last lines of `/etc/hosts`.
    pub hosts: Option<&'a str>,
    /// The WorkloadGroup that istioctl was given: it says more than the files that were made of it.
    pub workload_group: Option<&'a str>,
    /// For example `mesh.internal`.
    pub mesh_domain: &'a str,
}

/// A key and what becomes of it, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Where it was read: `cluster.env`, `mesh.yaml`, `hosts`.
    pub file: &'static str,
    /// The key.
    pub key: String,
    /// What becomes of it.
    pub text: String,
}

/// What came of the files.
#[derive(Debug, Clone, PartialEq)]
pub struct IstioVm {
    /// To be applied.
    pub group: Object<WorkloadGroupSpec>,
    /// To be applied, unless a service of that name is there already: gives the VMs their name.
    pub service: Object<ServiceEntrySpec>,
    /// Lines of `/etc/tombolo/agent.yaml`.
    pub agent: Vec<(String, Value)>,
    /// The trust domain that the VM was in; empty: `cluster.local`.
    pub trust_domain: String,
    /// What was taken over in another form, or needs no counterpart.
    pub notes: Vec<Note>,
    /// What has no counterpart, and keys that are not known.
    pub lost: Vec<Note>,
}

/// Reads the files.
///
/// `ports` overrides the ports of the service: the files say only where the application listens, not what clients
/// connect to.
///
/// # Errors
/// With every line that cannot be read, or what is missing to name a group.
pub fn read_istio_vm(files: &IstioVmFiles<'_>, ports: &[NewPort]) -> Result<IstioVm, Vec<Diagnostic>> {
    let env = shell_lines(files.cluster_env)?;
    let config = proxy_config(files.mesh_yaml)?;
    let mut all = metadata(&config)?;
    all.extend(env.clone());
    let get = |key: &str| all.get(key).map_or("", String::as_str);
    let first = |keys: &[&str]| keys.iter().map(|key| get(key)).find(|text| !text.is_empty());
    let missing = |what: &str| vec![Diagnostic::error("cluster.env", format!("{what} is missing"))];

    let namespace = first(&["ISTIO_NAMESPACE", "POD_NAMESPACE"]).ok_or_else(|| missing("ISTIO_NAMESPACE"))?;
    let of_service = get("ISTIO_SERVICE").split('.').next().unwrap_or_default();
    let name = first(&["ISTIO_META_WORKLOAD_NAME", "ISTIO_META_AUTO_REGISTER_GROUP"])
        .or(Some(of_service).filter(|name| !name.is_empty()))
        .ok_or_else(|| missing("ISTIO_META_WORKLOAD_NAME"))?;
    let mut all_ports = false;
    let declared = match (get("ISTIO_META_POD_PORTS"), get("ISTIO_INBOUND_PORTS")) {
        ("", "" | "*") => {
            all_ports = get("ISTIO_INBOUND_PORTS") == "*";
            Vec::new()
        }
        ("", list) => listed(list)?,
        (json, _) => pod_ports(json)?,
    };
    let new = NewWorkloadGroup {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        service_account: get("SERVICE_ACCOUNT").to_owned(),
        ports: over(&declared, ports),
        labels: labels(get("ISTIO_METAJSON_LABELS"))?,
        network: get("ISTIO_META_NETWORK").to_owned(),
        mesh_domain: files.mesh_domain.to_owned(),
        exported: false,
        outbound_only: false,
    };
    let (mut group, service) = new.objects()?;
    group.spec.probe = config
        .get("readinessProbe")
        .map(|probe| typed::typed::<Probe>(probe.clone()).map_err(|found| within("readinessProbe", found)))
        .transpose()?;
    if all_ports {
        group
            .metadata
            .annotations
            .insert(annotation::DELIVER_ALL_PORTS.into(), "true".into());
    }
    if let Some(text) = files.workload_group {
        group = own_group(text, &group)?;
    }
    let mut vm = IstioVm {
        group,
        service,
        agent: Vec::new(),
        trust_domain: get("TRUST_DOMAIN").to_owned(),
        notes: Vec::new(),
        lost: Vec::new(),
    };
    vm.judge("cluster.env", env.keys().map(String::as_str), "");
    let of_mesh = metadata(&config)?;
    let only_there = of_mesh.keys().filter(|key| !env.contains_key(*key));
    vm.judge("mesh.yaml", only_there.map(String::as_str), "proxyMetadata.");
    vm.settings(&config);
    if let Some(hosts) = files.hosts.filter(|hosts| !hosts.trim().is_empty()) {
        let text = format!(
            "take this line out of /etc/hosts when Istio is gone: {}",
            hosts.trim()
        );
        vm.note("hosts", "hosts", text);
    }
    Ok(vm)
}

impl IstioVm {
    fn note(&mut self, file: &'static str, key: &str, text: impl Into<String>) {
        let (key, text) = (key.to_owned(), text.into());
        self.notes.push(Note { file, key, text });
    }

    fn judge<'a>(&mut self, file: &'static str, keys: impl Iterator<Item = &'a str>, prefix: &str) {
        for key in keys {
            let shown = format!("{prefix}{key}");
            match fate(key) {
                Fate::Taken(text) => self.note(file, &shown, text),
                Fate::Lost(text) => self.lost.push(Note {
                    file,
                    key: shown,
                    text: text.to_owned(),
                }),
            }
        }
    }

    /// ProxyConfig: what the agent has a setting for, and what it has not.
    fn settings(&mut self, config: &Map<String, Value>) {
        for (key, value) in config {
            match key.as_str() {
                "proxyMetadata" => {}
                "readinessProbe" => self.note("mesh.yaml", key, "probe of the WorkloadGroup"),
                "discoveryAddress" => self.note("mesh.yaml", key, "the join token says where discovery is"),
                "concurrency" if value.is_u64() => {
                    self.agent.push(("workers".into(), value.clone()));
                    self.note("mesh.yaml", key, "workers in agent.yaml");
                }
                "terminationDrainDuration" | "drainDuration" => match seconds(value) {
                    Some(seconds) => {
                        self.agent.retain(|(key, _)| key != "drain_seconds");
                        self.agent.push(("drain_seconds".into(), seconds.into()));
                        self.note("mesh.yaml", key, "drain_seconds in agent.yaml");
                    }
                    None => self.lost.push(Note {
                        file: "mesh.yaml",
                        key: key.clone(),
                        text: "not a time such as 45s".into(),
                    }),
                },
                _ => self.lost.push(Note {
                    file: "mesh.yaml",
                    key: key.clone(),
                    text: keys::of_proxy_config(key).to_owned(),
                }),
            }
        }
    }

    /// The two objects, as they are applied.
    pub fn resources(&self) -> Vec<Resource> {
        vec![self.group.clone().into(), self.service.clone().into()]
    }
}

fn within(path: &str, found: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let inner = |mut finding: Diagnostic| {
        finding.path = format!("{path}.{}", finding.path)
            .trim_end_matches('.')
            .to_owned();
        finding
    };
    found.into_iter().map(inner).collect()
}

/// The group that istioctl was given, with the label by which the service finds its VMs.
fn own_group(
    text: &str,
    made: &Object<WorkloadGroupSpec>,
) -> Result<Object<WorkloadGroupSpec>, Vec<Diagnostic>> {
    let resources = crate::read_documents(text)?;
    let Some(Resource::WorkloadGroup(mut group)) = resources
        .into_iter()
        .find(|resource| matches!(resource, Resource::WorkloadGroup(_)))
    else {
        return Err(vec![Diagnostic::error("", "there is no WorkloadGroup in it")]);
    };
    if (&group.metadata.namespace, &group.metadata.name) != (&made.metadata.namespace, &made.metadata.name) {
        let cause = format!(
            "it is {}/{}, but the files are of {}/{}",
            group.metadata.namespace, group.metadata.name, made.metadata.namespace, made.metadata.name
        );
        return Err(vec![Diagnostic::error("metadata", cause)]);
    }
    for (key, value) in &made.spec.metadata.labels {
        if !group.spec.template.labels.contains_key(key) {
            group
                .spec
                .metadata
                .labels
                .entry(key.clone())
                .or_insert_with(|| value.clone());
        }
    }
    if group.spec.probe.is_none() {
        group.spec.probe.clone_from(&made.spec.probe);
    }
    Ok(group)
}

/// Lines of `KEY=value` as a shell reads them: quotes, `\'` between them, comments, `export`.
fn shell_lines(text: &str) -> Result<BTreeMap<String, String>, Vec<Diagnostic>> {
    let (mut all, mut refused) = (BTreeMap::new(), Vec::new());
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let parsed = line
            .split_once('=')
            .filter(|(key, _)| !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
            .and_then(|(key, value)| Some((key.to_owned(), unquoted(value)?)));
        match parsed {
            Some((key, value)) => {
                all.insert(key, value);
            }
            None => refused.push(Diagnostic::error(
                format!("cluster.env line {}", number + 1),
                "not KEY='value'",
            )),
        }
    }
    if refused.is_empty() { Ok(all) } else { Err(refused) }
}

fn unquoted(text: &str) -> Option<String> {
    let (mut value, mut rest) = (String::new(), text.chars());
    while let Some(c) = rest.next() {
        match c {
            '\'' => loop {
                match rest.next()? {
                    '\'' => break,
                    c => value.push(c),
                }
            },
            '"' => loop {
                match rest.next()? {
                    '"' => break,
                    '\\' => value.push(rest.next()?),
                    c => value.push(c),
                }
            },
            '\\' => value.push(rest.next()?),
            c if c.is_whitespace() => return rest.as_str().trim_start().starts_with('#').then_some(value),
            c => value.push(c),
        }
    }
    Some(value)
}

fn proxy_config(text: Option<&str>) -> Result<Map<String, Value>, Vec<Diagnostic>> {
    let Some(text) = text else { return Ok(Map::new()) };
    match yaml::documents(text)?.into_iter().next() {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(mut file)) => match file.remove("defaultConfig") {
            Some(Value::Object(config)) => Ok(config),
            None | Some(Value::Null) => Ok(Map::new()),
            Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
                Err(vec![Diagnostic::error("defaultConfig", "must be a map")])
            }
        },
        Some(Value::Bool(_) | Value::Number(_) | Value::String(_) | Value::Array(_)) => {
            Err(vec![Diagnostic::error(
                "mesh.yaml",
                "must be a map with defaultConfig",
            )])
        }
    }
}

fn metadata(config: &Map<String, Value>) -> Result<BTreeMap<String, String>, Vec<Diagnostic>> {
    match config.get("proxyMetadata") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(map) => typed::typed(map.clone()).map_err(|found| within("proxyMetadata", found)),
    }
}

fn labels(json: &str) -> Result<BTreeMap<String, String>, Vec<Diagnostic>> {
    if json.is_empty() {
        return Ok(BTreeMap::new());
    }
    serde_json::from_str(json)
        .map_err(|error| vec![Diagnostic::error("ISTIO_METAJSON_LABELS", error.to_string())])
}

/// `[{"name":"http","containerPort":8080,"protocol":"TCP"}]`.
fn pod_ports(json: &str) -> Result<Vec<NewPort>, Vec<Diagnostic>> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct PodPort {
        #[serde(default)]
        name: String,
        container_port: u16,
    }
    let refused =
        |error: &dyn std::fmt::Display| vec![Diagnostic::error("ISTIO_META_POD_PORTS", error.to_string())];
    let ports: Vec<PodPort> = serde_json::from_str(json).map_err(|error| refused(&error))?;
    let named = ports.into_iter().map(|port| {
        let name = if port.name.is_empty() {
            format!("tcp-{}", port.container_port)
        } else {
            port.name
        };
        format!("{name}={}", port.container_port)
    });
    named
        .map(|text| text.parse().map_err(|error: String| refused(&error)))
        .collect()
}

/// `8080,9090`.
fn listed(list: &str) -> Result<Vec<NewPort>, Vec<Diagnostic>> {
    list.split(',')
        .map(str::trim)
        .filter(|port| !port.is_empty())
        .map(|port| {
            format!("tcp-{port}={port}")
                .parse()
                .map_err(|error: String| vec![Diagnostic::error("ISTIO_INBOUND_PORTS", error)])
        })
        .collect()
}

/// The declared ports with the numbers that were given for them, and what was given beside them.
fn over(declared: &[NewPort], given: &[NewPort]) -> Vec<NewPort> {
    let other = |port: &&NewPort| {
        !given
            .iter()
            .any(|g| g.name == port.name || g.target_port == port.target_port)
    };
    given
        .iter()
        .chain(declared.iter().filter(other))
        .cloned()
        .collect()
}

/// `45s`, `1m30s` in whole seconds.
fn seconds(value: &Value) -> Option<u64> {
    let span: jiff::SignedDuration = value.as_str()?.parse().ok()?;
    u64::try_from(span.as_secs()).ok()
}
