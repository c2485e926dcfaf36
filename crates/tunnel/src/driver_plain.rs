//! Drives HTTP/2 inside another stream, where the outer connection already keeps the peer alive and batches writes.

use crate::{
    control::{CLOSED, CUT, Control, DRAIN},
    driver::{End, Growth, Http2},
};
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

/// Runs one nested connection until it ends or is cut.
pub(crate) struct PlainDriver<H> {
    http2: H,
    control: Arc<Control>,
    drained: bool,
    grown: Growth,
}

impl<H: Http2> PlainDriver<H> {
    pub(crate) fn new(http2: H, control: Arc<Control>) -> Self {
        Self {
            http2,
            control,
            drained: false,
            grown: Growth::default(),
        }
    }
}

impl<H: Http2> Future for PlainDriver<H> {
    type Output = End;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<End> {
        self.control.register(cx);
        if self.control.has(CUT) {
            return Poll::Ready(End::Cut);
        }
        if self.control.has(DRAIN) && !self.drained {
            self.drained = true;
            self.http2.drain();
        }
        let this = &mut *self;
        this.grown.obey(&this.control, &mut this.http2);
        self.http2.poll_drive(cx).map(End::Http2)
    }
}

impl<H> Drop for PlainDriver<H> {
    fn drop(&mut self) {
        self.control.set(CLOSED);
    }
}
