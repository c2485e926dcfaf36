use imbl::OrdMap;
use std::{collections::BTreeMap, sync::Arc};
use tombolo_proto::type_url;

/// One resource, ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Compiled {
    /// Resource name of its type.
    pub name: Arc<str>,
    /// Hash of the content: the same content has the same version in every process.
    pub version: Arc<str>,
    /// The payload.
    pub any: prost_types::Any,
    /// Other names under which it may be asked for (`<network>/<ip>`).
    pub aliases: Vec<String>,
}

/// Resources of one type by name.
pub type Resources = OrdMap<Arc<str>, Arc<Compiled>>;

/// Everything that subscribers may see, at one moment. Immutable; cloning costs a few reference counts.
#[derive(Debug, Clone)]
pub struct World {
    /// Advances by one with every published change.
    pub version: u64,
    pub(crate) types: BTreeMap<&'static str, Resources>,
    pub(crate) changed: BTreeMap<&'static str, Vec<Arc<str>>>,
}

impl World {
    /// The types that are published here.
    pub const TYPES: [&'static str; 8] = [
        type_url::ADDRESS,
        type_url::AUTHORIZATION,
        type_url::SERVICE_VIP,
        type_url::EXPOSURE,
        type_url::REVOCATIONS,
        type_url::TRUST_BUNDLE,
        type_url::NETWORK_GATEWAYS,
        type_url::EXPORTED_SERVICE,
    ];

    /// Without a resource.
    pub fn empty() -> Self {
        Self {
            version: 0,
            types: Self::TYPES
                .into_iter()
                .map(|url| (url, Resources::new()))
                .collect(),
            changed: BTreeMap::new(),
        }
    }

    /// All resources of a type; `None` for a type that is not published here.
    pub fn resources(&self, type_url: &str) -> Option<&Resources> {
        self.types.get(type_url)
    }

    /// One resource by its name.
    pub fn resource(&self, type_url: &str, name: &str) -> Option<&Arc<Compiled>> {
        self.types.get(type_url)?.get(name)
    }

    /// Names of a type that were added, changed or removed since the version before this one.
    pub fn changed(&self, type_url: &str) -> &[Arc<str>] {
        self.changed.get(type_url).map_or(&[], Vec::as_slice)
    }
}

/// A workload that asks. Its view differs from others' in one type only: EXPOSURE has one resource per workload, and a
/// subscriber is served its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subscriber<'a> {
    /// Namespace of its workload.
    pub namespace: &'a str,
    /// Name of its workload.
    pub workload: &'a str,
}

impl Subscriber<'_> {
    /// Name of its EXPOSURE resource.
    pub fn exposure_name(&self) -> String {
        format!("{}/{}", self.namespace, self.workload)
    }
}
