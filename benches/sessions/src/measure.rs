//! What a process uses, as the kernel counts it.

use anyhow::{Context as _, Result};
use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

/// Memory of a process in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Everything resident.
    pub(crate) resident: u64,
    /// Of it what the program itself has made: heap and stacks.
    pub(crate) anonymous: u64,
}

pub(crate) fn memory(pid: i32) -> Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_suffix("kB"))
            .and_then(|value| value.trim().parse::<u64>().ok())
            .with_context(|| name.to_owned())
    };
    Ok(Memory {
        resident: field("VmRSS:")?,
        anonymous: field("RssAnon:")?,
    })
}

/// As [`memory`], when it has not changed by more than a hundredth for two seconds.
pub(crate) fn settled(pid: i32, patience: Duration) -> Result<Memory> {
    let end = Instant::now() + patience;
    let mut last = memory(pid)?;
    loop {
        sleep(Duration::from_secs(2));
        let now = memory(pid)?;
        if now.anonymous.abs_diff(last.anonymous) * 100 <= last.anonymous || Instant::now() > end {
            return Ok(now);
        }
        last = now;
    }
}

/// CPU of a process over a time, in per cent of one core.
pub(crate) fn cpu(pid: i32, over: Duration) -> Result<f64> {
    let (before, began) = (cpu_time(pid)?, Instant::now());
    sleep(over);
    let used = cpu_time(pid)?.saturating_sub(before);
    Ok(used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0)
}

/// User and system time. Source: proc(5), fields 14 and 15 of stat, in hundredths of a second.
fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').context("stat")?.1;
    let mut fields = after_name.split_whitespace().skip(11);
    let mut ticks = || {
        fields
            .next()
            .and_then(|field| field.parse::<u64>().ok())
            .context("stat")
    };
    Ok(Duration::from_millis(10 * (ticks()? + ticks()?)))
}
