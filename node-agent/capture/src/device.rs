//! The TUN device: ioctls that the `tun` crate does not have, on top of its device.
#![allow(unsafe_code, reason = "ioctls on the TUN descriptor")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd},
    task::{Context, Poll, ready},
};
use tokio::io::{Interest, unix::AsyncFd};

/// What the device may hand over unfinished: TCP super-segments and checksums of both families.
const OFFLOADS: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;

/// `struct ifreq`, as far as TUN needs it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

nix::ioctl_read_bad!(
    tun_get_interface,
    0x8004_54d2_u32 as libc::Ioctl,
    InterfaceRequest
);
nix::ioctl_write_int_bad!(tun_set_offload, 0x4004_54d0_u32 as libc::Ioctl);
nix::ioctl_write_ptr_bad!(tun_set_header_size, 0x4004_54d8_u32 as libc::Ioctl, libc::c_int);

/// Name and flags of the device that a descriptor is attached to.
fn interface_of(fd: BorrowedFd<'_>) -> io::Result<(String, i32)> {
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; 22],
    };
    // SAFETY: TUNGETIFF writes one `struct ifreq` of 40 bytes, which `InterfaceRequest` is.
    unsafe { tun_get_interface(fd.as_raw_fd(), &raw mut request) }?;
    let name = request.name.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((
        String::from_utf8_lossy(name).into_owned(),
        i32::from(request.flags),
    ))
}

/// Sets header and offloads; no capability is needed.
fn set_offloads(fd: BorrowedFd<'_>) -> io::Result<()> {
    let length = libc::c_int::try_from(tombolo_packet::VNET_LENGTH).map_err(io::Error::other)?;
    let offloads = libc::c_int::try_from(OFFLOADS).map_err(io::Error::other)?;
    // SAFETY: TUNSETVNETHDRSZ reads one int; TUNSETOFFLOAD takes its argument by value.
    unsafe {
        tun_set_header_size(fd.as_raw_fd(), &raw const length)?;
        tun_set_offload(fd.as_raw_fd(), offloads)?;
    }
    Ok(())
}

/// Opens `/dev/net/tun` and makes or attaches to the persistent device `name`, which `owner` may attach to as well.
/// Needs CAP_NET_ADMIN.
///
/// # Errors
/// As the kernel says; `EBUSY` when somebody else is attached.
pub(crate) fn open(name: &str, owner: u32) -> io::Result<OwnedFd> {
    let mut configuration = tun::configure();
    configuration.tun_name(name).platform_config(|platform| {
        // Addresses and routes are set by netlink: the crate's own way knows only one IPv4 address.
        platform.ensure_root_privileges(false).vnet_hdr(true);
    });
    let mut device = tun::create(&configuration).map_err(into_io)?;
    device.persist().map_err(into_io)?;
    device
        .user(i32::try_from(owner).map_err(io::Error::other)?)
        .map_err(into_io)?;
    let device = Attached(device);
    set_offloads(device.as_fd())?;
    device.as_fd().try_clone_to_owned()
}

fn into_io(error: tun::Error) -> io::Error {
    if let tun::Error::Io(error) = error {
        error
    } else {
        io::Error::other(error)
    }
}

/// The crate's device, which does not implement `AsFd` itself.
struct Attached(tun::Device);

impl AsFd for Attached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the device lives, which is borrowed here.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl AsRawFd for Attached {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An attached TUN device in non-blocking mode.
pub(crate) struct Tun {
    device: AsyncFd<Attached>,
    name: String,
}

impl std::fmt::Debug for Tun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tun")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Tun {
    /// Takes over a descriptor that netd has attached.
    pub(crate) fn attach(fd: OwnedFd) -> io::Result<Self> {
        let (name, flags) = interface_of(fd.as_fd())?;
        let wanted = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{name} is not a TUN device with virtio-net headers"),
            ));
        }
        set_offloads(fd.as_fd())?;
        let mut configuration = tun::configure();
        configuration.raw_fd(fd.into_raw_fd()).tun_name(&name);
        let device = tun::create(&configuration).map_err(into_io)?;
        device.set_nonblock()?;
        // SAFETY: the device owns its descriptor, which is never replaced, and is owned by the AsyncFd from here on.
        let device = unsafe {
            AsyncFd::register_with_interest(Attached(device), Interest::READABLE | Interest::ERROR)
        }?;
        Ok(Self { device, name })
    }

    /// Name of the link.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The same attachment for another process: one of the two may read.
    pub(crate) fn share(&self) -> io::Result<OwnedFd> {
        self.device.get_ref().as_fd().try_clone_to_owned()
    }

    /// Reads one frame, or says that there is none and wakes when there is one.
    pub(crate) fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.device.poll_read_ready(cx))?;
            if let Ok(read) = guard.try_io(|device| device.get_ref().0.recv(buffer)) {
                return Poll::Ready(read);
            }
        }
    }

    /// Waits until the device is removed: a descriptor of one that is gone is never readable again. Cancel-safe.
    pub(crate) async fn gone(&self) -> io::Error {
        match self.device.ready(Interest::ERROR).await {
            Ok(_) => io::Error::from_raw_os_error(libc::EBADFD),
            Err(error) => error,
        }
    }

    /// Writes one frame. The kernel takes it at once: what it delivers locally is delivered when this returns.
    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<()> {
        self.device.get_ref().0.send(frame).map(|_| ())
    }
}
