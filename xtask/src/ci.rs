//! The run of everything: stages in order, each with its time against its budget, and one summary at the end.

use anyhow::{Context as _, Result, bail};
use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Over this the run fails, whatever the tests say.
const TOTAL_MAX: Duration = Duration::from_secs(45 * 60);

struct Stage {
    name: &'static str,
    /// Minutes on two cores with nothing built.
    budget_min: u32,
    /// Words, variables of the environment first. `--show-output`: what a suite skips, and why, is to be seen.
    commands: &'static [&'static str],
}

const STAGES: &[Stage] = &[
    Stage {
        name: "format",
        budget_min: 1,
        commands: &["cargo fmt --all --check"],
    },
    Stage {
        name: "rules",
        budget_min: 2,
        commands: &[
            "cargo xtask layers",
            "cargo xtask licences",
            "cargo xtask unused",
            "cargo xtask docs --check",
        ],
    },
    Stage {
        name: "lints",
        budget_min: 5,
        commands: &["cargo clippy --locked --workspace --all-targets -- -D warnings"],
    },
    Stage {
        name: "unit",
        budget_min: 12,
        commands: &[
            "cargo test --locked --workspace --exclude tombolo-netns --exclude tombolo-interop \
            --exclude tombolo-packages --exclude tombolo-vm --lib --bins --tests -- --show-output",
        ],
    },
    Stage {
        name: "release build",
        budget_min: 10,
        commands: &[
            "cargo build --locked --release -p tombolo -p tombolo-agent -p tombolo-netd \
            -p tombolo-gateway -p tombolo-discovery -p tombolo-testkit -p tombolo-demo",
        ],
    },
    Stage {
        name: "netns",
        budget_min: 8,
        commands: &["cargo test --locked -p tombolo-netns --test netns -- --show-output --test-threads=2"],
    },
    Stage {
        name: "interop",
        budget_min: 3,
        commands: &[
            "cargo test --locked -p tombolo-interop --test interop -- --show-output --test-threads=1",
        ],
    },
    Stage {
        name: "packages",
        budget_min: 8,
        commands: &[
            "cargo test --locked -p tombolo-packages --test packages -- --show-output --test-threads=2",
            "cargo test --locked -p tombolo-vm --lib --test checks -- --show-output",
        ],
    },
];

/// What takes too long for every change: thousands of seeds and cycles, and real kernels, on an emulated processor
/// where there is no other.
const SLOW: &[Stage] = &[
    Stage {
        name: "release build",
        budget_min: 10,
        commands: &[
            "cargo build --locked --release -p tombolo -p tombolo-agent -p tombolo-netd \
            -p tombolo-gateway -p tombolo-discovery",
        ],
    },
    Stage {
        name: "simulation",
        budget_min: 20,
        commands: &[
            "SEEDS=10000 cargo test --locked -p tombolo-simulation --test federation -- --show-output",
        ],
    },
    Stage {
        name: "churn",
        budget_min: 10,
        commands: &[
            "CHURN_CYCLES=1000 cargo test --locked -p tombolo-discovery --test discovery federation_churn \
            -- --show-output",
        ],
    },
    Stage {
        name: "vm",
        budget_min: 40,
        commands: &["cargo test --locked -p tombolo-vm --test slow -- --show-output --test-threads=1"],
    },
];

#[derive(Default)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
    skipped: u64,
}

/// Runs the named stages, or all. Goes on after a failed stage, so that one run shows everything.
pub(crate) fn run(names: &[&str]) -> Result<()> {
    run_of(STAGES, names)
}

/// The same with the slow stages.
pub(crate) fn slow(names: &[&str]) -> Result<()> {
    run_of(SLOW, names)
}

fn run_of(stages: &[Stage], names: &[&str]) -> Result<()> {
    if let Some(unknown) = names
        .iter()
        .find(|name| !stages.iter().any(|stage| stage.name == **name))
    {
        let known: Vec<_> = stages.iter().map(|stage| stage.name).collect();
        bail!("no stage {unknown}; there are: {}", known.join(", "));
    }
    let start = Instant::now();
    let (mut counts, mut rows, mut failed) = (Counts::default(), Vec::new(), Vec::new());
    for stage in stages
        .iter()
        .filter(|stage| names.is_empty() || names.contains(&stage.name))
    {
        let begun = Instant::now();
        println!("\n=== {}", stage.name);
        for command in stage.commands {
            println!("$ {command}");
            if !step(command, &mut counts)? {
                failed.push(format!("{}: {command}", stage.name));
            }
        }
        rows.push(format!(
            "{:14} {:>6.0} s of {:>4} s",
            stage.name,
            begun.elapsed().as_secs_f64(),
            stage.budget_min * 60
        ));
    }
    println!(
        "\n=== time per stage\n{}\n{:14} {:>6.0} s",
        rows.join("\n"),
        "total",
        start.elapsed().as_secs_f64()
    );
    if start.elapsed() > TOTAL_MAX {
        failed.push(format!(
            "the run took longer than {} minutes",
            TOTAL_MAX.as_secs() / 60
        ));
    }
    for failure in &failed {
        println!("FAILED {failure}");
    }
    println!(
        "\ntest result: {}. {} passed; {} failed; {} ignored; {} suites skipped; {} stages failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        counts.passed,
        counts.failed,
        counts.ignored,
        counts.skipped,
        failed.len(),
    );
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("{} steps failed", failed.len())
    }
}

fn step(command: &str, counts: &mut Counts) -> Result<bool> {
    let mut words = command.split_whitespace().peekable();
    let mut variables = Vec::new();
    while let Some(variable) = words.peek().and_then(|word| word.split_once('=')) {
        variables.push(variable);
        words.next();
    }
    let program = words.next().context("a command")?;
    let program = if program == "cargo" {
        env!("CARGO")
    } else {
        program
    };
    let mut child = Command::new(program)
        .args(words)
        .envs(variables)
        // Tests print SKIPPED on stdout, which the harness captures unless it is told not to.
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let output = child.stdout.take().context("stdout")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        if let Some(rest) = line.strip_prefix("test result:") {
            let number = |word: &str| -> u64 {
                rest.split([';', '.'])
                    .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
                    .unwrap_or(0)
            };
            counts.passed += number("passed");
            counts.failed += number("failed");
            counts.ignored += number("ignored");
        }
        if line.starts_with("SKIPPED") {
            counts.skipped += 1;
        }
        println!("{line}");
        std::io::stdout().flush()?;
    }
    Ok(child.wait()?.success())
}
