//! The last metrics of each member, bounded in size, number and age: bookkeeping with `now` given.

use super::exposition;
use crate::fleet::View;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tombolo_types::DeviceId;

/// Bytes of one member's text: about 1,500 series. An agent has ten series per pair of workloads that talk.
pub const EXPOSITION_MAX: usize = 256 << 10;
/// Bytes of all members' texts: 10,000 members with 25 KiB each.
const TOTAL_MAX: usize = 256 << 20;
/// A text that was not pushed again for so long is dropped: what a scraper would read is the past.
const STALE: Duration = Duration::from_secs(5 * 60);
/// How often is looked who is gone or silent.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

const _: () = assert!(
    EXPOSITION_MAX * 64 < TOTAL_MAX,
    "no handful of members fills the store"
);

/// What is pushed.
#[derive(Debug)]
pub(super) enum Content {
    /// A text.
    Text(String),
    /// The one that is held.
    Unchanged,
}

/// Why a push was refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) cause: String,
    /// The first refusal of this member since its last good push: the one that is logged.
    pub(super) first: bool,
}

#[derive(Debug)]
struct Row {
    at: Instant,
    text: Option<Arc<str>>,
    refused: bool,
}

#[derive(Debug, Default)]
struct Table {
    rows: BTreeMap<DeviceId, Row>,
    bytes: usize,
    swept: Option<Instant>,
}

/// What members have pushed. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct PushedMetrics(Arc<Mutex<Table>>);

impl Row {
    fn length(&self) -> usize {
        self.text.as_ref().map_or(0, |text| text.len())
    }
}

impl PushedMetrics {
    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a push of a member; true: the text itself is needed.
    pub(super) fn push(&self, device: DeviceId, content: Content, now: Instant) -> Result<bool, Refused> {
        let text = match content {
            Content::Unchanged => {
                let mut table = self.table();
                let held = table.rows.get_mut(&device).filter(|row| row.text.is_some());
                return Ok(held.map(|row| row.at = now).is_none());
            }
            Content::Text(text) => text,
        };
        // Read outside the lock: it is the long part.
        let checked = if text.len() > EXPOSITION_MAX {
            Err(format!("{} bytes, of at most {EXPOSITION_MAX}", text.len()))
        } else {
            exposition::check(&text)
        };
        let mut table = self.table();
        let before = table.rows.get(&device).map_or(0, Row::length);
        let checked = checked.and_then(|()| {
            let after = table.bytes - before + text.len();
            (after <= TOTAL_MAX)
                .then_some(after)
                .ok_or_else(|| "discovery keeps no more metrics than it does".to_owned())
        });
        let row = table.rows.entry(device).or_insert(Row {
            at: now,
            text: None,
            refused: false,
        });
        match checked {
            Ok(after) => {
                (row.at, row.text, row.refused) = (now, Some(text.into()), false);
                table.bytes = after;
                Ok(false)
            }
            Err(cause) => Err(Refused {
                cause,
                first: !std::mem::replace(&mut row.refused, true),
            }),
        }
    }

    /// Drops what is old, and the rows of those who are no members any more. At most every half minute.
    pub(super) fn sweep(&self, view: &View, now: Instant) {
        let mut table = self.table();
        if table
            .swept
            .is_some_and(|at| now.saturating_duration_since(at) < SWEEP_INTERVAL)
        {
            return;
        }
        table.swept = Some(now);
        table
            .rows
            .retain(|device, _| view.members.contains_key(device) && !view.revoked.contains(device));
        for row in table.rows.values_mut() {
            if now.saturating_duration_since(row.at) > STALE {
                row.text = None;
            }
        }
        table.bytes = table.rows.values().map(Row::length).sum();
    }

    /// The text of a member and how old it is; `None` for one that is silent.
    pub(super) fn text(&self, device: DeviceId, now: Instant) -> Option<(Arc<str>, Duration)> {
        let table = self.table();
        let row = table.rows.get(&device)?;
        let age = now.saturating_duration_since(row.at);
        let text = row.text.as_ref().filter(|_| age <= STALE)?;
        Some((Arc::clone(text), age))
    }

    /// Everybody who has pushed since discovery started, the silent ones too.
    pub(super) fn devices(&self) -> Vec<DeviceId> {
        let table = self.table();
        let good = table
            .rows
            .iter()
            .filter(|(_, row)| row.text.is_some() || !row.refused);
        good.map(|(device, _)| *device).collect()
    }

    /// Members with a text, and bytes of all texts.
    pub fn held(&self) -> (usize, usize) {
        let table = self.table();
        let texts = table.rows.values().filter(|row| row.text.is_some()).count();
        (texts, table.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(n: u8) -> DeviceId {
        format!("{n:016x}").parse().unwrap()
    }

    fn text(text: &str) -> Content {
        Content::Text(text.into())
    }

    #[test]
    fn the_last_text_counts_and_an_unchanged_one_is_not_sent_again() {
        let (pushed, now) = (PushedMetrics::default(), Instant::now());
        assert_eq!(pushed.push(device(1), Content::Unchanged, now), Ok(true));
        assert_eq!(pushed.push(device(1), text("a 1\n"), now), Ok(false));
        let later = now + STALE;
        assert_eq!(pushed.push(device(1), Content::Unchanged, later), Ok(false));
        assert_eq!(pushed.text(device(1), later + STALE).unwrap().1, STALE);
        assert!(
            pushed
                .text(device(1), later + STALE + Duration::from_secs(1))
                .is_none()
        );
        assert!(pushed.text(device(2), now).is_none());
        pushed.push(device(1), text("a 2\n"), later).unwrap();
        assert_eq!(pushed.push(device(2), Content::Unchanged, later), Ok(true));
        assert_eq!(&*pushed.text(device(1), later).unwrap().0, "a 2\n");
        assert_eq!(pushed.held(), (1, 4));
    }

    #[test]
    fn garbage_and_too_much_are_refused_and_said_once() {
        let (pushed, now) = (PushedMetrics::default(), Instant::now());
        pushed.push(device(1), text("a 1\n"), now).unwrap();
        let first = pushed.push(device(1), text("garbage"), now).unwrap_err();
        assert!(first.first && first.cause.contains("line 1"), "{first:?}");
        let again = pushed.push(device(1), text(&"a 1\n".repeat(EXPOSITION_MAX / 4 + 1)), now);
        let again = again.unwrap_err();
        assert!(!again.first && again.cause.contains("262148 bytes"), "{again:?}");
        assert_eq!(
            &*pushed.text(device(1), now).unwrap().0,
            "a 1\n",
            "what was good stays"
        );
        pushed.push(device(1), text("a 1\n"), now).unwrap();
        assert!(pushed.push(device(1), text("garbage"), now).unwrap_err().first);
        // Who has only ever pushed garbage is nobody that could be scraped.
        pushed.push(device(2), text("garbage"), now).unwrap_err();
        assert_eq!(pushed.devices(), [device(1)]);
    }

    #[test]
    fn all_together_are_bounded_and_who_is_gone_makes_room() {
        let (pushed, now) = (PushedMetrics::default(), Instant::now());
        let line = format!("a{{b=\"{}\"}} 1\n", "x".repeat(EXPOSITION_MAX - 20));
        let most = TOTAL_MAX / line.len();
        let id = |n: usize| format!("{n:016x}").parse::<DeviceId>().unwrap();
        for n in 0..most {
            pushed.push(id(n), text(&line), now).unwrap();
        }
        let full = pushed.push(id(most), text(&line), now).unwrap_err();
        assert!(full.cause.contains("no more"), "{full:?}");
        assert!(pushed.held().1 <= TOTAL_MAX);
        pushed.push(id(0), text("a 1\n"), now).unwrap(); // one that is there already only changes
        pushed.sweep(&View::default(), now);
        assert_eq!(pushed.held(), (0, 0));
        pushed.push(id(most), text(&line), now).unwrap();
    }
}
