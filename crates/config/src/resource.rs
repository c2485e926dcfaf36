use crate::{
    AuthorizationPolicySpec, DeviceSpec, Diagnostic, JoinTokenSpec, Kind, Metadata, NamespaceSpec, Object,
    PeerAuthenticationSpec, ServiceEntrySpec, ServiceExportSpec, WorkloadEntrySpec, WorkloadGroupSpec, read,
    validate,
};
use serde_json::{Map, Value};

/// A resource of any kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Resource {
    /// What VMs of one sort have in common.
    WorkloadGroup(Object<WorkloadGroupSpec>),
    /// One endpoint.
    WorkloadEntry(Object<WorkloadEntrySpec>),
    /// A service and where it lives.
    ServiceEntry(Object<ServiceEntrySpec>),
    /// Who may connect.
    AuthorizationPolicy(Object<AuthorizationPolicySpec>),
    /// Whether plaintext is admitted.
    PeerAuthentication(Object<PeerAuthenticationSpec>),
    /// A service that other clusters may call.
    ServiceExport(Object<ServiceExportSpec>),
    /// What holds for all services of a namespace.
    Namespace(Object<NamespaceSpec>),
    /// The right to enrol.
    JoinToken(Object<JoinTokenSpec>),
    /// An enrolled VM; internal.
    Device(Object<DeviceSpec>),
}

/// Evaluates `$body` with `$object` bound to the object of whatever kind.
macro_rules! each {
    ($resource:expr, $object:ident => $body:expr) => {
        match $resource {
            Resource::WorkloadGroup($object) => $body,
            Resource::WorkloadEntry($object) => $body,
            Resource::ServiceEntry($object) => $body,
            Resource::AuthorizationPolicy($object) => $body,
            Resource::PeerAuthentication($object) => $body,
            Resource::ServiceExport($object) => $body,
            Resource::Namespace($object) => $body,
            Resource::JoinToken($object) => $body,
            Resource::Device($object) => $body,
        }
    };
}

impl Resource {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Self::WorkloadGroup(_) => Kind::WorkloadGroup,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::ServiceExport(_) => Kind::ServiceExport,
            Self::Namespace(_) => Kind::Namespace,
            Self::JoinToken(_) => Kind::JoinToken,
            Self::Device(_) => Kind::Device,
        }
    }

    /// API group of its kind.
    pub const fn group(&self) -> &'static str {
        self.kind().group()
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.metadata().name
    }

    /// Namespace.
    pub fn namespace(&self) -> &str {
        &self.metadata().namespace
    }

    /// Metadata.
    pub fn metadata(&self) -> &Metadata {
        each!(self, object => &object.metadata)
    }

    /// Metadata, to change.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        each!(self, object => &mut object.metadata)
    }

    /// Status.
    pub fn status(&self) -> Option<&Value> {
        each!(self, object => object.status.as_ref())
    }

    /// Status, to change.
    pub fn status_mut(&mut self) -> &mut Option<Value> {
        each!(self, object => &mut object.status)
    }

    /// `Kind namespace/name`, as diagnostics say it.
    pub fn title(&self) -> String {
        self.kind().title(self.namespace(), self.name())
    }

    /// The spec alone, as JSON.
    pub fn spec_json(&self) -> Value {
        // Specs are plain structs with text keys: they always serialise.
        each!(self, object => serde_json::to_value(&object.spec)).unwrap_or_default()
    }

    /// The whole object, as JSON in Kubernetes' order of words; fields without a value are left out.
    pub fn to_json(&self) -> Value {
        let (api_version, kind) = each!(self, object => (&object.api_version, &object.kind));
        let mut json = Map::new();
        json.insert("apiVersion".into(), Value::String(api_version.clone()));
        json.insert("kind".into(), Value::String(kind.clone()));
        let mut metadata = serde_json::to_value(self.metadata()).unwrap_or_default();
        if self.kind().is_cluster_scoped()
            && let Some(fields) = metadata.as_object_mut()
        {
            fields.remove("namespace");
        }
        json.insert("metadata".into(), metadata);
        json.insert("spec".into(), self.spec_json());
        if let Some(status) = self.status() {
            json.insert("status".into(), status.clone());
        }
        Value::Object(json)
    }

    /// Reads one object strictly and validates it: unknown fields and bad values are refused.
    ///
    /// # Errors
    /// With every finding that refuses it.
    pub fn from_json(json: &Value) -> Result<Self, Vec<Diagnostic>> {
        read::from_json(json)
    }

    /// Reads an object that was accepted earlier: strict about its shape, but not validated again, so that a stricter
    /// rule of a newer version never makes the store unreadable.
    ///
    /// # Errors
    /// With every finding about its shape.
    pub fn from_stored(json: &Value) -> Result<Self, Vec<Diagnostic>> {
        read::from_stored(json)
    }

    /// Everything to be said about it that its shape does not show: refusals and warnings.
    pub fn validate(&self) -> Vec<Diagnostic> {
        validate::validate(self)
    }
}

macro_rules! from_object {
    ($($kind:ident($spec:ident)),*) => {$(
        impl From<Object<$spec>> for Resource {
            fn from(object: Object<$spec>) -> Self {
                Self::$kind(object)
            }
        }

        impl Object<$spec> {
            /// With the kind's own API version, no status.
            pub fn new(metadata: Metadata, spec: $spec) -> Self {
                let kind = Kind::$kind;
                Self {
                    api_version: kind.api_version(), kind: kind.name().to_owned(), metadata, spec, status: None,
                }
            }
        }
    )*};
}

from_object!(
    WorkloadGroup(WorkloadGroupSpec),
    WorkloadEntry(WorkloadEntrySpec),
    ServiceEntry(ServiceEntrySpec),
    AuthorizationPolicy(AuthorizationPolicySpec),
    PeerAuthentication(PeerAuthenticationSpec),
    ServiceExport(ServiceExportSpec),
    Namespace(NamespaceSpec),
    JoinToken(JoinTokenSpec),
    Device(DeviceSpec)
);
