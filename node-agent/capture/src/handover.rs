//! Messages with descriptors between two processes of one user: how an agent hands over to the next one.
#![allow(
    unsafe_code,
    reason = "received descriptors are raw numbers; the reactor wants a promise"
)]

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
            UnixAddr, accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, socket, socketpair,
            sockopt,
        },
    },
    unistd::geteuid,
};
use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Longest message. What is larger travels as a file: [`to_file`].
pub const MESSAGE_MAX: usize = 64 * 1024;
/// Most descriptors of a message.
pub const DESCRIPTORS_MAX: usize = 64;

fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open for as long as it lives and never changes; the AsyncFd owns it from here on.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

fn flags() -> SockFlag {
    SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK
}

/// One end of a connection whose messages are packets, each with descriptors.
#[derive(Debug)]
pub struct Packets(AsyncFd<OwnedFd>);

impl Packets {
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
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(register(fd)?))
    }

    /// Sends a packet. Cancel-safe: it is sent or not.
    ///
    /// # Errors
    /// When the other end is gone, or the packet is too long.
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > MESSAGE_MAX || descriptors.len() > DESCRIPTORS_MAX {
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
            .async_io(Interest::READABLE, |fd| receive(fd.as_fd()))
            .await
    }
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let mut control = nix::cmsg_space!([RawFd; DESCRIPTORS_MAX]);
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

/// Accepts connections from processes of the same user.
#[derive(Debug)]
pub struct PacketListener(AsyncFd<OwnedFd>);

impl PacketListener {
    /// Listens at a path that nobody has.
    ///
    /// # Errors
    /// When the path cannot be used.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags(), None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&fd, Backlog::new(16)?)?;
        Ok(Self(register(fd)?))
    }

    /// The next connection of this user. Cancel-safe.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn accept(&self) -> io::Result<Packets> {
        loop {
            let accept = |fd: &OwnedFd| Ok(accept4(fd.as_raw_fd(), flags())?);
            let fd = self.0.async_io(Interest::READABLE, accept).await?;
            // SAFETY: accept4 returned this descriptor, and nobody else knows of it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            if getsockopt(&fd, sockopt::PeerCredentials)?.uid() == geteuid().as_raw() {
                return Ok(Packets(register(fd)?));
            }
        }
    }
}

/// Bytes as a file in memory, for a message.
///
/// # Errors
/// When there is no memory or descriptor left.
pub fn to_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"tombolo", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file.into())
}

/// The bytes of such a file.
///
/// # Errors
/// When it is longer than `max`.
pub fn from_file(file: OwnedFd, max: u64) -> io::Result<Vec<u8>> {
    let file = File::from(file);
    let mut bytes = Vec::new();
    if file.take(max + 1).read_to_end(&mut bytes)? as u64 > max {
        return Err(Errno::EFBIG.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_and_files_arrive() {
        let (here, there) = Packets::pair().unwrap();
        let there = Packets::from_fd(there).unwrap();
        let files = [to_file(b"one").unwrap(), to_file(b"two").unwrap()];
        let borrowed: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        here.send(b"hello", &borrowed).await.unwrap();
        let (bytes, files) = there.receive().await.unwrap().unwrap();
        assert_eq!(bytes, b"hello");
        let files: Vec<_> = files
            .into_iter()
            .map(|file| from_file(file, 3).unwrap())
            .collect();
        assert_eq!(files, [b"one", b"two"]);
        assert!(from_file(to_file(b"four").unwrap(), 3).is_err());
        assert!(here.send(&vec![0; MESSAGE_MAX + 1], &[]).await.is_err());
        drop(here);
        assert!(there.receive().await.unwrap().is_none());
    }
}
