use std::fmt;
use tombolo_types::Code;
use tonic::Status;

/// Something that went wrong, as an operator sees it: a code of the table and the cause in this case.
///
/// `Display` is the one form of messages: code, title, cause, next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Row of the table.
    pub code: Code,
    /// Why, in this case. May be empty.
    pub cause: String,
}

impl Problem {
    /// With a cause.
    pub fn new(code: Code, cause: impl fmt::Display) -> Self {
        Self {
            code,
            cause: cause.to_string(),
        }
    }

    /// Reads the message of a gRPC error: the code that the other side named, else `fallback` with the whole text.
    pub fn from_status(status: &Status, fallback: Code) -> Self {
        Self::from_message(status.message()).unwrap_or_else(|| {
            let text = status.message();
            // tonic's own texts for a broken transport say little: the source says what happened.
            let source = std::error::Error::source(status)
                .map(deepest)
                .filter(|source| source != text);
            let cause = match (text.is_empty(), source) {
                (true, None) => format!("{:?}", status.code()),
                (true, Some(source)) => source,
                (false, None) => text.to_owned(),
                (false, Some(source)) => format!("{text}: {source}"),
            };
            Self {
                code: fallback,
                cause,
            }
        })
    }

    /// Reads the one form of messages back; `None` for any other text.
    pub fn from_message(text: &str) -> Option<Self> {
        let code = Code::find(text.get(..7)?)?;
        let rest = text.get(7..)?.trim_start();
        let rest = rest.strip_prefix(code.entry().title).unwrap_or(rest).trim_start();
        let rest = rest.split(" Next: ").next().unwrap_or(rest);
        let rest = if rest.starts_with("Next: ") { "" } else { rest };
        let cause = rest.strip_prefix("Cause: ").unwrap_or(rest).trim_end_matches('.');
        Some(Self {
            code,
            cause: cause.to_owned(),
        })
    }

    /// True if trying again cannot help before somebody does something: the server said no.
    pub fn is_refusal(&self) -> bool {
        !matches!(self.code, Code::Unreachable | Code::NoControlPlane)
    }
}

/// The innermost source: what the operating system or the TLS library said.
pub(crate) fn deepest(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.code.message(&self.cause))
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_back() {
        for (code, cause) in [
            (Code::TokenExpired, "it ended 3 minutes ago"),
            (Code::TokenSpent, ""),
            (
                Code::DeviceClone,
                "generation 4 was used with another key. Since noon",
            ),
        ] {
            let problem = Problem::new(code, cause);
            let status = Status::permission_denied(problem.to_string());
            assert_eq!(Problem::from_status(&status, Code::Unreachable), problem);
        }
    }

    #[test]
    fn other_texts_keep_their_words() {
        let status = Status::unavailable("broken pipe");
        assert_eq!(
            Problem::from_status(&status, Code::Unreachable),
            Problem::new(Code::Unreachable, "broken pipe")
        );
        assert_eq!(Problem::from_message("TMB9999 what"), None);
        assert_eq!(Problem::from_message(""), None);
        assert_eq!(Problem::from_message("äöüäöü"), None);
    }
}
