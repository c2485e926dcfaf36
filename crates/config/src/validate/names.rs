//! Syntax of names, labels, ports and addresses.

use crate::{nearest, typed};
use ipnet::IpNet;
use std::net::IpAddr;
use tombolo_types::{Hostname, check_label};

/// Protocols of a service port. Source: Istio pkg/config/protocol; compared without case.
pub(crate) const PROTOCOLS: [&str; 13] = [
    "TCP",
    "HTTP",
    "HTTPS",
    "HTTP2",
    "GRPC",
    "GRPC-WEB",
    "TLS",
    "UDP",
    "MONGO",
    "REDIS",
    "MYSQL",
    "HTTP_PROXY",
    "HBONE",
];

pub(super) fn key_path(parent: &str, key: &str) -> String {
    let mut path = parent.to_owned();
    typed::push_key(&mut path, key);
    path
}

pub(super) fn subdomain(what: &'static str, value: &str) -> Result<(), String> {
    if value.len() > 253 {
        return Err(format!(
            "{what} has {} characters, at most 253 are allowed",
            value.len()
        ));
    }
    value
        .split('.')
        .try_for_each(|label| check_label(what, label))
        .map_err(|error| error.to_string())
}

fn qualified(value: &str) -> bool {
    let outer = |b: u8| b.is_ascii_alphanumeric();
    let inner = |b: u8| outer(b) || matches!(b, b'-' | b'_' | b'.');
    let bytes = value.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(&first), Some(&last)) => {
            bytes.len() <= 63 && outer(first) && outer(last) && bytes.iter().all(|&b| inner(b))
        }
        _ => false,
    }
}

pub(super) fn label_key(key: &str) -> Result<(), &'static str> {
    let ok = match key.split_once('/') {
        Some((prefix, name)) => subdomain("prefix", prefix).is_ok() && qualified(name),
        None => qualified(key),
    };
    ok.then_some(())
        .ok_or("is not a label key: [prefix/]name, a name of at most 63 letters, digits, '-', '_' and '.'")
}

pub(super) fn label_value(value: &str) -> Result<(), String> {
    if value.is_empty() || qualified(value) {
        return Ok(());
    }
    Err(format!(
        "{value:.80?} is not a label value: at most 63 letters, digits, '-', '_' and '.', starting and ending with a \
         letter or digit"
    ))
}

pub(super) fn port(number: u32) -> Result<(), String> {
    if (1..=65535).contains(&number) {
        Ok(())
    } else {
        Err(format!("{number} is not a port: 1 to 65535"))
    }
}

pub(super) fn port_text(text: &str) -> Result<(), String> {
    match text.parse::<u32>() {
        Ok(number) if !text.starts_with('+') => port(number),
        _ => Err(format!("{text:.80?} is not a port: 1 to 65535")),
    }
}

pub(super) fn protocol(value: &str) -> Result<(), (String, Option<String>)> {
    if value.is_empty() || PROTOCOLS.iter().any(|known| known.eq_ignore_ascii_case(value)) {
        return Ok(());
    }
    let nearest = nearest(value, PROTOCOLS);
    let known = if nearest.is_some() {
        String::new()
    } else {
        format!("; known are {}", PROTOCOLS.join(", "))
    };
    Err((format!("unknown protocol {value:.80?}{known}"), nearest))
}

pub(super) fn host(value: &str) -> Result<Hostname, String> {
    if value == "*" {
        return Err("\"*\" alone is not a host; write *.example.org".to_owned());
    }
    value.parse::<Hostname>().map_err(|error| error.to_string())
}

pub(super) fn locality(value: &str) -> Result<(), String> {
    let parts: Vec<&str> = value.split('/').collect();
    let good = |part: &&str| {
        !part.is_empty() && !part.contains(|c: char| c == '*' || c.is_whitespace() || c.is_control())
    };
    if parts.len() <= 3 && parts.iter().all(good) && value.len() <= 253 {
        Ok(())
    } else {
        Err(format!(
            "{value:.80?} is not a locality: region, region/zone or region/zone/subzone"
        ))
    }
}

pub(super) fn network(value: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if value.len() <= 63 && value.chars().all(good) {
        Ok(())
    } else {
        Err(format!(
            "{value:.80?} is not a network id: at most 63 letters, digits, '-', '_' and '.'"
        ))
    }
}

pub(super) fn ip_or_cidr(value: &str) -> Result<(), String> {
    let good = value.parse::<IpAddr>().is_ok() || value.parse::<IpNet>().is_ok();
    if good {
        Ok(())
    } else {
        Err(format!("{value:.80?} is not an IP address or CIDR"))
    }
}

/// What an endpoint's address is.
pub(super) enum Endpoint {
    Ip(IpAddr),
    Unix,
    Host,
}

pub(super) fn endpoint(value: &str) -> Result<Endpoint, String> {
    if let Ok(ip) = value.parse() {
        return Ok(Endpoint::Ip(ip));
    }
    if let Some(path) = value.strip_prefix("unix://") {
        let named = path
            .strip_prefix('/')
            .or_else(|| path.strip_prefix('@'))
            .is_some_and(|rest| !rest.is_empty());
        return if named {
            Ok(Endpoint::Unix)
        } else {
            Err(format!(
                "{value:.80?} is not a unix socket: write unix:///absolute/path"
            ))
        };
    }
    match value.parse::<Hostname>() {
        // Digits and dots alone are a mistyped address, not a name.
        Ok(host) if !host.is_wildcard() && !value.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
            Ok(Endpoint::Host)
        }
        _ => Err(format!(
            "{value:.80?} is neither an IP address, a DNS name nor a unix socket (unix:///path)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        for (value, expected) in [
            ("10.0.0.1", "ip"),
            ("2001:db8::1", "ip"),
            ("unix:///run/x.sock", "unix"),
            ("unix://@x", "unix"),
            ("db.example.org", "host"),
            ("localhost", "host"),
            ("", "bad"),
            ("10.0.0", "bad"),
            ("10.0.0.256", "bad"),
            ("10.0.0.1/24", "bad"),
            ("unix://relative", "bad"),
            ("unix:///", "bad"),
            ("*.example.org", "bad"),
            ("a b", "bad"),
        ] {
            let found = match endpoint(value) {
                Ok(Endpoint::Ip(_)) => "ip",
                Ok(Endpoint::Unix) => "unix",
                Ok(Endpoint::Host) => "host",
                Err(_) => "bad",
            };
            assert_eq!(found, expected, "{value}");
        }
    }

    #[test]
    fn small_forms() {
        for (value, good) in [
            ("eu", true),
            ("eu/a/1", true),
            ("eu//1", false),
            ("eu/a/1/x", false),
            ("*", false),
        ] {
            assert_eq!(locality(value).is_ok(), good, "{value}");
        }
        for (value, good) in [
            ("80", true),
            ("0", false),
            ("65536", false),
            ("+80", false),
            ("http", false),
        ] {
            assert_eq!(port_text(value).is_ok(), good, "{value}");
        }
        assert_eq!(protocol("http"), Ok(()));
        assert_eq!(protocol("HTPP").unwrap_err().1.as_deref(), Some("HTTP"));
        assert!(host("*").is_err() && host("*.a.b").is_ok() && host("a_b").is_err());
    }
}
