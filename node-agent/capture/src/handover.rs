//! Messages with descriptors between two processes of one user: how an agent hands over to the next one.

use crate::packets::{Acceptor, PacketSocket, listen_at};
use nix::{
    errno::Errno,
    sys::memfd::{MFdFlags, memfd_create},
    unistd::geteuid,
};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, Write as _},
    os::fd::OwnedFd,
    path::Path,
};

/// Longest message. What is larger travels as a file: [`to_file`].
pub const MESSAGE_MAX: usize = 64 * 1024;
/// Most descriptors of a message.
pub const DESCRIPTORS_MAX: usize = 64;

/// One end of a connection between two agents.
pub type Packets = PacketSocket<MESSAGE_MAX, DESCRIPTORS_MAX>;

/// Accepts connections from processes of the same user.
#[derive(Debug)]
pub struct PacketListener(Acceptor);

impl PacketListener {
    /// Listens at a path that nobody has.
    ///
    /// # Errors
    /// When the path cannot be used.
    pub fn bind(path: &Path) -> io::Result<Self> {
        Ok(Self(Acceptor::new(listen_at(path)?)?))
    }

    /// The next connection of this user. Cancel-safe.
    ///
    /// # Errors
    /// As the kernel says.
    pub async fn accept(&self) -> io::Result<Packets> {
        loop {
            let (packets, other) = self.0.accept().await?;
            if other.user == geteuid().as_raw() {
                return Ok(packets);
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
    use std::os::fd::AsFd as _;

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
