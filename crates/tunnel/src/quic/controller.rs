//! Congestion control between networks: quinn's BBR, held to what the path has shown to carry.
//!
//! BBR finds the bandwidth of a lossy path where loss-based controllers give up, but quinn's lets far more than a
//! round trip of data into the queue of a bottleneck, which then drops it. So its window is capped at a little more than
//! the highest delivery rate of the last rounds times the shortest round trip.
//!
//! Source: draft-ietf-ccwg-bbr (BDP, cwnd_gain, min_rtt filter of 10 s).

use quinn::congestion::{Bbr, BbrConfig, Controller, ControllerFactory, ControllerMetrics};
use quinn_proto::RttEstimator;
use std::{
    any::Any,
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// Data in flight for each unit of bandwidth-delay product, in percent. Measured over 300 Mbit/s, 50 ms and 1 % loss
/// (benches/README.md): nothing dropped by a queue of one such product, 95 % of the link carried.
const GAIN: u64 = 125;
/// Rounds whose best delivery rate counts.
const ROUNDS: usize = 10;
/// A shortest round trip is believed for so long.
const MIN_RTT_LIFE: Duration = Duration::from_secs(10);
/// Shortest round: below that a rate is made of too few packets.
const ROUND_MIN: Duration = Duration::from_millis(5);
/// Never fewer packets in flight than these, in bytes.
const FLOOR: u64 = 32 * 1200;

/// Makes the controllers of connections.
#[derive(Debug, Default)]
pub(crate) struct CappedBbr;

impl ControllerFactory for CappedBbr {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let inner = Arc::new(BbrConfig::default()).build(now, current_mtu);
        Box::new(Capped {
            inner,
            path: Path::new(now),
        })
    }
}

struct Capped {
    inner: Box<dyn Controller>,
    path: Path,
}

/// What the path has shown.
#[derive(Debug, Clone)]
struct Path {
    /// Bytes per second of the last rounds.
    rates: VecDeque<u64>,
    round_began: Instant,
    acked: u64,
    min_rtt: Option<(Duration, Instant)>,
    smoothed: Duration,
}

impl Path {
    fn new(now: Instant) -> Self {
        Self {
            rates: VecDeque::with_capacity(ROUNDS),
            round_began: now,
            acked: 0,
            min_rtt: None,
            smoothed: Duration::ZERO,
        }
    }

    /// A packet was acknowledged, a round trip of `rtt` after it was sent.
    fn acked(&mut self, now: Instant, bytes: u64, rtt: Duration, smoothed: Duration, app_limited: bool) {
        let expired = |(_, since): &(Duration, Instant)| now.duration_since(*since) > MIN_RTT_LIFE;
        if self
            .min_rtt
            .as_ref()
            .is_none_or(|held| rtt <= held.0 || expired(held))
        {
            self.min_rtt = Some((rtt, now));
        }
        self.smoothed = smoothed;
        self.acked += bytes;
        let round = now.duration_since(self.round_began);
        if round < smoothed.max(ROUND_MIN) {
            return;
        }
        let micros = u64::try_from(round.as_micros()).unwrap_or(u64::MAX).max(1);
        let rate = self.acked.saturating_mul(1_000_000) / micros;
        // A round in which the application had nothing to send says nothing about the path, unless it was a record.
        let best = self.rates.iter().copied().max().unwrap_or(0);
        if !app_limited || rate > best {
            if self.rates.len() == ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.round_began = now;
        self.acked = 0;
    }

    /// Most bytes in flight; `None` before anything is known.
    fn cap(&self) -> Option<u64> {
        // The first rounds are the search for the bandwidth: BBR's own window, which doubles, is the better guide.
        if self.rates.len() < 4 {
            return None;
        }
        let rate = self.rates.iter().copied().max()?;
        let (rtt, _) = self.min_rtt?;
        let micros = u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
        let product = u128::from(rate) * u128::from(micros) / 1_000_000;
        let cap = product * u128::from(GAIN) / 100;
        Some(u64::try_from(cap).unwrap_or(u64::MAX).max(FLOOR))
    }
}

impl Controller for Capped {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        let measured = now.saturating_duration_since(sent);
        self.path.acked(now, bytes, measured, rtt.get(), app_limited);
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.inner.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.inner.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        let window = self.inner.window();
        self.path.cap().map_or(window, |cap| window.min(cap))
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.inner.metrics();
        metrics.congestion_window = self.window();
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            inner: self.inner.clone_box(),
            path: self.path.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        // Whoever asks for quinn's controller gets it.
        let bbr: Box<dyn Any> = self.inner.into_any();
        match bbr.downcast::<Bbr>() {
            Ok(bbr) => bbr,
            Err(other) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 MB/s at 50 ms: the window is a quarter more than the path holds.
    #[test]
    fn the_window_follows_the_path() {
        let start = Instant::now();
        let mut path = Path::new(start);
        assert_eq!(path.cap(), None);
        let rtt = Duration::from_millis(50);
        for step in 1..=1000u32 {
            path.acked(start + Duration::from_millis(1) * step, 10_000, rtt, rtt, false);
        }
        let cap = path.cap().unwrap();
        assert!((600_000..660_000).contains(&cap), "{cap}");
        // A queue makes round trips longer and raises nothing.
        let long = Duration::from_millis(200);
        for step in 1001..=2000u32 {
            path.acked(start + Duration::from_millis(1) * step, 10_000, long, long, false);
        }
        assert!(path.cap().unwrap() < 660_000, "{:?}", path.cap());
        // A path that has become longer is believed after a while.
        for step in 2001..=30_000u32 {
            path.acked(start + Duration::from_millis(1) * step, 10_000, long, long, false);
        }
        assert!(path.cap().unwrap() > 2_000_000, "{:?}", path.cap());
    }

    #[test]
    fn an_idle_application_does_not_shrink_it() {
        let start = Instant::now();
        let mut path = Path::new(start);
        let rtt = Duration::from_millis(20);
        for step in 1..=500u32 {
            path.acked(start + Duration::from_millis(1) * step, 20_000, rtt, rtt, false);
        }
        let before = path.cap().unwrap();
        for step in 501..=3000u32 {
            path.acked(start + Duration::from_millis(1) * step, 10, rtt, rtt, true);
        }
        assert_eq!(path.cap(), Some(before));
    }
}
