//! The folder of an authority.

use crate::{CATALOG, DEFAULT, id, issue, made, now, request, td};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};
use tombolo_ca::{Authority, CaError};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn content(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn made_private_and_opened_again() {
    let made = made();
    assert_eq!(mode(&made.dir), 0o700);
    let names: Vec<_> = content(&made.dir)
        .iter()
        .map(|(path, _)| path.file_name().unwrap().to_owned())
        .collect();
    assert_eq!(
        names,
        ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "trust-domain"]
    );
    assert!(content(&made.dir).iter().all(|(path, _)| mode(path) == 0o600));
    assert_eq!(
        fs::read_dir(made.dir.parent().unwrap()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
    assert!(
        fs::read_to_string(made.dir.join("ca-key.pem"))
            .unwrap()
            .starts_with("-----BEGIN PRIVATE KEY-----")
    );
    let again = Authority::open(&made.dir, &td()).unwrap();
    assert_eq!(
        (again.root_pin(), again.roots_pem()),
        (made.authority.root_pin(), made.authority.roots_pem())
    );
    issue(&again, CATALOG, None, DEFAULT, now());
}

#[test]
fn never_overwritten() {
    let made = made();
    let before = content(&made.dir);
    let refused = |error: CaError| assert_eq!(error, CaError::AlreadyExists(made.dir.clone()));
    refused(Authority::create(&made.dir, &td(), now()).unwrap_err());
    let other = crate::made();
    refused(Authority::import(&made.dir, &other.dir, &td()).unwrap_err());
    fs::remove_file(made.dir.join("ca-key.pem")).unwrap();
    refused(Authority::create(&made.dir, &td(), now()).unwrap_err());
    assert_eq!(content(&made.dir).len(), before.len() - 1);
    // An empty folder, as systemd makes it, is free; its mode is set right.
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ca");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    Authority::create(&dir, &td(), now()).unwrap();
    assert_eq!(mode(&dir), 0o700);
}

#[test]
fn only_one_of_two_that_make_it_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("ca");
    let mut results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| Authority::create(&dir, &td(), now())))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap().map(|ca| ca.root_pin()))
            .collect()
    });
    results.sort_by_key(Result::is_err);
    let pin = results[0].clone().unwrap();
    assert!(
        results[1..]
            .iter()
            .all(|other| *other == Err(CaError::AlreadyExists(dir.clone()))),
        "{results:?}"
    );
    assert_eq!(Authority::open(&dir, &td()).unwrap().root_pin(), pin);
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
}

#[test]
fn what_is_wrong_is_named() {
    let open = |change: &dyn Fn(&Path)| {
        let made = made();
        change(&made.dir);
        Authority::open(&made.dir, &td()).unwrap_err().to_string()
    };
    let check = |text: String, wanted: &[&str]| {
        assert!(wanted.iter().all(|word| text.contains(word)), "{text}");
        assert!(!text.contains("PRIVATE KEY"), "{text}");
    };
    for name in ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "trust-domain"] {
        check(
            open(&|dir| fs::remove_file(dir.join(name)).unwrap()),
            &[name, "No such file"],
        );
    }
    check(
        open(&|dir| fs::write(dir.join("ca-key.pem"), "x").unwrap()),
        &["ca-key.pem", "not a PEM private key"],
    );
    let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    check(
        open(&|dir| fs::write(dir.join("ca-key.pem"), encrypted).unwrap()),
        &["ca-key.pem", "encrypted", "openssl pkey"],
    );
    let copy = |name: &'static str| {
        move |dir: &Path| {
            let other = made();
            fs::copy(other.dir.join(name), dir.join(name))
                .map(|_| ())
                .unwrap();
        }
    };
    check(
        open(&copy("ca-key.pem")),
        &["ca-key.pem", "not the key of ca-cert.pem"],
    );
    check(
        open(&copy("ca-cert.pem")),
        &["ca-key.pem", "not the key of ca-cert.pem"],
    );
    check(
        open(&copy("root-cert.pem")),
        &["cert-chain.pem", "does not hold ca-cert.pem"],
    );
    let open_key =
        |dir: &Path| fs::set_permissions(dir.join("ca-key.pem"), fs::Permissions::from_mode(0o640)).unwrap();
    check(open(&open_key), &["ca-key.pem", "0640", "chmod 0600"]);
    check(
        open(&|dir| fs::write(dir.join("trust-domain"), "other.example\n").unwrap()),
        &["other.example", "mesh.example"],
    );
    // A workload's certificate in place of the CA's.
    let leaf = |dir: &Path| {
        let ca = Authority::open(dir, &td()).unwrap();
        let identity = issue(&ca, CATALOG, None, DEFAULT, now());
        fs::write(dir.join("ca-cert.pem"), identity.chain_pem()).unwrap();
    };
    check(open(&leaf), &["ca-cert.pem", "not a CA certificate"]);
    check(
        open(&|dir| fs::write(dir.join("extra-roots.pem"), "none").unwrap()),
        &["extra-roots.pem"],
    );
    check(
        open(&|dir| fs::write(dir.join("root-cert.pem"), vec![b'x'; 2 << 20]).unwrap()),
        &["root-cert.pem", "1 MiB"],
    );
}

#[test]
fn several_roots_are_published() {
    let (made, other) = (made(), made());
    fs::write(made.dir.join("extra-roots.pem"), other.authority.roots_pem()).unwrap();
    let ca = Authority::open(&made.dir, &td()).unwrap();
    assert_eq!(ca.bundle().roots().len(), 2);
    assert_eq!(ca.root_pin(), made.authority.root_pin(), "its own comes first");
    let request = request(CATALOG);
    let issued = ca
        .issue(&request.csr_pem, &id(CATALOG), None, DEFAULT, now())
        .unwrap();
    assert_eq!(issued.cert_chain.len(), 2, "all roots in the last element");
    assert_eq!(
        issued.cert_chain[1],
        format!("{}{}", made.authority.roots_pem(), other.authority.roots_pem())
    );
}

#[test]
fn debug_shows_no_key() {
    let made = made();
    let key = fs::read_to_string(made.dir.join("ca-key.pem")).unwrap();
    let shown = format!("{:?}", made.authority);
    assert!(shown.contains("mesh.example"));
    assert!(
        key.lines()
            .filter(|line| !line.starts_with('-'))
            .all(|line| !shown.contains(line)),
        "{shown}"
    );
}
