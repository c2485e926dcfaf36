//! How long to wait before the next attempt.

use std::time::Duration;

/// Exponential backoff. Pure: randomness is an argument.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    most: Duration,
    attempts: u32,
}

impl Backoff {
    /// Starts at `first` and doubles up to `most`.
    pub const fn new(first: Duration, most: Duration) -> Self {
        Self {
            first,
            most,
            attempts: 0,
        }
    }

    /// For the control stream: 10 ms to 15 s, as Istio's clients wait.
    pub const fn stream() -> Self {
        Self::new(Duration::from_millis(10), Duration::from_secs(15))
    }

    /// The next wait. `random` in 0..1 takes up to half of it away, so that a fleet does not come back at once.
    pub fn next(&mut self, random: f64) -> Duration {
        let full = self
            .first
            .saturating_mul(1 << self.attempts.min(20))
            .min(self.most);
        self.attempts = self.attempts.saturating_add(1);
        full.mul_f64(1.0 - random.clamp(0.0, 1.0) / 2.0)
    }

    /// Attempts since the last success.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    /// After a success.
    pub const fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_its_limit_and_jitters_downward() {
        let mut backoff = Backoff::stream();
        let waits: Vec<_> = (0..13).map(|_| backoff.next(0.0).as_millis()).collect();
        assert_eq!(
            waits,
            [
                10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000
            ]
        );
        assert_eq!(backoff.next(1.0), Duration::from_millis(7500));
        for _ in 0..100 {
            backoff.next(0.5);
        }
        assert_eq!(
            backoff.next(0.0),
            Duration::from_secs(15),
            "many attempts do not overflow"
        );
        backoff.reset();
        assert_eq!(backoff.next(0.0), Duration::from_millis(10));
    }
}
