use http::{HeaderMap, HeaderValue};
use tombolo_tunnel::{Authority, Baggage, Forwarded};

/// First line: an authority. Further lines: `b` and a baggage header, `f` and a forwarded header.
pub fn check(bytes: &[u8]) {
    let mut lines = bytes.split(|&byte| byte == b'\n');
    let first = String::from_utf8_lossy(lines.next().unwrap_or_default());
    if let Ok(authority) = first.parse::<Authority>() {
        assert_eq!(
            authority.to_string().parse(),
            Ok(authority),
            "an authority means the same when it is told again"
        );
    }
    let mut headers = HeaderMap::new();
    for line in lines {
        let (name, value) = match line.split_first() {
            Some((b'b', value)) => ("baggage", value),
            Some((b'f', value)) => ("forwarded", value),
            _ => continue,
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    let baggage = Baggage::from_headers(&headers);
    let mut again = HeaderMap::new();
    if let Some(header) = baggage.to_header() {
        again.insert("baggage", header);
    }
    let read = Baggage::from_headers(&again);
    for (told, known) in [
        (&read.cluster, &baggage.cluster),
        (&read.namespace, &baggage.namespace),
        (&read.workload, &baggage.workload),
        (&read.service, &baggage.service),
        (&read.revision, &baggage.revision),
        (&read.region, &baggage.region),
        (&read.zone, &baggage.zone),
    ] {
        assert!(told == known || told.is_empty(), "{told:?} was {known:?}");
    }
    let forwarded = Forwarded::from_headers(&headers);
    if forwarded.source.is_some() {
        let told = Forwarded {
            host: String::new(),
            ..forwarded.clone()
        }
        .to_header();
        let mut again = HeaderMap::new();
        again.insert("forwarded", told.expect("an address is a header value"));
        assert_eq!(Forwarded::from_headers(&again).source, forwarded.source);
    }
}
