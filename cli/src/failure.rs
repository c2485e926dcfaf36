use std::process::ExitCode;
use tombolo_config::Diagnostic;
use tombolo_control_client::{Problem, StateError};
use tombolo_types::Code;
use tonic::Status;

/// Done.
pub(crate) const OK: u8 = 0;
/// An error.
pub(crate) const ERROR: u8 = 1;
/// The command line is wrong.
pub(crate) const USAGE: u8 = 2;
/// Refused: by policy, by trust, by role.
pub(crate) const REFUSED: u8 = 3;
/// Agent or discovery cannot be reached.
pub(crate) const UNREACHABLE: u8 = 4;
/// A deadline passed.
pub(crate) const TIMEOUT: u8 = 5;

/// Why a verb failed, for a person, and the exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// With a code.
    Problem(Problem),
    /// Without one.
    Plain { exit: u8, text: String },
}

impl Failure {
    pub(crate) fn plain(text: impl Into<String>) -> Self {
        Self::Plain {
            exit: ERROR,
            text: text.into(),
        }
    }

    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Plain {
            exit: USAGE,
            text: text.into(),
        }
    }

    pub(crate) fn coded(code: Code, cause: impl std::fmt::Display) -> Self {
        Self::Problem(Problem::new(code, cause))
    }

    /// Of files: every finding on a line of its own.
    pub(crate) fn findings(file: &str, findings: &[Diagnostic]) -> Self {
        let lines: Vec<_> = findings
            .iter()
            .map(|finding| format!("{file}: {finding}"))
            .collect();
        Self::Problem(Problem::new(Code::InvalidResource, lines.join("\n         ")))
    }

    pub(crate) const fn code(&self) -> Option<Code> {
        match self {
            Self::Problem(problem) => Some(problem.code),
            Self::Plain { .. } => None,
        }
    }

    pub(crate) fn exit(&self) -> u8 {
        match self {
            Self::Plain { exit, .. } => *exit,
            Self::Problem(problem) => exit_of(problem.code),
        }
    }

    /// Prints it and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Self::Plain { text, .. } => eprintln!("error: {text}"),
            Self::Problem(problem) => eprintln!("error: {}", shown(problem)),
        }
        ExitCode::from(self.exit())
    }
}

/// A problem on lines of its own: title, cause, next step.
pub(crate) fn shown(problem: &Problem) -> String {
    let entry = problem.code.entry();
    let cause = if problem.cause.is_empty() {
        String::new()
    } else {
        format!("\n  cause: {}", problem.cause)
    };
    format!("{} {}{cause}\n  next:  {}", entry.id, entry.title, entry.next)
}

fn exit_of(code: Code) -> u8 {
    use Code as C;
    if matches!(
        code,
        C::Unreachable | C::NoControlPlane | C::NetdUnreachable | C::AdminUnreachable | C::AgentUnreachable
    ) {
        UNREACHABLE
    } else if matches!(
        code,
        C::TokenExpired
            | C::TokenSpent
            | C::TokenUnknown
            | C::TokenSource
            | C::TokenProof
            | C::PinMismatch
            | C::NotDiscovery
            | C::DeviceRevoked
            | C::DeviceClone
            | C::DeviceUnknown
            | C::Forbidden
            | C::Reserved
            | C::NeedsRoot
            | C::InviteExpired
            | C::InviteSpent
            | C::InviteUnknown
            | C::InviteProof
            | C::InviteMismatch
            | C::MayNotAdmit
    ) {
        REFUSED
    } else if code == C::NotReady {
        TIMEOUT
    } else if matches!(code, C::Usage | C::InvalidRequest) {
        USAGE
    } else {
        ERROR
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain { text, .. } => f.write_str(text),
            Self::Problem(problem) => write!(f, "{problem}"),
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::Problem(error.problem())
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        use tonic::Code as Rpc;
        if let Some(problem) = Problem::from_message(status.message()) {
            return Self::Problem(problem);
        }
        let code = match status.code() {
            Rpc::Unavailable => Code::AdminUnreachable,
            Rpc::PermissionDenied | Rpc::Unauthenticated => Code::Forbidden,
            Rpc::NotFound => Code::NotFound,
            Rpc::AlreadyExists => Code::AlreadyExists,
            Rpc::Aborted => Code::Conflict,
            Rpc::InvalidArgument => Code::InvalidRequest,
            Rpc::DeadlineExceeded => {
                return Self::Plain {
                    exit: TIMEOUT,
                    text: format!("no answer in time: {}", status.message()),
                };
            }
            Rpc::Unimplemented => {
                return Self::plain(
                    "the other side does not know this verb: it is of an older version. See tombolo version",
                );
            }
            // Discovery's own words: something is in the way, or there is too much at once.
            Rpc::FailedPrecondition | Rpc::ResourceExhausted => return Self::plain(status.message()),
            Rpc::Ok | Rpc::Cancelled | Rpc::Unknown | Rpc::OutOfRange | Rpc::Internal | Rpc::DataLoss => {
                return Self::plain(format!("discovery failed: {}", status.message()));
            }
        };
        Self::Problem(Problem::from_status(&status, code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_stable() {
        for (failure, exit) in [
            (Failure::plain("x"), 1),
            (Failure::usage("x"), 2),
            (Failure::coded(Code::TokenSpent, ""), 3),
            (Failure::coded(Code::Forbidden, ""), 3),
            (Failure::coded(Code::Unreachable, ""), 4),
            (Failure::coded(Code::AgentUnreachable, ""), 4),
            (Failure::coded(Code::NotReady, ""), 5),
            (Failure::coded(Code::NotFound, ""), 1),
            (Status::permission_denied("no").into(), 3),
            (Status::unavailable("no").into(), 4),
            (Status::deadline_exceeded("late").into(), 5),
            (
                Status::failed_precondition(Code::TokenExpired.message("x")).into(),
                3,
            ),
        ] {
            assert_eq!(failure.exit(), exit, "{failure:?}");
        }
    }

    #[test]
    fn people_read_title_cause_and_next_step() {
        let text = shown(&Problem::new(Code::TokenSpent, "2 of 2 uses"));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "TMB0103 The join token has no uses left.");
        assert_eq!(lines[1], "  cause: 2 of 2 uses");
        assert!(lines[2].starts_with("  next:  Make a new one"));
    }
}
