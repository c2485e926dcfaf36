//! The node that a client says it is, checked against who it is.

use crate::{caller::Caller, fleet::View, refusal::Refusal};
use std::net::IpAddr;
use tombolo_config::Kind;
use tombolo_proto::envoy::config::core::v3::Node;
use tombolo_types::{Code, DeviceId, SpiffeId};

/// Addresses taken from one node at most.
const ADDRESSES_MAX: usize = 16;

/// An admitted client of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) id: SpiffeId,
    pub(super) device: Option<DeviceId>,
    /// Name of its workload, if it is known: what EXPOSURE is served for.
    pub(super) workload: Option<String>,
    /// As the client says; for debugging.
    pub(super) node_id: String,
    pub(super) version: String,
    /// Addresses that the node claims.
    pub(super) addresses: Vec<IpAddr>,
}

fn metadata<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    let prost_types::value::Kind::StringValue(text) =
        node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()?
    else {
        return None;
    };
    (!text.is_empty()).then_some(text)
}

fn shortened(text: &str) -> String {
    text.chars().take(256).collect()
}

/// Whoever has an identity of this mesh.
pub(super) fn known(caller: &Caller) -> Result<(&SpiffeId, Option<DeviceId>), Refusal> {
    match caller {
        Caller::Workload { id, device } => Ok((id, *device)),
        Caller::Operator { .. } | Caller::Anonymous => Err(Refusal {
            code: None,
            status: tonic::Code::Unauthenticated,
            message: "authorization failed: a certificate of this mesh or a bearer token is needed".into(),
        }),
    }
}

/// Admits a client, or says why not.
///
/// Source: istiod's identity check: the namespace must be the caller's, and the service account if one is named. A
/// device may in addition speak for its own WorkloadEntry only.
pub(super) fn admit(node: &Node, caller: &Caller, view: &View) -> Result<Client, Refusal> {
    let (id, device) = known(caller)?;
    let denied = |cause: String| Refusal {
        code: None,
        status: tonic::Code::PermissionDenied,
        message: format!("authorization failed: {cause}"),
    };
    // Node ids have four parts; the third is name.namespace, which stands in where the metadata is silent.
    let from_id = node
        .id
        .split('~')
        .nth(2)
        .and_then(|part| part.rsplit_once('.'))
        .map(|(_, ns)| ns);
    let namespace = metadata(node, "NAMESPACE").or(from_id.filter(|ns| !ns.is_empty()));
    if let Some(namespace) = namespace
        && namespace != &*id.namespace
    {
        return Err(denied(format!(
            "{id} is not of namespace {}",
            shortened(namespace)
        )));
    }
    if let Some(account) = metadata(node, "SERVICE_ACCOUNT")
        && account != &*id.service_account
    {
        return Err(denied(format!(
            "{id} is not service account {}",
            shortened(account)
        )));
    }
    let workload = match device {
        Some(device) => {
            let member = view
                .members
                .get(&device)
                .ok_or_else(|| Refusal::new(Code::DeviceUnknown, device))?;
            let entry = &member.device.spec.workload_entry;
            if let Some(name) = metadata(node, "NAME")
                && name != entry
            {
                let shown = shortened(name);
                return Err(denied(format!(
                    "device {device} is {} {entry}, not {shown}",
                    Kind::WorkloadEntry
                )));
            }
            Some(entry.clone())
        }
        None => metadata(node, "NAME").map(shortened),
    };
    let addresses = metadata(node, "INSTANCE_IPS").map(|text| {
        text.split(',')
            .filter_map(|ip| ip.trim().parse().ok())
            .take(ADDRESSES_MAX)
            .collect()
    });
    Ok(Client {
        id: id.clone(),
        device,
        workload,
        node_id: shortened(&node.id),
        version: metadata(node, "TOMBOLO_VERSION")
            .or(metadata(node, "ISTIO_VERSION"))
            .map(shortened)
            .unwrap_or_default(),
        addresses: addresses.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Member;
    use std::sync::Arc;
    use tombolo_config::{DeviceSpec, Metadata, Object};

    fn node(id: &str, pairs: &[(&str, &str)]) -> Node {
        let value = |text: &str| prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue(text.to_owned())),
        };
        let fields = pairs.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect();
        Node {
            id: id.into(),
            metadata: Some(prost_types::Struct { fields }),
            ..Node::default()
        }
    }

    fn caller(device: Option<u64>) -> Caller {
        let id = "spiffe://mesh.example/ns/shop/sa/catalog".parse().unwrap();
        Caller::Workload {
            id,
            device: device.map(DeviceId),
        }
    }

    fn view() -> View {
        let spec = DeviceSpec {
            workload_entry: "catalog-1".into(),
            ..DeviceSpec::default()
        };
        let member = Member {
            locality: String::new(),
            device: Object::<DeviceSpec>::new(Metadata::named("shop", "0000000000000001"), spec),
            address: None,
            entry_status: None,
            standing: None,
            report: None,
            awaits_report: false,
            since_unix_ms: 0,
        };
        let mut view = View::default();
        view.members.insert(DeviceId(1), Arc::new(member));
        view
    }

    #[test]
    fn the_node_must_be_who_the_caller_is() {
        let check = |device, id: &str, pairs: &[(&str, &str)]| {
            admit(&node(id, pairs), &caller(device), &view()).map_err(|refusal| refusal.status)
        };
        let denied = Err(tonic::Code::PermissionDenied);
        assert!(check(None, "", &[]).is_ok());
        assert!(
            check(None, "ztunnel~1.1.1.1~.~.svc.cluster.local", &[("NAMESPACE", "")]).is_ok(),
            "ztunnel on a VM"
        );
        assert!(check(None, "", &[("NAMESPACE", "shop"), ("SERVICE_ACCOUNT", "catalog")]).is_ok());
        assert_eq!(check(None, "", &[("NAMESPACE", "other")]), denied);
        assert_eq!(
            check(None, "ztunnel~1.1.1.1~vm.other~other.svc.cluster.local", &[]),
            denied
        );
        assert_eq!(check(None, "", &[("SERVICE_ACCOUNT", "root")]), denied);
        assert_eq!(check(Some(1), "", &[("NAME", "catalog-2")]), denied);
        let client = check(
            Some(1),
            "",
            &[("NAME", "catalog-1"), ("INSTANCE_IPS", "10.0.0.1, x,fd00::1")],
        )
        .unwrap();
        assert_eq!(client.workload.as_deref(), Some("catalog-1"));
        assert_eq!(client.addresses.len(), 2);
        assert_eq!(
            check(Some(2), "", &[]),
            Err(tonic::Code::Unauthenticated),
            "a device that is unknown here"
        );
        let anonymous = admit(&node("", &[]), &Caller::Anonymous, &view());
        assert_eq!(anonymous.unwrap_err().status, tonic::Code::Unauthenticated);
    }
}
