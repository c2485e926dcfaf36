use std::{fmt, sync::Arc};
use tombolo_types::Code;

/// Why something was refused, and who caused it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Row of the table of diagnostics.
    pub code: Code,
    /// The member that caused it, by its key, or where it has not shown that, by its certificate; empty otherwise.
    pub cluster: Arc<str>,
    /// What exactly; may repeat what a peer sent, at most 200 characters of it, control characters escaped.
    pub cause: String,
}

impl Refusal {
    pub(crate) fn new(code: Code, cause: impl fmt::Display) -> Self {
        let cause: String = cause
            .to_string()
            .chars()
            .flat_map(|c| {
                if c.is_control() {
                    c.escape_default().collect::<Vec<_>>()
                } else {
                    vec![c]
                }
            })
            .take(200)
            .collect();
        Self {
            code,
            cluster: "".into(),
            cause,
        }
    }

    pub(crate) fn of(mut self, cluster: &Arc<str>) -> Self {
        self.cluster = cluster.clone();
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cluster.is_empty() {
            f.write_str(&self.code.message(&self.cause))
        } else {
            f.write_str(
                &self
                    .code
                    .message(format_args!("{}: {}", self.cluster, self.cause)),
            )
        }
    }
}

impl std::error::Error for Refusal {}
