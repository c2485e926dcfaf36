use super::message::Refusal;
use async_trait::async_trait;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use std::fmt;
use tombolo_types::{Code, ports};

/// Guarded ports at most. A WorkloadGroup declares a few; a full message with [`PREFIXES_MAX`] stays below 16 KiB.
const PORTS_MAX: usize = 256;
/// Prefixes at most, of all ports together.
const PREFIXES_MAX: usize = 128;
/// The host's own door stays the host's.
const SSH: u16 = 22;

/// What the guard closes to callers outside of the mesh. Without a port there is no guard at all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardRules {
    /// Guarded ports, each once.
    #[serde(default)]
    pub ports: Vec<GuardedPort>,
}

/// A TCP port of an application that plaintext does not reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardedPort {
    /// Port.
    pub port: u16,
    /// Callers that policies admit without an identity, by their address; mostly none.
    #[serde(default)]
    pub allowed: Vec<IpNet>,
}

impl GuardRules {
    /// True if they fit into one request; others must be made shorter, and never weaker.
    pub fn fits(&self) -> bool {
        let prefixes: usize = self.ports.iter().map(|port| port.allowed.len()).sum();
        self.ports.len() <= PORTS_MAX && prefixes <= PREFIXES_MAX
    }

    /// The agent reads what the network sends: it must not be able to close this host's own doors, those of the mesh,
    /// or so many that one is an ordinary connection's.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        let refused = |cause: String| Refusal {
            code: Code::GuardRefused,
            cause,
        };
        if !self.fits() {
            return Err(refused(format!(
                "at most {PORTS_MAX} ports and {PREFIXES_MAX} prefixes are guarded"
            )));
        }
        let mut seen = Vec::with_capacity(self.ports.len());
        for GuardedPort { port, .. } in &self.ports {
            if *port == 0 || *port == SSH || ports::NEVER_DELIVERED.contains(port) {
                return Err(refused(format!("port {port} is never guarded")));
            }
            if seen.contains(port) {
                return Err(refused(format!("port {port} is named twice")));
            }
            seen.push(*port);
        }
        Ok(())
    }
}

/// Closes ports of the host. It is beside netd, as the resolver is: the agent never runs a program.
#[async_trait]
pub trait HostGuard: fmt::Debug + Send + Sync {
    /// Has exactly these rules in force, all at once or not at all; without a port nothing of the guard is left.
    /// Returns within five seconds.
    ///
    /// # Errors
    /// With what was missing or what the kernel said; then the rules from before are in force.
    async fn set(&self, rules: &GuardRules) -> Result<(), String>;
}

#[cfg(test)]
mod tests {
    use super::super::message::{MESSAGE_MAX, Request};
    use super::*;

    fn closed(ports: impl IntoIterator<Item = u16>) -> GuardRules {
        let port = |port| GuardedPort {
            port,
            allowed: Vec::new(),
        };
        GuardRules {
            ports: ports.into_iter().map(port).collect(),
        }
    }

    #[test]
    fn what_is_never_closed() {
        assert!(closed([]).check().is_ok() && closed([80, 8080, 65535]).check().is_ok());
        for ports in [
            vec![0],
            vec![22],
            vec![80, 15008],
            vec![80, 80],
            (1000..1257).collect(),
        ] {
            let refusal = closed(ports.clone()).check().unwrap_err();
            assert_eq!(refusal.code, Code::GuardRefused, "{ports:?}");
        }
    }

    #[test]
    fn the_longest_rules_fit_into_a_message() {
        let mut rules = closed(60000..60000 + u16::try_from(PORTS_MAX).unwrap());
        let long: IpNet = "2001:1db8:1111:1111:1111:1111:1111:1111/128".parse().unwrap();
        rules.ports[0].allowed = vec![long; PREFIXES_MAX];
        assert!(rules.check().is_ok());
        let bytes = serde_json::to_vec(&Request::SetGuard { rules: rules.clone() }).unwrap();
        assert!(bytes.len() < MESSAGE_MAX, "{}", bytes.len());
        rules.ports[1].allowed = vec![long];
        assert!(!rules.fits() && rules.check().is_err());
    }

    #[test]
    fn strange_messages_are_no_rules() {
        for text in [
            r#"{"verb":"set_guard","rules":{"ports":[{"port":70000}]}}"#,
            r#"{"verb":"set_guard","rules":{"ports":[{"port":-1}]}}"#,
            r#"{"verb":"set_guard","rules":{"ports":[{"port":"80; flush ruleset"}]}}"#,
            r#"{"verb":"set_guard","rules":{"ports":[{"port":80,"allowed":["10.0.0.0/8 } accept"]}]}}"#,
            r#"{"verb":"set_guard"}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
        let old = r#"{"verb":"set_guard","rules":{}}"#;
        assert_eq!(
            serde_json::from_str::<Request>(old).unwrap(),
            Request::SetGuard {
                rules: GuardRules::default()
            }
        );
    }
}
