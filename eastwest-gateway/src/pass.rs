//! The bytes of an accepted call, counted also when it ends in an error.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    net::TcpStream,
};
use tombolo_tunnel::{Call, Monitor, TunnelIo, bidirectional};

/// The end of an accepted call that the gateway has made.
pub(crate) enum Inward {
    /// A connection to the endpoint.
    Tcp(TcpStream),
    /// A stream of the session that the endpoint holds.
    Session(TunnelIo),
}

/// Passes bytes on until both directions have ended, or one has failed. What has passed is in the monitor all the time, in
/// whichever way the call ends: from its stream to the endpoint, and to its stream.
pub(crate) async fn pass(inward: Inward, outward: Call, monitor: &Monitor) {
    match (inward, outward) {
        (Inward::Tcp(tcp), Call::Stream(outward)) => {
            bidirectional(tcp, outward, monitor).await;
        }
        (Inward::Tcp(tcp), Call::Io(outward)) => copy(tcp, outward, monitor).await,
        (Inward::Session(inward), outward) => copy(inward, TunnelIo::from(outward), monitor).await,
    }
}

async fn copy(
    mut inward: impl AsyncRead + AsyncWrite + Unpin,
    outward: impl AsyncRead + AsyncWrite + Unpin,
    monitor: &Monitor,
) {
    let mut outward = Counted { io: outward, monitor };
    // What went wrong is said by the ends; here it only ends the call.
    let _ = copy_bidirectional(&mut outward, &mut inward).await;
}

/// Counts what passes.
struct Counted<'m, T> {
    io: T,
    monitor: &'m Monitor,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<'_, T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buffer))?;
        self.monitor.add(0, (buffer.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<'_, T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
        self.monitor.add(count as u64, 0);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    /// Reads as it is, and then fails.
    struct Breaks<T>(T);

    impl<T: AsyncRead + Unpin> AsyncRead for Breaks<T> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let before = buffer.filled().len();
            ready!(Pin::new(&mut self.0).poll_read(cx, buffer))?;
            if buffer.filled().len() == before {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            Poll::Ready(Ok(()))
        }
    }

    impl<T: AsyncWrite + Unpin> AsyncWrite for Breaks<T> {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, bytes)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn bytes_of_a_call_that_fails_are_counted() {
        for breaks in [false, true] {
            let ((mut caller, outward), (inward, mut endpoint)) = (duplex(64), duplex(64));
            let ends = async move {
                caller.write_all(b"question").await.unwrap();
                let mut question = [0; 8];
                endpoint.read_exact(&mut question).await.unwrap();
                endpoint.write_all(b"answer").await.unwrap();
                let mut answer = [0; 6];
                caller.read_exact(&mut answer).await.unwrap();
                drop((caller, endpoint));
            };
            let monitor = Monitor::default();
            if breaks {
                tokio::join!(copy(inward, Breaks(outward), &monitor), ends);
            } else {
                tokio::join!(copy(inward, outward, &monitor), ends);
            }
            assert_eq!((monitor.from_stream(), monitor.to_stream()), (8, 6), "{breaks}");
        }
    }
}
