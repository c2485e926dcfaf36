//! The streams of one connection, as HTTP/2 brings them.

use super::{Accepted, Incoming, Service, Shared};
use crate::{conn_io::ConnIo, driver::Http2, observe::Observe};
use bytes::Bytes;
use h2::{PingPong, Reason, server::Connection};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tombolo_runtime::TaskGroup;

/// The server's side of HTTP/2.
pub(super) struct ServerSide<S> {
    connection: Connection<ConnIo, Bytes>,
    accepted: Arc<Accepted>,
    service: Arc<S>,
    tasks: TaskGroup,
    serving: Arc<AtomicUsize>,
    serving_max: usize,
    observer: Arc<dyn Observe>,
    told: bool,
}

impl<S> ServerSide<S> {
    pub(super) fn new(
        connection: Connection<ConnIo, Bytes>,
        accepted: &Arc<Accepted>,
        service: Arc<S>,
        tasks: TaskGroup,
        shared: &Shared,
    ) -> Self {
        Self {
            connection,
            accepted: Arc::clone(accepted),
            service,
            tasks,
            serving: Arc::default(),
            // A stream that ends is forgotten by HTTP/2 a little earlier than by its task.
            serving_max: 2 * usize::try_from(shared.limits.streams_max).unwrap_or(usize::MAX / 2),
            observer: Arc::clone(&shared.observer),
            told: false,
        }
    }
}

/// One stream that is being served.
struct Serving(Arc<AtomicUsize>);

impl Serving {
    fn start(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<S: Service> Http2 for ServerSide<S> {
    fn poll_drive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            match self.connection.poll_accept(cx) {
                // HTTP/2 forgets a stream that was reset, but what it has started goes on for a while.
                Poll::Ready(Some(Ok((_, mut respond))))
                    if self.serving.load(Ordering::Acquire) >= self.serving_max =>
                {
                    respond.send_reset(Reason::REFUSED_STREAM);
                    self.observer.limited("streams");
                    if !std::mem::replace(&mut self.told, true) {
                        tracing::warn!(
                            peer = %self.accepted.peer.id, remote = %self.accepted.remote, max = self.serving_max,
                            "streams refused: this connection opens them faster than they end"
                        );
                    }
                }
                Poll::Ready(Some(Ok((request, respond)))) => {
                    let incoming = Incoming::over_http2(request, respond, Arc::clone(&self.accepted));
                    let serving = Serving::start(&self.serving);
                    let served = Arc::clone(&self.service).connect(incoming);
                    self.tasks.spawn("hbone stream", async move {
                        served.await;
                        drop(serving);
                    });
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn ping_pong(&mut self) -> Option<PingPong> {
        self.connection.ping_pong()
    }

    fn grow(&mut self, window: u32) {
        // Fails only while an earlier change is unacknowledged: then the windows stay as they are.
        let _ = self.connection.set_initial_window_size(window);
    }

    fn drain(&mut self) {
        self.connection.graceful_shutdown();
    }
}
