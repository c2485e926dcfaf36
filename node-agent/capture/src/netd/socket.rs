//! SOCK_SEQPACKET with descriptors, which neither std nor tokio has.
#![allow(
    unsafe_code,
    reason = "received descriptors are raw numbers; the reactor wants a promise"
)]

use super::message::MESSAGE_MAX;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, sockopt,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives and never changes; the AsyncFd owns it from here on.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A socket that listens at a path; not bound to a runtime yet.
pub(super) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let fd = new_socket()?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// The accepting side.
#[derive(Debug)]
pub(super) struct Acceptor(AsyncFd<OwnedFd>);

impl Acceptor {
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(register(fd)?))
    }

    /// The next connection, and the user and the process that it comes from. Cancel-safe.
    pub(super) async fn accept(&self) -> io::Result<(PacketSocket, u32, i32)> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let accept = |fd: &OwnedFd| Ok(accept4(fd.as_raw_fd(), flags)?);
        let fd = self.0.async_io(Interest::READABLE, accept).await?;
        // SAFETY: accept4 returned this descriptor, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let peer = getsockopt(&fd, sockopt::PeerCredentials)?;
        Ok((PacketSocket(register(fd)?), peer.uid(), peer.pid()))
    }
}

/// A connection: packets, each with at most one descriptor.
#[derive(Debug)]
pub(super) struct PacketSocket(AsyncFd<OwnedFd>);

impl PacketSocket {
    /// Connects to a path; a local connect does not wait.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let fd = new_socket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(register(fd)?))
    }

    /// True if somebody accepts connections at a path. Needs no runtime.
    pub(super) fn is_served(path: &Path) -> bool {
        let attempt = || -> io::Result<()> {
            let fd = new_socket()?;
            Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?)
        };
        // A full queue is somebody, too.
        attempt().map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |()| true)
    }

    /// Sends a packet. Cancel-safe: it is sent or not.
    pub(super) async fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let raw: Vec<RawFd> = descriptor.iter().map(|fd| fd.as_raw_fd()).collect();
        let send = |fd: &OwnedFd| {
            let rights = [ControlMessage::ScmRights(&raw)];
            let control = if raw.is_empty() { &[][..] } else { &rights[..] };
            let parts = [IoSlice::new(bytes)];
            Ok(sendmsg::<()>(
                fd.as_raw_fd(),
                &parts,
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?)
        };
        self.0.async_io(Interest::WRITABLE, send).await.map(|_| ())
    }

    /// Receives a packet; `None` when the other side has closed. Cancel-safe.
    pub(super) async fn receive(&self) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
        self.0
            .async_io(Interest::READABLE, |fd| receive(fd.as_fd()))
            .await
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let length = message.bytes;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these descriptors for this process.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message
        .flags
        .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC)
    {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a message of netd's socket is too long",
        ));
    }
    bytes.truncate(length);
    Ok((length > 0).then_some((bytes, descriptors.pop())))
}
