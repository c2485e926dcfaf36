//! What the process may do on this host.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Every connection has two descriptors: the soft limit of 1,024 is for programs that use select().
pub(crate) fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard),
        false => Ok(soft),
    });
    match raised {
        Ok(limit) => tracing::debug!(limit, "file descriptors"),
        Err(error) => tracing::warn!(%error, "the limit of file descriptors was not raised"),
    }
}

/// Freed memory that each heap keeps for the next use, in bytes, is twice this.
const KEPT: usize = 2 * 1024 * 1024;

/// Bulk traffic allocates and frees each frame. The C library would give such memory back to the kernel and take it
/// again at once: a tenth of the CPU went into page faults. Freeing one large block tells it what sizes come and go.
///
/// Source: mallopt(3), the dynamic M_MMAP_THRESHOLD; other C libraries are not moved by it.
pub(crate) fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(KEPT)));
}

/// The agent parses what the network sends: it should be nobody. It works all the same, and says so.
pub(crate) fn warn_of_privilege() {
    if nix::unistd::geteuid().is_root() {
        tracing::warn!(
            "the agent runs as root: a fault in it would be a fault of root. Run it as the user tombolo-agent; \
             tombolo up and the packages do"
        );
    }
    match tombolo_capture::privilege::effective() {
        Ok(0) => {}
        Ok(mask) => tracing::warn!(
            capabilities = format!("{mask:#x}"),
            "the agent has capabilities and needs none: take AmbientCapabilities= out of its unit"
        ),
        Err(error) => tracing::debug!(%error, "capabilities are not known"),
    }
}
