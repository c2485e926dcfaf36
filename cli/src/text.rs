//! Durations and times as people write and read them.

use std::time::Duration;

/// Reads `90s`, `500ms`, `15m`, `24h`, `7d`, `1h30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as 90s, 15m, 24h or 7d");
    let (mut total, mut rest) = (0u64, text);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let letters = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(letters);
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let amount: u64 = number.parse().map_err(|_| wrong())?;
        total = amount
            .checked_mul(milliseconds)
            .and_then(|ms| total.checked_add(ms))
            .ok_or_else(wrong)?;
        rest = tail;
    }
    if text.is_empty() {
        return Err(wrong());
    }
    Ok(Duration::from_millis(total))
}

/// Longest life of a join token or an invite.
const LIFE_MAX: Duration = Duration::from_secs(7 * 86_400);

/// The life of a join token or an invite, as [`duration`] reads it.
pub(crate) fn life(text: &str) -> Result<Duration, String> {
    let life = duration(text)?;
    if (Duration::from_secs(1)..=LIFE_MAX).contains(&life) {
        Ok(life)
    } else {
        Err("it may live from 1s to 7d".to_owned())
    }
}

/// An age as kubectl writes it: two units at most.
pub(crate) fn age(milliseconds: i64) -> String {
    let seconds = (milliseconds / 1000).max(0);
    let (m, h, d) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 if seconds % 60 != 0 => format!("{m}m{}s", seconds % 60),
        120..7_200 => format!("{m}m"),
        7_200..28_800 if m % 60 != 0 => format!("{h}h{}m", m % 60),
        7_200..172_800 => format!("{h}h"),
        172_800..691_200 if h % 24 != 0 => format!("{d}d{}h", h % 24),
        172_800..63_072_000 => format!("{d}d"),
        _ => format!("{}y{}d", d / 365, d % 365),
    }
}

/// Every line moved to the right.
pub(crate) fn indented(text: &str, by: usize) -> String {
    text.lines().map(|line| format!("{:by$}{line}\n", "")).collect()
}

/// A time as RFC 3339 in UTC, to the second.
pub(crate) fn time(unix_ms: i64) -> String {
    tombolo_config::rfc3339(unix_ms / 1000 * 1000)
}

/// How far away a time is: `in 3h`, `3h ago`.
pub(crate) fn relative(unix_ms: i64, now_unix_ms: i64) -> String {
    if unix_ms >= now_unix_ms {
        format!("in {}", age(unix_ms - now_unix_ms))
    } else {
        format!("{} ago", age(now_unix_ms - unix_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, seconds) in [
            ("90s", 90),
            ("15m", 900),
            ("24h", 86_400),
            ("7d", 604_800),
            ("1h30m", 5400),
            ("0s", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(duration("1s500ms"), Ok(Duration::from_millis(1500)));
        for bad in [
            "",
            "15",
            "m",
            "1w",
            "-1s",
            "1.5h",
            "99999999999999999999s",
            "999999999999999999d",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_lives_a_second_to_a_week() {
        for (text, good) in [
            ("1s", true),
            ("7d", true),
            ("0s", false),
            ("999ms", false),
            ("8d", false),
            ("x", false),
        ] {
            assert_eq!(life(text).is_ok(), good, "{text}");
        }
    }

    #[test]
    fn ages() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (3600, "60m"),
            (7200, "2h"),
            (7260, "2h1m"),
            (100_000, "27h"),
            (172_800, "2d"),
            (180_000, "2d2h"),
            (864_000, "10d"),
            (70_000_000, "2y80d"),
        ] {
            assert_eq!(age(seconds * 1000), text, "{seconds}");
        }
        assert_eq!(age(-5), "0s");
        assert_eq!(
            (relative(61_000, 1000).as_str(), relative(1000, 61_000).as_str()),
            ("in 60s", "60s ago")
        );
    }
}
