use super::*;

/// A machine with a clock, and a world in which some endpoints answer.
struct Lab {
    live: Liveness,
    now: Instant,
    answers: BTreeMap<SocketAddr, Dialled>,
    brakes: Vec<bool>,
    dials: usize,
}

fn endpoint(n: u64) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, u8::try_from(n).unwrap()], 15008))
}

impl Lab {
    /// `n` members that are connected and were reached, the grace over.
    fn running(n: u64) -> Self {
        let mut lab = Self::new();
        for id in 1..=n {
            lab.live
                .upsert(DeviceId(id), "".into(), Some(endpoint(id)), lab.now);
            lab.connect(id);
        }
        lab.pass(GRACE + Duration::from_secs(1));
        lab
    }

    fn new() -> Self {
        let now = Instant::now();
        Self {
            live: Liveness::new(now, GRACE),
            now,
            answers: BTreeMap::new(),
            brakes: Vec::new(),
            dials: 0,
        }
    }

    fn connect(&mut self, id: u64) {
        self.live.handle_connected(DeviceId(id), self.now);
        self.settle();
    }

    fn lose(&mut self, id: u64) {
        self.live.handle_disconnected(DeviceId(id), self.now);
        self.settle();
    }

    fn answer(&mut self, id: u64, found: Dialled) {
        self.answers.insert(endpoint(id), found);
    }

    /// Runs timers and dials at the present instant. A silent endpoint takes 500 ms: its answer comes by `pass`.
    fn settle(&mut self) {
        self.live.handle_timeout(self.now);
        while let Some(action) = self.live.poll_action() {
            match action {
                Action::Dial { device, endpoint } => {
                    self.dials += 1;
                    let found = self.answers.get(&endpoint).copied().unwrap_or(Dialled::Reached);
                    self.live.handle_dialled(device, endpoint, found, self.now);
                }
                Action::Changed(_) => {}
                Action::Brake { engaged, .. } => self.brakes.push(engaged),
            }
            self.live.handle_timeout(self.now);
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some((at, _)) = self.live.poll_timeout().filter(|(at, _)| *at <= end) {
            assert!(at > self.now || self.live.dialling > 0, "no busy loop");
            self.now = at.max(self.now);
            self.settle();
        }
        self.now = end;
    }

    fn is_in(&self, id: u64) -> bool {
        self.live.standing(DeviceId(id)).unwrap().is_in()
    }

    fn reason(&self, id: u64) -> String {
        match self.live.standing(DeviceId(id)).unwrap() {
            Standing::Connected => String::new(),
            Standing::Suspect(reason) | Standing::Out(reason) => reason,
        }
    }
}

#[test]
fn power_off_is_out_within_the_settle_time_and_comes_back_by_its_stream() {
    let mut lab = Lab::running(3);
    lab.answer(2, Dialled::Silent);
    lab.lose(2);
    assert!(lab.is_in(2), "one witness is not enough");
    lab.pass(SETTLE);
    assert!(!lab.is_in(2));
    assert!(
        lab.reason(2).contains("10.0.0.2:15008 does not answer"),
        "{}",
        lab.reason(2)
    );
    let dials = lab.dials;
    lab.pass(Duration::from_secs(60));
    assert_eq!(lab.dials, dials, "whoever is out is not dialled any more");
    lab.connect(2);
    assert_eq!(lab.live.standing(DeviceId(2)), Some(Standing::Connected));
}

#[test]
fn a_refusal_is_believed_at_once() {
    let mut lab = Lab::running(2);
    lab.answer(1, Dialled::Refused);
    lab.lose(1);
    assert!(!lab.is_in(1));
}

#[test]
fn a_member_that_answers_stays_and_is_dialled_each_second() {
    let mut lab = Lab::running(2);
    lab.lose(1);
    let dials = lab.dials;
    lab.pass(Duration::from_secs(30));
    assert!(lab.is_in(1) && lab.reason(1).contains("still answers"));
    assert!((29..=31).contains(&(lab.dials - dials)), "{}", lab.dials - dials);
    lab.answer(1, Dialled::Silent);
    lab.pass(Duration::from_secs(2));
    assert!(!lab.is_in(1), "died later");
}

#[test]
fn an_endpoint_that_was_never_reached_is_no_witness() {
    let mut lab = Lab::new();
    lab.answer(1, Dialled::Silent);
    lab.live
        .upsert(DeviceId(1), "".into(), Some(endpoint(1)), lab.now);
    lab.connect(1);
    lab.pass(Duration::from_secs(600));
    assert!(lab.dials < 20, "learning backs off: {}", lab.dials);
    lab.lose(1);
    lab.pass(Duration::from_secs(60));
    assert!(
        lab.is_in(1) && lab.reason(1).contains("no witness"),
        "{}",
        lab.reason(1)
    );
    // Nor is one that moved.
    let mut lab = Lab::running(1);
    lab.answer(9, Dialled::Silent);
    lab.live
        .upsert(DeviceId(1), "".into(), Some(endpoint(9)), lab.now);
    lab.lose(1);
    lab.pass(Duration::from_secs(60));
    assert!(lab.is_in(1));
}

#[test]
fn enrolled_but_never_connected_is_out() {
    let mut lab = Lab::new();
    lab.live
        .upsert(DeviceId(1), "".into(), Some(endpoint(1)), lab.now);
    lab.settle();
    assert!(!lab.is_in(1));
    lab.connect(1);
    assert!(lab.is_in(1));
}

#[test]
fn discovery_cut_off_takes_nobody_out() {
    let mut lab = Lab::running(50);
    (1..=50).for_each(|id| lab.answer(id, Dialled::Silent));
    // Streams time out over one PING interval.
    for id in 1..=50 {
        lab.lose(id);
        lab.pass(Duration::from_millis(20));
    }
    for _ in 0..60 {
        assert!((1..=50).all(|id| lab.is_in(id)));
        lab.pass(Duration::from_secs(1));
    }
    assert_eq!(lab.brakes, [true]);
    assert!(lab.reason(7).contains("TMB0601"));
    // The network is back: all return but one, which is then taken out.
    (1..=49).for_each(|id| lab.answer(id, Dialled::Reached));
    (1..=49).for_each(|id| lab.connect(id));
    assert_eq!(lab.brakes, [true, false]);
    lab.pass(Duration::from_secs(2));
    assert!(!lab.is_in(50) && (1..=49).all(|id| lab.is_in(id)));
}

#[test]
fn who_was_taken_out_just_before_the_brake_is_put_back() {
    let mut lab = Lab::running(10);
    (1..=10).for_each(|id| lab.answer(id, Dialled::Silent));
    lab.lose(1);
    lab.pass(Duration::from_secs(1));
    assert!(!lab.is_in(1));
    (2..=5).for_each(|id| lab.lose(id));
    assert_eq!(lab.brakes, [true]);
    assert!((1..=10).all(|id| lab.is_in(id)));
}

#[test]
fn the_brake_needs_five_and_a_fifth() {
    // Four of four: a small network.
    let mut lab = Lab::running(4);
    (1..=4).for_each(|id| lab.answer(id, Dialled::Silent));
    (1..=4).for_each(|id| lab.lose(id));
    lab.pass(Duration::from_secs(1));
    assert!((1..=4).all(|id| !lab.is_in(id)));
    // Five of twenty-five are a fifth, not more.
    let mut lab = Lab::running(25);
    (1..=25).for_each(|id| lab.answer(id, Dialled::Silent));
    (1..=5).for_each(|id| lab.lose(id));
    lab.pass(Duration::from_secs(1));
    assert!((1..=5).all(|id| !lab.is_in(id)) && lab.brakes.is_empty());
    // Slow deaths do not add up: more than the window lies between them.
    let mut lab = Lab::running(20);
    (1..=20).for_each(|id| lab.answer(id, Dialled::Silent));
    for id in 1..=10 {
        lab.lose(id);
        lab.pass(BRAKE_WINDOW);
    }
    assert!((1..=10).all(|id| !lab.is_in(id)) && lab.brakes.is_empty());
}

#[test]
fn networks_brake_apart() {
    let mut lab = Lab::running(8);
    for id in 11..=12 {
        lab.live
            .upsert(DeviceId(id), "edge".into(), Some(endpoint(id)), lab.now);
        lab.connect(id);
        lab.answer(id, Dialled::Silent);
    }
    (1..=8).for_each(|id| lab.answer(id, Dialled::Silent));
    (1..=8).for_each(|id| lab.lose(id));
    lab.lose(11);
    lab.pass(Duration::from_secs(2));
    assert!((1..=8).all(|id| lab.is_in(id)) && !lab.is_in(11) && lab.is_in(12));
}

#[test]
fn grace_after_a_start() {
    let mut lab = Lab::new();
    let known = Remembered {
        reached: true,
        out: None,
    };
    for id in 1..=3 {
        lab.live.load(DeviceId(id), "".into(), Some(endpoint(id)), &known);
        lab.answer(id, Dialled::Silent);
    }
    let out = Remembered {
        reached: true,
        out: Some("gone".into()),
    };
    lab.live.load(DeviceId(4), "".into(), Some(endpoint(4)), &out);
    lab.connect(1);
    lab.lose(1);
    lab.connect(2);
    lab.pass(GRACE - Duration::from_secs(1));
    assert!(
        (1..=3).all(|id| lab.is_in(id)),
        "nobody is taken out in the grace"
    );
    assert!(lab.reason(1).contains("TMB0602"), "{}", lab.reason(1));
    assert!(!lab.is_in(4), "who was out stays out");
    lab.pass(Duration::from_secs(3));
    assert!(!lab.is_in(1) && lab.is_in(2) && !lab.is_in(3));
}

#[test]
fn two_streams_of_one_device_count() {
    let mut lab = Lab::running(1);
    lab.connect(1);
    lab.answer(1, Dialled::Refused);
    lab.lose(1);
    assert_eq!(lab.live.standing(DeviceId(1)), Some(Standing::Connected));
    lab.lose(1);
    assert!(!lab.is_in(1));
}

#[test]
fn removed_members_leave_nothing() {
    let mut lab = Lab::running(30);
    (1..=30).for_each(|id| lab.answer(id, Dialled::Silent));
    (1..=30).for_each(|id| lab.lose(id));
    (1..=30).for_each(|id| lab.live.remove(DeviceId(id)));
    assert!(lab.live.timers.is_empty() && lab.live.dialling == 0);
    assert_eq!(lab.live.standing(DeviceId(1)), None);
    assert!(lab.live.networks.values().all(|n| n.recent.is_empty()));
}
