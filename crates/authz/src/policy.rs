use crate::Connection;
use ipnet::IpNet;
use std::{cell::OnceCell, net::IpAddr, sync::Arc};
use tombolo_types::{NamespacedName, SpiffeId};

/// Which workloads a policy applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All.
    Global,
    /// Those of its namespace.
    Namespace,
    /// Those that name it.
    WorkloadSelector,
}

/// What a policy does when it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Lets the connection in.
    Allow,
    /// Refuses it, whatever others allow.
    Deny,
}

/// How a text is compared.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StringMatch {
    /// The same text.
    Exact(Arc<str>),
    /// Starts so.
    Prefix(Arc<str>),
    /// Ends so.
    Suffix(Arc<str>),
    /// Anything but nothing.
    Presence,
}

/// A service account in whatever trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceAccountMatch {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Service account.
    pub service_account: Arc<str>,
}

/// Conditions on one connection. Values of one field are OR, fields are AND, every `not_` must miss.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Match {
    /// Namespace of the caller.
    pub namespaces: Vec<StringMatch>,
    /// Namespaces that must miss.
    pub not_namespaces: Vec<StringMatch>,
    /// Caller, as `<trust domain>/ns/<namespace>/sa/<service account>`.
    pub principals: Vec<StringMatch>,
    /// Callers that must miss; `Presence` here matches callers without identity.
    pub not_principals: Vec<StringMatch>,
    /// Caller's address.
    pub source_ips: Vec<IpNet>,
    /// Addresses that must miss.
    pub not_source_ips: Vec<IpNet>,
    /// Address dialled at the workload.
    pub destination_ips: Vec<IpNet>,
    /// Addresses that must miss.
    pub not_destination_ips: Vec<IpNet>,
    /// Port of the application.
    pub destination_ports: Vec<u16>,
    /// Ports that must miss.
    pub not_destination_ports: Vec<u16>,
    /// Caller in whatever trust domain.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Callers that must miss.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Something in it could not be read: in an ALLOW policy it never matches, in a DENY policy the rest decides, and
    /// with nothing left it always matches.
    pub unreadable: bool,
}

/// OR of its matches; without any it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Clause {
    /// Alternatives.
    pub matches: Vec<Match>,
}

/// AND of its clauses; without any it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// Conditions.
    pub clauses: Vec<Clause>,
}

/// A policy, ready to be evaluated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Namespace and name.
    pub key: NamespacedName,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What it does.
    pub action: Action,
    /// True: only reported, never enforced.
    pub dry_run: bool,
    /// OR. None: matches nothing.
    pub rules: Vec<Rule>,
}

/// A connection as policies look at it. The principal's text is made only if a policy asks for it, and once.
pub(crate) struct Subject<'a> {
    source: Option<&'a SpiffeId>,
    source_ip: IpAddr,
    destination_ip: IpAddr,
    destination_port: u16,
    principal: OnceCell<String>,
}

impl<'a> Subject<'a> {
    pub(crate) fn new(connection: &Connection<'a>) -> Self {
        Self {
            source: connection.source,
            source_ip: connection.source_ip.to_canonical(),
            destination_ip: connection.destination_ip.to_canonical(),
            destination_port: connection.destination_port,
            principal: OnceCell::new(),
        }
    }

    /// Nobody has no principal: nothing about it matches, not even an empty prefix.
    fn is_principal(&self, wanted: &StringMatch) -> bool {
        self.source
            .is_some_and(|id| wanted.matches(self.principal.get_or_init(|| id.principal())))
    }

    /// Nobody's namespace is the empty text.
    fn is_in(&self, wanted: &StringMatch) -> bool {
        wanted.matches(self.source.map_or("", |id| &id.namespace))
    }

    fn is_account(&self, wanted: &ServiceAccountMatch) -> bool {
        self.source.is_some_and(|id| {
            id.namespace == wanted.namespace && id.service_account == wanted.service_account
        })
    }
}

impl StringMatch {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *text,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence => !text.is_empty(),
        }
    }
}

/// One type of field: some positive value fits (or there is none), and no negative one does.
fn fits<T>(positive: &[T], negative: &[T], fits: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&fits)) && !negative.iter().any(&fits)
}

impl Match {
    /// True if it says nothing.
    pub fn is_empty(&self) -> bool {
        let Self {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            service_accounts,
            not_service_accounts,
            unreadable: _,
        } = self;
        namespaces.is_empty()
            && not_namespaces.is_empty()
            && principals.is_empty()
            && not_principals.is_empty()
            && source_ips.is_empty()
            && not_source_ips.is_empty()
            && destination_ips.is_empty()
            && not_destination_ips.is_empty()
            && destination_ports.is_empty()
            && not_destination_ports.is_empty()
            && service_accounts.is_empty()
            && not_service_accounts.is_empty()
    }

    fn matches(&self, action: Action, subject: &Subject<'_>) -> bool {
        match (action, self.unreadable) {
            (Action::Allow, true) => return false,
            (Action::Deny, true) if self.is_empty() => return true,
            (Action::Allow | Action::Deny, _) => {}
        }
        // Says nothing, never matches: such a match comes from conditions that do not exist at layer 4.
        !self.is_empty()
            && fits(&self.destination_ports, &self.not_destination_ports, |&port| {
                port == subject.destination_port
            })
            && fits(&self.namespaces, &self.not_namespaces, |wanted| {
                subject.is_in(wanted)
            })
            && fits(&self.service_accounts, &self.not_service_accounts, |wanted| {
                subject.is_account(wanted)
            })
            && fits(&self.source_ips, &self.not_source_ips, |net| {
                net.contains(&subject.source_ip)
            })
            && fits(&self.destination_ips, &self.not_destination_ips, |net| {
                net.contains(&subject.destination_ip)
            })
            && fits(&self.principals, &self.not_principals, |wanted| {
                subject.is_principal(wanted)
            })
    }
}

impl Policy {
    /// True if one of its rules holds.
    pub(crate) fn matches(&self, subject: &Subject<'_>) -> bool {
        self.rules.iter().any(|rule| {
            rule.clauses.iter().all(|clause| {
                clause.matches.is_empty()
                    || clause.matches.iter().any(|one| one.matches(self.action, subject))
            })
        })
    }
}
