//! Discovery's own server certificate: from its own CA, renewed while it serves.

use crate::{
    config::Config,
    trust::{OwnNames, Trust},
};
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

/// What the certificates say: one for each name of the trust domain under which discovery is looked for.
#[derive(Debug, Clone)]
pub struct ServerNames {
    names: OwnNames,
    dns: BTreeSet<String>,
    ips: Vec<IpAddr>,
}

/// The certificate that is shown to everybody, and those for clients that ask for another name.
pub type Certificates = (Arc<WorkloadIdentity>, Vec<Arc<WorkloadIdentity>>);

impl ServerNames {
    /// The advertised hosts, and the names by which Istio's clients dial a control plane.
    pub fn new(config: &Config, names: &OwnNames) -> Self {
        let mut dns: BTreeSet<String> = ["localhost", "istiod.istio-system.svc", "istiod.istio-system"]
            .map(str::to_owned)
            .into();
        let mut ips: BTreeSet<IpAddr> = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()].into();
        for host in config.hosts() {
            match host.parse() {
                Ok(ip) => drop(ips.insert(ip)),
                Err(_) => drop(dns.insert(host.to_ascii_lowercase())),
            }
        }
        Self {
            names: names.clone(),
            dns,
            ips: ips.into_iter().collect(),
        }
    }

    /// The same hosts under other names of the trust domain.
    #[must_use]
    pub fn named(&self, names: &OwnNames) -> Self {
        Self {
            names: names.clone(),
            ..self.clone()
        }
    }

    /// New certificates.
    ///
    /// # Errors
    /// When the authority refuses.
    pub fn issue(&self, authority: &Authority, now: SystemTime) -> Result<Certificates, CaError> {
        let one = |name| self.one(name, authority, now);
        let others = self.names.all().skip(1).map(one);
        Ok((one(&self.names.signing)?, others.collect::<Result<_, _>>()?))
    }

    fn one(
        &self,
        trust_domain: &TrustDomain,
        authority: &Authority,
        now: SystemTime,
    ) -> Result<Arc<WorkloadIdentity>, CaError> {
        let mut dns = self.dns.clone();
        dns.insert(format!("discovery.{trust_domain}"));
        let (id, dns) = (SpiffeId::discovery(trust_domain.clone()), Vec::from_iter(dns));
        authority
            .issue_server(&id, &dns, &self.ips, LIFE, now)
            .map(Arc::new)
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
            Ok((identity, others)) => {
                tracing::info!("discovery's own certificate renewed");
                live.set_identities(identity, others);
                jitter = rand::random();
            }
            Err(error) => {
                tracing::error!(%error, "discovery's own certificate cannot be renewed");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
