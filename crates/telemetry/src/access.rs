use std::{
    fmt,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Which way a connection goes, seen from this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Towards the local workload.
    Inbound,
    /// Away from it.
    Outbound,
}

impl Direction {
    /// As a label and log field.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One end of a connection, as far as it is known; empty is unknown.
#[derive(Debug, Clone, Copy, Default)]
pub struct Party<'a> {
    /// Address as this host saw it.
    pub address: Option<SocketAddr>,
    /// SPIFFE id, verified by TLS for the peer.
    pub identity: &'a str,
    /// Workload name.
    pub workload: &'a str,
    /// Its namespace.
    pub namespace: &'a str,
}

/// What is said of one connection when it has ended or was refused.
#[derive(Debug, Clone, Copy)]
pub struct AccessEntry<'a> {
    /// Which way.
    pub direction: Direction,
    /// Who called.
    pub source: Party<'a>,
    /// Who was called.
    pub destination: Party<'a>,
    /// The gateway that the connection went through, `host:port`; empty if none.
    pub gateway: &'a str,
    /// Host name of the service that was called; empty if none.
    pub service: &'a str,
    /// Bytes from the caller to the called.
    pub bytes_sent: u64,
    /// Bytes from the called to the caller.
    pub bytes_received: u64,
    /// From the first packet to the end.
    pub duration: Duration,
    /// Envoy's response flags, `-` for none.
    pub flags: &'a str,
    /// Why it was refused or cut; empty if it ended by itself.
    pub reason: &'a str,
    /// Detail for people; may be empty.
    pub detail: &'a str,
    /// The policy that decided, `namespace/name`; empty if none.
    pub policy: &'a str,
}

/// A field without a value is not written.
fn known(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// Lines about failed connections that may come at once, and how many a second after that. journald takes 10,000 in
/// 30 s from a unit (RateLimitBurst) before it drops whatever comes, findings of the agent included: a client that calls
/// a closed port in a loop must not use that up. 500 + 30 * 20 lines are an eighth of it.
const FAILURES_BURST: f64 = 500.0;
const FAILURES_PER_SECOND: f64 = 20.0;
/// How often is said how many were left out.
const LEFT_OUT_EVERY: Duration = Duration::from_secs(10);

/// What may still be written.
#[derive(Debug)]
struct Budget {
    lines: f64,
    at: Option<Instant>,
    left_out: u64,
    said_at: Option<Instant>,
}

impl Budget {
    const FULL: Self = Self {
        lines: FAILURES_BURST,
        at: None,
        left_out: 0,
        said_at: None,
    };

    /// Whether a line may be written now, and how many were not, if it is time to say so.
    fn take(&mut self, now: Instant) -> (bool, Option<u64>) {
        let since = self
            .at
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        self.lines = FAILURES_BURST.min(self.lines + since.as_secs_f64() * FAILURES_PER_SECOND);
        let due = self
            .said_at
            .is_none_or(|at| now.saturating_duration_since(at) >= LEFT_OUT_EVERY);
        if self.lines < 1.0 {
            self.left_out += 1;
            return (false, None);
        }
        self.lines -= 1.0;
        let said = (self.left_out > 0 && due).then(|| std::mem::take(&mut self.left_out));
        if said.is_some() {
            self.said_at = Some(now);
        }
        (true, said)
    }
}

/// Of this process.
static FAILURES: Mutex<Budget> = Mutex::new(Budget::FULL);

/// Writes one line a connection, as a `tracing` event of target `access`: so it is text, JSON or journal fields as the
/// log is. By default refused and failed connections only, and of a flood of those a part; by setting all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessLog {
    all: bool,
}

impl Default for AccessLog {
    fn default() -> Self {
        Self::new(true)
    }
}

impl AccessLog {
    /// `all`: connections that ended well are written too.
    pub fn new(all: bool) -> Self {
        Self { all }
    }

    /// True if a connection with this outcome is written: lets the caller skip making the entry.
    pub fn wants(&self, failed: bool) -> bool {
        (self.all || failed) && tracing::enabled!(target: "access", tracing::Level::INFO)
    }

    /// Writes the line, if it is wanted.
    pub fn write(&self, entry: &AccessEntry<'_>) {
        let failed = entry.flags != "-";
        if !self.wants(failed) {
            return;
        }
        if !self.all {
            let taken = FAILURES
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(Instant::now());
            if let Some(count) = taken.1 {
                tracing::warn!(
                    count,
                    "failed connections were not written one by one; the metrics count all"
                );
            }
            if !taken.0 {
                return;
            }
        }
        macro_rules! line {
            ($level:ident, $message:literal) => {
                tracing::$level!(
                    target: "access",
                    direction = entry.direction.as_str(),
                    src_identity = known(entry.source.identity),
                    src_workload = known(entry.source.workload),
                    src_namespace = known(entry.source.namespace),
                    src_address = entry.source.address.map(tracing::field::display),
                    dst_identity = known(entry.destination.identity),
                    dst_workload = known(entry.destination.workload),
                    dst_namespace = known(entry.destination.namespace),
                    dst_address = entry.destination.address.map(tracing::field::display),
                    gateway = known(entry.gateway),
                    dst_service = known(entry.service),
                    bytes_sent = entry.bytes_sent,
                    bytes_received = entry.bytes_received,
                    duration_ms = u64::try_from(entry.duration.as_millis()).unwrap_or(u64::MAX),
                    response_flags = entry.flags,
                    reason = known(entry.reason),
                    detail = known(entry.detail),
                    policy = known(entry.policy),
                    $message
                )
            };
        }
        if failed {
            line!(warn, "connection failed")
        } else {
            line!(info, "connection complete")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write,
        sync::{Arc, Mutex},
    };
    use tracing_subscriber::fmt::MakeWriter;

    #[test]
    fn a_flood_of_failures_is_cut() {
        let mut budget = Budget::FULL;
        let begun = Instant::now();
        let (mut written, mut said) = (0_u64, 0);
        for ms in 0..30_000 {
            let (write, left_out) = budget.take(begun + Duration::from_millis(ms));
            written += u64::from(write);
            said += left_out.unwrap_or(0);
        }
        assert!((1000..1200).contains(&written), "{written}");
        assert!(
            said > 15_000 && said + budget.left_out + written == 30_000,
            "{said}"
        );
        let (write, left_out) = budget.take(begun + Duration::from_secs(60));
        assert!(write && left_out.is_some());
    }

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);
    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;
        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    fn entry(flags: &'static str) -> AccessEntry<'static> {
        let source = Party {
            identity: "spiffe://mesh.example/ns/shop/sa/webapp",
            workload: "webapp-1",
            namespace: "shop",
            address: Some("10.0.0.2:4000".parse().unwrap()),
        };
        AccessEntry {
            direction: Direction::Inbound,
            source,
            destination: Party {
                workload: "catalog-1",
                ..Party::default()
            },
            gateway: "",
            service: "",
            bytes_sent: 12,
            bytes_received: 34,
            duration: Duration::from_millis(56),
            flags,
            reason: if flags == "-" { "" } else { "policy_denied" },
            detail: "",
            policy: if flags == "-" { "" } else { "shop/deny-web" },
        }
    }

    fn written(log: AccessLog, flags: &'static str) -> String {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(lines.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || log.write(&entry(flags)));
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_keeps_its_fields() {
        let line = written(AccessLog::new(true), "-");
        for part in [
            r#""src_identity":"spiffe://mesh.example/ns/shop/sa/webapp""#,
            r#""src_address":"10.0.0.2:4000""#,
            r#""direction":"inbound""#,
            r#""bytes_sent":12"#,
            r#""duration_ms":56"#,
            r#""response_flags":"-""#,
        ] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_written() {
        let line = written(AccessLog::new(true), "-");
        for name in [
            "dst_identity",
            "dst_service",
            "dst_address",
            "gateway",
            "reason",
            "detail",
            "policy",
        ] {
            assert!(!line.contains(name), "{name} in {line}");
        }
    }

    #[test]
    fn failures_are_written_whatever_the_setting() {
        assert_eq!(written(AccessLog::new(false), "-"), "");
        let line = written(AccessLog::new(false), "UAEX");
        assert!(
            line.contains(r#""policy":"shop/deny-web""#) && line.contains("WARN"),
            "{line}"
        );
    }
}
