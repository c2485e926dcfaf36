use crate::{
    FlowId,
    flow::{Flow, Octets, State, hash, words},
};
use hashbrown::HashTable;

/// End of the list of free places.
const NONE: u32 = u32::MAX;

/// The connections, found by either of their two names: what the application sends, and what the listener sends.
#[derive(Debug)]
pub(crate) struct Slots {
    flows: Vec<Flow>,
    /// First free place.
    free: u32,
    used: usize,
    by_application: HashTable<u32>,
    by_listener: HashTable<u32>,
    seed: u64,
}

fn application_hash(
    seed: u64,
    application: Octets,
    application_port: u16,
    vip: Octets,
    vip_port: u16,
) -> u64 {
    let ([a, b], [c, d]) = (words(application), words(vip));
    hash(
        seed,
        &[
            a,
            b,
            c,
            d,
            u64::from(application_port) << 16 | u64::from(vip_port),
        ],
    )
}

fn listener_hash(seed: u64, vip: Octets, mapped_port: u16) -> u64 {
    let [a, b] = words(vip);
    hash(seed, &[a, b, u64::from(mapped_port)])
}

impl Slots {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            flows: Vec::new(),
            free: NONE,
            used: 0,
            by_application: HashTable::new(),
            by_listener: HashTable::new(),
            seed,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.used
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Flow)> {
        (0..)
            .zip(&self.flows)
            .filter(|(_, flow)| flow.state != State::Free)
    }

    fn at(&self, index: u32) -> Option<&Flow> {
        self.flows
            .get(usize::try_from(index).ok()?)
            .filter(|flow| flow.state != State::Free)
    }

    pub(crate) fn get(&self, id: FlowId) -> Option<&Flow> {
        self.at(id.index).filter(|flow| flow.generation == id.generation)
    }

    pub(crate) fn get_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        let flow = self.flows.get_mut(usize::try_from(id.index).ok()?)?;
        (flow.state != State::Free && flow.generation == id.generation).then_some(flow)
    }

    pub(crate) fn id(&self, index: u32) -> Option<FlowId> {
        self.at(index).map(|flow| FlowId {
            index,
            generation: flow.generation,
        })
    }

    /// By what the application sends.
    pub(crate) fn find_by_application(
        &self,
        application: Octets,
        application_port: u16,
        vip: Octets,
        vip_port: u16,
    ) -> Option<FlowId> {
        let hash = application_hash(self.seed, application, application_port, vip, vip_port);
        let same = |index: &u32| {
            self.at(*index)
                .is_some_and(|flow| flow.is_from(application, application_port, vip, vip_port))
        };
        self.id(*self.by_application.find(hash, same)?)
    }

    /// By what the listener sees.
    pub(crate) fn find_by_listener(&self, vip: Octets, mapped_port: u16) -> Option<FlowId> {
        let hash = listener_hash(self.seed, vip, mapped_port);
        let same = |index: &u32| {
            self.at(*index)
                .is_some_and(|flow| flow.mapped_port == mapped_port && flow.vip == vip)
        };
        self.id(*self.by_listener.find(hash, same)?)
    }

    /// Adds a connection; neither of its names may be there. Its generation is given here.
    pub(crate) fn insert(&mut self, mut flow: Flow) -> Option<FlowId> {
        let index = if self.free == NONE {
            let index = u32::try_from(self.flows.len())
                .ok()
                .filter(|index| *index != NONE)?;
            flow.generation = 0;
            self.flows.push(flow);
            index
        } else {
            let index = self.free;
            let place = self.flows.get_mut(usize::try_from(index).ok()?)?;
            self.free = place.link;
            flow.generation = place.generation.wrapping_add(1);
            *place = flow;
            index
        };
        self.used += 1;
        let (flows, seed) = (&self.flows, self.seed);
        // An index in the tables always is one of `flows`; if it were not, the entry would only not be found.
        let of = |index: &u32| usize::try_from(*index).ok().and_then(|index| flows.get(index));
        let by_application = |index: &u32| {
            of(index).map_or(0, |f| {
                application_hash(seed, f.application, f.application_port, f.vip, f.vip_port)
            })
        };
        let by_listener = |index: &u32| of(index).map_or(0, |f| listener_hash(seed, f.vip, f.mapped_port));
        self.by_application
            .insert_unique(by_application(&index), index, by_application);
        self.by_listener
            .insert_unique(by_listener(&index), index, by_listener);
        Some(FlowId {
            index,
            generation: flow.generation,
        })
    }

    /// Takes a connection out.
    pub(crate) fn remove(&mut self, id: FlowId) -> Option<Flow> {
        let flow = *self.get(id)?;
        let hash = application_hash(
            self.seed,
            flow.application,
            flow.application_port,
            flow.vip,
            flow.vip_port,
        );
        if let Ok(entry) = self.by_application.find_entry(hash, |index| *index == id.index) {
            entry.remove();
        }
        let hash = listener_hash(self.seed, flow.vip, flow.mapped_port);
        if let Ok(entry) = self.by_listener.find_entry(hash, |index| *index == id.index) {
            entry.remove();
        }
        let free = self.free;
        let place = self.get_mut(id)?;
        place.state = State::Free;
        place.link = free;
        self.free = id.index;
        self.used -= 1;
        if self.used == 0 {
            // A burst is over: give its memory back.
            self.by_application.shrink_to(0, |_| 0);
            self.by_listener.shrink_to(0, |_| 0);
        }
        Some(flow)
    }
}
