use std::fmt;

/// One finding about a resource or a configuration file: where, why, and what was probably meant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Diagnostic {
    /// Field, for example `spec.ports[0].protocol`; empty for the whole document.
    pub path: String,
    /// Why, for people.
    pub reason: String,
    /// The known name that is nearest to an unknown one.
    pub nearest: Option<String>,
    /// The object is taken in spite of it.
    pub warning: bool,
    /// Number of the document in its file, from 0.
    pub document: usize,
    /// `Kind namespace/name`, as far as it could be read.
    pub object: String,
}

impl Diagnostic {
    /// A refusal.
    pub fn error(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            reason: reason.into(),
            ..Self::default()
        }
    }

    /// A finding that refuses nothing.
    pub fn warning(path: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            warning: true,
            ..Self::error(path, reason)
        }
    }

    /// Adds what was probably meant.
    #[must_use]
    pub fn with_nearest(mut self, nearest: Option<String>) -> Self {
        self.nearest = nearest;
        self
    }

    /// Says which object of which document it is about.
    #[must_use]
    pub fn of(mut self, document: usize, object: &str) -> Self {
        self.document = document;
        object.clone_into(&mut self.object);
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.document > 0 {
            write!(f, "document {}: ", self.document + 1)?;
        }
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.reason)?;
        match &self.nearest {
            Some(nearest) => write!(f, "; did you mean {nearest}?"),
            None => Ok(()),
        }
    }
}

/// The candidate with the smallest edit distance to `word`, ignoring case, if it is near enough to be a slip: at most
/// one edit per three characters.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let lower = word.to_lowercase();
    // An attacker-chosen key of megabytes is no slip, and comparing it costs length x length.
    if lower.len() > 64 {
        return None;
    }
    candidates
        .into_iter()
        .map(|candidate| (distance(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(edits, candidate)| *edits * 3 <= candidate.chars().count().max(lower.chars().count()))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate.to_owned())
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swaps of neighbours count 1.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (rows[i - 1][j] + 1)
                .min(rows[i][j - 1] + 1)
                .min(rows[i - 1][j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, edits) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("kitten", "sitting", 3),
            ("prots", "ports", 1),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
            assert_eq!(distance(b, a), edits, "{b} {a}");
        }
    }

    #[test]
    fn only_slips_have_a_nearest() {
        let fields = ["hosts", "ports", "resolution", "workloadSelector"];
        assert_eq!(nearest("prots", fields).as_deref(), Some("ports"));
        assert_eq!(
            nearest("workloadselector", fields).as_deref(),
            Some("workloadSelector")
        );
        assert_eq!(nearest("banana", fields), None);
        assert_eq!(nearest(&"x".repeat(1 << 20), fields), None);
    }

    #[test]
    fn the_text_names_everything() {
        let found = Diagnostic::error("spec.prots", "unknown field")
            .with_nearest(Some("ports".into()))
            .of(2, "ServiceEntry shop/catalog");
        assert_eq!(
            found.to_string(),
            "document 3: ServiceEntry shop/catalog: spec.prots: unknown field; did you mean ports?"
        );
    }
}
