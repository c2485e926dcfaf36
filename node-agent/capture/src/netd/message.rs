use super::{DnsSettings, GuardRules, HostNames, NetdError};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use tombolo_types::{AddressPlan, Code};

/// Version of the protocol; both sides say theirs first. Messages only grow.
pub(super) const VERSION: u32 = 1;

/// Longest message. An answer is a few hundred bytes.
pub(super) const MESSAGE_MAX: usize = 16 * 1024;

/// One end of a connection; a packet has at most the device's descriptor with it.
pub(super) type Socket = crate::packets::PacketSocket<MESSAGE_MAX, 1>;

/// Address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Families {
    /// IPv4.
    pub ipv4: bool,
    /// IPv6.
    pub ipv6: bool,
}

/// Address space that is nobody's on the Internet: reserved for future use, private, shared, benchmarking (RFC 1112,
/// 1918, 6598, 2544; RFC 5180, 4193).
const PRIVATE: [&str; 8] = [
    "240.0.0.0/4",
    "10.0.0.0/8",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "100.64.0.0/10",
    "198.18.0.0/15",
    "2001:2::/48",
    "fc00::/7",
];

/// The address plan on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    v4: Ipv4Net,
    v6: Ipv6Net,
}

impl From<AddressPlan> for Plan {
    fn from(plan: AddressPlan) -> Self {
        Self {
            v4: plan.v4,
            v6: plan.v6,
        }
    }
}

impl Plan {
    /// Checks it as any other plan, and that it is not a part of the public Internet: the agent reads what the network
    /// sends, and must not be able to have this host's ordinary traffic routed to itself.
    pub(super) fn check(self) -> Result<AddressPlan, Refusal> {
        let refused = |cause: String| Refusal {
            code: Code::CaptureFailed,
            cause,
        };
        let plan = AddressPlan::from_prefixes([self.v4.to_string(), self.v6.to_string()])
            .map_err(|error| refused(error.to_string()))?;
        for prefix in [IpNet::V4(plan.v4), IpNet::V6(plan.v6)] {
            let private = PRIVATE.iter().filter_map(|space| space.parse::<IpNet>().ok());
            if !private.into_iter().any(|space| space.contains(&prefix)) {
                return Err(refused(format!(
                    "{prefix} is public address space; VIPs are in one of {PRIVATE:?}"
                )));
            }
        }
        Ok(plan)
    }
}

/// What the agent asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub(super) enum Request {
    /// First message of a connection.
    Hello { version: u32 },
    /// The TUN descriptor; mesh0 is made if there is none.
    OpenTun,
    /// mesh0's own addresses, in the families that are wished and that the host has.
    SetAddress { plan: Plan, families: Families },
    /// Routes of the VIP prefixes to mesh0.
    SetRoute { plan: Plan, families: Families },
    /// The host's guard.
    SetGuard { rules: GuardRules },
    /// The host's DNS settings.
    SetDns { settings: DnsSettings },
    /// How lookups went after it.
    ConfirmDns {
        #[serde(default)]
        problem: Option<String>,
    },
    /// The agent answers lookups.
    Alive,
    /// mesh0 and all routes away.
    Revert,
}

/// What netd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// To `hello`.
    Hello { version: u32 },
    /// Done.
    Done,
    /// Done; the descriptor is beside the message.
    Tun,
    /// Done, for these families.
    Families { families: Families },
    /// What became of the host's DNS settings.
    Names { names: HostNames },
    /// Not done.
    Refused { code: String, message: String },
}

/// Why netd does not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: Code,
    pub(super) cause: String,
}

impl From<Refusal> for Answer {
    fn from(refusal: Refusal) -> Self {
        Self::Refused {
            code: refusal.code.to_string(),
            message: refusal.code.message(&refusal.cause),
        }
    }
}

impl From<Refusal> for NetdError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused {
            code: refusal.code.to_string(),
            message: refusal.code.message(&refusal.cause),
        }
    }
}
