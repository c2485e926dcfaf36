use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

/// What was logged last of each kind of request. An agent that cannot go on asks the same again and again, every two
/// seconds for as long as it lasts: once is news.
#[derive(Debug, Default)]
pub(super) struct Said(Mutex<BTreeMap<String, (i32, String)>>);

impl Said {
    /// True unless this process asked exactly this the last time, with this outcome.
    pub(super) fn is_news(&self, process: i32, request: &str, outcome: &str) -> bool {
        let kind = request
            .split(|c: char| !c.is_ascii_alphanumeric())
            .next()
            .unwrap_or_default();
        let now = (process, format!("{request} {outcome}"));
        let mut said = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        said.insert(kind.to_owned(), now.clone()).as_ref() != Some(&now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_per_change() {
        let said = Said::default();
        assert!(said.is_news(7, "OpenTun", "done") && said.is_news(7, "SetRoute { a }", "refused: x"));
        for _ in 0..3 {
            assert!(!said.is_news(7, "OpenTun", "done"));
            assert!(!said.is_news(7, "SetRoute { a }", "refused: x"));
        }
        assert!(said.is_news(7, "SetRoute { a }", "done"), "it is mended");
        assert!(said.is_news(8, "OpenTun", "done"), "another agent");
        assert!(said.is_news(7, "SetRoute { b }", "done"));
    }
}
