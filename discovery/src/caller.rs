//! Who calls: authenticators in a fixed order, of which the first that recognises its credential decides.

use crate::{
    bearer::Bearer,
    fleet::Fleet,
    listener::Link,
    refusal::Refusal,
    roles::{self, Grant, Thing, Verb},
};
use std::{fmt, sync::Arc};
use tombolo_types::{Code, DeviceId, SpiffeId, reserved_namespace};
use tonic::{Request, Status, metadata::MetadataMap};

/// An authenticated caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// A workload, with its device if the certificate names one.
    Workload {
        /// Identity.
        id: SpiffeId,
        /// Device, from the serial of the certificate.
        device: Option<DeviceId>,
    },
    /// A person, or a program of one.
    Operator {
        /// For the audit log.
        name: String,
        /// What it may do.
        grants: Vec<Grant>,
    },
    /// Nobody that is known.
    Anonymous,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload {
                id,
                device: Some(device),
            } => write!(f, "{id} (device {device})"),
            Self::Workload { id, device: None } => write!(f, "{id}"),
            Self::Operator { name, .. } => f.write_str(name),
            Self::Anonymous => f.write_str("anonymous"),
        }
    }
}

impl Caller {
    /// Asks the role table. Workloads hold no role.
    ///
    /// # Errors
    /// With who may not do what.
    pub fn authorize(&self, verb: Verb, thing: Thing, namespace: Option<&str>) -> Result<(), Refusal> {
        let grants = match self {
            Self::Operator { grants, .. } => grants.as_slice(),
            Self::Workload { .. } | Self::Anonymous => &[],
        };
        if roles::allowed(grants, verb, thing, namespace) {
            return Ok(());
        }
        let place = namespace.map_or_else(|| "the mesh".to_owned(), |n| format!("namespace {n}"));
        let is_admin = grants.iter().any(|grant| grant.role == roles::Role::MeshAdmin);
        if is_admin && namespace.is_some_and(reserved_namespace) {
            return Err(Refusal::new(Code::Reserved, format_args!("{thing:?} in {place}")));
        }
        let role = match grants.iter().map(|grant| grant.role).max() {
            Some(role) => format!("as {role}"),
            None => "without a role".into(),
        };
        Err(Refusal::new(
            Code::Forbidden,
            format_args!("{self} may not {verb} {thing:?} in {place} {role}"),
        ))
    }
}

/// One way to show who one is.
#[tonic::async_trait]
pub trait Authenticator: Send + Sync {
    /// `None`: this credential is not there, ask the next.
    ///
    /// # Errors
    /// When the credential is there and does not hold: no other is asked then.
    async fn authenticate(&self, link: &Link, headers: &MetadataMap) -> Result<Option<Caller>, Refusal>;
}

/// Client certificates: verified by the handshake already.
#[derive(Debug)]
pub struct Mtls;

#[tonic::async_trait]
impl Authenticator for Mtls {
    async fn authenticate(&self, link: &Link, _headers: &MetadataMap) -> Result<Option<Caller>, Refusal> {
        Ok(link.peer.as_ref().map(|peer| Caller::Workload {
            id: peer.id.clone(),
            device: peer.device,
        }))
    }
}

#[tonic::async_trait]
impl Authenticator for Bearer {
    async fn authenticate(&self, _link: &Link, headers: &MetadataMap) -> Result<Option<Caller>, Refusal> {
        let Some(value) = headers.get("authorization") else {
            return Ok(None);
        };
        let refused = |cause: &dyn fmt::Display| Refusal {
            code: None,
            status: tonic::Code::Unauthenticated,
            message: format!("request authenticate failure: {cause}"),
        };
        let text = value.to_str().map_err(|e| refused(&e))?;
        let Some(token) = text.strip_prefix("Bearer ") else {
            return Err(refused(&"not a bearer token"));
        };
        let id = self.verify(token).map_err(|e| refused(&e))?;
        Ok(Some(Caller::Workload { id, device: None }))
    }
}

/// The list, and the check that comes after every one of them: is the device still admitted.
#[derive(Clone)]
pub struct Authenticators {
    list: Arc<[Box<dyn Authenticator>]>,
    fleet: Fleet,
}

impl fmt::Debug for Authenticators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticators")
            .field("methods", &self.list.len())
            .finish_non_exhaustive()
    }
}

impl Authenticators {
    /// In the order in which they are asked.
    pub fn new(list: Vec<Box<dyn Authenticator>>, fleet: Fleet) -> Self {
        Self {
            list: list.into(),
            fleet,
        }
    }

    /// Who sends this request.
    ///
    /// # Errors
    /// When a credential does not hold, or belongs to a revoked device.
    pub async fn caller<T: Sync>(&self, request: &Request<T>) -> Result<(Caller, Link), Refusal> {
        self.identify(&link_of(request), request.metadata()).await
    }

    /// As [`Self::caller`], from the parts of a request.
    ///
    /// # Errors
    /// As [`Self::caller`].
    pub async fn identify(&self, link: &Link, headers: &MetadataMap) -> Result<(Caller, Link), Refusal> {
        if let Some(cause) = &link.over {
            return Err(Refusal::new(Code::MemberLimit, cause));
        }
        for authenticator in self.list.iter() {
            if let Some(caller) = authenticator.authenticate(link, headers).await? {
                if let Caller::Workload {
                    device: Some(device), ..
                } = &caller
                    && self.fleet.is_revoked(*device)
                {
                    return Err(Refusal::new(Code::DeviceRevoked, format_args!("device {device}")));
                }
                return Ok((caller, link.clone()));
            }
        }
        Ok((Caller::Anonymous, link.clone()))
    }
}

/// What the listener knows of the connection.
pub fn link_of<T>(request: &Request<T>) -> Link {
    request.extensions().get::<Link>().cloned().unwrap_or_default()
}

/// The channel binding of the connection.
///
/// # Errors
/// On a connection without TLS.
pub fn exporter_of(link: &Link) -> Result<[u8; 32], Status> {
    link.exporter
        .ok_or_else(|| Status::failed_precondition("this call needs TLS"))
}
