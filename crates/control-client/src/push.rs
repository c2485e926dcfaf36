//! Metrics, pushed to discovery for hosts that nobody can scrape: over the connection of the control stream, so that no
//! other port is needed and the certificate says whose they are.

use crate::Problem;
use std::{fmt, sync::Arc, time::Duration};
use tokio::time::{sleep, timeout};
use tombolo_proto::tombolo::v1::{PushMetricsRequest, telemetry_client::TelemetryClient};
use tombolo_types::Code;
use tonic::{Status, transport::Channel};

/// Bytes of a push: what discovery takes at most.
const EXPOSITION_MAX: usize = 256 << 10;
/// One call; it is one write to memory over there.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// After a refusal: nothing changes by itself soon.
const REFUSED_PERIODS: u32 = 20;

/// What is pushed, and how often.
#[derive(Clone)]
pub struct MetricsPush {
    /// From one push to the next.
    pub period: Duration,
    /// The text as a scraper would read it here.
    pub encode: Arc<dyn Fn() -> String + Send + Sync>,
}

impl fmt::Debug for MetricsPush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MetricsPush")
            .field("period", &self.period)
            .finish_non_exhaustive()
    }
}

/// Pushes until it is dropped. The first push is at a random moment of the first period, so that a discovery that was
/// restarted does not get all of them at once. Cancel-safe.
pub(crate) async fn run(push: Option<&MetricsPush>, channel: Channel) {
    let Some(push) = push else {
        return std::future::pending().await;
    };
    let mut client = TelemetryClient::new(channel);
    let mut last: Option<String> = None;
    let (mut wait, mut said) = (push.period.mul_f64(rand::random()), false);
    loop {
        sleep(wait).await;
        wait = push.period;
        let text = bounded((push.encode)());
        if text.is_empty() {
            continue;
        }
        let unchanged = last.as_ref() == Some(&text);
        let request = PushMetricsRequest {
            exposition: if unchanged { String::new() } else { text.clone() },
            unchanged,
        };
        match timeout(CALL_TIMEOUT, client.push_metrics(request)).await {
            Ok(Ok(answer)) if answer.get_ref().resend => {
                last = None;
                wait = Duration::ZERO;
            }
            Ok(Ok(_)) => (last, said) = (Some(text), false),
            // A discovery of an older version: nothing to push to on this connection.
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => {
                tracing::debug!("discovery takes no metrics");
                return std::future::pending().await;
            }
            Ok(Err(status)) => {
                last = None;
                if let Some(problem) = refusal(&status) {
                    if !said {
                        tracing::warn!("{problem}");
                    }
                    (wait, said) = (push.period * REFUSED_PERIODS, true);
                }
            }
            Err(_) => last = None, // the control stream notices by itself whether the connection still lives
        }
    }
}

fn refusal(status: &Status) -> Option<Problem> {
    let problem = Problem::from_status(status, Code::Unreachable);
    (problem.code != Code::Unreachable).then_some(problem)
}

/// As many whole families as fit.
fn bounded(text: String) -> String {
    if text.len() <= EXPOSITION_MAX {
        return text;
    }
    let mut end = 0;
    for (at, _) in text.match_indices("\n# HELP ") {
        if at + 1 > EXPOSITION_MAX {
            break;
        }
        end = at + 1;
    }
    tracing::debug!(
        bytes = text.len(),
        pushed = end,
        "the metrics are too long to be pushed whole"
    );
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_families_are_pushed() {
        let family =
            |name: &str, lines: usize| format!("# HELP {name} x\n{}", format!("{name} 1\n").repeat(lines));
        let short = family("a", 10);
        assert_eq!(bounded(short.clone()), short);
        let long = family("a", 10) + &family("b", 10) + &family("c", EXPOSITION_MAX / 4) + &family("d", 1);
        assert_eq!(bounded(long), family("a", 10) + &family("b", 10));
        assert_eq!(bounded(family("a", EXPOSITION_MAX)), "");
    }
}
