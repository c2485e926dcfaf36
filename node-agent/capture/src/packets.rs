//! SOCK_SEQPACKET with descriptors, which neither std nor tokio has.
#![allow(
    unsafe_code,
    reason = "received descriptors are raw numbers; the reactor wants a promise"
)]

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
        accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, socketpair, sockopt,
    },
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

fn flags() -> SockFlag {
    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK
}

fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?)
}

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives and never changes; the AsyncFd owns it from here on.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// A socket that listens at a path; not bound to a runtime yet.
pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let fd = new_socket()?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// True if somebody accepts connections at a path. Needs no runtime.
pub(crate) fn is_served(path: &Path) -> bool {
    let attempt = || -> io::Result<()> {
        let fd = new_socket()?;
        Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?)
    };
    // A full queue is somebody, too.
    attempt().map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |()| true)
}

/// The accepting side.
#[derive(Debug)]
pub(crate) struct Acceptor(AsyncFd<OwnedFd>);

/// Who is at the other end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Other {
    pub(crate) user: u32,
    pub(crate) process: i32,
}

impl Acceptor {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(register(fd)?))
    }

    /// The next connection and who it is from. Cancel-safe.
    pub(crate) async fn accept<const BYTES: usize, const DESCRIPTORS: usize>(
        &self,
    ) -> io::Result<(PacketSocket<BYTES, DESCRIPTORS>, Other)> {
        let accept = |fd: &OwnedFd| Ok(accept4(fd.as_raw_fd(), flags())?);
        let fd = self.0.async_io(Interest::READABLE, accept).await?;
        // SAFETY: accept4 returned this descriptor, and nobody else knows of it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let peer = getsockopt(&fd, sockopt::PeerCredentials)?;
        let other = Other {
            user: peer.uid(),
            process: peer.pid(),
        };
        Ok((PacketSocket(register(fd)?), other))
    }
}

/// One end of a connection whose messages are packets of at most `BYTES` bytes, each with at most `DESCRIPTORS`
/// descriptors.
#[derive(Debug)]
pub struct PacketSocket<const BYTES: usize, const DESCRIPTORS: usize>(AsyncFd<OwnedFd>);

impl<const BYTES: usize, const DESCRIPTORS: usize> PacketSocket<BYTES, DESCRIPTORS> {
    /// Both ends; the second one is for another process.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (here, there) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags())?;
        Ok((Self(register(here)?), there))
    }

    /// An end that another process has made.
    ///
    /// # Errors
    /// When it is no such socket.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        if getsockopt(&fd, sockopt::SockType)? != SockType::SeqPacket {
            return Err(Errno::ENOTSOCK.into());
        }
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        Ok(Self(register(fd)?))
    }

    /// Connects to a path; a local connect does not wait.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = new_socket()?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(register(fd)?))
    }

    /// Sends a packet. Cancel-safe: it is sent or not.
    ///
    /// # Errors
    /// When the other end is gone, or the packet is too long.
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > BYTES || descriptors.len() > DESCRIPTORS {
            return Err(Errno::EMSGSIZE.into());
        }
        let raw: Vec<RawFd> = descriptors.iter().map(|fd| fd.as_raw_fd()).collect();
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

    /// Receives a packet; `None` when the other end is closed. Cancel-safe.
    ///
    /// # Errors
    /// When a packet is longer than [`Self::send`] sends.
    pub async fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        self.0
            .async_io(Interest::READABLE, |fd| receive::<DESCRIPTORS>(fd.as_fd(), BYTES))
            .await
    }
}

fn receive<const DESCRIPTORS: usize>(
    socket: BorrowedFd<'_>,
    bytes_max: usize,
) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; bytes_max];
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
        Ok(message) => message,
        // It died with something unread.
        Err(Errno::ECONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
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
            "the message is too long",
        ));
    }
    bytes.truncate(length);
    Ok((length > 0).then_some((bytes, descriptors)))
}
