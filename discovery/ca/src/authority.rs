use crate::{
    CaError, csr,
    files::{self, CA_CERT, CA_KEY, CERT_CHAIN, EXTRA_ROOTS, ROOT_CERT, TRUST_DOMAIN},
    material::Material,
};
use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::{
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use time::OffsetDateTime;
use tombolo_identity::{TrustBundle, WorkloadIdentity, certificates_to_pem, root_pin, serial};
use tombolo_types::{DeviceId, SpiffeId, TrustDomain, reserved_namespace};
use zeroize::Zeroizing;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// Life of a self-made root.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A root begins earlier than what it signs, whatever the clocks of the hosts around it say.
const ROOT_BACKDATE: Duration = HOUR;
/// How far a certificate begins in the past, for peers whose clock is behind. Source: istio ClockSkewGracePeriod.
pub(crate) const BACKDATE: Duration = Duration::from_secs(120);

/// How long certificates live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TtlLimits {
    /// When the request does not say: 24 h unless set.
    pub default: Duration,
    /// What a request may ask for at most: 7 d unless set.
    pub max: Duration,
}

impl Default for TtlLimits {
    fn default() -> Self {
        Self {
            default: DAY,
            max: 7 * DAY,
        }
    }
}

/// A certificate that was issued, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Certificate, intermediates one by one, then all roots in one element. Source: istio
    /// `IstioCertificateResponse.cert_chain`.
    pub cert_chain: Vec<String>,
    /// Serial number, unsigned big-endian without leading zeros.
    pub serial: Vec<u8>,
    /// Start of validity, Unix seconds.
    pub not_before: u64,
    /// End of validity, Unix seconds.
    pub not_after: u64,
}

/// The signing key of a trust domain with its certificates. `Debug` shows no key.
pub struct Authority {
    pub(crate) dir: PathBuf,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) material: Material,
    pub(crate) roots_pem: String,
    pub(crate) root_pin: [u8; 32],
    pub(crate) limits: TtlLimits,
    /// Its signing certificate as older authorities signed it, each with its end in Unix seconds.
    pub(crate) crosses: Vec<(CertificateDer<'static>, u64)>,
    /// Names under which discovery is dialled beside `trust_domain`.
    pub(crate) other_names: Vec<TrustDomain>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("dir", &self.dir)
            .field("trust_domain", &self.trust_domain)
            .field("roots", &self.material.bundle.roots().len())
            .field("not_after", &self.material.not_after)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a root (ECDSA P-256, 10 years) in `dir`, which must be missing or empty. The folder is 0700, its files
    /// 0600, and it is there whole or not at all.
    ///
    /// # Errors
    /// When there is something in `dir`, or it cannot be written.
    pub fn create(dir: &Path, td: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        Self::create_with(dir, td, now, None)
    }

    pub(crate) fn create_with(
        dir: &Path,
        td: &TrustDomain,
        now: SystemTime,
        extra_roots: Option<&str>,
    ) -> Result<Self, CaError> {
        files::check_free(dir)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(SerialNumber::from_slice(&serial::without_device(random()?)));
        let now = unix_seconds(now);
        params.not_before = moment(now.saturating_sub(ROOT_BACKDATE.as_secs()))?;
        params.not_after = moment(now + ROOT_LIFE.as_secs())?;
        // A name of its own for each root: with one name for two, verifiers try the wrong key first.
        let [a, b, c, d]: [u8; 4] = random()?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, td.as_str());
        params.distinguished_name.push(
            DnType::CommonName,
            format!("Tombolo root {a:02x}{b:02x}{c:02x}{d:02x}"),
        );
        let certificate = params.self_signed(&key).map_err(signing)?;
        let certificate_pem = certificates_to_pem([certificate.der()]);
        let key_pem = Zeroizing::new(key.serialize_pem());
        let mut made: Vec<(&str, &str)> = vec![
            (CA_KEY, &key_pem),
            (CA_CERT, &certificate_pem),
            (ROOT_CERT, &certificate_pem),
            (TRUST_DOMAIN, td.as_str()),
        ];
        made.extend(extra_roots.map(|text| (EXTRA_ROOTS, text)));
        files::write_new(dir, &suffix()?, &made)?;
        Self::open(dir, td)
    }

    /// Opens what [`Self::create`] or [`Self::import`] made. The roots of `extra-roots.pem`, where there is one, are
    /// published beside its own.
    ///
    /// # Errors
    /// When a file is missing or does not fit the others (the error names it), others can read the key, or it is the
    /// authority of another trust domain.
    pub fn open(dir: &Path, td: &TrustDomain) -> Result<Self, CaError> {
        let found = files::read(dir, TRUST_DOMAIN)?;
        if found.trim() != td.as_str() {
            let (path, found) = (dir.to_owned(), found.trim().to_owned());
            return Err(CaError::WrongTrustDomain {
                path,
                found,
                wanted: td.clone(),
            });
        }
        files::check_private(&dir.join(CA_KEY))?;
        Self::from_material(dir, td, Material::read(dir, td, false)?)
    }

    /// Copies a plugged CA into `dir`, which must be missing or empty. `cacerts_dir` holds Istio's four files:
    /// `ca-cert.pem`, `ca-key.pem`, `cert-chain.pem`, `root-cert.pem`; RSA or ECDSA. They are checked first, up to
    /// a trial certificate that must verify against the roots.
    ///
    /// # Errors
    /// As [`Self::create`], and when a file is missing or does not fit the others (the error names it).
    pub fn import(dir: &Path, cacerts_dir: &Path, td: &TrustDomain) -> Result<Self, CaError> {
        files::check_free(dir)?;
        Self::from_material(cacerts_dir, td, Material::read(cacerts_dir, td, true)?)?;
        let read = |name| files::read(cacerts_dir, name);
        files::write_new(
            dir,
            &suffix()?,
            &[
                (CA_KEY, &read(CA_KEY)?),
                (CA_CERT, &read(CA_CERT)?),
                (CERT_CHAIN, &read(CERT_CHAIN)?),
                (ROOT_CERT, &read(ROOT_CERT)?),
                (TRUST_DOMAIN, td.as_str()),
            ],
        )?;
        Self::open(dir, td)
    }

    fn from_material(dir: &Path, td: &TrustDomain, material: Material) -> Result<Self, CaError> {
        let fault = |name: &str, cause: String| CaError::File {
            path: dir.join(name),
            cause,
        };
        let roots_pem = material.bundle.to_pem();
        let first = material
            .bundle
            .roots()
            .first()
            .ok_or_else(|| fault(ROOT_CERT, "it is empty".to_owned()))?;
        let root_pin = root_pin(first)?;
        let (dir, trust_domain) = (dir.to_owned(), td.clone());
        let authority = Self {
            dir,
            trust_domain,
            material,
            roots_pem,
            root_pin,
            limits: TtlLimits::default(),
            crosses: Vec::new(),
            other_names: Vec::new(),
        };
        authority.try_out()?;
        Ok(authority)
    }

    /// Issues a certificate to nobody and reads it as a client would: what peers would refuse is refused here.
    pub(crate) fn try_out(&self) -> Result<(), CaError> {
        let id = SpiffeId::new(self.trust_domain.clone(), "default", "trial")
            .map_err(|_| CaError::Name(self.trust_domain.to_string()))?;
        let request = tombolo_identity::generate_csr(Some(&id))?;
        let when = UNIX_EPOCH + Duration::from_secs(self.material.begun) + BACKDATE;
        let issued = self.issue(&request.csr_pem, &id, None, HOUR, when)?;
        WorkloadIdentity::from_issued(&issued.cert_chain, &request.key_pem).map_err(|error| {
            CaError::File {
                path: self.dir.join(CA_CERT),
                cause: error.to_string(),
            }
        })?;
        Ok(())
    }

    /// Whose identities it vouches for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// All roots that members must believe, its own first, concatenated.
    pub fn roots_pem(&self) -> &str {
        &self.roots_pem
    }

    /// SHA-256 of the SubjectPublicKeyInfo of its own root: what join tokens pin.
    pub fn root_pin(&self) -> [u8; 32] {
        self.root_pin
    }

    /// All roots as a bundle.
    pub fn bundle(&self) -> TrustBundle {
        self.material.bundle.clone()
    }

    /// End of the signing certificate, Unix seconds: nothing issued outlives it.
    pub fn not_after(&self) -> u64 {
        self.material.not_after
    }

    /// How long certificates live.
    pub fn limits(&self) -> TtlLimits {
        self.limits
    }

    /// Sets how long certificates live, within 1 h to 7 d.
    ///
    /// # Errors
    /// Outside of that, or when the default is above the maximum.
    pub fn set_limits(&mut self, limits: TtlLimits) -> Result<(), CaError> {
        let TtlLimits { default, max } = limits;
        if default < HOUR || max > 7 * DAY || default > max {
            return Err(CaError::TtlLimits { default, max });
        }
        self.limits = limits;
        Ok(())
    }

    /// Issues a workload certificate for `id`. Of the request only the public key is used: who asks was found out
    /// before. `ttl` zero asks for the default life; above the maximum is an error.
    ///
    /// Everything is checked before the private key is used.
    ///
    /// # Errors
    /// When the request is bad ([`CaError::is_request`]), `id` is of a reserved namespace or another trust domain, or
    /// the authority itself has expired.
    /// Source: content and order as istiod's CA.
    pub fn issue(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        device: Option<DeviceId>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        if reserved_namespace(&id.namespace) {
            return Err(CaError::Reserved(id.clone()));
        }
        self.issue_request(csr_pem, id, device, ttl, now)
    }

    /// Issues a certificate for discovery or a gateway of this trust domain: the two identities that [`Self::issue`]
    /// refuses and somebody may have. The caller has made sure that it is they who ask.
    ///
    /// # Errors
    /// As [`Self::issue`], and for any other identity.
    pub fn issue_system(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        device: Option<DeviceId>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let td = || self.trust_domain.clone();
        if *id != SpiffeId::discovery(td()) && *id != SpiffeId::gateway(td()) {
            return Err(CaError::NotSystem(id.clone()));
        }
        self.issue_request(csr_pem, id, device, ttl, now)
    }

    /// Makes a key and its certificate for a server of ours (discovery): `id` and the names and addresses that
    /// clients without SPIFFE check. The chain includes the roots. `id` may be of one of the other names of the trust
    /// domain (see [`crate::Publication`]): whoever knows only that one finds discovery by it.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate, `id` is of another trust domain, or the authority has expired.
    pub fn issue_server(
        &self,
        id: &SpiffeId,
        dns: &[String],
        ips: &[IpAddr],
        ttl: Duration,
        now: SystemTime,
    ) -> Result<WorkloadIdentity, CaError> {
        if !self.other_names.contains(&id.trust_domain) {
            self.check_own(id)?;
        }
        let mut names = Vec::with_capacity(dns.len() + ips.len());
        for name in dns {
            let text = name
                .as_str()
                .try_into()
                .map_err(|_| CaError::Name(name.clone()))?;
            names.push(SanType::DnsName(text));
        }
        names.extend(ips.iter().map(|ip| SanType::IpAddress(*ip)));
        let validity = self.validity(ttl, now)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(signing)?;
        let (leaf, _) = self.sign(&key, id, names, None, validity)?;
        let mut chain = certificates_to_pem([&leaf]);
        for certificate in self.above(validity.1) {
            chain.push_str(&certificates_to_pem([certificate]));
        }
        chain.push_str(&self.roots_pem);
        Ok(WorkloadIdentity::from_pem(
            &chain,
            &Zeroizing::new(key.serialize_pem()),
        )?)
    }

    fn issue_request(
        &self,
        csr_pem: &str,
        id: &SpiffeId,
        device: Option<DeviceId>,
        ttl: Duration,
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        let (not_before, not_after) = self.validity(ttl, now)?;
        let key = csr::public_key(csr_pem)?;
        self.check_own(id)?;
        let (leaf, serial) = self.sign(&key, id, Vec::new(), device, (not_before, not_after))?;
        let mut cert_chain = vec![certificates_to_pem([&leaf])];
        cert_chain.extend(
            self.above(not_after)
                .map(|certificate| certificates_to_pem([certificate])),
        );
        cert_chain.push(self.roots_pem.clone());
        Ok(Issued {
            cert_chain,
            serial,
            not_before,
            not_after,
        })
    }

    fn check_own(&self, id: &SpiffeId) -> Result<(), CaError> {
        if id.trust_domain == self.trust_domain {
            return Ok(());
        }
        Err(CaError::ForeignTrustDomain {
            id: id.clone(),
            ours: self.trust_domain.clone(),
        })
    }

    /// Unix seconds of begin and end.
    fn validity(&self, ttl: Duration, now: SystemTime) -> Result<(u64, u64), CaError> {
        if ttl > self.limits.max {
            return Err(CaError::Ttl {
                asked: ttl,
                max: self.limits.max,
            });
        }
        let ttl = if ttl.is_zero() { self.limits.default } else { ttl };
        let now = unix_seconds(now);
        if now >= self.material.not_after {
            return Err(CaError::SignerExpired(self.dir.join(CA_CERT)));
        }
        // At least a second: less would be over before it is read.
        let not_after = (now + ttl.as_secs().max(1)).min(self.material.not_after);
        Ok((now.saturating_sub(BACKDATE.as_secs()), not_after))
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        id: &SpiffeId,
        mut names: Vec<SanType>,
        device: Option<DeviceId>,
        (not_before, not_after): (u64, u64),
    ) -> Result<(CertificateDer<'static>, Vec<u8>), CaError> {
        let uri = id.to_string();
        names.insert(
            0,
            SanType::URI(uri.as_str().try_into().map_err(|_| CaError::Name(uri.clone()))?),
        );
        let serial = match device {
            Some(device) => serial::for_device(device, random()?).to_vec(),
            None => serial::without_device(random()?).to_vec(),
        };
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.not_before = moment(not_before)?;
        params.not_after = moment(not_after)?;
        // Without a subject the alternative names are critical.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &self.material.issuer).map_err(signing)?;
        let zeros = serial.iter().take_while(|&&byte| byte == 0).count();
        Ok((leaf.der().clone(), serial[zeros..].to_vec()))
    }
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N], CaError> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| CaError::Signing("the system gives no randomness".to_owned()))?;
    Ok(bytes)
}

/// For names that nobody else uses.
fn suffix() -> Result<String, CaError> {
    Ok(format!("{:016x}", u64::from_be_bytes(random()?)))
}

/// A clock before 1970 counts as 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

pub(crate) fn moment(unix_seconds: u64) -> Result<OffsetDateTime, CaError> {
    let seconds = i64::try_from(unix_seconds).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds)
        .map_err(|_| CaError::Signing("the clock of this host is beyond the year 9999".to_owned()))
}

pub(crate) fn signing(error: rcgen::Error) -> CaError {
    CaError::Signing(error.to_string())
}
