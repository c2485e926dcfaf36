//! The same certificates in the eyes of another implementation.

use crate::{CATALOG, DEFAULT, DISCOVERY, id, issue, made, now};
use std::{fs, path::Path, process::Command};
use tombolo_ca::Authority;
use tombolo_types::DeviceId;

/// Runs openssl in a folder; `None` where there is none and nobody demands it.
fn openssl(dir: &Path, arguments: &[&str]) -> Option<String> {
    let output = match Command::new("openssl").args(arguments).current_dir(dir).output() {
        Ok(output) => output,
        Err(error) => {
            let required = std::env::var("TOMBOLO_TEST_REQUIRE").unwrap_or_default();
            assert!(
                !required.split(',').any(|suite| suite == "openssl"),
                "openssl is required: {error}"
            );
            println!("SKIPPED openssl: {error}");
            return None;
        }
    };
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "openssl {arguments:?}: {text}");
    Some(text)
}

#[test]
fn reads_and_verifies_what_we_issue() {
    let made = made();
    let device = DeviceId(0xfedc_ba98_7654_3210);
    let identity = issue(&made.authority, CATALOG, Some(device), DEFAULT, now());
    let dir = made.dir.parent().unwrap();
    fs::write(dir.join("leaf.pem"), identity.chain_pem()).unwrap();
    let Some(text) = openssl(
        dir,
        &[
            "x509", "-in", "leaf.pem", "-noout", "-text", "-nameopt", "RFC2253",
        ],
    ) else {
        return;
    };
    for wanted in [
        "X509v3 Subject Alternative Name: critical",
        "URI:spiffe://mesh.example/ns/shop/sa/catalog",
        "X509v3 Key Usage: critical",
        "Digital Signature, Key Encipherment",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "CA:FALSE",
        "ASN1 OID: prime256v1",
        "fe:dc:ba:98:76:54:32:10:",
    ] {
        assert!(text.contains(wanted), "{wanted} is not in\n{text}");
    }
    assert!(!text.contains("Negative"), "{text}");
    for purpose in ["sslserver", "sslclient"] {
        let arguments = [
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            "ca/root-cert.pem",
            "leaf.pem",
        ];
        openssl(dir, &arguments);
    }
    let server = made
        .authority
        .issue_server(&id(DISCOVERY), &["localhost".to_owned()], &[], DEFAULT, now())
        .unwrap();
    fs::write(dir.join("server.pem"), server.chain_pem()).unwrap();
    let arguments = [
        "verify",
        "-verify_hostname",
        "localhost",
        "-CAfile",
        "ca/root-cert.pem",
        "server.pem",
    ];
    openssl(dir, &arguments);
    // The pin is what an operator computes by hand.
    openssl(
        dir,
        &[
            "x509",
            "-in",
            "ca/root-cert.pem",
            "-pubkey",
            "-noout",
            "-out",
            "root.pub",
        ],
    );
    openssl(
        dir,
        &[
            "pkey",
            "-pubin",
            "-in",
            "root.pub",
            "-outform",
            "der",
            "-out",
            "root.spki",
        ],
    );
    let text = openssl(dir, &["dgst", "-sha256", "-r", "root.spki"]).unwrap_or_default();
    let pin: String = made
        .authority
        .root_pin()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(text.starts_with(&pin), "{text} {pin}");
}

#[test]
fn requests_and_folders_made_by_it() {
    let made = made();
    let dir = made.dir.parent().unwrap();
    let new = [
        "req", "-new", "-nodes", "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/O=",
    ];
    let kinds: [(&[&str], bool); 6] = [
        (&["-newkey", "rsa:2048"], true),
        (&["-newkey", "rsa:1024"], false),
        (
            &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"],
            true,
        ),
        (
            &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"],
            true,
        ),
        (
            &["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"],
            false,
        ),
        (&["-newkey", "ed25519"], true),
    ];
    for (kind, good) in kinds {
        if openssl(dir, &[&new, kind].concat()).is_none() {
            return;
        }
        let csr = fs::read_to_string(dir.join("csr.pem")).unwrap();
        let issued = made.authority.issue(&csr, &id(CATALOG), None, DEFAULT, now());
        assert_eq!(issued.is_ok(), good, "{kind:?} {issued:?}");
        let Ok(issued) = issued else { continue };
        let key = fs::read_to_string(dir.join("key.pem")).unwrap();
        tombolo_identity::WorkloadIdentity::from_issued(&issued.cert_chain, &key).unwrap();
    }
    // Signed with SHA-1.
    openssl(dir, &[&new[..], &["-newkey", "rsa:2048", "-sha1"]].concat());
    let csr = fs::read_to_string(dir.join("csr.pem")).unwrap();
    let error = made
        .authority
        .issue(&csr, &id(CATALOG), None, DEFAULT, now())
        .unwrap_err();
    assert!(error.to_string().contains("SHA-1"), "{error}");
    // A plugged CA as Istio's documents make it: RSA, keys in the old forms too.
    let plug = |key: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        openssl(dir, key);
        let root = [
            "req",
            "-x509",
            "-new",
            "-key",
            "ca-key.pem",
            "-subj",
            "/O=Istio/CN=Root CA",
            "-days",
            "30",
            "-out",
        ];
        let usage = ["root-cert.pem", "-addext", "keyUsage=critical,keyCertSign"];
        openssl(dir, &[&root[..], &usage].concat());
        for name in ["ca-cert.pem", "cert-chain.pem"] {
            fs::copy(dir.join("root-cert.pem"), dir.join(name)).unwrap();
        }
        let authority = Authority::import(&dir.join("ca"), dir, &crate::td()).unwrap();
        issue(&authority, CATALOG, None, DEFAULT, now());
        fs::read_to_string(dir.join("ca-key.pem")).unwrap()
    };
    assert!(
        plug(&["genrsa", "-traditional", "-out", "ca-key.pem", "2048"]).contains("BEGIN RSA PRIVATE KEY")
    );
    assert!(
        plug(&[
            "ecparam",
            "-genkey",
            "-noout",
            "-name",
            "prime256v1",
            "-out",
            "ca-key.pem"
        ])
        .contains("BEGIN EC PRIVATE KEY")
    );
    plug(&[
        "genpkey",
        "-algorithm",
        "RSA",
        "-pkeyopt",
        "rsa_keygen_bits:3072",
        "-out",
        "ca-key.pem",
    ]);
}
