//! Licences of everything that is linked, from cargo's metadata.

use crate::graph::{list, metadata, text};
use anyhow::{Result, bail};

/// Allowed for every crate.
const ALLOWED: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "ISC",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "CC0-1.0",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
    "WTFPL",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
    "OpenSSL",
];

/// Allowed for one crate alone, with the reason.
const ALONE: &[(&str, &str)] = &[
    // Persistent maps; file-level copyleft, used unchanged.
    ("imbl", "MPL-2.0+"),
    ("imbl", "MPL-2.0"),
    ("imbl-sized-chunks", "MPL-2.0+"),
    ("imbl-sized-chunks", "MPL-2.0"),
    ("bitmaps", "MPL-2.0+"),
    ("archery", "MIT"),
];

/// Checks every package of the lock file.
pub(crate) fn check() -> Result<()> {
    let metadata = metadata(true)?;
    let (mut wrong, mut count) = (Vec::new(), 0);
    for package in list(&metadata, "packages") {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        count += 1;
        let alone = |term: &str| ALONE.contains(&(name, term));
        if !satisfied(licence, &|term| ALLOWED.contains(&term) || alone(term)) {
            wrong.push(format!("{name} {}: {licence:?}", text(package, "version")));
        }
    }
    if wrong.is_empty() {
        println!("licences: {count} packages, all allowed");
        Ok(())
    } else {
        bail!(
            "licences that are not on the list (xtask/src/licences.rs):\n  {}",
            wrong.join("\n  ")
        )
    }
}

/// SPDX expressions as crates use them: AND binds tighter than OR; parentheses; `/` is an old OR.
fn satisfied(expression: &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let text = expression.replace('/', " OR ");
    let mut rest = text.as_str();
    let value = either(&mut rest, allowed);
    value && rest.trim().is_empty()
}

fn either(rest: &mut &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut value = both(rest, allowed);
    while let Some(after) = rest.trim_start().strip_prefix("OR ") {
        *rest = after;
        let next = both(rest, allowed);
        value |= next;
    }
    value
}

fn both(rest: &mut &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    let mut value = term(rest, allowed);
    while let Some(after) = rest.trim_start().strip_prefix("AND ") {
        *rest = after;
        let next = term(rest, allowed);
        value &= next;
    }
    value
}

fn term(rest: &mut &str, allowed: &dyn Fn(&str) -> bool) -> bool {
    *rest = rest.trim_start();
    if let Some(after) = rest.strip_prefix('(') {
        *rest = after;
        let value = either(rest, allowed);
        *rest = rest.trim_start().strip_prefix(')').unwrap_or(rest);
        return value;
    }
    let end = [" OR ", " AND ", ")"]
        .iter()
        .filter_map(|stop| rest.find(stop))
        .min()
        .unwrap_or(rest.len());
    let (name, after) = rest.split_at(end);
    *rest = after;
    allowed(name.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let mit = |term: &str| term == "MIT" || term == "ISC" || term == "Apache-2.0 WITH LLVM-exception";
        for yes in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "ISC AND MIT",
            "ISC AND (GPL-3.0 OR MIT)",
            "GPL-2.0 OR Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(satisfied(yes, &mit), "{yes}");
        }
        for no in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "ISC AND (GPL-3.0)",
            "GPL-3.0 OR MIT AND BSD",
        ] {
            assert!(!satisfied(no, &mit), "{no}");
        }
    }
}
