//! Generated protobuf messages: what Tombolo says on the wire.
//!
//! Position: layer 0. The `.proto` files in `proto/` are written from the field tables of Istio, Envoy and ztunnel
//! (package and field numbers are theirs) and, under `proto/tombolo/`, are our own. gRPC stubs come with the feature
//! `grpc`; without it this crate is messages only.
//!
//! **Invariant:** no logic lives here, and our own files are append-only.
#![allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    unused_qualifications,
    clippy::allow_attributes_without_reason,
    reason = "generated code; its documentation is the .proto files"
)]

pub mod envoy {
    pub mod config {
        pub mod core {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/envoy.config.core.v3.rs"));
            }
        }
    }
    pub mod service {
        pub mod discovery {
            pub mod v3 {
                include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
            }
        }
    }
}
pub mod istio {
    pub mod workload {
        include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));
    }
    pub mod security {
        include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
    }
    pub mod v1 {
        pub mod auth {
            include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
        }
    }
}
pub mod google {
    pub mod rpc {
        include!(concat!(env!("OUT_DIR"), "/google.rpc.rs"));
    }
}
pub mod tombolo {
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/tombolo.v1.rs"));
    }
    pub mod admin {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/tombolo.admin.v1.rs"));
        }
    }
    pub mod agent {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/tombolo.agent.v1.rs"));
        }
    }
    pub mod federation {
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/tombolo.federation.v1.rs"));
        }
    }
}

/// Messages of incremental xDS.
pub use envoy::service::discovery::v3 as xds;

/// The compiled descriptors of every file here: the append-only check compares them with the committed set.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// xDS type URLs.
pub mod type_url {
    /// istio.workload.Address.
    pub const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
    /// istio.security.Authorization.
    pub const AUTHORIZATION: &str = "type.googleapis.com/istio.security.Authorization";
    /// No message: a request of this type on the ADS stream reports the health of the sender.
    pub const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";
    /// tombolo.v1.Revocations.
    pub const REVOCATIONS: &str = "type.googleapis.com/tombolo.v1.Revocations";
    /// tombolo.v1.TrustBundle.
    pub const TRUST_BUNDLE: &str = "type.googleapis.com/tombolo.v1.TrustBundle";
    /// tombolo.v1.ServiceVip.
    pub const SERVICE_VIP: &str = "type.googleapis.com/tombolo.v1.ServiceVip";
    /// tombolo.v1.Exposure.
    pub const EXPOSURE: &str = "type.googleapis.com/tombolo.v1.Exposure";
    /// tombolo.v1.ExportedService.
    pub const EXPORTED_SERVICE: &str = "type.googleapis.com/tombolo.v1.ExportedService";
    /// tombolo.v1.NetworkGateways.
    pub const NETWORK_GATEWAYS: &str = "type.googleapis.com/tombolo.v1.NetworkGateways";
}

/// Decodes the payload of a resource.
///
/// # Errors
/// When the bytes are not a message of type `M`.
pub fn unpack<M: prost::Message + Default>(any: &prost_types::Any) -> Result<M, prost::DecodeError> {
    M::decode(any.value.as_slice())
}

/// Wraps a message as a resource payload with an Envoy-style type URL.
pub fn pack<M: prost::Name>(message: &M) -> prost_types::Any {
    prost_types::Any {
        type_url: M::type_url(),
        value: message.encode_to_vec(),
    }
}
