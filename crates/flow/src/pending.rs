use crate::FlowId;
use std::{collections::VecDeque, time::Instant};

/// Places that keep their buffer when they are free; beyond, a burst's memory is given back.
const KEPT_MAX: usize = 64;

/// The kept SYNs of connections that are held or wait for their socket, and when their time is over.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// Frames.
    syns: Vec<Vec<u8>>,
    free: Vec<u32>,
    /// In the order of their deadlines: all have the same budget.
    deadlines: VecDeque<(FlowId, Instant)>,
}

impl Pending {
    pub(crate) fn len(&self) -> usize {
        self.syns.len() - self.free.len()
    }

    /// Keeps a SYN; returns its place.
    pub(crate) fn keep(&mut self, syn: &[u8]) -> u32 {
        let place = self.free.pop().unwrap_or_else(|| {
            self.syns.push(Vec::new());
            u32::try_from(self.syns.len() - 1).unwrap_or(u32::MAX)
        });
        self.replace(place, syn);
        place
    }

    /// Keeps a later SYN instead.
    pub(crate) fn replace(&mut self, place: u32, syn: &[u8]) {
        if let Some(kept) = usize::try_from(place)
            .ok()
            .and_then(|place| self.syns.get_mut(place))
        {
            kept.clear();
            kept.extend_from_slice(syn);
        }
    }

    /// The SYN at a place.
    pub(crate) fn syn(&self, place: u32) -> &[u8] {
        usize::try_from(place)
            .ok()
            .and_then(|place| self.syns.get(place))
            .map_or(&[], Vec::as_slice)
    }

    /// Frees a place.
    pub(crate) fn free(&mut self, place: u32) {
        let small = self.syns.len() <= KEPT_MAX;
        if let Some(kept) = usize::try_from(place)
            .ok()
            .and_then(|place| self.syns.get_mut(place))
        {
            kept.clear();
            if !small {
                *kept = Vec::new();
            }
            self.free.push(place);
        }
        if self.len() == 0 {
            self.deadlines.clear();
            if !small {
                *self = Self::default();
            }
        }
    }

    /// Notes when a connection's time is over; not before those noted earlier.
    pub(crate) fn expire_at(&mut self, id: FlowId, at: Instant) {
        self.deadlines.push_back((id, at));
    }

    /// All deadlines.
    pub(crate) fn deadlines(&self) -> impl Iterator<Item = (FlowId, Instant)> + '_ {
        self.deadlines.iter().copied()
    }

    /// The first deadline.
    pub(crate) fn first(&self) -> Option<(FlowId, Instant)> {
        self.deadlines.front().copied()
    }

    /// Takes the first deadline out.
    pub(crate) fn pop(&mut self) {
        self.deadlines.pop_front();
    }
}
