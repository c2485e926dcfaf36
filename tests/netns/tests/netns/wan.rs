//! A long way that loses packets: what QUIC between networks must carry there. `make bench-wan` compares the transports.

use crate::needs_root;
use anyhow::{Result, ensure};
use std::time::Duration;
use tombolo_bench_wan::{Load, Transport, World};
use tombolo_testkit::WanOptions;

/// 50 ms, 1 % lost each way, 100 Mbit/s: TCP with cubic carries 3 Mbit/s there, on any machine.
#[test]
fn quic_lives_with_delay_and_loss() -> Result<()> {
    needs_root!();
    let world = World::new(WanOptions {
        delay: Duration::from_millis(25),
        jitter: Duration::ZERO,
        loss_ppm: 10_000,
        rate_bits: 100_000_000,
        queue_bytes: 625_000,
        seed: 7,
    })?;
    let outcome = world.run(
        Transport::Quic,
        Load {
            bulk: 4,
            requesters: 2,
            warm_up: Duration::from_millis(1500),
            measured: Duration::from_secs(2),
        },
    )?;
    let (there, _) = world.wan().counts();
    ensure!(there.lost > 50, "the way lost nothing: {there:?}");
    let megabits = outcome.goodput * 8.0 / 1e6;
    // Half of the link: busy machines give each side too little CPU for all of it.
    ensure!(megabits > 50.0, "{megabits:.1} Mbit/s: {outcome:?}");
    ensure!(
        outcome.retransmitted < 0.06,
        "{:.3}: {outcome:?}",
        outcome.retransmitted
    );
    ensure!(outcome.latencies.len() > 10, "{outcome:?}");
    let half = outcome.quantile(500);
    ensure!(half >= Duration::from_millis(50), "faster than the way: {half:?}");
    ensure!(half < Duration::from_millis(150), "{half:?}: {outcome:?}");
    Ok(())
}
