//! Prometheus text, checked line by line: what a member says is shown to a scraper, which fails on the first bad line.
//!
//! Source: Prometheus text-based exposition format 0.0.4.

/// Checks a text.
///
/// Samples carry no timestamp: a member does not say when, or a scraper would store its past and its future.
///
/// # Errors
/// With the number of the first bad line and what is wrong with it.
pub(super) fn check(text: &str) -> Result<(), String> {
    if text.trim().is_empty() {
        return Err("it is empty".into());
    }
    for (number, line) in text.lines().enumerate() {
        // Comments, HELP, TYPE, and the EOF of OpenMetrics.
        if !line.is_empty() && !line.starts_with('#') {
            sample(line).map_err(|what| format!("line {}: {what}", number + 1))?;
        }
    }
    Ok(())
}

fn is_name(text: &str, colons: bool) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '_' || (colons && c == ':');
    !text.is_empty() && !text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(good)
}

fn sample(line: &str) -> Result<(), &'static str> {
    let end = line.find(['{', ' ', '\t']).ok_or("no value")?;
    let (name, rest) = line.split_at(end);
    if !is_name(name, true) {
        return Err("not the name of a metric");
    }
    let rest = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => rest,
    };
    let mut words = rest.split_ascii_whitespace();
    let value = words.next().ok_or("no value")?;
    value.parse::<f64>().map_err(|_| "the value is not a number")?;
    match words.next() {
        None => Ok(()),
        Some(_) => Err("something follows the value; timestamps are not taken"),
    }
}

/// Reads `name="value",…}` and gives what follows.
fn labels(mut rest: &str) -> Result<&str, &'static str> {
    loop {
        rest = rest.trim_start();
        if let Some(rest) = rest.strip_prefix('}') {
            return Ok(rest);
        }
        let (name, value) = rest.split_once('=').ok_or("a label without a value")?;
        if !is_name(name.trim(), false) {
            return Err("not the name of a label");
        }
        let value = value
            .trim_start()
            .strip_prefix('"')
            .ok_or("a label without quotes")?;
        rest = quoted(value)?.trim_start();
        rest = match rest.strip_prefix(',') {
            Some(rest) => rest,
            None if rest.starts_with('}') => rest,
            None => return Err("no comma between labels"),
        };
    }
}

fn quoted(text: &str) -> Result<&str, &'static str> {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match (escaped, c) {
            (true, '\\' | '"' | 'n') => escaped = false,
            (true, _) => return Err("an escape that is none"),
            (false, '\\') => escaped = true,
            (false, '"') => return Ok(text.get(at + 1..).unwrap_or_default()),
            (false, _) => {}
        }
    }
    Err("a label without a closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        for (text, bad) in [
            ("a 1\n", None),
            ("# HELP a b\n# TYPE a counter\na_total 1\n\n# EOF\n", None),
            ("a{} 1", None),
            ("a{b=\"c\",d=\"e\\\"f\\\\\\n\",} 1.5e3", None),
            ("a:b{le=\"+Inf\"} +Inf", None),
            ("a NaN", None),
            ("", Some("empty")),
            (" \n", Some("empty")),
            ("a", Some("line 1: no value")),
            ("a 1\nb{ 1", Some("line 2: a label without a value")),
            ("1a 1", Some("name of a metric")),
            ("a-b 1", Some("name of a metric")),
            ("a{b=c} 1", Some("quotes")),
            ("a{b=\"c} 1", Some("closing quote")),
            ("a{b=\"\\x\"} 1", Some("escape")),
            ("a{b=\"c\" d=\"e\"} 1", Some("comma")),
            ("a{b:c=\"d\"} 1", Some("name of a label")),
            ("a x", Some("not a number")),
            ("a{b=\"c\"}", Some("no value")),
            ("a 1 1700000000000", Some("timestamps")),
            ("a 1 # {trace=\"x\"} 1", Some("timestamps")),
            ("\u{1b}[2K 1", Some("name of a metric")),
        ] {
            match (check(text), bad) {
                (Ok(()), None) => {}
                (Err(cause), Some(bad)) => assert!(cause.contains(bad), "{text:?}: {cause}"),
                (result, _) => panic!("{text:?}: {result:?}"),
            }
        }
    }
}
