use std::net::{Ipv4Addr, Ipv6Addr};
use tombolo_config::{Kind, Resource};

/// A virtual address pair given to a host of an object, to be written into the object's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// ServiceEntry, or WorkloadEntry for the per-instance name of a headless service.
    pub kind: Kind,
    /// Of the object.
    pub namespace: String,
    /// Of the object.
    pub name: String,
    /// Host that it is for.
    pub host: String,
    /// IPv4; `None` if the prefix is used up.
    pub v4: Option<Ipv4Addr>,
    /// IPv6; `None` if the prefix is used up.
    pub v6: Option<Ipv6Addr>,
}

impl Allocation {
    /// Writes it into `status.addresses` of its object, in place of what was there for the host.
    pub fn persist(&self, resource: &mut Resource) {
        let _ = resource;
        todo!()
    }
}
