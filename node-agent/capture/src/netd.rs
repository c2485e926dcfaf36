//! The protocol between the agent and `tombolo-netd`.

use std::{os::fd::OwnedFd, path::Path};
use tombolo_types::AddressPlan;

/// Where netd listens.
pub const SOCKET: &str = "/run/tombolo/netd/netd.sock";

/// Why a request to netd failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetdError {
    /// netd cannot be reached, or the connection broke.
    #[error("{}", tombolo_types::Code::NetdUnreachable.message(.0))]
    Io(#[from] std::io::Error),
    /// netd refused; the text has code, cause and next step.
    #[error("{message}")]
    Refused {
        /// `TMB0114`.
        code: String,
        /// For people.
        message: String,
    },
}

/// Families that mesh0 offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

/// Rules of the guard; empty until that verb is available.
#[derive(Debug, Clone, Default)]
pub struct GuardRules {}

/// DNS settings of the host; empty until that verb is available.
#[derive(Debug, Clone, Default)]
pub struct DnsSettings {}

/// The agent's side.
#[derive(Debug)]
pub struct NetdClient {}

impl NetdClient {
    /// Connects.
    ///
    /// # Errors
    /// When netd does not answer.
    pub async fn connect(path: &Path) -> Result<Self, NetdError> {
        let _ = path;
        todo!()
    }

    /// The TUN descriptor of mesh0.
    ///
    /// # Errors
    /// When netd refuses or is gone.
    pub async fn open_tun(&self) -> Result<OwnedFd, NetdError> {
        todo!()
    }

    /// Gives mesh0 its own addresses; returns the families that are offered.
    ///
    /// # Errors
    /// When netd refuses or is gone.
    pub async fn set_address(&self, plan: AddressPlan, ipv4: bool, ipv6: bool) -> Result<Families, NetdError> {
        let _ = (plan, ipv4, ipv6);
        todo!()
    }

    /// Routes the VIP prefixes to mesh0.
    ///
    /// # Errors
    /// When a prefix is routed elsewhere, netd refuses or is gone.
    pub async fn set_route(&self, plan: AddressPlan, ipv4: bool, ipv6: bool) -> Result<(), NetdError> {
        let _ = (plan, ipv4, ipv6);
        todo!()
    }

    /// Not available in this version.
    ///
    /// # Errors
    /// Always.
    pub async fn set_guard(&self, rules: GuardRules) -> Result<(), NetdError> {
        let _ = rules;
        todo!()
    }

    /// Not available in this version.
    ///
    /// # Errors
    /// Always.
    pub async fn set_dns(&self, settings: DnsSettings) -> Result<(), NetdError> {
        let _ = settings;
        todo!()
    }

    /// Removes mesh0 and everything else that netd did on the host.
    ///
    /// # Errors
    /// When netd refuses or is gone.
    pub async fn revert(&self) -> Result<(), NetdError> {
        todo!()
    }
}
