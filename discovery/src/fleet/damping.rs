//! Reports that flap: a member whose application comes and goes is taken out at once each time, and put back later each
//! time. Bookkeeping with `now` given.
//!
//! **Invariant:** bad news is never delayed.

use super::Report;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tombolo_types::DeviceId;

/// So many returns are taken at once: a restart of an application, and one that failed at first.
const RETURNS_FREE: u32 = 3;
/// A return is forgotten after so long without another.
const MEMORY: Duration = Duration::from_secs(60);
/// The first delay; it doubles with each further return.
const DELAY: Duration = Duration::from_secs(2);
/// The longest delay: an application that works again is back within a minute, whatever it did before.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// What is known of a member.
#[derive(Debug)]
struct Row {
    healthy: bool,
    returns: u32,
    last_return: Instant,
    /// A return that waits.
    held: Option<(Instant, Report)>,
}

/// Of all members.
#[derive(Debug, Default)]
pub(super) struct Damping {
    rows: BTreeMap<DeviceId, Row>,
}

/// What to do with a report.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Take it.
    Now(Report),
    /// It says what is known already.
    Nothing,
    /// It is taken later, by [`Damping::poll`]; true: for the first time since the member was calm.
    Later(bool),
}

impl Damping {
    /// Hears a report. `known` is the one in force.
    pub(super) fn hear(
        &mut self,
        device: DeviceId,
        report: Report,
        known: Option<&Report>,
        now: Instant,
    ) -> Heard {
        let row = self.rows.entry(device).or_insert(Row {
            // A first report is no return.
            healthy: known.is_none_or(|known| known.healthy),
            returns: 0,
            last_return: now,
            held: None,
        });
        if !report.healthy {
            row.healthy = false;
            row.held = None;
            return if known == Some(&report) {
                Heard::Nothing
            } else {
                Heard::Now(report)
            };
        }
        if row.healthy || row.held.is_some() {
            return if known == Some(&report) || row.held.is_some() {
                Heard::Nothing
            } else {
                Heard::Now(report)
            };
        }
        if now.saturating_duration_since(row.last_return) > MEMORY.max(delay(row.returns) * 2) {
            row.returns = 0;
        }
        row.returns = row.returns.saturating_add(1);
        row.last_return = now;
        match delay(row.returns) {
            Duration::ZERO => {
                row.healthy = true;
                Heard::Now(report)
            }
            delay => {
                row.held = Some((now + delay, report));
                Heard::Later(row.returns == RETURNS_FREE + 1)
            }
        }
    }

    /// Returns that are due.
    pub(super) fn poll(&mut self, now: Instant) -> Vec<(DeviceId, Report)> {
        let mut due = Vec::new();
        for (device, row) in &mut self.rows {
            if let Some((_, report)) = row.held.take_if(|(at, _)| *at <= now) {
                row.healthy = true;
                due.push((*device, report));
            }
        }
        due
    }

    /// When the next return is due.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.rows
            .values()
            .filter_map(|row| Some(row.held.as_ref()?.0))
            .min()
    }

    /// Forgets a member.
    pub(super) fn forget(&mut self, device: DeviceId) {
        self.rows.remove(&device);
    }

    /// True while a return of the member waits.
    pub(super) fn holds(&self, device: DeviceId) -> bool {
        self.rows.get(&device).is_some_and(|row| row.held.is_some())
    }
}

fn delay(returns: u32) -> Duration {
    match returns.checked_sub(RETURNS_FREE + 1) {
        None => Duration::ZERO,
        Some(doublings) => DELAY
            .checked_mul(1 << doublings.min(16))
            .map_or(DELAY_MAX, |delay| delay.min(DELAY_MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: DeviceId = DeviceId(1);

    fn report(healthy: bool) -> Report {
        Report {
            healthy,
            message: if healthy { "" } else { "connection refused" }.into(),
        }
    }

    /// Hears reports and applies what is to be applied, as the owner does.
    struct Member {
        damping: Damping,
        known: Option<Report>,
        now: Instant,
    }

    impl Member {
        fn new() -> Self {
            Self {
                damping: Damping::default(),
                known: None,
                now: Instant::now(),
            }
        }

        fn hears(&mut self, healthy: bool) -> Heard {
            let heard = self
                .damping
                .hear(DEVICE, report(healthy), self.known.as_ref(), self.now);
            if let Heard::Now(report) = &heard {
                self.known = Some(report.clone());
            }
            heard
        }

        fn passes(&mut self, time: Duration) {
            self.now += time;
            for (_, report) in self.damping.poll(self.now) {
                self.known = Some(report);
            }
        }

        fn is_up(&self) -> bool {
            self.known.as_ref().is_none_or(|known| known.healthy)
        }
    }

    #[test]
    fn down_is_never_delayed_and_up_ever_longer() {
        let mut member = Member::new();
        assert_eq!(member.hears(true), Heard::Now(report(true)));
        let mut delays = Vec::new();
        for _ in 0..12 {
            assert_eq!(member.hears(false), Heard::Now(report(false)));
            member.passes(Duration::from_millis(100));
            let heard = member.hears(true);
            let begun = member.now;
            while !member.is_up() {
                member.passes(Duration::from_millis(500));
            }
            delays.push(member.now.duration_since(begun).as_secs());
            assert_eq!(heard == Heard::Later(true), delays.len() == 4, "said once");
        }
        assert_eq!(delays, [0, 0, 0, 2, 4, 8, 16, 32, 60, 60, 60, 60]);
        // Calm for long enough: as new.
        member.passes(Duration::from_secs(200));
        member.hears(false);
        assert_eq!(member.hears(true), Heard::Now(report(true)));
    }

    #[test]
    fn a_return_that_waits_is_called_off_by_bad_news() {
        let mut member = Member::new();
        for _ in 0..4 {
            member.hears(false);
            member.hears(true);
        }
        assert!(!member.is_up() && member.damping.holds(DEVICE));
        assert_eq!(member.damping.poll_timeout(), Some(member.now + DELAY));
        assert_eq!(member.hears(true), Heard::Nothing, "said again while it waits");
        assert_eq!(member.hears(false), Heard::Nothing, "it is known to be down");
        assert_eq!(member.damping.poll_timeout(), None);
        member.passes(DELAY_MAX);
        assert!(!member.is_up());
        member.damping.forget(DEVICE);
        assert!(!member.damping.holds(DEVICE));
    }

    #[test]
    fn reports_that_change_nothing_are_nothing() {
        let mut member = Member::new();
        member.hears(true);
        assert_eq!(member.hears(true), Heard::Nothing);
        // Ten thousand a second cost nothing and change nothing: down at once, and down it stays.
        for _ in 0..10_000 {
            member.hears(false);
            member.hears(true);
        }
        assert!(!member.is_up());
    }
}
