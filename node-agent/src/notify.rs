//! What is said to systemd. Elsewhere nobody listens and nothing is said.

use sd_notify::NotifyState;
use std::sync::atomic::{AtomicBool, Ordering};
use tombolo_runtime::TaskGroup;

/// systemd listens to the main process alone; another one would only fill its log.
static MUTED: AtomicBool = AtomicBool::new(false);

/// Says nothing until [`unmute`].
pub(crate) fn mute() {
    MUTED.store(true, Ordering::Release);
}

/// This process is the main one now.
pub(crate) fn unmute() {
    MUTED.store(false, Ordering::Release);
    tell(&[NotifyState::Watchdog]);
}

/// A reload has begun.
pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::debug!(%error, "the clock was not read"),
    }
}

/// The reload is done, and another process is the main one: the last word of this one.
pub(crate) fn hand_over(pid: u32) {
    tell(&[NotifyState::MainPid(pid), NotifyState::Ready]);
    mute();
}

pub(crate) fn ready() {
    tell(&[NotifyState::Ready]);
}

pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// The line that `systemctl status` shows.
pub(crate) fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

fn tell(states: &[NotifyState<'_>]) {
    if MUTED.load(Ordering::Acquire) {
        return;
    }
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not told");
    }
}

/// Shows that the runtime turns, twice per interval of the watchdog, where there is one.
pub(crate) fn watchdog(tasks: &TaskGroup) {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return;
    };
    tasks.spawn_until_stopped("watchdog", async move {
        let mut ticks = tokio::time::interval(interval / 2);
        loop {
            ticks.tick().await;
            tell(&[NotifyState::Watchdog]);
        }
    });
}
