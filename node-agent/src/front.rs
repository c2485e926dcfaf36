//! What other processes reach this one by, and what it holds for them: handed over at a reload, closed afterwards.

use crate::handover::Kind;
use std::{
    io,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tombolo_runtime::TaskGroup;

/// Sockets of the admin API and of the HTTP endpoints, and the lock of the state directory.
#[derive(Debug)]
pub(crate) struct Front {
    /// Serves the sockets.
    pub(crate) tasks: TaskGroup,
    descriptors: Mutex<Vec<(Kind, OwnedFd)>>,
}

impl Front {
    pub(crate) fn new(tasks: &TaskGroup) -> Self {
        Self {
            tasks: tasks.child("front"),
            descriptors: Mutex::default(),
        }
    }

    fn descriptors(&self) -> MutexGuard<'_, Vec<(Kind, OwnedFd)>> {
        self.descriptors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps one for the next process.
    pub(crate) fn keep(&self, kind: Kind, descriptor: io::Result<OwnedFd>) {
        match descriptor {
            Ok(descriptor) => self.descriptors().push((kind, descriptor)),
            Err(error) => tracing::debug!(%error, ?kind, "not kept for a reload"),
        }
    }

    /// All of them, for the next process.
    pub(crate) fn share(&self) -> io::Result<Vec<(Kind, OwnedFd)>> {
        let descriptors = self.descriptors();
        descriptors
            .iter()
            .map(|(kind, fd)| Ok((*kind, fd.try_clone()?)))
            .collect()
    }

    /// Serves no more; answers that are under way are finished.
    pub(crate) fn close(&self) {
        self.tasks.stop();
        self.descriptors().clear();
    }
}
