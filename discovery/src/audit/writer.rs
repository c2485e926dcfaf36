//! The thread that writes.

use super::{Line, Shared, files::Log, text_of};
use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};
use tombolo_types::Code;

/// After a failure the disk is asked again no sooner than this; what comes in between waits in the queue.
const RETRY: Duration = Duration::from_secs(1);

/// Writes until the queue is closed and empty.
pub(super) fn run(mut log: Log, shared: &Shared) {
    let mut retry_at: Option<Instant> = None;
    loop {
        let (mut lines, last, mut lost, closed) = {
            let mut queue = shared.queue();
            while queue.lines.is_empty() && queue.lost == 0 && !queue.closed {
                queue = shared.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            (
                std::mem::take(&mut queue.lines),
                queue.last,
                std::mem::take(&mut queue.lost),
                queue.closed,
            )
        };
        if lines.is_empty() && (lost == 0 || closed) {
            return;
        }
        // A disk that is full is not asked for every line: what it would refuse is only counted.
        if !closed && retry_at.is_some_and(|at| Instant::now() < at) {
            lost += lines.len() as u64;
            shared.queue().lost += lost;
            shared.done.send_replace(last);
            std::thread::sleep(RETRY / 10);
            continue;
        }
        if lost > 0 {
            let line = Line {
                who: "discovery".into(),
                from: "local".into(),
                verb: "audit".into(),
                object: "Audit".into(),
                result: "lines before this one could not be written".into(),
                omitted: lost,
                ..Line::default()
            };
            lines.splice(0..0, text_of(line));
        }
        let wanted = lines.len() as u64 - u64::from(lost > 0) + lost;
        match log.append(&lines.concat()) {
            Ok(()) => {
                retry_at = None;
                if shared.failing.send_replace(None).is_some() {
                    tracing::info!(lost, "the audit log is written again");
                }
            }
            Err(error) => {
                retry_at = Some(Instant::now() + RETRY);
                let cause = format!("{}: {error}", log.path().display());
                if shared.failing.send_replace(Some(cause.clone())).is_none() {
                    tracing::error!("{}", Code::AuditFailing.message(cause));
                }
                shared.queue().lost += wanted;
            }
        }
        shared.done.send_replace(last);
    }
}
