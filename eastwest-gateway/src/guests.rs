//! Open calls of other trust domains: when a service is exported no more, they are cut.
//!
//! Whether a caller of the own mesh may go on is decided by the endpoint, which knows its policies; what is exported only
//! gateways know.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;
use tombolo_types::NamespacedName;

/// The services that are being called from other trust domains.
#[derive(Debug, Default)]
pub(crate) struct Guests(Mutex<HashMap<NamespacedName, Called>>);

#[derive(Debug)]
struct Called {
    withdrawn: watch::Sender<bool>,
    calls: usize,
}

/// One such call; it counts until it is dropped.
#[derive(Debug)]
pub(crate) struct Guest {
    guests: Arc<Guests>,
    service: NamespacedName,
    withdrawn: watch::Receiver<bool>,
}

impl Guests {
    fn table(&self) -> MutexGuard<'_, HashMap<NamespacedName, Called>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call that was allowed. Whether it still is must be asked again afterwards: the next [`Self::recheck`] sees it, an
    /// earlier one has not.
    pub(crate) fn enter(self: &Arc<Self>, service: &NamespacedName) -> Guest {
        let mut table = self.table();
        let called = table.entry(service.clone()).or_insert_with(|| Called {
            withdrawn: watch::Sender::new(false),
            calls: 0,
        });
        called.calls += 1;
        Guest {
            guests: Arc::clone(self),
            service: service.clone(),
            withdrawn: called.withdrawn.subscribe(),
        }
    }

    /// Cuts the calls of what is exported no more.
    pub(crate) fn recheck(&self, exported: impl Fn(&NamespacedName) -> bool) {
        self.table().retain(|service, called| {
            let stays = exported(service);
            if !stays {
                tracing::info!(%service, calls = called.calls, "exported no more: calls from other clusters are cut");
                called.withdrawn.send_replace(true);
            }
            stays
        });
    }
}

impl Guest {
    /// Ready when the call must end. Cancel-safe.
    pub(crate) async fn withdrawn(&self) {
        // The sender says so before it goes.
        let _ = self.withdrawn.clone().wait_for(|withdrawn| *withdrawn).await;
    }

    fn is_cut(&self) -> bool {
        *self.withdrawn.borrow()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut table = self.guests.table();
        // One that was cut is not in the table any more; the service may be exported, and called, again.
        if self.is_cut() {
            return;
        }
        if let Some(called) = table.get_mut(&self.service) {
            called.calls -= 1;
            if called.calls == 0 {
                table.remove(&self.service);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_withdrawn_is_cut_and_the_rest_goes_on() {
        let guests = Arc::new(Guests::default());
        let (bank, shop) = (
            NamespacedName::new("bank", "ledger"),
            NamespacedName::new("shop", "catalog"),
        );
        let (first, second, other) = (guests.enter(&bank), guests.enter(&bank), guests.enter(&shop));
        guests.recheck(|_| true);
        assert!(!first.is_cut());
        guests.recheck(|service| *service == shop);
        for cut in [&first, &second] {
            assert!(cut.is_cut());
        }
        assert!(!other.is_cut());
        // Exported again while those of before are ending.
        let again = guests.enter(&bank);
        drop((first, second));
        assert!(!again.is_cut());
        guests.recheck(|_| false);
        assert!(again.is_cut());
        drop((again, other));
        assert!(guests.table().is_empty());
        drop(guests.enter(&bank));
        assert!(guests.table().is_empty());
    }
}
