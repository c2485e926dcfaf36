use super::*;
use crate::registration::tests::message;
use std::sync::atomic::Ordering;

fn registration(generation: u64) -> Registration {
    let mut registration = Registration::from_proto(message(), &["d:15012".into()]).unwrap();
    registration.generation = generation;
    registration
}

fn temp() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a").join("agent");
    (dir, path)
}

const KEY: &str = "-----BEGIN PRIVATE KEY-----\nk\n-----END PRIVATE KEY-----\n";
const CHAIN: &str = "-----BEGIN CERTIFICATE-----\nc\n-----END CERTIFICATE-----\n";

#[test]
fn modes_lock_and_contents() {
    let (_keep, path) = temp();
    let state = State::open(&path, None).unwrap();
    assert!(state.registration().unwrap().is_none() && state.identity().unwrap().is_none());
    state.create_device_key("device").unwrap();
    state.commit(&registration(1), CHAIN, KEY, Some("roots")).unwrap();
    state.save_snapshot(b"snapshot").unwrap();
    for entry in fs::read_dir(&path).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(
            entry.metadata().unwrap().mode() & 0o777,
            0o600,
            "{:?}",
            entry.file_name()
        );
    }
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    assert!(state.is_locked() && State::peek(&path).device_key().unwrap().is_some());
    let Err(StateError::Locked { pid, .. }) = State::open(&path, None) else {
        panic!("two agents on one state")
    };
    assert_eq!(pid, std::process::id().to_string());
    drop(state);

    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    let state = State::open(&path, None).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().mode() & 0o777,
        0o700,
        "an open directory is closed"
    );
    assert_eq!(state.registration().unwrap(), Some(registration(1)));
    let (chain, key) = state.identity().unwrap().unwrap();
    assert_eq!((chain.as_str(), key.as_str()), (CHAIN, KEY));
    assert_eq!(state.roots().unwrap().as_deref(), Some("roots"));
    assert_eq!(state.snapshot().unwrap().as_deref(), Some(&b"snapshot"[..]));
}

#[test]
fn a_device_key_is_never_replaced_or_lost() {
    let (_keep, path) = temp();
    let state = State::open(&path, None).unwrap();
    state.create_device_key("first").unwrap();
    assert!(matches!(
        state.create_device_key("second"),
        Err(StateError::DeviceKeyExists { .. })
    ));
    state.commit(&registration(1), CHAIN, KEY, None).unwrap();
    state.save_snapshot(b"x").unwrap();
    let bad = state.set_aside_snapshot().unwrap();
    assert_eq!(fs::read(bad).unwrap(), b"x");
    assert!(state.snapshot().unwrap().is_none());
    state.discard_unregistered().unwrap();
    assert_eq!(
        state.device_key().unwrap().unwrap().as_str(),
        "first",
        "an enrolled host keeps everything"
    );
    state.wipe().unwrap();
    let left: Vec<_> = fs::read_dir(&path)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(left.is_empty(), "the lock's file goes too: {left:?}");
}

#[test]
fn refused_enrolment_leaves_nothing() {
    let (_keep, path) = temp();
    let state = State::open(&path, None).unwrap();
    state.create_device_key("first").unwrap();
    state
        .begin::<StateError>(0, || Ok((Zeroizing::new("k".into()), "c".into())))
        .unwrap();
    state.discard_unregistered().unwrap();
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "only the lock");
}

#[test]
fn damaged_files_are_named() {
    let (_keep, path) = temp();
    let state = State::open(&path, None).unwrap();
    for (name, text) in [
        (REGISTRATION, "{"),
        (PENDING, "{}"),
        (IDENTITY, CHAIN),
        (DEVICE_KEY, "\u{0}"),
    ] {
        fs::write(path.join(name), text).unwrap();
    }
    fs::write(path.join(DEVICE_KEY), [0xff, 0xfe]).unwrap();
    let named = |error: StateError, name: &str| assert!(error.to_string().contains(name), "{error}");
    named(state.registration().unwrap_err(), REGISTRATION);
    named(state.pending().unwrap_err(), PENDING);
    named(state.identity().unwrap_err(), IDENTITY);
    named(state.device_key().unwrap_err(), DEVICE_KEY);
    assert!(
        !format!(
            "{:?}",
            Pending {
                generation: 3,
                key_pem: Zeroizing::new("secret".into()),
                csr_pem: String::new()
            }
        )
        .contains("secret")
    );
}

/// Discovery's rule of generations: a repeat of (generation, key) is answered with the same certificate, another key at
/// a used generation is a clone.
struct Discovery {
    generation: u64,
    csr: String,
}

impl Discovery {
    fn renew(&mut self, pending: &Pending) -> (Registration, String) {
        if pending.generation == self.generation + 1 {
            (self.generation, self.csr) = (pending.generation, pending.csr_pem.clone());
        }
        assert_eq!(
            (pending.generation, &pending.csr_pem),
            (self.generation, &self.csr),
            "a clone"
        );
        (
            registration(self.generation),
            format!("{CHAIN}certificate of {}\n", self.csr),
        )
    }
}

/// One renewal as the agent does it, with the answer lost where `answered` is false.
fn renew(state: &State, discovery: &mut Discovery, keys: &mut u32, answered: bool) -> Result<(), StateError> {
    let held = state.registration()?.expect("enrolled");
    let pending = state.begin::<StateError>(held.generation + 1, || {
        *keys += 1;
        Ok((
            Zeroizing::new(format!("-----BEGIN PRIVATE KEY-----\n{keys}\n")),
            format!("csr {keys}"),
        ))
    })?;
    let (registration, chain) = discovery.renew(&pending);
    if answered {
        state.commit(&registration, &chain, &pending.key_pem, None)?;
    }
    Ok(())
}

#[test]
fn killed_at_any_step_the_device_stays_one_device() {
    for steps in 0..12 {
        for answered in [true, false] {
            let (_keep, path) = temp();
            let state = State::open(&path, None).unwrap();
            state.create_device_key("device").unwrap();
            state.commit(&registration(1), CHAIN, KEY, Some("roots")).unwrap();
            let (mut discovery, mut keys) = (
                Discovery {
                    generation: 1,
                    csr: String::new(),
                },
                0,
            );
            state.steps_left.store(steps, Ordering::SeqCst);
            let _ = renew(&state, &mut discovery, &mut keys, answered);
            drop(state);

            let state = State::open(&path, None).unwrap();
            let (chain, key) = state.identity().unwrap().expect("there is always a pair");
            let pair = |n: u32| {
                chain.contains(&format!("certificate of csr {n}\n")) == key.contains(&format!("\n{n}\n"))
            };
            assert!(
                (1..=keys).all(pair),
                "after {steps} steps certificate and key do not belong together"
            );
            renew(&state, &mut discovery, &mut keys, true).unwrap();
            renew(&state, &mut discovery, &mut keys, true).unwrap();
            assert_eq!(
                state.registration().unwrap().unwrap().generation,
                discovery.generation
            );
            assert!(state.pending().unwrap().is_none());
            assert_eq!(state.device_key().unwrap().unwrap().as_str(), "device");
        }
    }
}
