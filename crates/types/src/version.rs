/// True if two programs are further apart than they are tested together: another major version, or more than one minor
/// version. What is not a version is not judged.
pub fn far_apart(a: &str, b: &str) -> bool {
    let number = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    match (number(a), number(b)) {
        (Some(a), Some(b)) => a.0 != b.0 || a.1.abs_diff(b.1) > 1,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_minor_version_is_near() {
        for (a, b, far) in [
            ("0.1.0", "0.1.9", false),
            ("0.1.0", "0.2.0", false),
            ("0.3.1", "0.1.7", true),
            ("1.0.0", "0.9.0", true),
            ("0.1.0-rc.1", "0.3.0", true),
            ("0.1.0", "", false),
            ("istiod", "0.9.0", false),
        ] {
            assert_eq!((far_apart(a, b), far_apart(b, a)), (far, far), "{a} {b}");
        }
    }
}
