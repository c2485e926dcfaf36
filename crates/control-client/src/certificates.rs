use crate::{
    ControlStatus, Problem, Registration, State,
    backoff::Backoff,
    connect::connect,
    enroll::{call, device_key, hello, new_key},
    host,
};
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tombolo_identity::{
    Current, LiveIdentity, TrustBundle, WorkloadIdentity, control_client_config, is_of_first_root,
    is_of_signing_name, proof,
};
use tombolo_proto::tombolo::v1::{self, enrollment_client::EnrollmentClient};
use tombolo_runtime::Reader;
use tombolo_snapshot::Snapshot;
use tombolo_types::{Code, SpiffeId};

/// How long at most until the wall clock is looked at again: it may jump (suspend, a first NTP step), and timers do
/// not notice. The connection to discovery wakes as often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Retries while the certificate is still good: 1 s to 150 s, as ztunnel waits.
const CALM: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(150));
/// Retries without a good certificate: the host is out of the mesh until it has one.
const URGENT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
/// After a change of the CA that signs, or of the name of the trust domain, members renew spread over so long for each workload of the mesh: 50 renewals a
/// second, a twentieth of what one core of discovery does.
const EARLY_PER_WORKLOAD: Duration = Duration::from_millis(20);
/// And over this at most.
const EARLY_MAX: Duration = Duration::from_secs(3600);
/// What rustls says of a connection that the other side ended with an alert: it did not take the certificate.
const ALERT: &str = "received fatal alert";
/// A certificate in its time that discovery does not take is replaced at most so often.
const SHUNNED_EVERY: Duration = Duration::from_secs(60);
/// Retries after discovery said no: an operator has to act first.
const REFUSED: Duration = Duration::from_secs(15);

/// Gets a new certificate with the device key, stores it and puts it into force. With `present` the present
/// certificate is shown too; without, the device key alone speaks, as after an absence past every expiry.
///
/// Cancel-safe: the request is on disk before it is sent and goes out again with the next call.
///
/// # Errors
/// As discovery says (TMB0120 to TMB0122), TMB0112 when it cannot be reached, TMB0502 when the disk refuses.
pub async fn renew(state: &State, live: &Arc<LiveIdentity>, present: bool) -> Result<Registration, Problem> {
    let held = state
        .registration()?
        .ok_or_else(|| Problem::new(Code::NotEnrolled, ""))?;
    let device = device_key(state)?;
    let pending = state.begin(held.generation + 1, new_key)?;
    let discovery = SpiffeId::discovery(held.trust_domain.clone());
    let mut last = Problem::new(Code::Unreachable, "no endpoint is known");
    for endpoint in &held.endpoints {
        let tls = control_client_config(live, &discovery, present);
        let tls = tls.map_err(|error| Problem::new(Code::Unreachable, error))?;
        let connection = match connect(endpoint, &held.trust_domain, tls).await {
            Ok(connection) => connection,
            Err(problem) => {
                last = problem;
                continue;
            }
        };
        let message = proof::renew(
            &connection.exporter,
            held.device,
            pending.generation,
            &pending.csr_pem,
        );
        let request = v1::RenewRequest {
            hello: Some(hello()),
            device_id: held.device.to_string(),
            generation: pending.generation,
            csr: pending.csr_pem.clone(),
            device_signature: device.sign(&message),
            addresses: host::addresses(Some(&held.plan))
                .iter()
                .map(IpAddr::to_string)
                .collect(),
        };
        let answer = match call(endpoint, EnrollmentClient::new(connection.channel).renew(request)).await {
            Ok(answer) => answer,
            Err(problem) if problem.is_refusal() => return Err(problem),
            Err(problem) => {
                last = problem;
                continue;
            }
        };
        let broken = |error: &dyn std::fmt::Display| {
            Problem::new(
                Code::Unreachable,
                format!("{endpoint}: its answer cannot be used: {error}"),
            )
        };
        let registration = answer
            .registration
            .ok_or_else(|| broken(&"it has no registration"))?;
        let mut registration =
            Registration::from_proto(registration, &held.endpoints).map_err(|error| broken(&error))?;
        let issued = WorkloadIdentity::from_issued(&answer.cert_chain, &pending.key_pem);
        let (identity, _) = issued.map_err(|error| broken(&error))?;
        if *identity.id() != registration.identity || registration.device != held.device {
            return Err(broken(&format!(
                "it is for {} of device {}",
                identity.id(),
                registration.device
            )));
        }
        if registration.trust_domain != held.trust_domain {
            // Whoever answers has proven to be the discovery of the trust domain that this node is in.
            if !registration.is_name(&held.trust_domain) {
                return Err(broken(&format!(
                    "it is of the trust domain {}, which was never called {}",
                    registration.trust_domain, held.trust_domain
                )));
            }
            tracing::info!(
                from = %held.trust_domain, to = %registration.trust_domain, "the trust domain is renamed"
            );
            rename(live, &held, &registration);
        }
        // Of a readmitted device discovery moves past every generation that was given out: its number counts.
        registration.generation = registration.generation.max(pending.generation);
        state.commit(&registration, &identity.chain_pem(), &pending.key_pem, None)?;
        live.set_identity(Arc::new(identity));
        return Ok(registration);
    }
    Err(last)
}

/// Believes the new name of the own trust domain by the roots that the old one has: the bundle of the new one may be still
/// to come, and without it the node would not find its discovery again.
fn rename(live: &LiveIdentity, from: &Registration, to: &Registration) {
    let current = live.current();
    let Some(roots) = current.bundle(&from.trust_domain) else {
        return; // it could not have asked
    };
    if current.bundle(&to.trust_domain).is_none() {
        let mut bundles = current.bundles.clone();
        bundles.push(Arc::new(TrustBundle::named(roots, to.trust_domain.clone())));
        live.set_bundles(bundles);
    }
}

/// Keeps the certificate alive for as long as the process runs.
pub(crate) struct Certificates {
    pub(crate) state: Arc<State>,
    pub(crate) live: Arc<LiveIdentity>,
    /// How large the mesh is.
    pub(crate) world: Reader<Snapshot>,
    pub(crate) registration: watch::Sender<Arc<Registration>>,
    pub(crate) status: watch::Sender<ControlStatus>,
}

impl Certificates {
    /// What another process has renewed since this one looked: a used generation must not be used again.
    pub(crate) fn read_again(&self) {
        let Ok(Some(found)) = self.state.registration() else {
            return;
        };
        if found == **self.registration.borrow() {
            return;
        }
        rename(&self.live, &self.registration.borrow(), &found);
        if let Ok(Some((chain, key))) = self.state.identity()
            && let Ok(identity) = WorkloadIdentity::from_pem(&chain, &key)
        {
            self.live.set_identity(Arc::new(identity));
        }
        self.registration.send_replace(Arc::new(found));
    }

    pub(crate) async fn run(self) {
        // A request without an answer: the process died in between. Asking again makes it whole.
        let mut unanswered = matches!(self.state.pending(), Ok(Some(_)));
        let mut jitter: f64 = rand::random();
        let (mut calm, mut urgent) = (CALM, URGENT);
        let (mut early, mut shunned_at) = (Early::default(), None::<Instant>);
        loop {
            let (now, current) = (host::now_unix(), self.live.current());
            let certificate = current.identity.as_ref();
            let due = certificate.map_or(0, |certificate| certificate.renew_at(jitter));
            let due = due.min(early.due(&current, now, jitter, self.world.peek().workload_count()));
            let good = is_good(certificate.map(|c| &**c), now);
            self.status.send_if_modified(|status| {
                let not_after = certificate.map_or(0, |certificate| certificate.not_after());
                let changed = (status.certificate_not_after, status.renewal_due) != (not_after, due);
                (status.certificate_not_after, status.renewal_due) = (not_after, due);
                changed
            });
            let shunned =
                good && self.is_shunned() && shunned_at.is_none_or(|at| at.elapsed() >= SHUNNED_EVERY);
            if shunned {
                tracing::warn!("discovery does not take this certificate; the device key gets another one");
                shunned_at = Some(Instant::now());
            }
            if good && now < due && !unanswered && !shunned {
                (calm, urgent) = (CALM, URGENT);
                tokio::time::sleep(LOOK_AGAIN.min(Duration::from_secs(due - now))).await;
                continue;
            }
            // A server that does not take the certificate (a clock, another root) still takes the device key.
            let backoff = if good { &mut calm } else { &mut urgent };
            let present = good && !shunned && backoff.attempts().is_multiple_of(2);
            match renew(&self.state, &self.live, present).await {
                Ok(registration) => {
                    tracing::info!(generation = registration.generation, "certificate renewed");
                    self.registration.send_replace(Arc::new(registration));
                    self.status.send_modify(|status| status.renewal_problem = None);
                    (unanswered, jitter) = (false, rand::random());
                    early.done();
                    // Of no use on this clock: asking at once again would not change that.
                    let usable = self.live.current().identity.as_ref().is_some_and(|new| {
                        (new.not_before()..new.renew_at(jitter)).contains(&host::now_unix())
                    });
                    if !usable {
                        tokio::time::sleep(backoff.next(rand::random())).await;
                    }
                }
                Err(problem) => {
                    let mut wait = backoff.next(rand::random());
                    // Clocks are set by programs, and discovery may just have woken with an expired certificate itself.
                    if problem.is_refusal() && problem.code != Code::ClockSkew {
                        wait = wait.max(REFUSED);
                    }
                    let first = self.status.borrow().renewal_problem.as_ref() != Some(&problem);
                    if first {
                        tracing::warn!(code = %problem.code, cause = problem.cause, "the certificate was not renewed");
                    }
                    self.status
                        .send_modify(|status| status.renewal_problem = Some(problem));
                    self.pause(wait, good).await;
                }
            }
        }
    }

    /// Waits before the next attempt: less long once discovery is reached again, or when the certificate goes out of
    /// its time (also by a jump of the clock) or comes into it.
    async fn pause(&self, wait: Duration, good: bool) {
        let end = Instant::now() + wait;
        let mut status = self.status.subscribe();
        let mut connected = status.borrow_and_update().connected;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_good() != good {
                return;
            }
            if let Ok(changed) = timeout(left.min(LOOK_AGAIN), status.changed()).await {
                let now = status.borrow_and_update().connected;
                if changed.is_err() || (now && !connected) {
                    return;
                }
                connected = now;
            }
        }
    }

    /// The certificate is in its time, and discovery ends every connection that shows it: its root has gone while this
    /// host was away.
    fn is_shunned(&self) -> bool {
        let status = self.status.borrow();
        let problem = status.stream_problem.as_ref();
        !status.connected && problem.is_some_and(|problem| problem.cause.contains(ALERT))
    }

    fn is_good(&self) -> bool {
        is_good(self.live.current().identity.as_deref(), host::now_unix())
    }
}

/// A renewal before its time: another CA signs now, or the trust domain has a new name, and the root or the name of this
/// certificate goes soon.
#[derive(Debug, Default)]
struct Early {
    /// Generation of the roots under which it was decided, and when it is due.
    planned: Option<(u64, u64)>,
}

impl Early {
    /// When, Unix seconds; far away where there is no reason. Once for each change of roots: a CA that goes on signing
    /// with another root than it publishes first is not asked again and again.
    fn due(&mut self, current: &Current, now_unix: u64, jitter: f64, workloads: usize) -> u64 {
        let generation = current.bundle_generation;
        match self.planned {
            Some((planned, due)) if planned == generation => due,
            _ if is_of_first_root(current) && is_of_signing_name(current) => {
                self.planned = Some((generation, u64::MAX));
                u64::MAX
            }
            _ => {
                let spread = EARLY_PER_WORKLOAD.saturating_mul(u32::try_from(workloads).unwrap_or(u32::MAX));
                let due = now_unix + (spread.min(EARLY_MAX).as_secs_f64() * jitter) as u64;
                self.planned = Some((generation, due));
                due
            }
        }
    }

    fn done(&mut self) {
        if let Some((_, due)) = &mut self.planned {
            *due = u64::MAX;
        }
    }
}

/// True for a certificate that is in its time. Before its start, the clock went back, it is of no use either.
fn is_good(certificate: Option<&WorkloadIdentity>, now_unix: u64) -> bool {
    certificate.is_some_and(|c| (c.not_before()..c.not_after()).contains(&now_unix))
}
