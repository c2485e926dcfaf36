use crate::{
    buffers,
    control::Control,
    record::{FRAGMENT_MAX, Framed, HEADER, Opened, Records, framed},
    tls::Established,
};
use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    ops::Range,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Sealed bytes that may wait for the socket; at more, writers wait. The greatest frame we send fits twice.
const OUT_MAX: usize = 256 * 1024;
/// Records in one writev.
const SLICES: usize = 32;

/// TLS over TCP for one HTTP/2 connection.
///
/// Writing collects: frames are packed into records of the greatest size and leave by [`TlsIo::poll_send`], which the
/// driver calls once after HTTP/2 has had its turn. So one write to the socket carries what many streams said.
pub(crate) struct TlsIo {
    tcp: TcpStream,
    records: Records,
    /// Borrowed from the thread while it holds something.
    incoming: Vec<u8>,
    /// Bytes of `incoming` that were read and not yet used.
    unread: Range<usize>,
    /// Bytes of `incoming` that are decrypted and not yet taken.
    plain: Range<usize>,
    /// Decrypted during the handshake.
    early: Vec<u8>,
    /// Plaintext that does not fill a record yet.
    staged: Vec<u8>,
    out: VecDeque<Vec<u8>>,
    out_bytes: usize,
    /// Bytes of the first record in `out` that are sent.
    out_sent: usize,
    heard: u64,
    /// Our close_notify is sealed.
    closing: bool,
    /// The peer has said its last.
    closed: bool,
    control: Arc<Control>,
}

impl TlsIo {
    pub(crate) fn new(tcp: TcpStream, established: Established, control: Arc<Control>) -> Self {
        let Established {
            records,
            incoming,
            early,
            ..
        } = established;
        let unread = 0..incoming.len();
        Self {
            tcp,
            records,
            incoming,
            unread,
            plain: 0..0,
            early,
            staged: Vec::new(),
            out: VecDeque::new(),
            out_bytes: 0,
            out_sent: 0,
            heard: 0,
            closing: false,
            closed: false,
            control,
        }
    }

    /// Counts bytes from the peer: whoever sends is alive.
    pub(crate) fn heard(&self) -> u64 {
        self.heard
    }

    /// True if something waits to be sent.
    pub(crate) fn has_output(&self) -> bool {
        !self.staged.is_empty() || !self.out.is_empty()
    }

    /// The socket, for options.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    fn seal_staged(&mut self) -> io::Result<()> {
        if !self.staged.is_empty() {
            self.records
                .seal(&[&self.staged], &mut self.out)
                .map_err(invalid)?;
            self.staged.clear();
            self.out_bytes += self.out.back().map_or(0, Vec::len);
            // Its 16 KiB are not kept by a connection that only said a little.
            if self.staged.capacity() > FRAGMENT_MAX / 4 {
                self.staged = Vec::new();
            }
        }
        Ok(())
    }

    /// Takes plaintext; whole records are sealed at once, the rest is staged.
    fn push(&mut self, mut plain: &[u8]) -> io::Result<()> {
        while self.staged.len() + plain.len() >= FRAGMENT_MAX {
            let (head, rest) = plain.split_at(FRAGMENT_MAX - self.staged.len());
            let before = self.out.len();
            if self.staged.is_empty() {
                self.records.seal(&[head], &mut self.out).map_err(invalid)?;
            } else {
                self.records
                    .seal(&[&self.staged, head], &mut self.out)
                    .map_err(invalid)?;
                self.staged.clear();
            }
            self.out_bytes += self.out.range(before..).map(Vec::len).sum::<usize>();
            plain = rest;
        }
        self.staged.extend_from_slice(plain);
        Ok(())
    }

    /// Sends everything collected. Ready when all of it is in the kernel.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seal_staged()?;
        while !self.out.is_empty() {
            ready!(self.poll_write_out(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        for (slice, record) in slices.iter_mut().zip(&self.out) {
            *slice = IoSlice::new(if count == 0 {
                &record[self.out_sent..]
            } else {
                record
            });
            count += 1;
        }
        let mut written = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.out_bytes = self.out_bytes.saturating_sub(written);
        while let Some(first) = self.out.front() {
            let left = first.len() - self.out_sent;
            if written < left {
                self.out_sent += written;
                break;
            }
            written -= left;
            self.out_sent = 0;
            self.out.pop_front();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_read_plain(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let count = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early[..count]);
            self.early.drain(..count);
            return Poll::Ready(Ok(()));
        }
        loop {
            if !self.plain.is_empty() {
                let count = self.plain.len().min(buffer.remaining());
                buffer.put_slice(&self.incoming[self.plain.start..self.plain.start + count]);
                self.plain.start += count;
                return Poll::Ready(Ok(()));
            }
            if self.closed {
                return Poll::Ready(Ok(()));
            }
            match framed(&self.incoming[self.unread.clone()]).map_err(invalid)? {
                Framed::Whole(length) => {
                    let body = self.unread.start + HEADER;
                    self.unread.start = body + length;
                    let opened = self.records.open(&mut self.incoming[body..body + length]);
                    let opened = opened.inspect_err(|error| self.control.tls_failed(error.clone().into()));
                    match opened.map_err(invalid)? {
                        Opened::Data(length) => self.plain = body..body + length,
                        Opened::Nothing => {}
                        Opened::Closed => self.closed = true,
                    }
                }
                Framed::Partial => {
                    if self.unread.is_empty() {
                        self.release();
                    }
                    // Borrow a buffer only when there is something to put in it.
                    ready!(self.tcp.poll_read_ready(cx))?;
                    self.make_room();
                    let mut room = ReadBuf::new(&mut self.incoming[self.unread.end..]);
                    ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut room))?;
                    let count = room.filled().len();
                    if count == 0 {
                        // HTTP/2 knows by itself whether something is missing.
                        self.closed = true;
                    }
                    self.heard += u64::try_from(count).unwrap_or(u64::MAX);
                    self.unread.end += count;
                }
            }
        }
    }

    fn release(&mut self) {
        self.unread = 0..0;
        self.plain = 0..0;
        buffers::give(std::mem::take(&mut self.incoming));
    }

    /// Makes room for a record of the greatest size behind what is unread.
    fn make_room(&mut self) {
        if self.incoming.len() < buffers::RECORDS {
            let mut larger = buffers::take();
            let length = self.unread.len();
            // What the handshake left is less than a record.
            if length > larger.len() / 2 {
                larger.resize(length + buffers::RECORDS, 0);
            }
            larger[..length].copy_from_slice(&self.incoming[self.unread.clone()]);
            buffers::give(std::mem::replace(&mut self.incoming, larger));
            self.unread = 0..length;
        } else if self.incoming.len() - self.unread.start < HEADER + FRAGMENT_MAX + 256 {
            self.incoming.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
    }
}

impl Drop for TlsIo {
    fn drop(&mut self) {
        self.release();
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// The same connection for HTTP/2, which reads and writes, and for the driver, which sends.
#[derive(Clone)]
pub(crate) struct SharedIo(Arc<Mutex<TlsIo>>);

impl SharedIo {
    pub(crate) fn new(io: TlsIo) -> Self {
        Self(Arc::new(Mutex::new(io)))
    }

    /// Never contended: both users are the same task.
    pub(crate) fn lock(&self) -> MutexGuard<'_, TlsIo> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsyncRead for SharedIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.lock().poll_read_plain(cx, buffer)
    }
}

impl AsyncWrite for SharedIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut io = self.lock();
        while io.out_bytes >= OUT_MAX {
            ready!(io.poll_write_out(cx))?;
        }
        let mut taken = 0;
        for slice in slices {
            let room = OUT_MAX.saturating_sub(io.out_bytes).max(FRAGMENT_MAX);
            let part = &slice[..slice.len().min(room)];
            io.push(part)?;
            taken += part.len();
            if part.len() < slice.len() || io.out_bytes >= OUT_MAX {
                break;
            }
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing: the driver sends when all streams have had their turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut io = self.lock();
        let io = &mut *io;
        io.seal_staged()?;
        if !io.closing {
            io.closing = true;
            io.records.seal_close(&mut io.out).map_err(invalid)?;
        }
        ready!(io.poll_send(cx))?;
        Pin::new(&mut io.tcp).poll_shutdown(cx)
    }
}
