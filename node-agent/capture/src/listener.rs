//! The listeners on mesh0's own addresses that the kernel delivers captured connections to.
#![allow(
    unsafe_code,
    reason = "accept4 with SOCK_NONBLOCK saves a system call per connection"
)]

use crate::CaptureError;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    time::Duration,
};
use tombolo_flow::Listener;
use tombolo_types::AddressPlan;

/// Connections that wait to be accepted; the kernel takes the smaller of this and net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// One of the four listeners. It is not registered with the reactor: the packet loop knows when a connection is there.
#[derive(Debug)]
pub(crate) struct CaptureListener {
    pub(crate) kind: Listener,
    pub(crate) v6: bool,
    socket: TcpListener,
}

/// Opens the listeners of both families.
pub(crate) fn bind_all(
    plan: &AddressPlan,
    link: &str,
    ipv4: bool,
    ipv6: bool,
) -> Result<Vec<CaptureListener>, CaptureError> {
    let mut listeners = Vec::new();
    for (address, offered) in [
        (IpAddr::from(plan.host_v4()), ipv4),
        (plan.host_v6().into(), ipv6),
    ] {
        for kind in [Listener::Services, Listener::Dns] {
            let address = SocketAddr::new(address, kind.port());
            match bind(address, link) {
                Ok(socket) => listeners.push(CaptureListener {
                    kind,
                    v6: address.is_ipv6(),
                    socket,
                }),
                // A family that may be offered later, or that this kernel does not have.
                Err(error) if !offered => {
                    tracing::debug!(%address, %error, "no listener for a family not offered")
                }
                Err(source) => return Err(CaptureError::Listen { address, source }),
            }
        }
    }
    Ok(listeners)
}

fn bind(address: SocketAddr, link: &str) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    // A connection accepted here has both options from the start.
    socket.set_tcp_nodelay(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        // The address may come (back) later: netd sets it.
        socket.set_freebind_v4(true)?;
    }
    // Without this a neighbour that routes mesh0's address to this host would reach the listener.
    if let Err(error) = socket.bind_device(Some(link.as_bytes())) {
        tracing::warn!(%error, link, "the capture listener cannot be bound to the link");
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

impl CaptureListener {
    /// A listener of another process; `None` if it is not one of ours.
    pub(crate) fn adopt(socket: OwnedFd) -> io::Result<Option<Self>> {
        let socket = TcpListener::from(socket);
        let address = socket.local_addr()?;
        Ok(Listener::of_port(address.port()).map(|kind| Self {
            kind,
            v6: address.is_ipv6(),
            socket,
        }))
    }

    /// The same listener for another process.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.socket.try_clone()?.into())
    }

    /// Takes a connection, without waiting; its socket is non-blocking.
    pub(crate) fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        // SAFETY: accept4 writes at most `length` bytes of an address to `storage` and sets `length` to what it wrote.
        let (fd, peer) = unsafe {
            SockAddr::try_init(|storage, length| {
                let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
                let fd = libc::accept4(self.socket.as_raw_fd(), storage.cast(), length, flags);
                if fd < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(fd)
                }
            })
        }?;
        // SAFETY: accept4 returned this descriptor, and nobody else knows of it.
        let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok((stream, peer))
    }
}

/// Closes a connection by RST: its application learns that nobody wanted it.
pub(crate) fn abort(stream: TcpStream) {
    // If it fails, the connection is closed the ordinary way.
    let _ = Socket::from(stream).set_linger(Some(Duration::ZERO));
}
