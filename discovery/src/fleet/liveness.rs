//! Who is alive: a pure state machine that is told of streams, dials and time.
//!
//! A lost control stream makes a member suspect, not dead. It is taken out of every client's choice only when a second
//! witness agrees: a dial of its HBONE port fails, at an endpoint that was reached before. When many members of a
//! network turn suspect at once it is discovery that is cut off, so nobody is taken out (the brake); the same holds
//! in the first seconds after a start (the grace).

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tombolo_types::DeviceId;

/// After a start nobody is taken out by suspicion for so long: agents reconnect within seconds.
pub const GRACE: Duration = Duration::from_secs(20);
/// Members that turn suspect within this time of each other count together for the brake.
pub const BRAKE_WINDOW: Duration = Duration::from_secs(10);
/// The brake needs at least so many suspects: in a small network one dead rack is not "discovery is cut off".
pub const BRAKE_MEMBERS_MIN: usize = 5;
/// The brake needs more than this share of a network's members, in percent.
pub const BRAKE_SHARE_PERCENT: usize = 20;
/// A dial that got no answer is believed only so long after the stream was lost: streams that are cut together are
/// noticed up to one PING interval apart, and the brake must see them first. An answered refusal is believed at once.
pub const SETTLE: Duration = Duration::from_millis(700);
/// A suspect is dialled again at this interval.
pub const REDIAL: Duration = Duration::from_secs(1);
/// First interval at which a connected member is dialled that was not reached yet: its listener may be up a moment after
/// its control stream, and a witness that comes late is none.
const LEARN_MIN: Duration = Duration::from_millis(100);
/// Longest interval at which a connected member is dialled that was not reached yet.
const LEARN_MAX: Duration = Duration::from_secs(60);
/// Most dials under way at once; more wait for their turn.
const DIALS_MAX: usize = 256;

/// What a dial of the HBONE port found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialled {
    /// The connection was accepted.
    Reached,
    /// The host answered, and nobody listens.
    Refused,
    /// No answer in time, or no route.
    Silent,
}

/// What is known of a member from before a start of discovery.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Remembered {
    /// Its endpoint was reached.
    #[serde(default)]
    pub reached: bool,
    /// It was out, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<String>,
}

/// What the machine wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Dial the endpoint and call [`Liveness::handle_dialled`].
    Dial {
        /// Of whom.
        device: DeviceId,
        /// Where.
        endpoint: SocketAddr,
    },
    /// [`Liveness::standing`] of this member is another one now.
    Changed(DeviceId),
    /// The brake of a network was engaged or released.
    Brake {
        /// Which network.
        network: Arc<str>,
        /// Engaged, or released.
        engaged: bool,
    },
}

/// Whether clients may choose a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Its control stream is up.
    Connected,
    /// Its stream is lost, it stays in the choice, and the text says why.
    Suspect(String),
    /// Taken out; the text says why.
    Out(String),
}

impl Standing {
    /// True if clients may choose it.
    pub fn is_in(&self) -> bool {
        !matches!(self, Self::Out(_))
    }
}

#[derive(Debug)]
struct Member {
    network: Arc<str>,
    endpoint: Option<SocketAddr>,
    reached: bool,
    streams: u32,
    suspect_since: Option<Instant>,
    /// The last dial since the stream was lost.
    witness: Option<Dialled>,
    out: Option<String>,
    /// Taken out by suspicion (the brake puts such a member back), not for never having connected.
    out_by_suspicion: bool,
    dialling: bool,
    next_dial: Option<Instant>,
    learn_interval: Duration,
    wake: Option<Instant>,
}

/// The machine.
#[derive(Debug)]
pub struct Liveness {
    /// End of the grace.
    grace_end: Instant,
    grace_over: bool,
    members: BTreeMap<DeviceId, Member>,
    timers: BTreeSet<(Instant, DeviceId)>,
    networks: BTreeMap<Arc<str>, Network>,
    actions: VecDeque<Action>,
    dialling: usize,
}

#[derive(Debug, Default)]
struct Network {
    recent: VecDeque<(Instant, DeviceId)>,
    /// The brake is engaged; suspects since then count for its release.
    braked_since: Option<Instant>,
}

impl Liveness {
    /// Starts the grace, [`GRACE`] but in tests.
    pub fn new(now: Instant, grace: Duration) -> Self {
        Self {
            grace_end: now + grace,
            grace_over: false,
            members: BTreeMap::new(),
            timers: BTreeSet::new(),
            networks: BTreeMap::new(),
            actions: VecDeque::new(),
            dialling: 0,
        }
    }

    /// Adds a member that was there before discovery started, with what was remembered of it.
    pub fn load(
        &mut self,
        device: DeviceId,
        network: Arc<str>,
        endpoint: Option<SocketAddr>,
        known: &Remembered,
    ) {
        let mut member = Member::new(network, endpoint);
        member.reached = known.reached && endpoint.is_some();
        member.out.clone_from(&known.out);
        self.insert(device, member);
    }

    /// Adds a member that has just enrolled: it is out until its agent connects. Or changes one: an endpoint that
    /// moved has to be reached anew.
    pub fn upsert(
        &mut self,
        device: DeviceId,
        network: Arc<str>,
        endpoint: Option<SocketAddr>,
        now: Instant,
    ) {
        let Some(member) = self.members.get_mut(&device) else {
            let mut member = Member::new(network, endpoint);
            member.out = Some("enrolled; its agent has not connected yet".into());
            self.insert(device, member);
            return;
        };
        member.network = network;
        if member.endpoint != endpoint {
            member.endpoint = endpoint;
            (member.reached, member.witness, member.learn_interval) = (false, None, LEARN_MIN);
            member.next_dial = endpoint.map(|_| now);
            self.reschedule(device, now);
        }
    }

    fn insert(&mut self, device: DeviceId, member: Member) {
        self.remove(device);
        self.members.insert(device, member);
    }

    /// Forgets a member.
    pub fn remove(&mut self, device: DeviceId) {
        let Some(member) = self.members.remove(&device) else {
            return;
        };
        if let Some(wake) = member.wake {
            self.timers.remove(&(wake, device));
        }
        if member.dialling {
            self.dialling -= 1;
        }
        if let Some(network) = self.networks.get_mut(&member.network) {
            network.recent.retain(|(_, id)| *id != device);
        }
    }

    /// An authenticated control stream of the member started.
    pub fn handle_connected(&mut self, device: DeviceId, now: Instant) {
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        member.streams += 1;
        (member.suspect_since, member.witness) = (None, None);
        (member.out, member.out_by_suspicion) = (None, false);
        member.learn_interval = LEARN_MIN;
        member.next_dial = if member.reached {
            None
        } else {
            member.endpoint.map(|_| now)
        };
        let network = Arc::clone(&member.network);
        self.reschedule(device, now);
        self.actions.push_back(Action::Changed(device));
        self.weigh_brake(&network, now);
    }

    /// A control stream of the member ended, in whatever way.
    pub fn handle_disconnected(&mut self, device: DeviceId, now: Instant) {
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        member.streams = member.streams.saturating_sub(1);
        if member.streams == 0 {
            self.suspect(device, now);
        }
    }

    fn suspect(&mut self, device: DeviceId, now: Instant) {
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        member.suspect_since = Some(now);
        member.witness = None;
        member.next_dial = member.endpoint.map(|_| now);
        let network = Arc::clone(&member.network);
        let recent = &mut self.networks.entry(Arc::clone(&network)).or_default().recent;
        recent.retain(|(_, id)| *id != device);
        recent.push_back((now, device));
        self.reschedule(device, now);
        self.actions.push_back(Action::Changed(device));
        self.weigh_brake(&network, now);
    }

    /// The answer to [`Action::Dial`].
    pub fn handle_dialled(&mut self, device: DeviceId, endpoint: SocketAddr, found: Dialled, now: Instant) {
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        if !member.dialling {
            return; // the member is another one by now
        }
        member.dialling = false;
        self.dialling -= 1;
        if member.endpoint != Some(endpoint) {
            self.reschedule(device, now);
            return;
        }
        let away = member.streams == 0;
        if found == Dialled::Reached {
            member.reached = true;
        }
        member.next_dial = if away {
            Some(now + REDIAL)
        } else if member.reached {
            None
        } else {
            member.learn_interval = (member.learn_interval * 2).min(LEARN_MAX);
            Some(now + member.learn_interval)
        };
        if away && member.witness.replace(found) != Some(found) {
            self.actions.push_back(Action::Changed(device)); // the reason reads differently
        }
        self.judge(device, now);
        self.reschedule(device, now);
    }

    /// Ends the grace: there is nobody who could have to come back.
    pub fn end_grace(&mut self, now: Instant) {
        self.grace_end = now;
        self.grace_over = true;
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if !self.grace_over && now >= self.grace_end {
            self.grace_over = true;
            let missing: Vec<DeviceId> = self
                .members
                .iter()
                .filter(|(_, m)| m.is_missing())
                .map(|(d, _)| *d)
                .collect();
            missing.into_iter().for_each(|device| self.suspect(device, now));
            let waiting: Vec<DeviceId> = self.members.keys().copied().collect();
            waiting.into_iter().for_each(|device| self.judge(device, now));
        }
        while let Some(&(at, device)) = self.timers.first() {
            if at > now || (self.dialling >= DIALS_MAX && self.due_dial(device, now)) {
                break;
            }
            self.timers.pop_first();
            if let Some(member) = self.members.get_mut(&device) {
                member.wake = None;
                if !member.dialling
                    && member.next_dial.is_some_and(|at| at <= now)
                    && let Some(endpoint) = member.endpoint
                {
                    (member.dialling, member.next_dial) = (true, None);
                    self.dialling += 1;
                    self.actions.push_back(Action::Dial { device, endpoint });
                }
            }
            self.judge(device, now);
            self.reschedule(device, now);
        }
    }

    fn due_dial(&self, device: DeviceId, now: Instant) -> bool {
        self.members
            .get(&device)
            .is_some_and(|m| !m.dialling && m.next_dial.is_some_and(|at| at <= now))
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Self::handle_timeout`] has something to do, and what.
    pub fn poll_timeout(&self) -> Option<(Instant, &'static str)> {
        let grace = (!self.grace_over).then_some((self.grace_end, "end of the start grace"));
        let timer = self
            .timers
            .first()
            .filter(|_| self.dialling < DIALS_MAX)
            .map(|(at, _)| (*at, "dial or decide"));
        grace.into_iter().chain(timer).min_by_key(|(at, _)| *at)
    }

    /// Takes a member out if the witness agrees and neither grace nor brake holds.
    fn judge(&mut self, device: DeviceId, now: Instant) {
        let grace = !self.grace_over;
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        let (Some(since), Some(witness)) = (member.suspect_since, member.witness) else {
            return;
        };
        let braked = self
            .networks
            .get(&member.network)
            .is_some_and(|network| network.braked_since.is_some());
        if grace || braked || member.streams > 0 || member.out.is_some() || !member.reached {
            return;
        }
        let Some(endpoint) = member.endpoint else { return };
        let cause = match witness {
            Dialled::Reached => return,
            Dialled::Silent if now < since + SETTLE => return,
            Dialled::Silent => "does not answer",
            Dialled::Refused => "refuses connections",
        };
        member.out = Some(format!("its control stream is lost and {endpoint} {cause}"));
        member.out_by_suspicion = true;
        self.actions.push_back(Action::Changed(device));
    }

    fn reschedule(&mut self, device: DeviceId, now: Instant) {
        let Some(member) = self.members.get_mut(&device) else {
            return;
        };
        if let Some(old) = member.wake.take() {
            self.timers.remove(&(old, device));
        }
        // Whoever is out needs no more dials: it comes back by its own stream.
        let dial = if member.dialling || member.out.is_some() {
            None
        } else {
            member.next_dial
        };
        let settle = match (member.suspect_since, member.witness) {
            (Some(since), Some(Dialled::Silent)) if member.out.is_none() && now < since + SETTLE => {
                Some(since + SETTLE)
            }
            _ => None,
        };
        member.wake = dial.into_iter().chain(settle).min();
        if let Some(wake) = member.wake {
            self.timers.insert((wake, device));
        }
    }

    fn weigh_brake(&mut self, name: &Arc<str>, now: Instant) {
        let network = self.networks.entry(Arc::clone(name)).or_default();
        while network
            .recent
            .front()
            .is_some_and(|(at, _)| *at + BRAKE_WINDOW < now)
        {
            network.recent.pop_front();
        }
        if network.braked_since.is_none() && network.recent.len() < BRAKE_MEMBERS_MIN {
            return;
        }
        // Members that were out before do not count: they would hide a cut among many dead entries.
        let away_since = |member: &Member, start: Instant| {
            member.streams == 0 && member.suspect_since.is_some_and(|since| since >= start)
        };
        let start = network
            .braked_since
            .unwrap_or_else(|| network.recent.front().map_or(now, |(at, _)| *at));
        let (mut total, mut suspects) = (0usize, 0usize);
        for member in self.members.values().filter(|member| member.network == *name) {
            let suspect = away_since(member, start);
            suspects += usize::from(suspect);
            total += usize::from(suspect || member.out.is_none());
        }
        let many = suspects >= BRAKE_MEMBERS_MIN && suspects * 100 > total * BRAKE_SHARE_PERCENT;
        if many == network.braked_since.is_some() {
            return;
        }
        network.braked_since = many.then_some(start);
        self.actions.push_back(Action::Brake {
            network: Arc::clone(name),
            engaged: many,
        });
        let concerned: Vec<DeviceId> = self
            .members
            .iter_mut()
            .filter(|(_, member)| member.network == *name && away_since(member, start))
            .map(|(device, member)| {
                if many && member.out_by_suspicion {
                    (member.out, member.out_by_suspicion) = (None, false);
                    member.next_dial = Some(now + REDIAL);
                }
                *device
            })
            .collect();
        for device in concerned {
            self.actions.push_back(Action::Changed(device));
            self.judge(device, now);
            self.reschedule(device, now);
        }
    }

    /// How a member stands; `None` if it is unknown.
    pub fn standing(&self, device: DeviceId) -> Option<Standing> {
        let member = self.members.get(&device)?;
        if let Some(reason) = &member.out {
            return Some(Standing::Out(reason.clone()));
        }
        if member.streams > 0 {
            return Some(Standing::Connected);
        }
        let braked = self
            .networks
            .get(&member.network)
            .is_some_and(|network| network.braked_since.is_some());
        let shown = |endpoint: &Option<SocketAddr>| endpoint.map_or_else(String::new, |e| e.to_string());
        let witness = match (member.witness, member.reached) {
            _ if member.endpoint.is_none() => "it has no address that could be dialled".into(),
            (Some(Dialled::Reached), _) => format!("{} still answers", shown(&member.endpoint)),
            (_, false) => format!(
                "{} was never reached from here, so there is no witness",
                shown(&member.endpoint)
            ),
            (Some(Dialled::Silent | Dialled::Refused), true) if braked => {
                "TMB0601 many members turned suspect at once: nobody is taken out".into()
            }
            (Some(Dialled::Silent | Dialled::Refused), true) if !self.grace_over => {
                "TMB0602 discovery has just started: nobody is taken out yet".into()
            }
            (Some(Dialled::Silent | Dialled::Refused) | None, true) => {
                format!("{} is being dialled", shown(&member.endpoint))
            }
        };
        let stream = if member.suspect_since.is_some() {
            "its control stream is lost"
        } else {
            "it has not reconnected"
        };
        Some(Standing::Suspect(format!("{stream}; {witness}")))
    }

    /// True while the start grace holds.
    pub fn in_grace(&self) -> bool {
        !self.grace_over
    }

    /// Networks whose brake is engaged.
    pub fn braked(&self) -> impl Iterator<Item = &Arc<str>> {
        self.networks
            .iter()
            .filter(|(_, network)| network.braked_since.is_some())
            .map(|(name, _)| name)
    }

    /// What should be remembered over a restart.
    pub fn remember(&self, device: DeviceId) -> Option<Remembered> {
        let member = self.members.get(&device)?;
        Some(Remembered {
            reached: member.reached,
            out: member.out.clone(),
        })
    }
}

impl Member {
    fn new(network: Arc<str>, endpoint: Option<SocketAddr>) -> Self {
        Self {
            network,
            endpoint,
            reached: false,
            streams: 0,
            suspect_since: None,
            witness: None,
            out: None,
            out_by_suspicion: false,
            dialling: false,
            next_dial: None,
            learn_interval: LEARN_MIN,
            wake: None,
        }
    }

    /// Was there before the start and has not come back.
    fn is_missing(&self) -> bool {
        self.streams == 0 && self.suspect_since.is_none() && self.out.is_none()
    }
}

#[cfg(test)]
mod tests;
