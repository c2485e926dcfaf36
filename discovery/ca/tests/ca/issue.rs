//! What a certificate says, and which requests are refused.

use crate::{CATALOG, DEFAULT, DISCOVERY, WEBAPP, id, issue, made, now, request, td, unix};
use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PublicKeyData as _};
use std::{sync::LazyLock, time::Duration};
use tombolo_ca::{Authority, CaError, TtlLimits};
use tombolo_identity::{certificates_from_pem, generate_csr, serial};
use tombolo_types::DeviceId;
use x509_parser::prelude::{FromDer as _, GeneralName, ParsedExtension, X509Certificate};

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn the_answer_is_as_istiod_gives_it() {
    let made = made();
    let (ca, when, request) = (&made.authority, now(), request(CATALOG));
    let issued = ca
        .issue(&request.csr_pem, &id(CATALOG), Some(DeviceId(42)), DEFAULT, when)
        .unwrap();
    assert_eq!(issued.cert_chain.len(), 2, "a self-made root: certificate, roots");
    assert_eq!(issued.cert_chain[1], ca.roots_pem());
    for element in &issued.cert_chain {
        assert!(
            element.starts_with("-----BEGIN CERTIFICATE-----\n")
                && element.ends_with("-----END CERTIFICATE-----\n")
        );
    }
    let der = certificates_from_pem(&issued.cert_chain[0]).unwrap().remove(0);
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    assert_eq!(leaf.version().0, 2, "v3");
    assert_eq!(leaf.subject().iter().count(), 0, "no subject");
    assert_eq!(leaf.validity().not_before.timestamp() as u64, unix(when) - 120);
    assert_eq!(leaf.validity().not_after.timestamp() as u64, unix(when) + 86_400);
    assert_eq!(
        (issued.not_before, issued.not_after),
        (unix(when) - 120, unix(when) + 86_400)
    );
    let critical: Vec<_> = leaf
        .extensions()
        .iter()
        .filter(|e| e.critical)
        .map(|e| e.oid.to_id_string())
        .collect();
    assert_eq!(
        critical,
        ["2.5.29.17", "2.5.29.15", "2.5.29.19"],
        "names, key usage, basic constraints"
    );
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI(CATALOG)]);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert_eq!(usage.flags, 0b101, "digitalSignature and keyEncipherment");
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.any && extended.other.is_empty());
    assert!(!leaf.basic_constraints().unwrap().unwrap().value.ca);
    let root = certificates_from_pem(ca.roots_pem()).unwrap().remove(0);
    let (_, root) = X509Certificate::from_der(&root).unwrap();
    let find = |certificate: &X509Certificate<'_>| {
        certificate
            .extensions()
            .iter()
            .find_map(|extension| match extension.parsed_extension() {
                ParsedExtension::AuthorityKeyIdentifier(aki) => {
                    aki.key_identifier.as_ref().map(|key| key.0.to_vec())
                }
                ParsedExtension::SubjectKeyIdentifier(key) if certificate.is_ca() => Some(key.0.to_vec()),
                _ => None,
            })
    };
    assert!(
        find(&leaf).is_some() && find(&leaf) == find(&root),
        "authority key id"
    );
    let serial = leaf.raw_serial();
    assert_eq!(serial::device_of(serial), Some(DeviceId(42)));
    assert_eq!(issued.serial, serial);
}

#[test]
fn the_root() {
    let made = made();
    let der = made.authority.bundle().roots()[0].clone();
    let (_, root) = X509Certificate::from_der(&der).unwrap();
    assert!(root.is_ca() && root.verify_signature(None).is_ok());
    assert!(root.key_usage().unwrap().unwrap().value.key_cert_sign());
    let years = (root.validity().not_after.timestamp() as u64 - unix(now())) / (365 * 86_400);
    assert!((9..=10).contains(&years), "{years}");
    assert!(
        (root.validity().not_before.timestamp() as u64) < unix(now()) - 120,
        "before what it signs"
    );
    assert!(root.subject().to_string().contains("mesh.example"));
    assert_eq!(
        tombolo_identity::root_pin(&der).unwrap(),
        made.authority.root_pin()
    );
    let other = crate::made();
    assert_ne!(other.authority.root_pin(), made.authority.root_pin());
    assert_ne!(other.authority.bundle().roots()[0].to_vec(), der.to_vec());
}

static CA: LazyLock<crate::Made> = LazyLock::new(made);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_certificate_names_its_device(device: u64, shift in 0u32..64) {
        for device in [device >> shift, device] {
            let identity = issue(&CA.authority, CATALOG, Some(DeviceId(device)), DEFAULT, now());
            prop_assert_eq!(identity.device(), Some(DeviceId(device)));
            let peer = tombolo_identity::peer_of(identity.chain()).unwrap();
            prop_assert_eq!(peer.device, Some(DeviceId(device)));
            prop_assert_eq!(peer.serial, identity.serial());
        }
    }
}

#[test]
fn damaged_requests_are_refused() {
    let key = KeyPair::generate().unwrap();
    let good = CertificateParams::default()
        .serialize_request(&key)
        .unwrap()
        .der()
        .to_vec();
    // What the signature covers: the first element, with its three-byte head, behind the three-byte head of all.
    assert_eq!((good[1], good[3], good[4]), (0x81, 0x30, 0x81));
    let signed = 3..6 + usize::from(good[5]);
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut der = good.clone();
            der[at] ^= 1 << bit;
            let issued = CA.authority.issue(&pem(&der), &id(CATALOG), None, DEFAULT, now());
            match issued {
                Err(error) => assert!(error.is_request(), "byte {at} bit {bit}: {error}"),
                Ok(issued) => {
                    // The reader does not mind the class of a tag beside the signed part: key and signature are whole.
                    assert!(!signed.contains(&at), "byte {at} bit {bit} is signed");
                    let leaf = certificates_from_pem(&issued.cert_chain[0]).unwrap().remove(0);
                    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
                    assert_eq!(
                        leaf.public_key().raw,
                        key.subject_public_key_info(),
                        "byte {at} bit {bit}"
                    );
                }
            }
        }
    }
}

fn pem(der: &[u8]) -> String {
    // The certificate writer with another label: the body is the same.
    tombolo_identity::certificates_to_pem([&der.to_vec().into()])
        .replace("CERTIFICATE", "CERTIFICATE REQUEST")
}

#[test]
fn no_device() {
    for _ in 0..50 {
        assert_eq!(issue(&CA.authority, CATALOG, None, DEFAULT, now()).device(), None);
    }
}

#[test]
fn a_request_gives_only_its_key() {
    // It asks for another identity, a CA certificate, another purpose.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
    params
        .subject_alt_names
        .push(rcgen::SanType::URI(DISCOVERY.try_into().unwrap()));
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::CodeSigning];
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "discovery");
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let issued = CA
        .authority
        .issue(&csr, &id(CATALOG), None, DEFAULT, now())
        .unwrap();
    let (identity, _) =
        tombolo_identity::WorkloadIdentity::from_issued(&issued.cert_chain, &key.serialize_pem()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&identity.chain()[0]).unwrap();
    assert_eq!(
        leaf.subject_alternative_name()
            .unwrap()
            .unwrap()
            .value
            .general_names,
        [GeneralName::URI(CATALOG)]
    );
    assert!(!leaf.is_ca() && leaf.subject().iter().count() == 0);
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
}

#[test]
fn keys() {
    let ok = |key: &KeyPair| {
        let csr = CertificateParams::default()
            .serialize_request(key)
            .unwrap()
            .pem()
            .unwrap();
        CA.authority
            .issue(&csr, &id(CATALOG), None, DEFAULT, now())
            .map(|issued| {
                tombolo_identity::WorkloadIdentity::from_issued(&issued.cert_chain, &key.serialize_pem())
                    .unwrap();
            })
    };
    for algorithm in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ] {
        ok(&KeyPair::generate_for(algorithm).unwrap()).unwrap();
    }
    ok(&KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap()).unwrap();
    let p521 = ok(&KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap()).unwrap_err();
    assert_eq!(
        p521,
        CaError::Csr("of elliptic curves, P-256 and P-384 are taken")
    );
}

#[test]
fn requests_that_are_none() {
    let good = request(CATALOG).csr_pem;
    let refused = |csr: &str| {
        let error = CA
            .authority
            .issue(csr, &id(CATALOG), None, DEFAULT, now())
            .unwrap_err();
        assert!(error.is_request(), "{error}");
        error.to_string()
    };
    assert!(refused("").contains("PEM"));
    assert!(refused(&good.replace("CERTIFICATE REQUEST", "CERTIFICATE")).contains("PEM"));
    assert!(refused(&pem(b"hello")).contains("PKCS#10"));
    assert!(refused(&format!("{good}{}", " ".repeat(20_000))).contains("16 KiB"));
    // A request for somebody else's key: its signature is by another one.
    let (mine, theirs) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let der = CertificateParams::default()
        .serialize_request(&mine)
        .unwrap()
        .der()
        .to_vec();
    let at = der.windows(65).position(|w| w == mine.public_key_raw()).unwrap();
    let mut stolen = der;
    stolen[at..at + 65].copy_from_slice(theirs.public_key_raw());
    assert!(refused(&pem(&stolen)).contains("signature"));
}

#[test]
fn identities() {
    let csr = request(CATALOG).csr_pem;
    let issue = |uri: &str| {
        CA.authority
            .issue(&csr, &id(uri), None, DEFAULT, now())
            .map(|_| ())
    };
    let system = |uri: &str| {
        CA.authority
            .issue_system(&csr, &id(uri), None, DEFAULT, now())
            .map(|_| ())
    };
    issue(CATALOG).unwrap();
    for uri in [
        DISCOVERY,
        "spiffe://mesh.example/ns/tombolo-system/sa/x",
        "spiffe://mesh.example/ns/istio-system/sa/istiod",
        "spiffe://mesh.example/ns/kube-system/sa/default",
    ] {
        assert_eq!(issue(uri), Err(CaError::Reserved(id(uri))));
    }
    system(DISCOVERY).unwrap();
    system("spiffe://mesh.example/ns/tombolo-system/sa/gateway").unwrap();
    for uri in [
        CATALOG,
        "spiffe://mesh.example/ns/tombolo-system/sa/x",
        "spiffe://mesh.example/ns/kube-system/sa/discovery",
        "spiffe://other.example/ns/tombolo-system/sa/discovery",
    ] {
        assert_eq!(system(uri), Err(CaError::NotSystem(id(uri))));
    }
    let foreign = "spiffe://other.example/ns/shop/sa/catalog";
    assert_eq!(
        issue(foreign),
        Err(CaError::ForeignTrustDomain {
            id: id(foreign),
            ours: td()
        })
    );
}

#[test]
fn lives() {
    let mut made = made();
    let life = |ca: &Authority, ttl: Duration| {
        let when = now();
        let request = request(CATALOG);
        ca.issue(&request.csr_pem, &id(CATALOG), None, ttl, when)
            .map(|issued| issued.not_after - unix(when))
    };
    assert_eq!(life(&made.authority, HOUR), Ok(3600));
    assert_eq!(life(&made.authority, Duration::from_secs(5)), Ok(5));
    assert_eq!(life(&made.authority, 7 * 24 * HOUR), Ok(7 * 86_400));
    let (asked, max) = (7 * 24 * HOUR + Duration::from_secs(1), 7 * 24 * HOUR);
    let error = life(&made.authority, asked).unwrap_err();
    assert_eq!(error, CaError::Ttl { asked, max });
    assert!(error.is_request());
    made.authority
        .set_limits(TtlLimits {
            default: HOUR,
            max: 2 * HOUR,
        })
        .unwrap();
    assert_eq!(life(&made.authority, DEFAULT), Ok(3600));
    assert!(life(&made.authority, 3 * HOUR).is_err());
    for (default, max) in [(HOUR / 2, HOUR), (2 * HOUR, HOUR), (HOUR, 8 * 24 * HOUR)] {
        assert_eq!(
            made.authority.set_limits(TtlLimits { default, max }),
            Err(CaError::TtlLimits { default, max })
        );
    }
    assert_eq!(
        made.authority.limits(),
        TtlLimits {
            default: HOUR,
            max: 2 * HOUR
        }
    );
}

#[test]
fn nothing_outlives_the_authority() {
    let made = made();
    let end = made.authority.not_after();
    let at = |seconds: u64| std::time::UNIX_EPOCH + Duration::from_secs(seconds);
    let request = request(CATALOG);
    let issue = |when| {
        made.authority
            .issue(&request.csr_pem, &id(CATALOG), None, 24 * HOUR, when)
    };
    assert_eq!(issue(at(end - 3600)).unwrap().not_after, end);
    let error = issue(at(end)).unwrap_err();
    assert!(
        matches!(error, CaError::SignerExpired(_)) && !error.is_request(),
        "{error}"
    );
}

#[test]
fn a_server_certificate() {
    let made = made();
    let dns = ["discovery.example".to_owned(), "localhost".to_owned()];
    let ips = ["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let server = made
        .authority
        .issue_server(&id(DISCOVERY), &dns, &ips, DEFAULT, now())
        .unwrap();
    assert_eq!((server.id(), server.device()), (&id(DISCOVERY), None));
    assert_eq!(
        server.chain().last(),
        made.authority.bundle().roots().first(),
        "the root is in its chain"
    );
    let (_, leaf) = X509Certificate::from_der(&server.chain()[0]).unwrap();
    let names = &leaf
        .subject_alternative_name()
        .unwrap()
        .unwrap()
        .value
        .general_names;
    let v6: std::net::Ipv6Addr = "2001:db8::1".parse().unwrap();
    let want = [
        GeneralName::URI(DISCOVERY),
        GeneralName::DNSName("discovery.example"),
        GeneralName::DNSName("localhost"),
        GeneralName::IPAddress(&[10, 0, 0, 1]),
        GeneralName::IPAddress(&v6.octets()),
    ];
    assert_eq!(names.as_slice(), want);
    let bad = ["dé.example".to_owned()];
    let error = made
        .authority
        .issue_server(&id(DISCOVERY), &bad, &[], DEFAULT, now())
        .unwrap_err();
    assert_eq!(error, CaError::Name(bad[0].clone()));
    let foreign = id("spiffe://other.example/ns/tombolo-system/sa/discovery");
    assert!(
        made.authority
            .issue_server(&foreign, &[], &[], DEFAULT, now())
            .is_err()
    );
    let too_long = made
        .authority
        .issue_server(&id(WEBAPP), &[], &[], 8 * 24 * HOUR, now());
    assert!(matches!(too_long, Err(CaError::Ttl { .. })));
}

#[test]
fn a_request_without_identity_is_enough() {
    let request = generate_csr(None).unwrap();
    CA.authority
        .issue(&request.csr_pem, &id(CATALOG), None, DEFAULT, now())
        .unwrap();
}
