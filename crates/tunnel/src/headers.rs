use http::{HeaderMap, HeaderName, HeaderValue, header};
use std::{
    fmt::{self, Write as _},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// Describes the workload at the other end.
pub(crate) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// W3C trace context.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Network of the caller, in the inner request of a call through a gateway. Source: ztunnel.
pub(crate) const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");
/// Longest baggage, all headers together, that is read. Ours are below 400 bytes.
const BAGGAGE_LENGTH_MAX: usize = 4 * 1024;

/// Why a header was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Neither `ip:port` nor `host:port`.
    #[error("{0:?} is not address:port or host:port")]
    Authority(String),
    /// A character that a header value cannot have.
    #[error("a header value has a character that is not allowed")]
    Value,
}

/// Where a CONNECT goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Authority {
    /// `10.0.0.1:80`, `[2001:db8::1]:80`.
    Address(SocketAddr),
    /// `catalog.shop.svc.mesh.internal:80`, lower case, no trailing dot.
    Name {
        /// Host name.
        host: String,
        /// Port of the service.
        port: u16,
    },
}

impl FromStr for Authority {
    type Err = HeaderError;

    fn from_str(value: &str) -> Result<Self, HeaderError> {
        let refused = || HeaderError::Authority(value.chars().take(128).collect());
        if let Ok(address) = value.parse::<SocketAddr>() {
            // A zone means something on the sender's host only.
            let scoped = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
            return if scoped || value.contains('%') {
                Err(refused())
            } else {
                Ok(Self::Address(address))
            };
        }
        let (host, port) = value.rsplit_once(':').ok_or_else(refused)?;
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(refused());
        }
        let port = port.parse().map_err(|_| refused())?;
        let host = host.strip_suffix('.').unwrap_or(host);
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        // All digits and dots would be an address that was mistyped, such as 10.0.0.256.
        let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if host.len() > 253 || numeric || !host.split('.').all(label) {
            return Err(refused());
        }
        Ok(Self::Name {
            host: host.to_ascii_lowercase(),
            port,
        })
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl Authority {
    /// The port.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Name { port, .. } => *port,
        }
    }
}

/// Describes a workload to its peer; empty fields are unknown and left out.
///
/// Source: ztunnel's `baggage` header: comma separated `key=value` of OpenTelemetry resource names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Baggage {
    /// `k8s.cluster.name`.
    pub cluster: String,
    /// `k8s.namespace.name`.
    pub namespace: String,
    /// `k8s.pod.name` as written by us; any of deployment, cronjob, pod and job is read.
    pub workload: String,
    /// `service.name`: canonical service.
    pub service: String,
    /// `service.version`: canonical revision.
    pub revision: String,
    /// `cloud.region`.
    pub region: String,
    /// `cloud.availability_zone`.
    pub zone: String,
}

impl Baggage {
    /// As a header value; `None` if nothing is known or a name has a character that no header can carry.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let mut text = String::with_capacity(192);
        for (key, value) in [
            ("k8s.cluster.name", &self.cluster),
            ("k8s.namespace.name", &self.namespace),
            ("k8s.pod.name", &self.workload),
            ("service.name", &self.service),
            ("service.version", &self.revision),
            ("cloud.region", &self.region),
            ("cloud.availability_zone", &self.zone),
        ] {
            if value.is_empty() || value.contains([',', '=', ';']) {
                continue;
            }
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{key}={value}"); // writing to a String does not fail
        }
        if text.is_empty() {
            None
        } else {
            HeaderValue::try_from(text).ok()
        }
    }

    /// Reads all `baggage` headers of a message together. Unknown keys and malformed members are passed over: it is
    /// telemetry, and nothing is decided by it.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let mut baggage = Self::default();
        let mut left = BAGGAGE_LENGTH_MAX;
        for value in headers.get_all(BAGGAGE) {
            let Some(rest) = left.checked_sub(value.len()) else {
                break;
            };
            left = rest;
            let Ok(text) = value.to_str() else { continue };
            for member in text.split(',') {
                // Properties after ';' belong to the member.
                let member = member.split(';').next().unwrap_or_default();
                let Some((key, value)) = member.split_once('=') else {
                    continue;
                };
                let field = match key.trim() {
                    "k8s.cluster.name" => &mut baggage.cluster,
                    "k8s.namespace.name" => &mut baggage.namespace,
                    "k8s.deployment.name" | "k8s.cronjob.name" | "k8s.pod.name" | "k8s.job.name" => {
                        &mut baggage.workload
                    }
                    "service.name" => &mut baggage.service,
                    "service.version" => &mut baggage.revision,
                    "cloud.region" => &mut baggage.region,
                    "cloud.availability_zone" => &mut baggage.zone,
                    _ => continue,
                };
                value.trim().clone_into(field);
            }
        }
        baggage
    }
}

/// The `forwarded` header as ztunnel writes it: the application's address and the service that it called.
///
/// Source: RFC 7239, parameters `for` and `host`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Forwarded {
    /// `for`: whom the sender speaks for.
    pub source: Option<SocketAddr>,
    /// `host`: service host name; empty if unknown.
    pub host: String,
}

impl Forwarded {
    /// As a header value.
    pub fn to_header(&self) -> Option<HeaderValue> {
        let mut text = String::with_capacity(96);
        if let Some(source) = self.source {
            let _ = write!(text, "for=\"{source}\""); // writing to a String does not fail
        }
        if !self.host.is_empty() {
            let semicolon = if text.is_empty() { "" } else { ";" };
            let _ = write!(text, "{semicolon}host={}", self.host);
        }
        if text.is_empty() {
            None
        } else {
            HeaderValue::try_from(text).ok()
        }
    }

    /// Reads the first element of the first header. What is malformed is passed over: it is telemetry.
    pub fn from_headers(headers: &HeaderMap) -> Self {
        let text = headers
            .get(header::FORWARDED)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let mut forwarded = Self::default();
        for pair in text.split(',').next().unwrap_or_default().split(';') {
            let Some((key, value)) = pair.split_once('=') else {
                continue;
            };
            let value = value.trim();
            let value = value
                .strip_prefix('"')
                .and_then(|v| v.strip_suffix('"'))
                .unwrap_or(value);
            if key.trim().eq_ignore_ascii_case("for") {
                forwarded.source = parse_node(value);
            } else if key.trim().eq_ignore_ascii_case("host") {
                forwarded.host = value.chars().take(253).collect();
            }
        }
        forwarded
    }
}

/// A node identifier of RFC 7239: an address, in brackets if IPv6, with or without a port.
fn parse_node(value: &str) -> Option<SocketAddr> {
    if let Ok(address) = value.parse() {
        return Some(address);
    }
    let bare = value.strip_prefix('[').and_then(|v| v.strip_suffix(']'));
    let ip: Option<IpAddr> = match bare {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::from),
        None => value.parse().ok(),
    };
    ip.map(|ip| SocketAddr::new(ip, 0))
}

/// A `traceparent` value from random bits, not sampled.
///
/// Source: W3C Trace Context, version 00.
pub fn traceparent(trace: u128, parent: u64) -> HeaderValue {
    let mut text = [b'0'; 55];
    text[2] = b'-';
    text[35] = b'-';
    text[52] = b'-';
    let hex = |value: u128, digits: &mut [u8]| {
        for (i, digit) in digits.iter_mut().rev().enumerate() {
            *digit = b"0123456789abcdef"[usize::try_from((value >> (4 * i)) & 0xf).unwrap_or_default()];
        }
    };
    // All zeroes would be invalid.
    hex(trace.max(1), &mut text[3..35]);
    hex(u128::from(parent.max(1)), &mut text[36..52]);
    HeaderValue::from_bytes(&text).unwrap_or(HeaderValue::from_static(
        "00-00000000000000000000000000000001-0000000000000001-00",
    ))
}

/// The CONNECT that a client sends.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// Address of the workload and target port, or host name and service port.
    pub authority: Authority,
    /// Describes the caller's workload; the same for all its connections: make it once.
    pub baggage: Option<HeaderValue>,
    /// The application's address and the service that it called.
    pub forwarded: Option<HeaderValue>,
    /// Trace context.
    pub traceparent: Option<HeaderValue>,
    /// `x-forwarded-network`: the caller's network, in the inner request of a call through a gateway only.
    pub network: Option<HeaderValue>,
}

impl ConnectRequest {
    /// A CONNECT without headers.
    pub fn new(authority: Authority) -> Self {
        Self {
            authority,
            baggage: None,
            forwarded: None,
            traceparent: None,
            network: None,
        }
    }

    /// As an HTTP/2 request: `:method` and `:authority`, neither `:scheme` nor `:path`.
    ///
    /// # Errors
    /// When the authority has a character that no URI can carry.
    pub(crate) fn to_http(&self) -> Result<http::Request<()>, HeaderError> {
        let mut text = String::with_capacity(48);
        let _ = write!(text, "{}", self.authority); // writing to a String does not fail
        let uri = http::Uri::builder()
            .authority(http::uri::Authority::from_maybe_shared(text).map_err(|_| HeaderError::Value)?)
            .build()
            .map_err(|_| HeaderError::Value)?;
        let mut request = http::Request::new(());
        *request.method_mut() = http::Method::CONNECT;
        *request.uri_mut() = uri;
        *request.version_mut() = http::Version::HTTP_2;
        let headers = request.headers_mut();
        for (name, value) in [
            (BAGGAGE, &self.baggage),
            (header::FORWARDED, &self.forwarded),
            (TRACEPARENT, &self.traceparent),
            (FORWARDED_NETWORK, &self.network),
        ] {
            if let Some(value) = value {
                headers.insert(name, value.clone());
            }
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities() {
        let check = |text: &str| text.parse::<Authority>();
        assert_eq!(
            check("10.0.0.1:80"),
            Ok(Authority::Address("10.0.0.1:80".parse().unwrap()))
        );
        assert_eq!(
            check("[2001:db8::1]:80"),
            Ok(Authority::Address("[2001:db8::1]:80".parse().unwrap()))
        );
        assert_eq!(
            check("Catalog.shop.svc.mesh.internal.:80"),
            Ok(Authority::Name {
                host: "catalog.shop.svc.mesh.internal".into(),
                port: 80
            })
        );
        for bad in [
            "",
            ":80",
            "10.0.0.1",
            "catalog",
            "catalog:",
            "catalog:x",
            "catalog:65536",
            "catalog:+80",
            "10.0.0.256:80",
            "2001:db8::1:80",
            "a..b:80",
            "user@host:80",
            "[fe80::1%3]:80",
            "a b:80",
            "*.x:80",
            &format!("{}:1", "a".repeat(64)),
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
        for text in ["10.0.0.1:80", "[2001:db8::1]:80", "a.b:1"] {
            assert_eq!(check(text).unwrap().to_string(), text);
        }
    }

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for value in values {
            map.append(name.clone(), HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn baggage_reads_what_it_writes_and_what_ztunnel_writes() {
        let baggage = Baggage {
            cluster: "c1".into(),
            namespace: "default".into(),
            workload: "vm1".into(),
            service: "vm-app".into(),
            revision: "v7".into(),
            ..Baggage::default()
        };
        let text = "k8s.cluster.name=c1,k8s.namespace.name=default,k8s.pod.name=vm1,service.name=vm-app,service.version=v7";
        assert_eq!(baggage.to_header().unwrap(), text);
        assert_eq!(Baggage::from_headers(&headers(BAGGAGE, &[text])), baggage);
        let several = headers(
            BAGGAGE,
            &[
                "k8s.deployment.name=d , x=y;p=1",
                "cloud.region=,=,a",
                "service.name=s;q=1",
            ],
        );
        let read = Baggage::from_headers(&several);
        assert_eq!(
            (
                read.workload.as_str(),
                read.service.as_str(),
                read.region.as_str()
            ),
            ("d", "s", "")
        );
        assert_eq!(Baggage::default().to_header(), None);
        let long = "service.name=".to_owned() + &"x".repeat(BAGGAGE_LENGTH_MAX);
        assert_eq!(
            Baggage::from_headers(&headers(BAGGAGE, &[&long])),
            Baggage::default()
        );
    }

    #[test]
    fn forwarded_reads_what_it_writes() {
        for source in ["10.0.0.1:4000", "[2001:db8::1]:4000"] {
            let forwarded = Forwarded {
                source: Some(source.parse().unwrap()),
                host: "catalog.shop.svc.mesh.internal".into(),
            };
            let text = forwarded.to_header().unwrap();
            assert_eq!(
                text,
                format!("for=\"{source}\";host=catalog.shop.svc.mesh.internal")
            );
            assert_eq!(
                Forwarded::from_headers(&headers(header::FORWARDED, &[text.to_str().unwrap()])),
                forwarded
            );
        }
        let node = |text: &str| Forwarded::from_headers(&headers(header::FORWARDED, &[text])).source;
        assert_eq!(
            node("For=10.0.0.1, for=10.0.0.2"),
            Some("10.0.0.1:0".parse().unwrap())
        );
        assert_eq!(
            node("for=\"[2001:db8::1]\""),
            Some("[2001:db8::1]:0".parse().unwrap())
        );
        assert_eq!(node("for=unknown;for"), None);
    }

    #[test]
    fn traceparent_form() {
        assert_eq!(
            traceparent(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, 0xb7ad_6b71_6920_3331),
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
        );
        assert_eq!(
            traceparent(0, 0),
            "00-00000000000000000000000000000001-0000000000000001-00"
        );
    }
}
