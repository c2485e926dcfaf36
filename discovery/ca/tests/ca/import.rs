//! A plugged CA with Istio's file names.

use crate::{CATALOG, DEFAULT, id, issue, now, request, td};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::{fs, path::Path};
use tempfile::TempDir;
use tombolo_ca::{Authority, CaError};
use tombolo_identity::{certificates_from_pem, root_pin};

struct Ca(CertifiedIssuer<'static, KeyPair>);

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Istio");
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(30);
    params
}

fn rsa() -> KeyPair {
    KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap()
}

impl Ca {
    fn root(name: &str, key: KeyPair) -> Self {
        Self(CertifiedIssuer::self_signed(params(name), key).unwrap())
    }

    fn under(&self, name: &str, key: KeyPair) -> Self {
        Self(CertifiedIssuer::signed_by(params(name), key, &self.0).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }
}

struct Cacerts {
    folder: TempDir,
    root: Ca,
    middle: Ca,
    ca: Ca,
}

/// Root, an intermediate, and below it the CA of this cluster.
fn cacerts(key: impl Fn() -> KeyPair) -> Cacerts {
    let root = Ca::root("root", key());
    let middle = root.under("middle", key());
    let ca = middle.under("cluster", key());
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: String| fs::write(folder.path().join(name), content).unwrap();
    write("ca-cert.pem", ca.pem());
    write("ca-key.pem", ca.0.key().serialize_pem());
    write("cert-chain.pem", ca.pem() + &middle.pem());
    write("root-cert.pem", root.pem());
    Cacerts {
        folder,
        root,
        middle,
        ca,
    }
}

fn import(from: &Path) -> Result<(TempDir, Authority), CaError> {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::import(&folder.path().join("ca"), from, &td())?;
    Ok((folder, authority))
}

#[test]
fn rsa_and_ecdsa() {
    for key in [
        rsa,
        || KeyPair::generate().unwrap(),
        || KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
    ] {
        let files = cacerts(key);
        let (folder, ca) = import(files.folder.path()).unwrap();
        assert_eq!(ca.root_pin(), root_pin(files.root.0.der()).unwrap());
        let request = request(CATALOG);
        let issued = ca
            .issue(&request.csr_pem, &id(CATALOG), None, DEFAULT, now())
            .unwrap();
        let chain: Vec<_> = issued
            .cert_chain
            .iter()
            .map(|pem| certificates_from_pem(pem).unwrap())
            .collect();
        assert_eq!(chain.len(), 4, "certificate, each of cert-chain.pem, the roots");
        assert_eq!(chain[1], [files.ca.0.der().clone()]);
        assert_eq!(chain[2], [files.middle.0.der().clone()]);
        assert_eq!(chain[3], [files.root.0.der().clone()]);
        issue(&ca, CATALOG, None, DEFAULT, now());
        // From its own copy, with the original gone.
        drop(files);
        issue(
            &Authority::open(&folder.path().join("ca"), &td()).unwrap(),
            CATALOG,
            None,
            DEFAULT,
            now(),
        );
    }
}

#[test]
fn nothing_outlives_it() {
    let files = cacerts(|| KeyPair::generate().unwrap());
    let (_folder, ca) = import(files.folder.path()).unwrap();
    let month = std::time::Duration::from_secs(29 * 86_400);
    let request = request(CATALOG);
    let issued = ca
        .issue(
            &request.csr_pem,
            &id(CATALOG),
            None,
            std::time::Duration::from_secs(7 * 86_400),
            now() + month,
        )
        .unwrap();
    assert_eq!(issued.not_after, ca.not_after());
}

#[test]
fn a_root_alone() {
    let root = Ca::root("root", rsa());
    let folder = tempfile::tempdir().unwrap();
    for name in ["ca-cert.pem", "cert-chain.pem", "root-cert.pem"] {
        fs::write(folder.path().join(name), root.pem()).unwrap();
    }
    fs::write(folder.path().join("ca-key.pem"), root.0.key().serialize_pem()).unwrap();
    let (_folder, ca) = import(folder.path()).unwrap();
    issue(&ca, CATALOG, None, DEFAULT, now());
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let other = cacerts(|| KeyPair::generate().unwrap());
    let refused = |change: &dyn Fn(&Cacerts), words: &[&str]| {
        let files = cacerts(|| KeyPair::generate().unwrap());
        change(&files);
        let folder = tempfile::tempdir().unwrap();
        let error = Authority::import(&folder.path().join("ca"), files.folder.path(), &td()).unwrap_err();
        let text = error.to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{text}");
    };
    let write = |files: &Cacerts, name: &str, content: String| {
        fs::write(files.folder.path().join(name), content).unwrap()
    };
    for name in ["ca-cert.pem", "ca-key.pem", "cert-chain.pem", "root-cert.pem"] {
        refused(
            &|files| fs::remove_file(files.folder.path().join(name)).unwrap(),
            &[name, "No such file"],
        );
        refused(&|files| write(files, name, "garbage".to_owned()), &[name]);
    }
    refused(
        &|files| write(files, "ca-key.pem", other.ca.0.key().serialize_pem()),
        &["ca-key.pem", "not the key of ca-cert.pem"],
    );
    refused(
        &|files| write(files, "cert-chain.pem", files.middle.pem()),
        &["cert-chain.pem", "does not hold ca-cert.pem"],
    );
    refused(
        &|files| write(files, "cert-chain.pem", files.ca.pem()),
        &["cert-chain.pem", "cluster", "middle"],
    );
    refused(
        &|files| write(files, "root-cert.pem", other.root.pem()),
        &["cert-chain.pem", "middle", "root"],
    );
    refused(
        &|files| {
            write(
                files,
                "ca-cert.pem",
                Ca::root("cluster", KeyPair::generate().unwrap()).pem(),
            )
        },
        &["ca-key.pem", "not the key"],
    );
}

#[test]
fn a_signer_that_has_expired() {
    let root = Ca::root("root", rsa());
    let mut short = params("short");
    short.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(2);
    short.not_after = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    let ca = Ca(CertifiedIssuer::signed_by(short, KeyPair::generate().unwrap(), &root.0).unwrap());
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in [
        ("ca-cert.pem", ca.pem()),
        ("ca-key.pem", ca.0.key().serialize_pem()),
        ("cert-chain.pem", ca.pem()),
        ("root-cert.pem", root.pem()),
    ] {
        fs::write(folder.path().join(name), content).unwrap();
    }
    // It fits together; that it is over is said when it is used, by the clock of then.
    let (_folder, authority) = import(folder.path()).unwrap();
    let error = authority
        .issue(&request(CATALOG).csr_pem, &id(CATALOG), None, DEFAULT, now())
        .unwrap_err();
    assert!(matches!(error, CaError::SignerExpired(_)), "{error}");
}
