//! Resources from messages: bytes, and a version that is a hash of them.

use crate::Compiled;
use std::sync::Arc;
use tombolo_proto::{
    istio::workload::{Address, Service, Workload, address::Type},
    pack, type_url,
};

/// A resource with its type.
pub(crate) type Output = (&'static str, Compiled);

/// FNV-1a, 64 bit: the same in every process and every version of the standard library, unlike its hashers. Versions
/// only tell whether a client holds what we would send, so nothing hangs on resistance to chosen collisions.
pub(crate) fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

fn compiled<M: prost::Name>(name: String, message: &M, aliases: Vec<String>) -> Compiled {
    let any = pack(message);
    let version = format!("{:016x}", fnv1a64(&any.value));
    Compiled {
        name: name.into(),
        version: version.into(),
        any,
        aliases,
    }
}

/// A resource without other names.
pub(crate) fn resource<M: prost::Name>(type_url: &'static str, name: String, message: &M) -> Output {
    (type_url, compiled(name, message, Vec::new()))
}

/// An ADDRESS resource, named by its uid and found by `<network>/<ip>`.
pub(crate) fn workload(workload: Workload) -> Output {
    let aliases = workload
        .addresses
        .iter()
        .filter_map(|bytes| Some(format!("{}/{}", workload.network, ip(bytes)?)))
        .collect();
    let name = workload.uid.clone();
    (
        type_url::ADDRESS,
        compiled(
            name,
            &Address {
                r#type: Some(Type::Workload(workload)),
            },
            aliases,
        ),
    )
}

/// An ADDRESS resource, named `<namespace>/<hostname>` and found by its virtual addresses.
pub(crate) fn service(service: Service) -> Output {
    let alias = |address: &tombolo_proto::istio::workload::NetworkAddress| {
        let ip = ip(&address.address)?;
        Some(match address.length {
            Some(length) => format!("{}/{ip}/{length}", address.network),
            None => format!("{}/{ip}", address.network),
        })
    };
    let aliases = service.addresses.iter().filter_map(alias).collect();
    let name = format!("{}/{}", service.namespace, service.hostname);
    (
        type_url::ADDRESS,
        compiled(
            name,
            &Address {
                r#type: Some(Type::Service(service)),
            },
            aliases,
        ),
    )
}

fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(Into::into),
        16 => <[u8; 16]>::try_from(bytes).ok().map(Into::into),
        _ => None,
    }
}

/// An address in network byte order.
pub(crate) fn ip_bytes(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Joins namespace and name.
pub(crate) fn key(namespace: &str, name: &str) -> String {
    format!("{namespace}/{name}")
}

/// Identity of an object within the registry.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub(crate) kind: tombolo_config::Kind,
    pub(crate) namespace: Arc<str>,
    pub(crate) name: Arc<str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_fnv_1a() {
        // Test vectors of the FNV reference code.
        assert_eq!(fnv1a64(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a64(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a64(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
