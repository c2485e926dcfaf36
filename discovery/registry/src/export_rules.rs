//! Who says that a service is exported, and what becomes of it.
//!
//! | order | who | says yes | says no |
//! |---|---|---|---|
//! | 1 | `spec.exportTo` of the service | - | anything but `*` or nothing: its author shows it to some namespaces only |
//! | 2 | label `istio.io/global` of the service | `"true"` | `"false"` |
//! | 3 | a ServiceExport of its name | by being there | - |
//! | 4 | label `istio.io/global` of its Namespace | `"true"` | `"false"` |
//! | 5 | the settings | its namespace is listed, or `*` is and it is not reserved | - |
//!
//! The first that says anything holds. After that the set of clusters has a say: what it refuses
//! ([`Registry::set_refused_exports`]) is told to nobody, not to the own gateways either.

use crate::{
    Export, Registry, ServicePort,
    changes::within,
    content::ObjectKey,
    imports::imported_key,
    state::{ServiceState, object_key},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};
use tombolo_config::{Kind, NamespaceSpec, Object, ServiceExportSpec, exports};
use tombolo_types::reserved_namespace;

/// Namespace and name of a service, as clusters tell each other.
type ServiceName = (Arc<str>, Arc<str>);

/// What was said about export, and by whom.
#[derive(Debug, Default)]
pub(crate) struct ExportRules {
    /// Namespaces of the settings.
    pub(crate) settings: BTreeSet<String>,
    /// Names of ServiceExports.
    services: BTreeSet<ServiceName>,
    /// Labels of Namespaces.
    namespaces: BTreeMap<Arc<str>, bool>,
    /// What the set of clusters refuses, and why.
    refused: BTreeMap<ServiceName, String>,
}

/// Who exports a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExportedBy {
    /// Its label.
    Label,
    /// A ServiceExport.
    ServiceExport,
    /// The label of its Namespace.
    Namespace,
    /// The settings of discovery.
    Settings,
}

impl ExportedBy {
    /// For people.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Label => "its label istio.io/global",
            Self::ServiceExport => "a ServiceExport",
            Self::Namespace => "the label istio.io/global of its Namespace",
            Self::Settings => "export_namespaces of discovery",
        }
    }
}

/// What became of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportVerdict {
    /// Offered to the other clusters.
    Exported(ExportedBy),
    /// Not offered: what stands here forbids it.
    Invalid {
        /// One word, as the Multi-Cluster Services API writes reasons.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The set of clusters refuses it: a coded message.
    Refused(String),
}

/// An export that somebody asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportState {
    /// What became of it.
    pub verdict: ExportVerdict,
    /// In what the ports of other clusters differ from these; `None`: in nothing.
    pub conflict: Option<String>,
}

/// All of them, by kind (ServiceExport or ServiceEntry), namespace and name of the object that they are shown on.
pub type ExportStates = BTreeMap<(Kind, Arc<str>, Arc<str>), ExportState>;

/// What its author shows to some namespaces only would be seen by all elsewhere.
fn is_public(service: &ServiceState) -> bool {
    let export_to = &service.spec().export_to;
    export_to.is_empty() || export_to.iter().any(|to| to == "*")
}

impl Registry {
    /// Namespaces whose services are all exported, `*` for every one but the reserved ones; what is written nearer to
    /// the service comes first.
    pub fn set_export_rules(&mut self, namespaces: BTreeSet<String>) {
        if self.rules.settings != namespaces {
            self.rules.settings = namespaces;
            for key in self.services.keys().cloned().collect::<Vec<_>>() {
                self.mark(key);
            }
        }
    }

    /// Exports that the set of clusters refuses, by namespace and name, with a coded message each. They are offered
    /// on, so that a grant that grows finds them, but the own gateways let nobody call them.
    pub fn set_refused_exports(&mut self, refused: BTreeMap<(Arc<str>, Arc<str>), String>) {
        let old = std::mem::take(&mut self.rules.refused);
        let changed: Vec<ServiceName> = old.keys().chain(refused.keys()).cloned().collect();
        self.rules.refused = refused;
        for name in changed {
            self.mark_name(&name);
        }
    }

    pub(crate) fn put_service_export(&mut self, object: &Object<ServiceExportSpec>) {
        let key = object_key(Kind::ServiceExport, &object.metadata);
        let name = (key.namespace, key.name);
        if self.rules.services.insert(name.clone()) {
            self.mark_name(&name);
        }
    }

    pub(crate) fn drop_service_export(&mut self, key: &ObjectKey) {
        let name = (key.namespace.clone(), key.name.clone());
        if self.rules.services.remove(&name) {
            self.mark_name(&name);
        }
    }

    pub(crate) fn put_namespace(&mut self, object: &Object<NamespaceSpec>) {
        self.set_namespace(&object.metadata.name, exports(&object.metadata));
    }

    pub(crate) fn drop_namespace(&mut self, key: &ObjectKey) {
        self.set_namespace(&key.name, None);
    }

    fn set_namespace(&mut self, namespace: &str, exported: Option<bool>) {
        let old = match exported {
            Some(exported) => self.rules.namespaces.insert(namespace.into(), exported),
            None => self.rules.namespaces.remove(namespace),
        };
        if old == exported {
            return;
        }
        let of_namespace = within(&self.services, Kind::ServiceEntry, namespace, false);
        for key in of_namespace.collect::<Vec<_>>() {
            self.mark(key);
        }
    }

    /// The service of a name has to be told anew.
    fn mark_name(&mut self, (namespace, name): &ServiceName) {
        if let Some(key) = self.service_of(namespace, name) {
            self.mark(key);
        }
    }

    fn host_of(&self, namespace: &str, name: &str) -> String {
        format!("{name}.{namespace}.svc.{}", self.settings.mesh_domain)
    }

    /// The ServiceEntry that publishes the host name of a service.
    fn service_of(&self, namespace: &str, name: &str) -> Option<ObjectKey> {
        let owner = self.owner(namespace, &self.host_of(namespace, name))?;
        self.services
            .contains_key(&owner.object)
            .then(|| owner.object.clone())
    }

    /// Who exports a service by one of its names; nobody, if it is not public.
    pub(crate) fn exported_by(&self, service: &ServiceState, name: &str) -> Option<ExportedBy> {
        let namespace = &service.key.namespace;
        let said = |yes: bool, by: ExportedBy| yes.then_some(by);
        if !is_public(service) {
            return None;
        }
        if let Some(yes) = exports(&service.object.metadata) {
            return said(yes, ExportedBy::Label);
        }
        if self.rules.services.contains(&(namespace.clone(), name.into())) {
            return Some(ExportedBy::ServiceExport);
        }
        if let Some(yes) = self.rules.namespaces.get(namespace) {
            return said(*yes, ExportedBy::Namespace);
        }
        let listed = self.rules.settings.contains(&**namespace)
            || (self.rules.settings.contains("*") && !reserved_namespace(namespace));
        said(listed, ExportedBy::Settings)
    }

    pub(crate) fn is_refused(&self, namespace: &Arc<str>, name: &str) -> bool {
        self.rules.refused.contains_key(&(namespace.clone(), name.into()))
    }

    /// All exports that somebody asked for, and what became of them. Costs what is exported.
    pub fn export_states(&self) -> ExportStates {
        let mut states = ExportStates::new();
        for name in &self.rules.services {
            let (namespace, name) = (name.0.clone(), name.1.clone());
            let state = self.state_of_service_export(&namespace, &name);
            states.insert((Kind::ServiceExport, namespace, name), state);
        }
        for (key, service) in &self.services {
            if let Some(state) = self.state_of_service(key, service) {
                states.insert(
                    (Kind::ServiceEntry, key.namespace.clone(), key.name.clone()),
                    state,
                );
            }
        }
        states
    }

    fn state_of_service_export(&self, namespace: &Arc<str>, name: &Arc<str>) -> ExportState {
        let invalid = |reason: &'static str, message: String| ExportState {
            verdict: ExportVerdict::Invalid { reason, message },
            conflict: None,
        };
        let found = self.service_of(namespace, name);
        let Some(service) = found.as_ref().and_then(|key| self.services.get(key)) else {
            let host = self.host_of(namespace, name);
            return invalid(
                "NoService",
                format!("no ServiceEntry of {namespace} publishes {host}"),
            );
        };
        let title = format!("ServiceEntry {namespace}/{}", service.key.name);
        if !is_public(service) {
            return invalid(
                "NotPublic",
                format!("{title} is not for all namespaces: exportTo"),
            );
        }
        match self.exported_by(service, name) {
            Some(by) => self.state(namespace, name, service, by),
            None => invalid(
                "LabelForbids",
                format!("{title} has the label istio.io/global: \"false\""),
            ),
        }
    }

    /// What is shown on a ServiceEntry: the first of its names that is refused, or the first.
    fn state_of_service(&self, key: &ObjectKey, service: &ServiceState) -> Option<ExportState> {
        if exports(&service.object.metadata) == Some(true) && !is_public(service) {
            let message = "its exportTo shows it to some namespaces only".to_owned();
            return Some(ExportState {
                verdict: ExportVerdict::Invalid {
                    reason: "NotPublic",
                    message,
                },
                conflict: None,
            });
        }
        let names = self.own_names(key, service);
        let asked = names.iter().filter_map(|name| {
            let by = self.exported_by(service, name)?;
            Some(self.state(&key.namespace, name, service, by))
        });
        let mut states: Vec<ExportState> = asked.collect();
        let worst = states
            .iter()
            .position(|state| matches!(state.verdict, ExportVerdict::Refused(_)))
            .or_else(|| states.iter().position(|state| state.conflict.is_some()))
            .unwrap_or(0);
        if states.is_empty() && exports(&service.object.metadata) == Some(true) {
            let message = format!(
                "it has no name <service>.{}.svc.{} of its own",
                key.namespace, self.settings.mesh_domain
            );
            let verdict = ExportVerdict::Invalid {
                reason: "NoName",
                message,
            };
            return Some(ExportState {
                verdict,
                conflict: None,
            });
        }
        (worst < states.len()).then(|| states.swap_remove(worst))
    }

    fn state(&self, namespace: &Arc<str>, name: &str, service: &ServiceState, by: ExportedBy) -> ExportState {
        let refused = self.rules.refused.get(&(namespace.clone(), name.into()));
        ExportState {
            verdict: refused.map_or(ExportVerdict::Exported(by), |why| {
                ExportVerdict::Refused(why.clone())
            }),
            conflict: self.conflict(namespace, name, service),
        }
    }

    /// Ports of the same service in other clusters that mean something else: the same number with another protocol, or
    /// the same name with another number. Callers here are served the ports of this cluster.
    fn conflict(&self, namespace: &str, name: &str, service: &ServiceState) -> Option<String> {
        let key = imported_key(namespace, &self.host_of(namespace, name));
        let others = self.imported.get(&key)?;
        let own: Vec<ServicePort> = Self::exported_ports(service);
        others.iter().find_map(|(cluster, export): (&Arc<str>, &Export)| {
            export.ports.iter().find_map(|theirs| {
                own.iter().find_map(|ours| {
                    let differs = (ours.port == theirs.port
                        && !ours.protocol.eq_ignore_ascii_case(&theirs.protocol))
                        || (ours.name == theirs.name && ours.port != theirs.port);
                    differs.then(|| {
                        format!(
                            "port {} is {} {} here and {} {} in {cluster}; callers of this cluster get the port of \
                             this one",
                            ours.name, ours.port, ours.protocol, theirs.port, theirs.protocol
                        )
                    })
                })
            })
        })
    }
}
