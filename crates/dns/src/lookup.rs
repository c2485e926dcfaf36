use crate::{Addresses, Names};

/// What a name was found as.
pub(crate) struct Found {
    pub(crate) addresses: Addresses,
    /// The full name that it stands for, if it was found by taking a search domain off: the target of a CNAME.
    pub(crate) alias_of: Option<String>,
}

/// Finds a name as asked, completed with the mesh domain, then with each search domain taken off and completed again;
/// each of them exactly, then as wildcards, the most specific first.
///
/// Source: ztunnel's DNS server, which follows the search paths of Kubernetes.
pub(crate) fn lookup(names: &dyn Names, host: &str, namespace: &str, search: &[String]) -> Option<Found> {
    if let Some((addresses, _)) = find_completed(names, host, namespace) {
        return Some(Found {
            addresses,
            alias_of: None,
        });
    }
    search.iter().find_map(|domain| {
        let stripped = strip_domain(host, domain)?;
        let (addresses, full) = find_completed(names, stripped, namespace)?;
        Some(Found {
            addresses,
            alias_of: full,
        })
    })
}

/// `host` without `domain`, which is as the host's configuration writes it: any case, dots at the ends.
fn strip_domain<'h>(host: &'h str, domain: &str) -> Option<&'h str> {
    let domain = domain.trim_matches('.');
    let at = host
        .len()
        .checked_sub(domain.len())
        .filter(|_| !domain.is_empty())?;
    let tail = host.get(at..)?;
    let rest = host.get(..at)?.strip_suffix('.')?;
    (tail.eq_ignore_ascii_case(domain) && !rest.is_empty()).then_some(rest)
}

/// The addresses of `host` or of one of its completions, and the completed name unless a wildcard fitted.
fn find_completed(names: &dyn Names, host: &str, namespace: &str) -> Option<(Addresses, Option<String>)> {
    std::iter::once(host.to_owned())
        .chain(completions(host, namespace, names.mesh_domain()))
        .find_map(|full| {
            if let Some(addresses) = names.find(&full, namespace) {
                return Some((addresses, Some(full)));
            }
            find_wildcard(names, &full, namespace).map(|addresses| (addresses, None))
        })
}

/// The full names that a short one may mean.
fn completions(host: &str, namespace: &str, domain: &str) -> Vec<String> {
    let in_svc = host.ends_with(".svc");
    match host.split('.').count() {
        1 => vec![format!("{host}.{namespace}.svc.{domain}")],
        2 => vec![
            format!("{host}.svc.{domain}"),
            format!("{host}.{namespace}.svc.{domain}"),
        ],
        3 if in_svc => vec![format!("{host}.{domain}"), format!("{host}.svc.{domain}")],
        3 => vec![format!("{host}.svc.{domain}")],
        4 if in_svc => vec![format!("{host}.{domain}")],
        _ => Vec::new(),
    }
}

fn find_wildcard(names: &dyn Names, host: &str, namespace: &str) -> Option<Addresses> {
    let mut rest = host;
    while let Some((_, parent)) = rest.split_once('.') {
        if let Some(addresses) = names.find(&format!("*.{parent}"), namespace) {
            return Some(addresses);
        }
        rest = parent;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_domains() {
        // (host, domain, rest)
        for (host, domain, rest) in [
            ("a.corp.example", "corp.example", Some("a")),
            ("a.b.corp.example", ".Corp.Example.", Some("a.b")),
            ("corp.example", "corp.example", None),
            ("acorp.example", "corp.example", None),
            (".corp.example", "corp.example", None),
            ("a.corp.example", "", None),
            ("a", "corp.example", None),
            ("é.a", "\u{a9}.a", None),
        ] {
            assert_eq!(strip_domain(host, domain), rest, "{host} {domain}");
        }
    }

    #[test]
    fn completed_names() {
        // (host, completions in order)
        for (host, expected) in [
            ("web", &["web.shop.svc.m.i"][..]),
            ("web.bank", &["web.bank.svc.m.i", "web.bank.shop.svc.m.i"]),
            ("web.bank.svc", &["web.bank.svc.m.i", "web.bank.svc.svc.m.i"]),
            ("db-0.db.bank", &["db-0.db.bank.svc.m.i"]),
            ("db-0.db.bank.svc", &["db-0.db.bank.svc.m.i"]),
            ("a.b.c.d", &[]),
            ("web.bank.svc.m.i", &[]),
        ] {
            assert_eq!(completions(host, "shop", "m.i"), expected, "{host}");
        }
    }
}
