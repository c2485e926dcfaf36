use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a name is answered with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    /// IPv4.
    pub v4: Vec<Ipv4Addr>,
    /// IPv6.
    pub v6: Vec<Ipv6Addr>,
    /// True if these are the single instances of a headless service: they change more often, so the TTL is shorter.
    pub headless: bool,
}

/// Finds mesh names. One version of the world.
pub trait Names {
    /// The addresses of a host name, exactly as given: lower case, no trailing dot; `*.x` finds the wildcard itself.
    /// A known name without addresses is `Some` of nothing.
    fn find(&self, host: &str, client_namespace: &str) -> Option<Addresses>;
    /// True if only the mesh can know this name: an unknown one does not exist. Lower case, no trailing dot.
    fn is_mesh_name(&self, host: &str) -> bool;
    /// The mesh domain, for example `mesh.internal`: short names are completed with it.
    fn mesh_domain(&self) -> &str;
    /// True if an address is one of the mesh's virtual addresses.
    fn is_mesh_address(&self, address: IpAddr) -> bool;
    /// The host name of a virtual address.
    fn host_of(&self, address: IpAddr) -> Option<String>;
}

/// Hides the addresses of a family that the host cannot use.
#[derive(Debug, Clone, Copy)]
pub struct OnlyFamilies<N> {
    /// Where names are found.
    pub names: N,
    /// Offer IPv4.
    pub v4: bool,
    /// Offer IPv6.
    pub v6: bool,
}

impl<N: Names> Names for OnlyFamilies<N> {
    fn find(&self, host: &str, client_namespace: &str) -> Option<Addresses> {
        let mut found = self.names.find(host, client_namespace)?;
        if !self.v4 {
            found.v4.clear();
        }
        if !self.v6 {
            found.v6.clear();
        }
        Some(found)
    }

    fn is_mesh_name(&self, host: &str) -> bool {
        self.names.is_mesh_name(host)
    }

    fn mesh_domain(&self) -> &str {
        self.names.mesh_domain()
    }

    fn is_mesh_address(&self, address: IpAddr) -> bool {
        self.names.is_mesh_address(address)
    }

    fn host_of(&self, address: IpAddr) -> Option<String> {
        self.names.host_of(address)
    }
}

impl<N: Names + ?Sized> Names for &N {
    fn find(&self, host: &str, client_namespace: &str) -> Option<Addresses> {
        (**self).find(host, client_namespace)
    }

    fn is_mesh_name(&self, host: &str) -> bool {
        (**self).is_mesh_name(host)
    }

    fn mesh_domain(&self) -> &str {
        (**self).mesh_domain()
    }

    fn is_mesh_address(&self, address: IpAddr) -> bool {
        (**self).is_mesh_address(address)
    }

    fn host_of(&self, address: IpAddr) -> Option<String> {
        (**self).host_of(address)
    }
}
