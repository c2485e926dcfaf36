//! Discovery's own server certificate: from its own CA, renewed while it serves.

use crate::{config::Config, trust::Trust};
use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tombolo_ca::{Authority, CaError};
use tombolo_identity::{LiveIdentity, WorkloadIdentity};
use tombolo_types::{SpiffeId, TrustDomain};

/// Life of the certificate; renewed at half of it.
const LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long at most until the wall clock is looked at again: it may jump (a VM that was paused, a first NTP step), and
/// timers do not notice.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A renewal that failed is tried again after so long.
const RETRY: Duration = Duration::from_secs(60);

/// What the certificate says beside the SPIFFE id.
#[derive(Debug, Clone)]
pub struct ServerNames {
    id: SpiffeId,
    dns: Vec<String>,
    ips: Vec<IpAddr>,
}

impl ServerNames {
    /// The advertised hosts, and the names by which Istio's clients dial a control plane.
    pub fn new(config: &Config, trust_domain: &TrustDomain) -> Self {
        let mut dns: BTreeSet<String> = ["localhost", "istiod.istio-system.svc", "istiod.istio-system"]
            .map(str::to_owned)
            .into();
        dns.insert(format!("discovery.{trust_domain}"));
        let mut ips: BTreeSet<IpAddr> = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()].into();
        for host in config.hosts() {
            match host.parse() {
                Ok(ip) => drop(ips.insert(ip)),
                Err(_) => drop(dns.insert(host.to_ascii_lowercase())),
            }
        }
        let id = SpiffeId::discovery(trust_domain.clone());
        Self {
            id,
            dns: dns.into_iter().collect(),
            ips: ips.into_iter().collect(),
        }
    }

    /// A new certificate.
    ///
    /// # Errors
    /// When the authority refuses.
    pub fn issue(&self, authority: &Authority, now: SystemTime) -> Result<WorkloadIdentity, CaError> {
        authority.issue_server(&self.id, &self.dns, &self.ips, LIFE, now)
    }
}

/// Renews at half life, for ever. New handshakes see the new certificate at once.
pub async fn keep(names: ServerNames, trust: Trust, live: Arc<LiveIdentity>) {
    let mut jitter = rand::random();
    loop {
        let renew_at = live
            .current()
            .identity
            .as_ref()
            .map_or(0, |identity| identity.renew_at(jitter));
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let wait = Duration::from_secs(renew_at.saturating_sub(now)).min(LOOK_AGAIN);
        tokio::time::sleep(wait).await;
        let now = SystemTime::now();
        if now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() < renew_at {
            continue;
        }
        match names.issue(&trust.authority(), now) {
            Ok(identity) => {
                tracing::info!("discovery's own certificate renewed");
                live.set_identity(Arc::new(identity));
                jitter = rand::random();
            }
            Err(error) => {
                tracing::error!(%error, "discovery's own certificate cannot be renewed");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
