use crate::{
    MemberKey, Refusal,
    codec::{Reader, Writer},
    limits::{ALIASES_MAX, DEPTH_MAX, ENDPOINTS_MAX, NAMESPACES_MAX, ROOTS_BYTES_MAX},
};
use std::{collections::BTreeSet, sync::Arc};
use tombolo_proto::tombolo::federation::v1::Signed;
use tombolo_types::{Code, TrustDomain, check_label, reserved_namespace};

const RECORD: &[u8] = b"tombolo member\0\x01";
/// The form of a record with aliases: one without them keeps the bytes that it always had, so that members of releases
/// before this form go on reading it.
const RECORD_WITH_ALIASES: &[u8] = b"tombolo member\0\x02";
const PROFILE: &[u8] = b"tombolo profile\0\x01";
/// Most characters of an endpoint: a DNS name and a port.
const ENDPOINT_LENGTH_MAX: usize = 253 + 6;

/// The namespaces whose services a member may export. Reserved ones are never granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// Written `*`.
    All,
    /// These.
    Only(BTreeSet<Arc<str>>),
}

impl Grant {
    /// Reads a list of namespaces; `*` alone grants all.
    ///
    /// # Errors
    /// When one is not a namespace, is reserved, or there are more than [`NAMESPACES_MAX`].
    pub fn from_list<'a>(namespaces: impl IntoIterator<Item = &'a str>) -> Result<Self, Refusal> {
        let list: BTreeSet<Arc<str>> = namespaces.into_iter().map(Arc::from).collect();
        if list.len() == 1 && list.contains("*") {
            return Ok(Self::All);
        }
        if list.len() > NAMESPACES_MAX {
            return Err(Refusal::new(
                Code::InvalidRequest,
                format!("at most {NAMESPACES_MAX} namespaces"),
            ));
        }
        for namespace in &list {
            check_label("namespace", namespace).map_err(|error| Refusal::new(Code::InvalidRequest, error))?;
            if reserved_namespace(namespace) {
                return Err(Refusal::new(Code::Reserved, namespace));
            }
        }
        Ok(Self::Only(list))
    }

    /// True if a service of `namespace` may be exported.
    pub fn allows(&self, namespace: &str) -> bool {
        !reserved_namespace(namespace)
            && match self {
                Self::All => true,
                Self::Only(list) => list.contains(namespace),
            }
    }

    /// As it is written.
    pub fn list(&self) -> Vec<&str> {
        match self {
            Self::All => vec!["*"],
            Self::Only(list) => list.iter().map(AsRef::as_ref).collect(),
        }
    }
}

/// Who a member is and what it may do: said by the member that admitted it.
///
/// **Invariant:** one value has one sequence of bytes, and [`Self::decode`] takes no other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Name of the cluster, a DNS label: the key of everything about it.
    pub cluster: Arc<str>,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Other names of its trust domain while that is renamed: identities of them are its own too, by the same roots.
    /// `trust_domain` is not among them.
    pub aliases: BTreeSet<TrustDomain>,
    /// Key of its discovery.
    pub key: MemberKey,
    /// Root certificates at the time of its join; a [`Profile`] replaces them.
    pub roots_pem: String,
    /// `host:port` of its discovery at the time of its join; none: it can only dial. A [`Profile`] replaces them.
    pub endpoints: Vec<String>,
    /// What it may export.
    pub namespaces: Grant,
    /// It may admit others.
    pub may_admit: bool,
    /// Its trust domain may be that of another member that says the same.
    pub share_trust_domain: bool,
    /// Counted from 1; a removed member that is admitted again gets the next one.
    pub incarnation: u64,
    /// Counted from 1 within an incarnation and an admitting member.
    pub version: u64,
    /// It is no member any more; final within the incarnation.
    pub removed: bool,
    /// Cluster that says all this.
    pub admitted_by: Arc<str>,
    /// Distance from the founder (0) when it was admitted first; above that of whoever says this. It stays when a
    /// member nearer to the founder takes over: nothing that it said and that was overridden counts again by that.
    pub rank: u64,
    /// Incarnation of that cluster: a key that was removed once says nothing later.
    pub admitter_incarnation: u64,
}

fn malformed(what: &str) -> Refusal {
    Refusal::new(Code::MembershipForged, what)
}

fn check_endpoints(endpoints: &[String]) -> Result<(), Refusal> {
    let ok = |endpoint: &String| {
        endpoint.len() <= ENDPOINT_LENGTH_MAX
            && !endpoint.chars().any(|c| c.is_control() || c.is_whitespace())
            && endpoint.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
            })
    };
    if endpoints.len() > ENDPOINTS_MAX || !endpoints.iter().all(ok) {
        return Err(malformed("an endpoint is not host:port, or there are too many"));
    }
    Ok(())
}

fn check_roots(roots_pem: &str) -> Result<(), Refusal> {
    if roots_pem.is_empty() || roots_pem.len() > ROOTS_BYTES_MAX {
        return Err(malformed("the roots are empty or too long"));
    }
    Ok(())
}

impl Record {
    /// The bytes that are signed.
    pub fn encode(&self) -> Vec<u8> {
        let aliases = &self.aliases;
        let form = if aliases.is_empty() {
            RECORD
        } else {
            RECORD_WITH_ALIASES
        };
        let writer = Writer::new(form)
            .text(&self.cluster)
            .text(self.trust_domain.as_str())
            .bytes(&self.key.0)
            .text(&self.roots_pem)
            .texts(self.endpoints.iter().map(String::as_str))
            .texts(self.namespaces.list().into_iter())
            .flag(self.may_admit)
            .flag(self.share_trust_domain)
            .number(self.incarnation)
            .number(self.version)
            .flag(self.removed)
            .text(&self.admitted_by)
            .number(self.rank)
            .number(self.admitter_incarnation);
        if aliases.is_empty() {
            return writer.finish();
        }
        writer.texts(aliases.iter().map(TrustDomain::as_str)).finish()
    }

    /// Reads what [`Self::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// [`Code::MembershipTooNew`] for another form, [`Code::MembershipForged`] for anything that is not canonical.
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let (mut reader, form) = Reader::new(bytes, RECORD, 2)?;
        let cluster = reader.text(63)?;
        let trust_domain = reader.text(253)?;
        let key = MemberKey::try_from(reader.bytes(32)?).map_err(|_| malformed("the key is not 32 bytes"))?;
        let roots_pem = reader.text(ROOTS_BYTES_MAX)?.to_owned();
        let endpoints = owned(reader.texts(ENDPOINTS_MAX, ENDPOINT_LENGTH_MAX)?);
        let namespaces = reader.texts(NAMESPACES_MAX, 63)?;
        let domain = |text: &str| text.parse().map_err(|_| malformed("trust domain"));
        let mut record = Self {
            cluster: cluster.into(),
            trust_domain: domain(trust_domain)?,
            aliases: BTreeSet::new(),
            key,
            roots_pem,
            endpoints,
            namespaces: Grant::from_list(namespaces).map_err(|_| malformed("namespaces"))?,
            may_admit: reader.flag()?,
            share_trust_domain: reader.flag()?,
            incarnation: reader.number()?,
            version: reader.number()?,
            removed: reader.flag()?,
            admitted_by: reader.text(63)?.into(),
            rank: reader.number()?,
            admitter_incarnation: reader.number()?,
        };
        if form > 1 {
            let aliases = reader.texts(ALIASES_MAX, 253)?;
            record.aliases = aliases.into_iter().map(domain).collect::<Result<_, _>>()?;
        }
        reader.finish()?;
        record.check()?;
        // Order and repetition of namespaces and aliases, and an empty list of these, are the only freedom that reading
        // leaves.
        if record.encode() != bytes {
            return Err(malformed("the bytes are not canonical"));
        }
        Ok(record)
    }

    /// Checks names and bounds.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        check_label("cluster", &self.cluster).map_err(|error| malformed(&error.to_string()))?;
        check_label("cluster", &self.admitted_by).map_err(|error| malformed(&error.to_string()))?;
        check_endpoints(&self.endpoints)?;
        check_roots(&self.roots_pem)?;
        if self.aliases.len() > ALIASES_MAX || self.aliases.contains(&self.trust_domain) {
            return Err(malformed("too many names of the trust domain, or one twice"));
        }
        if self.rank > DEPTH_MAX as u64 {
            return Err(malformed("too far from the founder"));
        }
        if self.incarnation == 0 || self.version == 0 || self.admitter_incarnation == 0 {
            return Err(malformed("a version is counted from 1"));
        }
        Ok(())
    }

    /// Which of two statements of one admitting member about one cluster holds: the later incarnation; within it a
    /// removal; then the higher version; then the larger bytes, so that all members choose the same.
    pub(crate) fn rank(&self) -> (u64, bool, u64) {
        (self.incarnation, self.removed, self.version)
    }

    /// Every name of its trust domain, that of `trust_domain` first.
    pub fn names(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.trust_domain).chain(&self.aliases)
    }

    /// True for a name of its trust domain.
    pub fn has_name(&self, trust_domain: &TrustDomain) -> bool {
        self.names().any(|name| name == trust_domain)
    }
}

/// What a member says about itself and may change alone: its roots and where it is. Signed by its own key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Whose.
    pub cluster: Arc<str>,
    /// Its key: a profile of an earlier incarnation with another key is void.
    pub key: MemberKey,
    /// Counted from 1.
    pub version: u64,
    /// Root certificates, all that are valid during a rotation.
    pub roots_pem: String,
    /// `host:port` of its discovery; none: it can only dial.
    pub endpoints: Vec<String>,
}

impl Profile {
    /// The bytes that are signed.
    pub fn encode(&self) -> Vec<u8> {
        Writer::new(PROFILE)
            .text(&self.cluster)
            .bytes(&self.key.0)
            .number(self.version)
            .text(&self.roots_pem)
            .texts(self.endpoints.iter().map(String::as_str))
            .finish()
    }

    /// Reads what [`Self::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// As [`Record::decode`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Refusal> {
        let (mut reader, _) = Reader::new(bytes, PROFILE, 1)?;
        let profile = Self {
            cluster: reader.text(63)?.into(),
            key: MemberKey::try_from(reader.bytes(32)?).map_err(|_| malformed("the key is not 32 bytes"))?,
            version: reader.number()?,
            roots_pem: reader.text(ROOTS_BYTES_MAX)?.to_owned(),
            endpoints: owned(reader.texts(ENDPOINTS_MAX, ENDPOINT_LENGTH_MAX)?),
        };
        reader.finish()?;
        profile.check()?;
        Ok(profile)
    }

    pub(crate) fn check(&self) -> Result<(), Refusal> {
        check_label("cluster", &self.cluster).map_err(|error| malformed(&error.to_string()))?;
        check_endpoints(&self.endpoints)?;
        check_roots(&self.roots_pem)?;
        if self.version == 0 {
            return Err(malformed("a version is counted from 1"));
        }
        Ok(())
    }
}

fn owned(texts: Vec<&str>) -> Vec<String> {
    texts.into_iter().map(str::to_owned).collect()
}

/// Signs canonical bytes.
pub(crate) fn sign(crypto: &impl crate::Crypto, body: Vec<u8>) -> Signed {
    let signature = crypto.sign(&body);
    Signed { body, signature }
}
