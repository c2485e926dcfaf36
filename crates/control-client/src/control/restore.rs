use crate::{Problem, Registration, State, host};
use std::sync::Arc;
use tombolo_identity::{Current, LiveIdentity, TrustBundle, WorkloadIdentity, still_trusted};
use tombolo_snapshot::{Snapshot, SnapshotError};
use tombolo_types::Code;

/// What was on disk.
#[derive(Debug)]
pub struct Restored {
    /// Who this node is.
    pub registration: Registration,
    /// Its certificate, if it is readable, and the roots of its trust domain and of others.
    pub identity: Arc<LiveIdentity>,
    /// The last snapshot, or an empty one.
    pub snapshot: Snapshot,
    /// Unix milliseconds of the stored snapshot; 0: there was none.
    pub snapshot_unix_ms: i64,
    /// What had to be set aside or will be got anew.
    pub problems: Vec<Problem>,
}

/// Reads everything that an agent needs to serve without discovery; `None` while the host is not enrolled.
///
/// # Errors
/// When the registration or the roots cannot be read. A bad snapshot is set aside and a bad certificate renewed.
pub fn restore(state: &State) -> Result<Option<Restored>, Problem> {
    let Some(registration) = state.registration()? else {
        return Ok(None);
    };
    let mut problems = Vec::new();
    for path in state.close_exposed()? {
        problems.push(Problem::new(Code::StateExposed, path.display()));
    }
    let roots = state.roots()?.unwrap_or_default();
    let own = TrustBundle::from_pem(registration.trust_domain.clone(), &roots)
        .map_err(|error| Problem::new(Code::StateLost, format!("roots.pem: {error}")))?;
    let identity = match state.identity() {
        Ok(None) => Err("it is not there; it will be renewed".to_owned()),
        Ok(Some((chain, key))) => WorkloadIdentity::from_pem(&chain, &key).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    let identity = identity
        .map_err(|cause| {
            let kept = state.set_aside_identity();
            let kept = kept.map_or_else(|_| String::new(), |kept| format!("; kept as {}", kept.display()));
            problems.push(Problem::new(
                Code::StateCorrupt,
                format!("identity.pem: {cause}{kept}"),
            ));
        })
        .ok()
        .map(Arc::new);
    let mut live = LiveIdentity::new(identity, vec![Arc::new(own)]);
    let empty = || Snapshot::empty(registration.plan, registration.own());
    let mut snapshot_unix_ms = state.snapshot_unix_ms();
    let snapshot = match state.snapshot()? {
        None => empty(),
        Some(bytes) => read(&bytes, &registration).or_else(|error| {
            snapshot_unix_ms = 0;
            let kept = state.set_aside_snapshot()?;
            problems.push(Problem::new(
                Code::StateCorrupt,
                format!("snapshot.bin: {error}; kept as {}", kept.display()),
            ));
            Ok::<_, Problem>(empty())
        })?,
    };
    trust(&snapshot, &live);
    if let Some(cause) = foreign(&live.current(), &registration) {
        let kept = state.set_aside_identity();
        let kept = kept.map_or_else(|_| String::new(), |kept| format!("; kept as {}", kept.display()));
        problems.push(Problem::new(
            Code::StateCorrupt,
            format!("identity.pem: {cause}; it will be renewed{kept}"),
        ));
        live = LiveIdentity::new(None, live.current().bundles.clone());
    }
    Ok(Some(Restored {
        registration,
        identity: live,
        snapshot,
        snapshot_unix_ms,
        problems,
    }))
}

/// A snapshot of this node: also one that was written before its trust domain was renamed.
pub(super) fn read(bytes: &[u8], registration: &Registration) -> Result<Snapshot, SnapshotError> {
    let names = &registration.other_names;
    Snapshot::decode_renamed(bytes, registration.plan, registration.own(), names)
}

/// Why the certificate on disk is not this node's: nobody would believe it, and it would not be renewed before its half
/// life. One that has only expired is its own, and so is one under another name of the own trust domain: its renewal was
/// cut between the certificate and the registration.
fn foreign(current: &Current, registration: &Registration) -> Option<String> {
    let held = current.identity.as_ref()?;
    if !current.is_same(held.id(), &registration.identity) {
        return Some(format!("it is of {}", held.id()));
    }
    let known = still_trusted(current, held.chain(), host::now_unix());
    (!known).then(|| "it is of a root that this mesh does not have".to_owned())
}

/// Puts the bundles of a snapshot into force. The own trust domain always keeps one: an empty or damaged set, from
/// wherever, must not make the node distrust everybody and itself. Returns the own bundle if it changed.
pub(super) fn trust(snapshot: &Snapshot, live: &LiveIdentity) -> Option<Arc<TrustBundle>> {
    let own = &snapshot.own().trust_domain;
    let held = live.current();
    let mut bundles: Vec<Arc<TrustBundle>> = Vec::new();
    for (trust_domain, pem) in snapshot.trust_bundles() {
        match TrustBundle::from_pem(trust_domain.clone(), pem) {
            Ok(bundle) if !bundle.roots().is_empty() => {
                let (also, former) = snapshot.names_of(trust_domain);
                bundles.push(Arc::new(bundle.with_names(also.to_vec(), former.to_vec())));
            }
            Ok(_) => tracing::warn!(%trust_domain, "a trust bundle without roots is passed over"),
            Err(error) => tracing::warn!(%trust_domain, %error, "a trust bundle is passed over"),
        }
    }
    let new = bundles
        .iter()
        .find(|bundle| bundle.trust_domain() == own)
        .cloned();
    // The certificate may be of the new name of the trust domain, and the snapshot still of the old one.
    let shown = held.identity.as_ref().map(|identity| &identity.id().trust_domain);
    for name in [Some(own), shown].into_iter().flatten() {
        if !bundles.iter().any(|bundle| bundle.trust_domain() == name) {
            bundles.extend(held.bundle(name).cloned());
        }
    }
    let same = bundles.len() == held.bundles.len()
        && bundles
            .iter()
            .all(|new| held.bundle(new.trust_domain()).is_some_and(|old| old == new));
    if same {
        return None;
    }
    let changed = new.filter(|new| held.bundle(own).is_none_or(|old| old != new));
    live.set_bundles(bundles);
    changed
}
