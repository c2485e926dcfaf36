//! An address that is not of the mesh: plaintext, past the mesh, to a host that may be in it.

use super::Walk;
use crate::guard;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpStream, time::timeout};
use tombolo_authz::{Connection, Verdict, decide};
use tombolo_control_client::host;
use tombolo_destination::{Index as _, Workload};
use tombolo_snapshot::Snapshot;
use tombolo_types::{Code, NetworkAddress};

/// Within a network a host answers at once, or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A port of a host of the mesh at its own address.
pub(super) struct Plain {
    workload: Arc<Workload>,
    address: SocketAddr,
}

/// How the connection went.
pub(super) type Outcome = Result<(), String>;

impl Plain {
    /// None if that address is of no host of the mesh in this network.
    pub(super) fn find(world: &Snapshot, address: IpAddr, port: u16) -> Option<Self> {
        let at = NetworkAddress {
            network: world.source().network,
            address,
        };
        world.workload_by_address(&at).map(|workload| Self {
            workload: Arc::clone(workload),
            address: SocketAddr::new(address, port),
        })
    }

    /// Connects as an application would.
    pub(super) async fn connect(&self) -> Outcome {
        match timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Err("refused".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }

    /// The service port and name under which the mesh carries it.
    fn by_name(&self) -> Option<String> {
        let port = self.address.port();
        self.workload.services.iter().find_map(|(key, ports)| {
            let map = ports.iter().find(|map| map.target_port == port)?;
            Some(format!("{}:{}", key.name, map.service_port))
        })
    }

    pub(super) fn judge(&self, walk: &mut Walk, world: &Snapshot, outcome: &Outcome) {
        let Self { workload, address } = self;
        let (name, port) = (&workload.name, address.port());
        walk.ok(format!(
            "{} is {name} of namespace {} at its own address: plaintext, past the mesh",
            address.ip(),
            workload.namespace
        ));
        let named = self.by_name();
        let next = named.as_ref().map_or_else(
            || {
                format!(
                    "Call it by a name of the mesh; tombolo get se -n {} lists them",
                    workload.namespace
                )
            },
            |named| format!("Call it by its name: {named}"),
        );
        let denied = denies_plaintext(world, workload, *address);
        match (denied, outcome) {
            (Some(why), Err(error)) => {
                let cause = format!(
                    "{why}: the guard of {name} refuses plaintext to port {port}, and this connection is not in the mesh \
                     ({error})"
                );
                walk.broken(Code::PlaintextRefused, cause, Some(next));
            }
            (Some(why), Ok(())) => {
                walk.ok(format!(
                    "{why}, yet plaintext gets through: {name} does not guard port {port}; tombolo status there says why"
                ));
                walk.skip("dialled directly");
                walk.skip("");
                walk.skip("plaintext");
                walk.ok(format!("{address} accepts the connection, without identity"));
            }
            (None, Ok(())) => {
                walk.ok("no policy closes the port to plaintext");
                walk.skip("dialled directly");
                walk.skip("");
                walk.skip(named.map_or_else(
                    || "plaintext".to_owned(),
                    |named| format!("plaintext; with identity it is {named}"),
                ));
                walk.ok(format!("{address} accepts the connection, without identity"));
            }
            (None, Err(error)) => {
                walk.ok("no policy closes the port to plaintext");
                walk.skip("dialled directly");
                walk.skip("");
                walk.skip("plaintext");
                let cause = format!("{address}: {error}; a firewall on the way may be the cause, too");
                walk.broken(Code::ApplicationRefuses, cause, None);
            }
        }
    }
}

/// Which policy closes a port of an endpoint to callers without identity, in words; none if plaintext is admitted.
pub(super) fn denies_plaintext(world: &Snapshot, workload: &Workload, address: SocketAddr) -> Option<String> {
    let own = host::addresses(Some(world.plan()));
    let source_ip = own.iter().find(|ip| ip.is_ipv4() == address.is_ipv4()).copied();
    let connection = Connection {
        source: None,
        source_ip: source_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
        destination_ip: address.ip(),
        destination_port: address.port(),
    };
    let policies = world.policies_for(workload);
    match decide(policies.iter().map(|policy| policy.as_ref()), &connection) {
        Verdict::Allow { .. } => None,
        verdict @ Verdict::Deny { .. } => Some(guard::reason(&verdict)),
    }
}
