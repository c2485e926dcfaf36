//! One root after another: a new one beside the old, cross-signed by it, and the set of roots that is published meanwhile.

use crate::{
    Authority, CaError,
    authority::{BACKDATE, moment, random, signing, unix_seconds},
    files::{self, CA_CERT, EXTRA_ROOTS},
    material,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyUsagePurpose, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tombolo_identity::{
    TrustBundle, WorkloadIdentity, certificates_from_pem, certificates_to_pem, root_facts, serial,
};
use tombolo_types::{SpiffeId, TrustDomain};

/// What is published beside the roots of an authority's own folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Publication {
    /// Further roots, PEM: one that is coming or leaving.
    pub roots_pem: String,
    /// Roots that let nobody in any more, PEM certificates.
    pub retired_pem: String,
    /// The signing certificate as older authorities signed it: whoever holds only an older root follows by it.
    pub crosses_pem: String,
    /// The name that identities are made for, where it is not the one that the authority was founded with.
    pub trust_domain: Option<TrustDomain>,
    /// Other names of the trust domain, for the certificates of discovery alone.
    pub other_names: Vec<TrustDomain>,
}

impl Authority {
    /// Adds what is published beside its own roots.
    ///
    /// # Errors
    /// When a text is damaged.
    pub fn publishing(mut self, with: &Publication) -> Result<Self, CaError> {
        let mut bundle = self.material.bundle.clone();
        if !with.roots_pem.is_empty() {
            let all = format!("{}\n{}", bundle.to_pem(), with.roots_pem);
            bundle = TrustBundle::from_pem(self.trust_domain.clone(), &all)?;
        }
        if !with.retired_pem.is_empty() {
            bundle = bundle.with_retired(&with.retired_pem)?;
        }
        if !with.crosses_pem.is_empty() {
            for cross in certificates_from_pem(&with.crosses_pem)? {
                let end = root_facts(&cross)?.not_after;
                self.crosses.push((cross, end));
            }
        }
        if let Some(name) = &with.trust_domain {
            self.trust_domain = name.clone();
            bundle = bundle.named(name.clone());
        }
        self.other_names.clone_from(&with.other_names);
        self.roots_pem = certificates_to_pem(bundle.roots());
        self.material.bundle = bundle;
        Ok(self)
    }

    /// Roots and retired roots, as members are told them. [`Authority::roots_pem`] has no retired ones: it goes to
    /// clients of other kinds, too.
    pub fn bundle_pem(&self) -> String {
        self.material.bundle.to_pem()
    }

    /// True for a CA whose signing certificate is a root itself, as [`Authority::create`] makes it.
    pub fn is_root(&self) -> bool {
        self.material.bundle.roots().contains(&self.material.certificate)
    }

    /// Makes the root that comes after this one in `dir`, which must be missing or empty. Roots of `extra-roots.pem` go
    /// with it.
    ///
    /// # Errors
    /// As [`Authority::create`].
    pub fn create_next(&self, dir: &Path, now: SystemTime) -> Result<Self, CaError> {
        let extra = files::read_optional(&self.dir, EXTRA_ROOTS)?;
        Self::create_with(
            dir,
            &self.trust_domain,
            now,
            extra.as_ref().map(|text| text.as_str()),
        )
    }

    /// Signs the root of `next` with this CA for `life`: a chain over it leads from what `next` issues to this CA's
    /// root. Tried out before it is given. PEM.
    ///
    /// # Errors
    /// When `next` is no self-made root, or this CA may not sign CAs.
    pub fn cross_sign(&self, next: &Self, life: Duration, now: SystemTime) -> Result<String, CaError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = name_of(&next.material.certificate)
            .ok_or_else(|| CaError::Signing("the new root has not the form of a self-made one".to_owned()))?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(SerialNumber::from_slice(&serial::without_device(random()?)));
        params.use_authority_key_identifier_extension = true;
        let seconds = unix_seconds(now);
        params.not_before = moment(seconds.saturating_sub(BACKDATE.as_secs()))?;
        params.not_after = moment((seconds + life.as_secs()).min(self.material.not_after))?;
        let cross = params
            .signed_by(next.material.issuer.key(), &self.material.issuer)
            .map_err(signing)?;
        let cross_pem = certificates_to_pem([cross.der()]);
        self.try_cross(next, cross.der(), now)?;
        Ok(cross_pem)
    }

    /// What `next` issues must be believed by whoever has this CA's roots alone.
    fn try_cross(&self, next: &Self, cross: &CertificateDer<'_>, now: SystemTime) -> Result<(), CaError> {
        let id = SpiffeId::new(self.trust_domain.clone(), "default", "trial")
            .map_err(|_| CaError::Name(self.trust_domain.to_string()))?;
        let request = tombolo_identity::generate_csr(Some(&id))?;
        let when = now.max(UNIX_EPOCH + Duration::from_secs(next.material.begun) + BACKDATE);
        let issued = next.issue(&request.csr_pem, &id, None, Duration::from_secs(3600), when)?;
        let mut chain: Vec<String> = issued.cert_chain.first().cloned().into_iter().collect();
        chain.push(certificates_to_pem([cross]));
        chain.extend(self.material.chain.iter().map(|one| certificates_to_pem([one])));
        chain.push(certificates_to_pem(self.material.bundle.roots()));
        WorkloadIdentity::from_issued(&chain, &request.key_pem)
            .map(drop)
            .map_err(|error| CaError::File {
                path: self.dir.join(CA_CERT),
                cause: format!("it cannot cross-sign a new root: {error}"),
            })
    }

    /// True if this CA signed the certificate that a chain begins with.
    pub fn has_signed(&self, cert_chain: &[String]) -> bool {
        let leaf = cert_chain
            .first()
            .and_then(|pem| certificates_from_pem(pem).ok()?.into_iter().next());
        leaf.is_some_and(|leaf| material::is_signed_by(&leaf, &self.material.certificate))
    }

    /// What is sent between a certificate that ends then and the roots. Of what older authorities signed, only what
    /// outlives it: a chain is judged as of the end of its shortest part.
    pub(crate) fn above(&self, not_after: u64) -> impl Iterator<Item = &CertificateDer<'static>> {
        let crosses = self.crosses.iter();
        let crosses = crosses.filter(move |(_, end)| *end >= not_after);
        self.material.chain.iter().chain(crosses.map(|(cross, _)| cross))
    }
}

/// The name of a self-made root, written as it was made: the bytes must be the same.
fn name_of(root: &CertificateDer<'_>) -> Option<DistinguishedName> {
    let (organization, common) = material::names_of(root)?;
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, organization);
    name.push(DnType::CommonName, common);
    Some(name)
}
