use crate::diagnostic::nearest;
use std::fmt;

/// The kinds of objects that Tombolo knows. The one table behind readers, store keys and the CLI's short names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// What VMs of one sort have in common; Istio's kind.
    WorkloadGroup,
    /// One endpoint outside Kubernetes; Istio's kind.
    WorkloadEntry,
    /// A service and where it lives; Istio's kind.
    ServiceEntry,
    /// Who may connect; Istio's kind.
    AuthorizationPolicy,
    /// Whether plaintext is admitted; Istio's kind.
    PeerAuthentication,
    /// A service that other clusters may call; the kind of the Multi-Cluster Services API.
    ServiceExport,
    /// What holds for all services of a namespace: its labels; Kubernetes' kind.
    Namespace,
    /// The right to enrol into a WorkloadGroup; ours.
    JoinToken,
    /// An enrolled VM; ours, written by discovery alone.
    Device,
}

const NETWORKING: &[&str] = &["v1", "v1beta1", "v1alpha3"];
const SECURITY: &[&str] = &["v1", "v1beta1"];
const OURS: &[&str] = &["v1"];
const CORE: &[&str] = &["v1"];
const MULTICLUSTER: &[&str] = &["v1alpha1"];

impl Kind {
    /// All kinds, the internal one too.
    pub const ALL: [Self; 9] = [
        Self::WorkloadGroup,
        Self::WorkloadEntry,
        Self::ServiceEntry,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::ServiceExport,
        Self::Namespace,
        Self::JoinToken,
        Self::Device,
    ];

    /// name, plural, short name, group, served versions (the first is the one written).
    const fn row(
        self,
    ) -> (
        &'static str,
        &'static str,
        &'static str,
        &'static str,
        &'static [&'static str],
    ) {
        match self {
            Self::WorkloadGroup => (
                "WorkloadGroup",
                "workloadgroups",
                "wg",
                "networking.istio.io",
                NETWORKING,
            ),
            Self::WorkloadEntry => (
                "WorkloadEntry",
                "workloadentries",
                "we",
                "networking.istio.io",
                NETWORKING,
            ),
            Self::ServiceEntry => (
                "ServiceEntry",
                "serviceentries",
                "se",
                "networking.istio.io",
                NETWORKING,
            ),
            Self::AuthorizationPolicy => (
                "AuthorizationPolicy",
                "authorizationpolicies",
                "ap",
                "security.istio.io",
                SECURITY,
            ),
            Self::PeerAuthentication => (
                "PeerAuthentication",
                "peerauthentications",
                "pa",
                "security.istio.io",
                SECURITY,
            ),
            Self::ServiceExport => (
                "ServiceExport",
                "serviceexports",
                "svcex",
                "multicluster.x-k8s.io",
                MULTICLUSTER,
            ),
            Self::Namespace => ("Namespace", "namespaces", "ns", "", CORE),
            Self::JoinToken => ("JoinToken", "jointokens", "jt", "tombolo.io", OURS),
            Self::Device => ("Device", "devices", "dev", "tombolo.io", OURS),
        }
    }

    /// As in YAML: `WorkloadGroup`.
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// As in a Kubernetes path: `workloadgroups`.
    pub const fn plural(self) -> &'static str {
        self.row().1
    }

    /// As on a command line: `wg`.
    pub const fn short(self) -> &'static str {
        self.row().2
    }

    /// API group: `networking.istio.io`; empty for the core group.
    pub const fn group(self) -> &'static str {
        self.row().3
    }

    /// Versions that are read; the first is the one that is written.
    pub const fn versions(self) -> &'static [&'static str] {
        self.row().4
    }

    /// `group/version` as written; the version alone in the core group.
    pub fn api_version(self) -> String {
        match self.group() {
            "" => self.versions()[0].to_owned(),
            group => format!("{group}/{}", self.versions()[0]),
        }
    }

    /// True for kinds whose objects are in no namespace. In keys, such an object is in the namespace of its name.
    pub const fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace)
    }

    /// `Kind namespace/name`, as diagnostics say it; `Kind name` for what is in no namespace.
    pub fn title(self, namespace: &str, name: &str) -> String {
        if self.is_cluster_scoped() {
            format!("{self} {name}")
        } else {
            format!("{self} {namespace}/{name}")
        }
    }

    /// Namespace under which an object is kept and authorized: for what is in none, that of its name.
    pub const fn key_namespace<'a>(self, namespace: &'a str, name: &'a str) -> &'a str {
        if self.is_cluster_scoped() { name } else { namespace }
    }

    /// True for kinds that only discovery writes.
    pub const fn is_internal(self) -> bool {
        matches!(self, Self::Device)
    }

    /// Finds a kind by any name a user would type: `WorkloadGroup`, `workloadgroup`, `workloadgroups`, `wg`, or with
    /// the group behind it (`workloadgroups.networking.istio.io`). Internal kinds are not found.
    ///
    /// # Errors
    /// With the nearest name when there is no such kind.
    pub fn find(name: &str) -> Result<Self, UnknownKind> {
        let lower = name.to_ascii_lowercase();
        let shown = || Self::ALL.into_iter().filter(|kind| !kind.is_internal());
        for kind in shown() {
            let (full, plural, short, group, _) = kind.row();
            let word = lower
                .strip_suffix(group)
                .and_then(|w| w.strip_suffix('.'))
                .unwrap_or(&lower);
            if word == plural || word == short || word.eq_ignore_ascii_case(full) {
                return Ok(kind);
            }
        }
        let names = shown().flat_map(|kind| [kind.name(), kind.plural()]);
        Err(UnknownKind {
            name: name.to_owned(),
            nearest: nearest(name, names),
        })
    }

    /// Finds a kind, internal ones too, by the group and kind of its API version.
    pub fn of(group: &str, name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.group() == group && kind.name() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No such kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKind {
    /// What was asked for.
    pub name: String,
    /// What was probably meant.
    pub nearest: Option<String>,
}

impl fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no kind {:?}", self.name)?;
        match &self.nearest {
            Some(nearest) => write!(f, "; did you mean {nearest}?"),
            None => {
                let known = Kind::ALL.into_iter().filter(|kind| !kind.is_internal());
                let known: Vec<_> = known
                    .map(|kind| format!("{} ({})", kind.plural(), kind.short()))
                    .collect();
                write!(f, "; known are {}", known.join(", "))
            }
        }
    }
}

impl std::error::Error for UnknownKind {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_kind_finds_it() {
        for kind in Kind::ALL.into_iter().filter(|kind| !kind.is_internal()) {
            for name in [
                kind.name(),
                kind.plural(),
                kind.short(),
                &kind.name().to_lowercase(),
            ] {
                assert_eq!(Kind::find(name), Ok(kind), "{name}");
            }
            assert_eq!(
                Kind::find(&format!("{}.{}", kind.plural(), kind.group())),
                Ok(kind)
            );
            assert_eq!(Kind::of(kind.group(), kind.name()), Some(kind));
        }
    }

    #[test]
    fn an_unknown_name_gets_the_nearest() {
        for (typed, nearest) in [
            ("workloadgruop", Some("WorkloadGroup")),
            ("servicentry", Some("ServiceEntry")),
            ("authorizationpolicys", Some("AuthorizationPolicy")),
            ("device", None),
            ("pods", None),
            ("", None),
        ] {
            assert_eq!(
                Kind::find(typed).unwrap_err().nearest.as_deref(),
                nearest,
                "{typed}"
            );
        }
    }
}
