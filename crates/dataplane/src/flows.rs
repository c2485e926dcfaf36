//! The connections that are open, for whoever must watch or cut them.

use crate::ConnectionInfo;
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::time::Instant;
use tombolo_authz::{Connection, Policy, Verdict, decide};
use tombolo_identity::Peer;
use tombolo_telemetry::{Direction, Metrics, RefusalLabels, TcpMetrics};
use tombolo_tunnel::Monitor;
use tombolo_types::{DeviceId, NamespacedName};

/// Why a connection was cut.
#[derive(Debug, Clone)]
pub(crate) struct CutReason {
    pub(crate) reason: &'static str,
    pub(crate) flag: &'static str,
    pub(crate) policy: Option<NamespacedName>,
}

/// One open connection.
#[derive(Debug)]
pub(crate) struct Flow {
    pub(crate) direction: Direction,
    /// The caller: the application here, or the peer host.
    pub(crate) source: SocketAddr,
    /// What was dialled: the virtual address, or the own address and the application's port.
    pub(crate) destination: SocketAddr,
    pub(crate) service: Arc<str>,
    /// Who is at the other end; none for plain TCP.
    pub(crate) peer: Option<Arc<Peer>>,
    pub(crate) started: Instant,
    pub(crate) monitor: Monitor,
    cut: OnceLock<Box<CutReason>>,
    metrics: OnceLock<Counted>,
}

/// Where its bytes are counted, and how many already are.
#[derive(Debug)]
struct Counted {
    tcp: TcpMetrics,
    all: Arc<Metrics>,
    to_stream: AtomicU64,
    from_stream: AtomicU64,
}

impl Flow {
    pub(crate) fn new(
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        service: Arc<str>,
        peer: Option<Arc<Peer>>,
        started: Instant,
    ) -> Self {
        Self {
            direction,
            source,
            destination,
            service,
            peer,
            started,
            monitor: Monitor::default(),
            cut: OnceLock::new(),
            metrics: OnceLock::new(),
        }
    }

    /// Cuts it; the first reason stays.
    pub(crate) fn cut(&self, reason: CutReason) {
        // A second reason changes nothing.
        let _ = self.cut.set(Box::new(reason));
        self.monitor.cut();
    }

    pub(crate) fn cut_reason(&self) -> Option<&CutReason> {
        self.cut.get().map(Box::as_ref)
    }

    /// Starts counting.
    pub(crate) fn count_in(&self, tcp: TcpMetrics, all: Arc<Metrics>) {
        tcp.opened.inc();
        let counted = Counted {
            tcp,
            all,
            to_stream: AtomicU64::new(0),
            from_stream: AtomicU64::new(0),
        };
        // Called once.
        let _ = self.metrics.set(counted);
    }

    /// Adds what has moved since the last call, so that a long connection is seen while it is open.
    pub(crate) fn flush(&self) {
        let Some(counted) = self.metrics.get() else { return };
        let (to, from) = (self.monitor.to_stream(), self.monitor.from_stream());
        let to = to - counted.to_stream.swap(to, Ordering::Relaxed);
        let from = from - counted.from_stream.swap(from, Ordering::Relaxed);
        counted.all.bytes_out.inc_by(to);
        counted.all.bytes_in.inc_by(from);
        // Istio counts the request as received and the response as sent, on both reporters.
        let (request, response) = match self.direction {
            Direction::Outbound => (to, from),
            Direction::Inbound => (from, to),
        };
        counted.tcp.received.inc_by(request);
        counted.tcp.sent.inc_by(response);
    }

    fn device(&self) -> Option<DeviceId> {
        self.peer.as_ref()?.device
    }

    /// Decides on an inbound connection.
    pub(crate) fn decide<'p>(&self, policies: impl Iterator<Item = &'p Policy>) -> Verdict {
        let connection = Connection {
            source: self.peer.as_ref().map(|peer| &peer.id),
            source_ip: canonical(self.source.ip()),
            destination_ip: canonical(self.destination.ip()),
            destination_port: self.destination.port(),
        };
        decide(policies, &connection)
    }

    fn info(&self) -> ConnectionInfo {
        ConnectionInfo {
            direction: self.direction,
            source: self.source,
            destination: self.destination,
            service: Arc::clone(&self.service),
            peer: self.peer.as_ref().map(|peer| peer.id.clone()),
            bytes_out: self.monitor.to_stream(),
            bytes_in: self.monitor.from_stream(),
            age: self.started.elapsed(),
        }
    }
}

/// IPv4 in IPv6 form counts as IPv4.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// All open connections. Cheap to clone; clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Flows(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<Flow>>>,
}

impl Flows {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Flow>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a connection until the guard is dropped. Register first, decide second.
    pub(crate) fn register(&self, flow: Flow) -> Registered {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let flow = Arc::new(flow);
        self.open().insert(id, Arc::clone(&flow));
        Registered {
            flows: self.clone(),
            id,
            flow,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.open().len()
    }

    pub(crate) fn infos(&self) -> Vec<ConnectionInfo> {
        self.open().values().map(|flow| flow.info()).collect()
    }

    fn all(&self) -> Vec<Arc<Flow>> {
        self.open().values().cloned().collect()
    }

    /// See [`Flow::flush`].
    pub(crate) fn flush(&self) {
        self.all().iter().for_each(|flow| flow.flush());
    }

    /// Decides again about all inbound connections and cuts those that are denied now.
    pub(crate) fn decide_again(&self, policies: &[&Arc<Policy>], metrics: &Metrics) {
        for flow in self.all() {
            if flow.direction != Direction::Inbound || flow.monitor.is_cut() {
                continue;
            }
            if let Verdict::Deny { policy, reason } = flow.decide(policies.iter().map(|policy| &***policy)) {
                flow.cut(CutReason {
                    reason,
                    flag: "UAEX",
                    policy,
                });
                metrics
                    .cut
                    .get_or_create(&RefusalLabels {
                        direction: flow.direction.as_str(),
                        reason,
                    })
                    .inc();
            }
        }
    }

    /// Cuts the connections of revoked devices, both ways.
    pub(crate) fn cut_revoked(&self, revoked: impl Fn(DeviceId) -> bool, metrics: &Metrics) {
        let reason = "device_revoked";
        for flow in self.all() {
            if flow.device().is_some_and(&revoked) && !flow.monitor.is_cut() {
                flow.cut(CutReason {
                    reason,
                    flag: "UAEX",
                    policy: None,
                });
                metrics
                    .cut
                    .get_or_create(&RefusalLabels {
                        direction: flow.direction.as_str(),
                        reason,
                    })
                    .inc();
            }
        }
    }

    /// Cuts everything.
    pub(crate) fn cut_all(&self, reason: &'static str) {
        self.all().iter().for_each(|flow| {
            flow.cut(CutReason {
                reason,
                flag: "DT",
                policy: None,
            })
        });
    }
}

/// A registered connection.
#[derive(Debug)]
pub(crate) struct Registered {
    flows: Flows,
    id: u64,
    pub(crate) flow: Arc<Flow>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.flow.flush();
        if let Some(counted) = self.flow.metrics.get() {
            counted.tcp.closed.inc();
        }
        self.flows.open().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_connection_is_small() {
        let size = size_of::<Flow>();
        assert!(size <= 320, "{size}");
    }

    #[test]
    fn bytes_are_counted_once_and_as_istio_does() {
        let flows = Flows::default();
        let metrics = Arc::new(Metrics::new());
        let address = "10.0.0.1:80".parse().unwrap();
        let flow = Flow::new(
            Direction::Inbound,
            address,
            address,
            "".into(),
            None,
            Instant::now(),
        );
        let registered = flows.register(flow);
        let tcp = TcpMetrics::default();
        registered.flow.count_in(tcp.clone(), Arc::clone(&metrics));
        registered.flow.monitor.add(5, 7);
        flows.flush();
        flows.flush();
        assert_eq!(
            (
                tcp.opened.get(),
                tcp.sent.get(),
                tcp.received.get(),
                tcp.closed.get()
            ),
            (1, 5, 7, 0)
        );
        registered.flow.monitor.add(1, 1);
        drop(registered);
        assert_eq!((tcp.sent.get(), tcp.received.get(), tcp.closed.get()), (6, 8, 1));
        assert_eq!(
            (metrics.bytes_out.get(), metrics.bytes_in.get(), flows.len()),
            (6, 8, 0)
        );
    }
}
