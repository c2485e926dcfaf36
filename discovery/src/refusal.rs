//! A refused request: a code of the diagnostic table, a cause for people, and the gRPC status that carries both.

use crate::objects::ObjectError;
use std::fmt;
use tombolo_store::StoreError;
use tombolo_types::Code;
use tonic::Status;

/// Why a request was refused. Its text is the coded message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Row of the diagnostic table; `None` for failures of discovery itself.
    pub code: Option<Code>,
    /// gRPC status code.
    pub status: tonic::Code,
    /// Coded message, or the plain cause.
    pub message: String,
}

impl Refusal {
    /// With a code; the status follows from it.
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "a code that is not named is a matter of rights"
    )]
    pub fn new(code: Code, cause: impl fmt::Display) -> Self {
        let status = match code {
            Code::TokenUnknown | Code::TokenProof | Code::DeviceUnknown => tonic::Code::Unauthenticated,
            Code::TokenMalformed | Code::InvalidResource | Code::MetricsRefused => {
                tonic::Code::InvalidArgument
            }
            Code::Conflict => tonic::Code::Aborted,
            Code::MemberLimit => tonic::Code::ResourceExhausted,
            Code::TrustStep | Code::TrustBehind => tonic::Code::FailedPrecondition,
            Code::NotFound => tonic::Code::NotFound,
            Code::AlreadyExists | Code::AlreadyEnrolled => tonic::Code::AlreadyExists,
            _ => tonic::Code::PermissionDenied,
        };
        Self {
            code: Some(code),
            status,
            message: code.message(cause),
        }
    }

    /// A request that makes no sense.
    pub fn invalid(cause: impl fmt::Display) -> Self {
        Self {
            code: None,
            status: tonic::Code::InvalidArgument,
            message: cause.to_string(),
        }
    }

    /// Something that the object needs or that needs it is in the way.
    pub fn precondition(cause: impl fmt::Display) -> Self {
        Self {
            code: None,
            status: tonic::Code::FailedPrecondition,
            message: cause.to_string(),
        }
    }

    /// Discovery itself failed.
    pub fn internal(cause: impl fmt::Display) -> Self {
        Self {
            code: None,
            status: tonic::Code::Internal,
            message: cause.to_string(),
        }
    }

    /// Too much at once; the caller may come again.
    pub fn busy(cause: impl fmt::Display) -> Self {
        Self {
            code: None,
            status: tonic::Code::ResourceExhausted,
            message: cause.to_string(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.status, refusal.message)
    }
}

impl From<ObjectError> for Refusal {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::Store(store) => store.into(),
            ObjectError::Unreadable { .. } => Self::internal(error),
        }
    }
}

impl From<StoreError> for Refusal {
    #[allow(
        clippy::wildcard_enum_match_arm,
        reason = "every other failure is the store's own"
    )]
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Conflict { key, .. } => Self::new(
                Code::Conflict,
                format_args!("{} {}/{}", key.kind, key.namespace, key.name),
            ),
            StoreError::AlreadyExists(key) => Self::new(
                Code::AlreadyExists,
                format_args!("{} {}/{}", key.kind, key.namespace, key.name),
            ),
            StoreError::NotFound(key) => Self::new(
                Code::NotFound,
                format_args!("{} {}/{}", key.kind, key.namespace, key.name),
            ),
            _ => Self::internal(error),
        }
    }
}

/// True if the same transaction may succeed when it is tried again on fresh objects.
pub fn is_race(error: &ObjectError) -> bool {
    matches!(
        error,
        ObjectError::Store(
            StoreError::Conflict { .. } | StoreError::AlreadyExists(_) | StoreError::NotFound(_)
        )
    )
}
