//! What may be written, beyond what a resource says by itself: rules that look at other objects.

use crate::refusal::Refusal;
use tombolo_config::{JoinTokenSpec, Object, Resource, WorkloadEntrySpec, annotation};
use tombolo_types::Code;

/// Longest life of a join token. It is minutes by default; a week is for a fleet that is imaged.
const TOKEN_LIFE_MAX_MS: i64 = 7 * 24 * 3600 * 1000;
/// Most uses of a join token.
const TOKEN_USES_MAX: u32 = 1000;

fn invalid(resource: &str, field: &str, cause: &str) -> Refusal {
    Refusal::new(
        Code::InvalidResource,
        format_args!("{resource}: {field}: {cause}"),
    )
}

/// Life, uses and name of a new token.
pub(super) fn check_new_token(token: &Object<JoinTokenSpec>, now_unix_ms: i64) -> Result<(), Refusal> {
    let title = format!("JoinToken {}/{}", token.metadata.namespace, token.metadata.name);
    let name = &token.metadata.name;
    if name.len() != 32
        || !name
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    {
        return Err(invalid(
            &title,
            "metadata.name",
            "it must be the token's id, 32 hex digits",
        ));
    }
    let expires = tombolo_config::unix_ms(&token.spec.expires)
        .ok_or_else(|| invalid(&title, "spec.expires", "it must be an RFC 3339 time"))?;
    if expires <= now_unix_ms {
        return Err(invalid(&title, "spec.expires", "it is in the past"));
    }
    if expires > now_unix_ms + TOKEN_LIFE_MAX_MS {
        return Err(invalid(&title, "spec.expires", "a token lives at most 7 days"));
    }
    if token.spec.uses == 0 || token.spec.uses > TOKEN_USES_MAX {
        return Err(invalid(&title, "spec.uses", "1 to 1000"));
    }
    Ok(())
}

/// True if the entry belongs to an enrolled device.
pub(super) fn is_of_a_device(entry: &Object<WorkloadEntrySpec>) -> bool {
    entry
        .metadata
        .annotations
        .contains_key(annotation::AUTO_REGISTRATION_GROUP)
}

/// What may not change from one version of an object to the next.
pub(super) fn check_change(before: &Resource, after: &Resource) -> Result<(), Refusal> {
    let title = after.title();
    match (before, after) {
        (Resource::WorkloadEntry(old), Resource::WorkloadEntry(new)) if is_of_a_device(old) => {
            let same = |field: &str, same: bool| {
                let cause =
                    "it is fixed by the enrolment of the device; change the WorkloadGroup and enrol again";
                if same {
                    Ok(())
                } else {
                    Err(invalid(&title, field, cause))
                }
            };
            same(
                "spec.serviceAccount",
                old.spec.service_account == new.spec.service_account,
            )?;
            same("spec.network", old.spec.network == new.spec.network)?;
            same("spec.address", old.spec.address == new.spec.address)?;
            let group = annotation::AUTO_REGISTRATION_GROUP;
            same(
                "metadata.annotations",
                old.metadata.annotations.get(group) == new.metadata.annotations.get(group),
            )
        }
        (Resource::WorkloadEntry(_), Resource::WorkloadEntry(new)) => check_new_entry(new),
        (Resource::JoinToken(old), Resource::JoinToken(new)) if old.spec != new.spec => Err(invalid(
            &title,
            "spec",
            "a token is never changed: delete it and make a new one",
        )),
        _ => Ok(()),
    }
}

/// Nobody writes an entry that looks like a device's.
pub(super) fn check_new_entry(entry: &Object<WorkloadEntrySpec>) -> Result<(), Refusal> {
    if !is_of_a_device(entry) {
        return Ok(());
    }
    let title = format!(
        "WorkloadEntry {}/{}",
        entry.metadata.namespace, entry.metadata.name
    );
    let field = format!("metadata.annotations[{}]", annotation::AUTO_REGISTRATION_GROUP);
    Err(invalid(&title, &field, "only enrolment writes it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tombolo_config::Metadata;

    fn token(uses: u32, expires: &str) -> Object<JoinTokenSpec> {
        let spec = JoinTokenSpec {
            uses,
            expires: expires.into(),
            ..JoinTokenSpec::default()
        };
        Object::<JoinTokenSpec>::new(Metadata::named("shop", "0123456789abcdef0123456789abcdef"), spec)
    }

    #[test]
    fn bounds_of_a_token() {
        let now = tombolo_config::unix_ms("2026-01-01T00:00:00Z").unwrap();
        for (uses, expires, ok) in [
            (1, "2026-01-01T00:15:00Z", true),
            (1000, "2026-01-08T00:00:00Z", true),
            (0, "2026-01-01T00:15:00Z", false),
            (1001, "2026-01-01T00:15:00Z", false),
            (1, "2025-12-31T23:59:59Z", false),
            (1, "2026-01-08T00:00:01Z", false),
            (1, "tomorrow", false),
        ] {
            assert_eq!(
                check_new_token(&token(uses, expires), now).is_ok(),
                ok,
                "{uses} {expires}"
            );
        }
        let mut named = token(1, "2026-01-01T00:15:00Z");
        named.metadata.name = "my-token".into();
        assert!(check_new_token(&named, now).is_err());
    }

    #[test]
    fn an_entry_cannot_become_somebody_else() {
        let mut metadata = Metadata::named("shop", "catalog-1");
        metadata
            .annotations
            .insert(annotation::AUTO_REGISTRATION_GROUP.into(), "catalog".into());
        let spec = WorkloadEntrySpec {
            service_account: "catalog".into(),
            address: "10.0.0.1".into(),
            ..WorkloadEntrySpec::default()
        };
        let old = Object::<WorkloadEntrySpec>::new(metadata, spec);
        let change = |edit: &dyn Fn(&mut Object<WorkloadEntrySpec>)| {
            let mut new = old.clone();
            edit(&mut new);
            check_change(&Resource::from(old.clone()), &Resource::from(new)).is_ok()
        };
        assert!(change(&|e| e.spec.weight = 5));
        assert!(!change(&|e| e.spec.service_account = "payments".into()));
        assert!(!change(&|e| e.spec.address = "10.0.0.2".into()));
        assert!(!change(&|e| e.spec.network = "other".into()));
        assert!(!change(&|e| e.metadata.annotations.clear()));
        let mut mine = old.clone();
        mine.metadata.annotations.clear();
        assert!(check_new_entry(&mine).is_ok() && check_new_entry(&old).is_err());
        assert!(check_change(&Resource::from(mine), &Resource::from(old)).is_err());
    }
}
