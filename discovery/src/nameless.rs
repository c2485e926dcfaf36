//! Calls on a connection that has shown no certificate: a host that enrols or comes back needs two or three of them, a
//! client with a bearer token is not refused all the time. What is over that is answered once more and then closed, so
//! that whoever goes on needs another handshake, and those are bounded ([`crate::limits`]).

use crate::{listener::Link, refusal::Refusal};
use http::{Request, Response};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    task::{Context, Poll},
};
use tonic::Status;
use tower::{Layer, Service};

/// Enrolments, renewals and refusals of one connection; more are told to come again on another one.
pub const CALLS_MAX: u32 = 16;
/// Further ones after which the connection is closed.
const TOLD_MAX: u32 = 8;
/// Calls that count whatever comes of them.
const ENROLMENT: &str = "/tombolo.v1.Enrollment/";

/// What one connection has had.
#[derive(Debug, Default)]
pub struct Calls(AtomicU32);

impl Calls {
    fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn is_spent(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= CALLS_MAX
    }

    /// True for a connection that is to be closed.
    pub fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= CALLS_MAX + TOLD_MAX
    }
}

/// Counts the calls of connections without a certificate.
#[derive(Debug, Clone, Copy)]
pub struct CountCalls;

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted(inner)
    }
}

/// Made by [`CountCalls`].
#[derive(Debug, Clone)]
pub struct Counted<S>(S);

/// An answer that is on its way.
type Answer<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Answer<Result<Response<R>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let calls = request
            .extensions()
            .get::<Link>()
            .and_then(|link| link.calls.clone());
        let Some(calls) = calls else {
            return Box::pin(self.0.call(request));
        };
        if calls.is_spent() {
            calls.count();
            let status: Status =
                Refusal::busy("many calls on one connection; come again on a new one").into();
            return Box::pin(std::future::ready(Ok(status.into_http())));
        }
        let enrolment = request.uri().path().starts_with(ENROLMENT);
        if enrolment {
            calls.count();
        }
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if !enrolment && answer.as_ref().map_or(true, is_refusal) {
                calls.count();
            }
            answer
        })
    }
}

/// A call that is refused at once has its status among the headers.
fn is_refusal<R>(answer: &Response<R>) -> bool {
    answer
        .headers()
        .get("grpc-status")
        .is_some_and(|status| status != "0")
}

/// For a connection that has shown no certificate.
pub(crate) fn counted() -> Arc<Calls> {
    Arc::default()
}
