//! Giving up what is not needed.
#![allow(unsafe_code, reason = "capabilities have no safe interface in std or nix")]

use std::{fs, io};

/// CAP_NET_ADMIN of linux/capability.h.
const NET_ADMIN: u32 = 12;
/// CAP_SYS_CHROOT and so on end before this number; the kernel's last one is below it for a while.
const LAST_MAX: u32 = 63;
/// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 bits.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Keeps CAP_NET_ADMIN and gives up every other capability of this thread and of the threads that it will start: call
/// it before there are any. The bounding set and the ambient set are emptied, and no program that is executed later
/// can gain anything.
///
/// # Errors
/// When this process does not have CAP_NET_ADMIN to begin with, or the kernel refuses.
pub fn keep_only_net_admin() -> io::Result<()> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut words = [Words::default(); 2];
    // SAFETY: capget reads the header and writes two `Words`, as version 3 says.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) })?;
    let wanted = 1u32 << NET_ADMIN;
    if words.first().is_none_or(|low| low.permitted & wanted == 0) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "this needs root, or the capability CAP_NET_ADMIN",
        ));
    }
    for capability in (0..=LAST_MAX).filter(|capability| *capability != NET_ADMIN) {
        // SAFETY: PR_CAPBSET_DROP takes a number. It fails for numbers that the kernel does not know, and without
        // CAP_SETPCAP, where a service manager has set the bounding set already.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
    }
    // SAFETY: both prctl calls take numbers.
    unsafe {
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0).into())?;
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
    }
    words = [
        Words {
            effective: wanted,
            permitted: wanted,
            inheritable: 0,
        },
        Words::default(),
    ];
    // SAFETY: capset reads the header and two `Words`, as version 3 says.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) })
}

/// The effective capabilities of this process, as a mask.
///
/// # Errors
/// When /proc cannot be read.
pub fn effective() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/thread-self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.ok_or_else(|| io::Error::other("/proc/thread-self/status has no CapEff"))
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
