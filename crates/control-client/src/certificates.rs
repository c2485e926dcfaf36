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
use tombolo_identity::{LiveIdentity, WorkloadIdentity, control_client_config, proof};
use tombolo_proto::tombolo::v1::{self, enrollment_client::EnrollmentClient};
use tombolo_types::{Code, SpiffeId};

/// How long at most until the wall clock is looked at again: it may jump (suspend, a first NTP step), and timers do
/// not notice. The connection to discovery wakes as often.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Retries while the certificate is still good: 1 s to 150 s, as ztunnel waits.
const CALM: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(150));
/// Retries without a good certificate: the host is out of the mesh until it has one.
const URGENT: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
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
        // Of a readmitted device discovery moves past every generation that was given out: its number counts.
        registration.generation = registration.generation.max(pending.generation);
        state.commit(&registration, &identity.chain_pem(), &pending.key_pem, None)?;
        live.set_identity(Arc::new(identity));
        return Ok(registration);
    }
    Err(last)
}

/// Keeps the certificate alive for as long as the process runs.
pub(crate) struct Certificates {
    pub(crate) state: Arc<State>,
    pub(crate) live: Arc<LiveIdentity>,
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
        loop {
            let (now, current) = (host::now_unix(), self.live.current());
            let certificate = current.identity.as_ref();
            let due = certificate.map_or(0, |certificate| certificate.renew_at(jitter));
            let good = is_good(certificate.map(|c| &**c), now);
            self.status.send_if_modified(|status| {
                let not_after = certificate.map_or(0, |certificate| certificate.not_after());
                let changed = (status.certificate_not_after, status.renewal_due) != (not_after, due);
                (status.certificate_not_after, status.renewal_due) = (not_after, due);
                changed
            });
            if good && now < due && !unanswered {
                (calm, urgent) = (CALM, URGENT);
                tokio::time::sleep(LOOK_AGAIN.min(Duration::from_secs(due - now))).await;
                continue;
            }
            // A server that does not take the certificate (a clock, another root) still takes the device key.
            let backoff = if good { &mut calm } else { &mut urgent };
            let present = good && backoff.attempts().is_multiple_of(2);
            match renew(&self.state, &self.live, present).await {
                Ok(registration) => {
                    tracing::info!(generation = registration.generation, "certificate renewed");
                    self.registration.send_replace(Arc::new(registration));
                    self.status.send_modify(|status| status.renewal_problem = None);
                    (unanswered, jitter) = (false, rand::random());
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

    fn is_good(&self) -> bool {
        is_good(self.live.current().identity.as_deref(), host::now_unix())
    }
}

/// True for a certificate that is in its time. Before its start, the clock went back, it is of no use either.
fn is_good(certificate: Option<&WorkloadIdentity>, now_unix: u64) -> bool {
    certificate.is_some_and(|c| (c.not_before()..c.not_after()).contains(&now_unix))
}
