use crate::{
    Problem, Registration, State,
    connect::{Connection, connect, refusal_problem},
    host,
};
use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};
use tombolo_identity::{
    DeviceKey, JoinKey, LiveIdentity, TrustBundle, WorkloadIdentity, control_client_config, generate_csr,
    pinned_client_config, proof, utc,
};
use tombolo_proto::tombolo::v1::{self, enrollment_client::EnrollmentClient};
use tombolo_types::{AddressPlan, Code, JoinToken, SpiffeId};
use tonic::{Response, Status, transport::Channel};

/// One call. Discovery writes one transaction for it.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest difference of clocks that `up` accepts: half of the two minutes by which certificates are backdated.
const CLOCK_DIFFERENCE_MAX_MS: i64 = 60_000;

/// What this version can do, sent with every call.
pub(crate) fn hello() -> v1::Hello {
    v1::Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: vec![],
    }
}

/// Awaits one call and gives a broken transport the code of an unreachable discovery.
pub(crate) async fn call<T>(
    endpoint: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Problem> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => {
            let mut problem = Problem::from_status(&status, Code::Unreachable);
            if problem.code == Code::Unreachable {
                problem.cause = format!("{endpoint}: {}", problem.cause);
            }
            Err(problem)
        }
        Err(_) => Err(Problem::new(
            Code::Unreachable,
            format!("{endpoint}: no answer within {} s", CALL_TIMEOUT.as_secs()),
        )),
    }
}

/// What a node says about itself: taken only as far as its WorkloadGroup allows.
#[derive(Debug, Clone, Default)]
pub struct Claims {
    /// Host name.
    pub hostname: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Labels; keys that the group does not list are refused.
    pub labels: HashMap<String, String>,
    /// Set by a gateway alone.
    pub gateway: Option<GatewayClaims>,
}

/// Where a gateway is reached from outside of its network.
#[derive(Debug, Clone, Default)]
pub struct GatewayClaims {
    /// `host:port`; none: the address of its entry, port 15008.
    pub addresses: Vec<String>,
    /// QUIC at the same hosts.
    pub quic_port: Option<u16>,
}

impl Claims {
    /// Host name and addresses as the kernel has them, no labels.
    pub fn of_this_host() -> Self {
        Self {
            hostname: host::hostname(),
            addresses: host::addresses(None),
            labels: HashMap::new(),
            gateway: None,
        }
    }
}

/// What discovery says before anything secret is said.
#[derive(Debug, Clone)]
pub struct Preflight {
    /// Version of discovery.
    pub version: String,
    /// This host's clock minus discovery's, milliseconds, less the time of the call.
    pub clock_difference_ms: i64,
    /// Discovery's clock, Unix milliseconds.
    pub discovery_unix_ms: i64,
    /// Mesh domain.
    pub mesh_domain: String,
    /// VIP prefixes of the mesh.
    pub plan: AddressPlan,
    /// What may still be done with the token; `None` if discovery does not know it or is of an older version.
    pub token: Option<TokenFacts>,
}

/// Longest life of a token that may be an argument.
const ARGUMENT_LIFE_MAX: Duration = Duration::from_secs(3600);

/// What discovery knows of a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenFacts {
    /// How many devices may use it in all.
    pub uses: u32,
    /// How many have.
    pub used: u32,
    /// From its making to its end.
    pub life: Duration,
    /// From now to its end.
    pub left: Duration,
}

impl TokenFacts {
    /// TMB0107 for a token that may not stand in an argument, where every user of the host reads it: only one of a
    /// single use and an hour of life may.
    pub fn argument_problem(&self) -> Option<Problem> {
        (self.uses > 1 || self.life > ARGUMENT_LIFE_MAX).then(|| {
            let cause = format!(
                "it is for {} use{} and {} of life, and may have been read already: tombolo token revoke, and make another",
                self.uses,
                if self.uses == 1 { "" } else { "s" },
                self.life_text()
            );
            Problem::new(Code::TokenInArgument, cause)
        })
    }

    fn life_text(&self) -> String {
        span(self.life)
    }

    /// Uses and time that are left, for people.
    pub fn left_text(&self) -> String {
        let uses = self.uses.saturating_sub(self.used);
        format!(
            "{uses} of {} use{} and {} left",
            self.uses,
            if self.uses == 1 { "" } else { "s" },
            span(self.left)
        )
    }
}

/// `90 min`, `36 h`.
fn span(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s => format!("{} h", s / 3600),
    }
}

impl Preflight {
    /// TMB0113 with the difference and both times, if the clocks differ by more than a minute.
    pub fn clock_problem(&self) -> Option<Problem> {
        let difference = self.clock_difference_ms;
        (difference.abs() > CLOCK_DIFFERENCE_MAX_MS).then(|| {
            let (seconds, word) = (
                difference.abs() / 1000,
                if difference < 0 { "behind" } else { "ahead" },
            );
            let amount = match seconds {
                0..=599 => format!("{seconds} s"),
                600..=86_399 => format!("{} min", seconds / 60),
                _ => format!("{} days", seconds / 86_400),
            };
            let time = |unix_ms: i64| utc(u64::try_from(unix_ms / 1000).unwrap_or(0));
            let theirs = self.discovery_unix_ms;
            let ours = theirs.saturating_add(difference);
            let cause = format!(
                "this host is {amount} {word}: it says {}, discovery {}",
                time(ours),
                time(theirs)
            );
            Problem::new(Code::ClockSkew, cause)
        })
    }
}

/// A connection to discovery over which a token may be redeemed: the root's pin and discovery's exact identity have
/// been checked.
#[derive(Debug)]
pub struct Enroller {
    connection: Connection,
    token: JoinToken,
    endpoint: String,
    roots_pem: String,
}

impl Enroller {
    /// Connects to the first endpoint of the token that proves to be discovery.
    ///
    /// # Errors
    /// TMB0110 for a wrong root, TMB0111 for a server that is not discovery, TMB0113 where its certificate is out of
    /// its time on this host's clock, TMB0112 otherwise. A refusal counts more than an endpoint that does not answer.
    pub async fn connect(token: &JoinToken) -> Result<Self, Problem> {
        let discovery = SpiffeId::discovery(token.trust_domain.clone());
        let mut worst: Option<Problem> = None;
        for endpoint in &token.endpoints {
            let pinned = pinned_client_config(token.root_pin, &discovery);
            let (tls, roots) = pinned.map_err(|error| Problem::new(Code::Unreachable, error))?;
            let problem = match connect(endpoint, &token.trust_domain, tls).await {
                Ok(connection) => {
                    let roots_pem = roots.get().unwrap_or_default();
                    return Ok(Self {
                        connection,
                        token: token.clone(),
                        endpoint: endpoint.clone(),
                        roots_pem,
                    });
                }
                Err(problem) => roots
                    .refusal()
                    .map_or(problem, |refusal| refusal_problem(endpoint, &refusal)),
            };
            if worst.as_ref().is_none_or(|worst| !worst.is_refusal()) {
                worst = Some(problem);
            }
        }
        Err(worst.unwrap_or_else(|| Problem::new(Code::TokenMalformed, "it names no endpoint")))
    }

    /// The endpoint that answered.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn client(&self) -> EnrollmentClient<Channel> {
        EnrollmentClient::new(self.connection.channel.clone())
    }

    /// Asks what discovery is.
    ///
    /// # Errors
    /// When it does not answer, or serves another trust domain than the token's.
    pub async fn preflight(&self) -> Result<Preflight, Problem> {
        let before = host::now_unix_ms();
        let request = v1::PreflightRequest {
            hello: Some(hello()),
            token_id: self.token.id.to_vec(),
        };
        let answer = call(&self.endpoint, self.client().preflight(request)).await?;
        let middle = before + (host::now_unix_ms() - before) / 2;
        if answer.trust_domain != self.token.trust_domain.as_str() {
            let cause = format!(
                "{} serves the trust domain {:?}",
                self.endpoint, answer.trust_domain
            );
            return Err(Problem::new(Code::NotDiscovery, cause));
        }
        let plan = AddressPlan::from_prefixes(&answer.vip_prefixes);
        Ok(Preflight {
            version: answer.hello.map(|hello| hello.version).unwrap_or_default(),
            clock_difference_ms: middle - answer.server_time_unix_ms,
            discovery_unix_ms: answer.server_time_unix_ms,
            mesh_domain: answer.mesh_domain,
            plan: plan.map_err(|error| Problem::new(Code::PrefixTaken, error))?,
            token: answer.token.map(|token| TokenFacts {
                uses: token.uses,
                used: token.used,
                life: Duration::from_millis(
                    u64::try_from(token.expires_unix_ms.saturating_sub(token.created_unix_ms)).unwrap_or(0),
                ),
                left: Duration::from_millis(
                    u64::try_from(token.expires_unix_ms.saturating_sub(answer.server_time_unix_ms))
                        .unwrap_or(0),
                ),
            }),
        })
    }

    /// Redeems the token and stores what came of it. A lost answer burns nothing: the same device key and request are
    /// on disk and go out again with the next call. After a refusal nothing of the attempt is left in `state`.
    ///
    /// # Errors
    /// As discovery says, or TMB0115 on an enrolled host.
    pub async fn enroll(&self, state: &State, claims: Claims) -> Result<Registration, Problem> {
        if let Some(registration) = state.registration()? {
            return Err(Problem::new(
                Code::AlreadyEnrolled,
                format!("it is {}", registration.workload_name),
            ));
        }
        let result = self.redeem(state, claims).await;
        if result.as_ref().is_err_and(Problem::is_refusal) {
            state.discard_unregistered()?;
        }
        result
    }

    async fn redeem(&self, state: &State, claims: Claims) -> Result<Registration, Problem> {
        let device = match state.device_key()? {
            Some(pem) => DeviceKey::from_pem(&pem)
                .map_err(|error| Problem::new(Code::StateLost, format!("device.key: {error}")))?,
            None => {
                let device =
                    DeviceKey::generate().map_err(|error| Problem::new(Code::StateUnusable, error))?;
                state.create_device_key(&device.to_pem())?;
                device
            }
        };
        let pending = state.begin(0, new_key)?;
        let device_public_key = device.public_key();
        let message = proof::enroll(
            &self.connection.exporter,
            &self.token.id,
            &device_public_key,
            &pending.csr_pem,
        );
        let request = v1::EnrollRequest {
            hello: Some(hello()),
            token_id: self.token.id.to_vec(),
            token_signature: JoinKey::from_seed(&self.token.seed).sign(&message),
            device_signature: device.sign(&message),
            device_public_key,
            csr: pending.csr_pem.clone(),
            hostname: claims.hostname,
            addresses: claims.addresses.iter().map(IpAddr::to_string).collect(),
            labels: claims.labels,
            gateway: claims.gateway.map(|gateway| v1::GatewayClaims {
                addresses: gateway.addresses,
                quic_port: gateway.quic_port.unwrap_or_default().into(),
            }),
        };
        let answer = call(&self.endpoint, self.client().enroll(request)).await?;
        // From here on discovery knows the device: a broken answer is not a refusal.
        let broken = |error: &dyn std::fmt::Display| {
            Problem::new(
                Code::Unreachable,
                format!("{}: its answer cannot be used: {error}", self.endpoint),
            )
        };
        let registration = answer
            .registration
            .ok_or_else(|| broken(&"it has no registration"))?;
        let registration =
            Registration::from_proto(registration, &self.token.endpoints).map_err(|error| broken(&error))?;
        let issued = WorkloadIdentity::from_issued(&answer.cert_chain, &pending.key_pem);
        let (identity, roots) = issued.map_err(|error| broken(&error))?;
        if *identity.id() != registration.identity {
            return Err(broken(&format!("the certificate is for {}", identity.id())));
        }
        let roots = if roots.is_empty() { &self.roots_pem } else { &roots };
        state.commit(
            &registration,
            &identity.chain_pem(),
            &pending.key_pem,
            Some(roots),
        )?;
        Ok(registration)
    }
}

/// A new TLS key and its request.
pub(crate) fn new_key() -> Result<(zeroize::Zeroizing<String>, String), Problem> {
    let made = generate_csr(None).map_err(|error| Problem::new(Code::StateUnusable, error))?;
    Ok((made.key_pem, made.csr_pem))
}

/// The device key of an enrolled host.
pub(crate) fn device_key(state: &State) -> Result<DeviceKey, Problem> {
    let pem = state
        .device_key()?
        .ok_or_else(|| Problem::new(Code::StateLost, "the device key is missing"))?;
    DeviceKey::from_pem(&pem).map_err(|error| Problem::new(Code::StateLost, format!("device.key: {error}")))
}

/// Deregisters this host's device. The state directory is not touched: wipe it afterwards.
///
/// # Errors
/// TMB0301 when the host is not enrolled; otherwise as discovery says.
pub async fn leave(state: &State) -> Result<(), Problem> {
    let registration = state
        .registration()?
        .ok_or_else(|| Problem::new(Code::NotEnrolled, ""))?;
    let device = device_key(state)?;
    let roots = state.roots()?.unwrap_or_default();
    let bundle = TrustBundle::from_pem(registration.trust_domain.clone(), &roots)
        .map_err(|error| Problem::new(Code::StateLost, format!("roots.pem: {error}")))?;
    let live = LiveIdentity::new(None, vec![Arc::new(bundle)]);
    let discovery = SpiffeId::discovery(registration.trust_domain.clone());
    let mut last = Problem::new(Code::Unreachable, "no endpoint is known");
    for endpoint in &registration.endpoints {
        let tls = control_client_config(&live, &discovery, false)
            .map_err(|error| Problem::new(Code::Unreachable, error))?;
        let connection = match connect(endpoint, &registration.trust_domain, tls).await {
            Ok(connection) => connection,
            Err(problem) => {
                last = problem;
                continue;
            }
        };
        let message = proof::leave(&connection.exporter, registration.device);
        let request = v1::LeaveRequest {
            hello: Some(hello()),
            device_id: registration.device.to_string(),
            device_signature: device.sign(&message),
        };
        match call(endpoint, EnrollmentClient::new(connection.channel).leave(request)).await {
            Ok(v1::LeaveResponse {}) => return Ok(()),
            Err(problem) if problem.is_refusal() => return Err(problem),
            Err(problem) => last = problem,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_for_tokens_of_one_use_and_an_hour() {
        let hour = 3600;
        for (uses, life, refused) in [
            (1, hour, None),
            (1, 60, None),
            (1, hour + 1, Some("1 use and 60 min")),
            (2, 60, Some("2 uses and 60 s")),
            (1000, 24 * hour, Some("1000 uses and 24 h")),
        ] {
            let facts = TokenFacts {
                uses,
                used: 0,
                life: Duration::from_secs(life),
                left: Duration::from_secs(life),
            };
            let problem = facts.argument_problem();
            assert_eq!(problem.is_some(), refused.is_some(), "{uses} {life}");
            if let (Some(problem), Some(text)) = (problem, refused) {
                assert_eq!(problem.code, Code::TokenInArgument);
                assert!(problem.cause.contains(text), "{problem}");
            }
        }
    }

    #[test]
    fn the_clock_is_named() {
        let preflight = |ms| Preflight {
            version: String::new(),
            clock_difference_ms: ms,
            discovery_unix_ms: 400 * 86_400_000 + 3_600_000,
            mesh_domain: String::new(),
            plan: AddressPlan::default(),
            token: None,
        };
        for (ms, expected) in [
            (0, None),
            (59_000, None),
            (-60_000, None),
            (61_000, Some("61 s ahead: it says 1971-02-05T01:01:01Z")),
            (-3_600_000, Some("60 min behind: it says 1971-02-05T00:00:00Z")),
            (
                400 * 86_400_000,
                Some("400 days ahead: it says 1972-03-11T01:00:00Z"),
            ),
        ] {
            let cause = preflight(ms).clock_problem().map(|problem| problem.cause);
            assert_eq!(
                cause.as_deref(),
                expected
                    .map(|e| format!("this host is {e}, discovery 1971-02-05T01:00:00Z"))
                    .as_deref(),
                "{ms}"
            );
        }
    }
}
