//! Who is behind a connection that comes from one of this host's own addresses.
//!
//! A container engine masquerades: the kernel gives a container's packet the host's own address before mesh0 sees it,
//! so that the address says nothing. But a connection of this host has a socket on this host, and a forwarded one has
//! not. The kernel is asked for it (`sock_diag(7)`, which needs no capability): one exchange of about 3 us for each
//! new connection, and only on hosts that forward packets.

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP, TCP_LISTEN},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::{Socket, SocketAddr as NetlinkAddr, protocols::NETLINK_SOCK_DIAG};
use std::{
    fs, io,
    net::SocketAddr,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Longest answer about one socket without extensions, in bytes; there is room for attributes that come unasked.
const ANSWER_BYTES_MAX: usize = 2048;
/// A new connection has it read again after so long: a container engine may switch it on at any time, and the kernel
/// tells nobody who has not asked per link. About 20 us on a host of ten links.
const FORWARDING_IS_READ_EVERY: Duration = Duration::from_secs(1);
/// Where the kernel says which links forward.
const SETTINGS: [&str; 2] = ["/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"];

/// Asks the kernel for sockets of this network namespace.
#[derive(Debug)]
struct Sockets {
    /// The socket, and the number of the last question.
    asking: Mutex<(Socket, u32)>,
    /// Index of mesh0: a socket that is bound to it is found, too.
    link: u32,
}

impl Sockets {
    /// For connections through the link of this index.
    fn open(link: u32) -> io::Result<Self> {
        let socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.connect(&NetlinkAddr::new(0, 0))?;
        // The kernel answers before `send` returns; should it not, nobody waits.
        socket.set_non_blocking(true)?;
        let sockets = Self {
            asking: Mutex::new((socket, 0)),
            link,
        };
        // A kernel without the module for TCP says so here and not at the first connection.
        let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
        sockets.have(nobody, nobody)?;
        Ok(sockets)
    }

    /// True if this host has a socket whose connection goes from `local` to `remote`.
    ///
    /// # Errors
    /// When the kernel does not answer the question.
    fn have(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        let mut asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, asked) = &mut *asking;
        *asked = asked.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        header.sequence_number = *asked;
        let id = SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: self.link,
            cookie: [0xff; 8],
        };
        let request = InetRequest {
            family: if local.is_ipv6() { AF_INET6 } else { AF_INET },
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::all(),
            socket_id: id,
        };
        let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
        message.finalize();
        let mut question = [0; 128];
        let question = question
            .get_mut(..message.buffer_len())
            .ok_or(io::ErrorKind::InvalidInput)?;
        message.serialize(question);
        socket.send(question, 0)?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        let answer = loop {
            let length = socket.recv(&mut &mut answer[..], 0)?;
            let bytes = answer.get(..length).unwrap_or_default();
            let answer = NetlinkMessage::<SockDiagMessage>::deserialize(bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            // One that came too late is not the answer to this question.
            if answer.header.sequence_number == *asked {
                break answer;
            }
        };
        if let NetlinkPayload::Error(error) = answer.payload {
            let error = error.to_io();
            return if error.kind() == io::ErrorKind::NotFound {
                Ok(false)
            } else {
                Err(error)
            };
        }
        let NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(found)) = answer.payload else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        // Without a connection the kernel names a listener of that port.
        let (socket, state) = (&found.header.socket_id, found.header.state);
        let ports = (socket.source_port, socket.destination_port);
        Ok(state != TCP_LISTEN && ports == (local.port(), remote.port()))
    }
}

/// Tells connections of this host from those that it forwards under its own address.
#[derive(Debug)]
pub(crate) struct Masquerade {
    /// `None`: everybody behind this host may speak as it, or the kernel cannot be asked.
    sockets: Option<Sockets>,
    forwarding: Mutex<Forwarding>,
}

/// Whether this host forwards, and when that was read.
#[derive(Debug, Clone, Copy)]
struct Forwarding {
    on: bool,
    read: Instant,
}

impl Forwarding {
    fn read(now: Instant) -> Self {
        Self {
            on: host_forwards(),
            read: now,
        }
    }
}

impl Masquerade {
    /// For connections through mesh0. `opted_in`: the host's owner lets containers speak as this host; which bridge a
    /// masqueraded packet came from is not to be seen, so all of them may then.
    pub(crate) fn new(mesh0: &str, opted_in: bool) -> Self {
        let open = || Sockets::open(nix::net::if_::if_nametoindex(mesh0)?);
        let sockets = (!opted_in).then(open).transpose().unwrap_or_else(|error| {
            tracing::warn!(
                %error,
                "the kernel does not tell whose a connection is (module tcp_diag): containers behind a masquerading \
                 bridge can speak as this host"
            );
            None
        });
        Self {
            sockets,
            forwarding: Mutex::new(Forwarding::read(Instant::now())),
        }
    }

    /// True if a connection from an address of this host is not this host's.
    pub(crate) fn hides(&self, source: SocketAddr, destination: SocketAddr, now: Instant) -> bool {
        let Some(sockets) = &self.sockets else {
            return false;
        };
        let forwards = {
            let mut forwarding = self.forwarding.lock().unwrap_or_else(PoisonError::into_inner);
            if now.saturating_duration_since(forwarding.read) >= FORWARDING_IS_READ_EVERY {
                *forwarding = Forwarding::read(now);
            }
            forwarding.on
        };
        forwards && sockets.have(source, destination).is_ok_and(|have| !have)
    }
}

/// True if a link of this host forwards packets, so that a packet may come from elsewhere with an address of this host;
/// also where that cannot be read.
fn host_forwards() -> bool {
    SETTINGS.iter().any(|folder| forwards(Path::new(folder)))
}

fn forwards(settings: &Path) -> bool {
    let links = match fs::read_dir(settings) {
        Ok(links) => links,
        // A kernel without the family.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
        Err(_) => return true,
    };
    let mut links = links.flatten().filter(|link| link.file_name() != "default");
    links.any(|link| match fs::read_to_string(link.path().join("forwarding")) {
        Ok(value) => value.trim() != "0",
        // The link has gone meanwhile.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_of_this_host_has_a_socket() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                println!("SKIPPED {address}: no such family on this host");
                continue;
            };
            let sockets = Sockets::open(0).unwrap();
            let remote = listener.local_addr().unwrap();
            let stream = TcpStream::connect(remote).unwrap();
            let local = stream.local_addr().unwrap();
            assert!(sockets.have(local, remote).unwrap());
            // The listener itself is not a connection, and another port is nobody's.
            let other = SocketAddr::new(local.ip(), local.port() ^ 1);
            assert!(!sockets.have(remote, other).unwrap());
            assert!(!sockets.have(other, remote).unwrap());
        }
        // One that serves both families, called by an IPv4 address that is written as IPv6.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let remote = listener.local_addr().unwrap();
        let mapped = format!("[::ffff:127.0.0.1]:{}", remote.port());
        let stream = TcpStream::connect(mapped).unwrap();
        let local = SocketAddr::new(remote.ip(), stream.local_addr().unwrap().port());
        assert!(Sockets::open(0).unwrap().have(local, remote).unwrap());
    }

    #[test]
    fn forwarding_is_read_per_link() {
        let folder = std::env::temp_dir().join(format!("tombolo-forwarding-{}", std::process::id()));
        let link = |name: &str, value: &str| {
            fs::create_dir_all(folder.join(name)).unwrap();
            fs::write(folder.join(name).join("forwarding"), value).unwrap();
        };
        assert!(!forwards(&folder), "no such family");
        link("default", "1\n");
        link("all", "0\n");
        link("eth0", "0\n");
        assert!(!forwards(&folder));
        link("docker0", "1\n");
        assert!(forwards(&folder));
        fs::remove_dir_all(&folder).unwrap();
    }
}
