//! Runs every transport over the same way and prints a table; `--json` adds a line for each run.
#![allow(clippy::print_stdout, reason = "the table is what it is for")]

use anyhow::Result;
use clap::Parser as _;
use std::time::Duration;
use tombolo_bench_wan::{Load, Outcome, Transport, World};
use tombolo_testkit::WanOptions;

/// The transports between networks over an emulated long way.
#[derive(Debug, clap::Parser)]
struct Args {
    /// Round trip of the way, in milliseconds.
    #[arg(long, default_value_t = 50)]
    rtt_ms: u64,
    /// Jitter of each direction, in milliseconds.
    #[arg(long, default_value_t = 0)]
    jitter_ms: u64,
    /// Packets lost by chance in each direction, in per cent.
    #[arg(long, default_value_t = 1.0)]
    loss: f64,
    /// Rate of each direction, in Mbit/s.
    #[arg(long, default_value_t = 300)]
    rate_mbit: u64,
    /// What waits in front of the bottleneck, in milliseconds of its rate.
    #[arg(long, default_value_t = 50)]
    queue_ms: u64,
    /// Of the losses.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How often everything is run; medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: u64,
    /// Measured seconds of a run.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Only transports whose label has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// A line of JSON for each run, on standard error.
    #[arg(long)]
    json: bool,
}

const TRANSPORTS: [Transport; 5] = [
    Transport::Quic,
    Transport::Hbone("bbr"),
    Transport::Double("bbr"),
    Transport::Hbone("cubic"),
    Transport::Double("cubic"),
];

/// The runs of one transport.
#[derive(Default)]
struct Runs {
    bulk: Vec<Outcome>,
    mixed: Vec<Outcome>,
}

fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn main() -> Result<()> {
    let args = Args::parse();
    let rate_bits = args.rate_mbit * 1_000_000;
    let options = |seed| WanOptions {
        delay: Duration::from_micros(args.rtt_ms * 500),
        jitter: Duration::from_millis(args.jitter_ms),
        loss_ppm: (args.loss * 10_000.0) as u32,
        rate_bits,
        queue_bytes: rate_bits / 8 * args.queue_ms / 1000,
        seed,
    };
    let load = |bulk, requesters| Load {
        bulk,
        requesters,
        warm_up: Duration::from_secs(2),
        measured: Duration::from_secs(args.seconds),
    };
    let transports: Vec<Transport> = TRANSPORTS
        .into_iter()
        .filter(|transport| transport.label().contains(&args.only))
        .collect();
    let mut runs: Vec<Runs> = transports.iter().map(|_| Runs::default()).collect();
    for round in 0..args.rounds {
        for (transport, runs) in transports.iter().zip(&mut runs) {
            // The same losses for each.
            let world = World::new(options(args.seed + round))?;
            for (name, load, kept) in [
                ("bulk", load(8, 0), &mut runs.bulk),
                ("mixed", load(1, 8), &mut runs.mixed),
            ] {
                let outcome = world.run(*transport, load)?;
                eprintln!(
                    "{round} {name:5} {:20} {:6.1} Mbit/s, {:4.2} % again, p50 {:5.1} p90 {:5.1} ms ({}; {})",
                    transport.label(),
                    outcome.goodput * 8.0 / 1e6,
                    outcome.retransmitted * 100.0,
                    ms(outcome.quantile(500)),
                    ms(outcome.quantile(900)),
                    outcome.latencies.len(),
                    outcome.detail,
                );
                if args.json {
                    let line = serde_json::json!({
                        "round": round, "test": name, "transport": transport.label(),
                        "goodput_bits_per_second": outcome.goodput * 8.0,
                        "retransmitted": outcome.retransmitted,
                        "requests": outcome.latencies.len(),
                        "p50_ms": ms(outcome.quantile(500)), "p90_ms": ms(outcome.quantile(900)),
                        "p99_ms": ms(outcome.quantile(990)),
                        "seed": args.seed + round,
                    });
                    println!("{line}");
                }
                kept.push(outcome);
            }
        }
    }
    println!(
        "| transport | 8 bulk streams, Mbit/s | of the link | sent again | requests p50, ms | p90, ms | p99, ms | bulk beside them, Mbit/s |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for (transport, runs) in transports.iter().zip(&runs) {
        let bulk = median(runs.bulk.iter().map(|run| run.goodput * 8.0 / 1e6));
        let quantile = |q| median(runs.mixed.iter().map(|run| ms(run.quantile(q))));
        println!(
            "| {} | {bulk:.0} | {:.0} % | {:.2} % | {:.1} | {:.1} | {:.1} | {:.0} |",
            transport.label(),
            bulk / args.rate_mbit as f64 * 100.0,
            median(runs.bulk.iter().map(|run| run.retransmitted)) * 100.0,
            quantile(500),
            quantile(900),
            quantile(990),
            median(runs.mixed.iter().map(|run| run.goodput * 8.0 / 1e6)),
        );
    }
    Ok(())
}
