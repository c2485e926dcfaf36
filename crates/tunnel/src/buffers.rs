//! Buffers are borrowed from the worker thread only while there is something to read, so that an idle connection owns
//! none of them.

use bytes::{Bytes, BytesMut};
use std::cell::RefCell;

/// Room for reading from a TLS socket in one call: four records of the greatest size.
pub(crate) const RECORDS: usize = 4 * (5 + 16 * 1024 + 256);
/// Spare buffers a thread keeps: more connections than this rarely hold half a record at the same time.
const SPARE_MAX: usize = 8;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Takes a buffer of [`RECORDS`] bytes; give it back with [`give`].
pub(crate) fn take() -> Vec<u8> {
    SPARE
        .with_borrow_mut(Vec::pop)
        .unwrap_or_else(|| vec![0; RECORDS])
}

/// Returns a buffer to this thread; a small one or one too many is freed.
pub(crate) fn give(buffer: Vec<u8>) {
    if buffer.len() != RECORDS {
        return;
    }
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < SPARE_MAX {
            spare.push(buffer);
        }
    });
}

/// Lets `read` append at most `room` bytes to the thread's arena and splits off what came, without a copy.
///
/// The arena is used again as soon as all that was split off it has been sent.
pub(crate) fn read_shared<T>(room: usize, read: impl FnOnce(&mut BytesMut) -> T) -> (T, Bytes) {
    ARENA.with_borrow_mut(|arena| {
        if arena.capacity() < room {
            arena.reserve(room.max(64 * 1024));
        }
        let result = read(arena);
        (result, arena.split().freeze())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut as _;

    #[test]
    fn the_arena_is_used_again() {
        let first = read_shared(1024, |arena| arena.put_slice(b"abc")).1;
        let place = first.as_ptr();
        drop(first);
        for _ in 0..10_000 {
            let ((), bytes) = read_shared(1024, |arena| arena.put_slice(&[7; 100]));
            assert_eq!(bytes.len(), 100);
        }
        let again = (0..1000).map(|_| read_shared(1024, |arena| arena.put_slice(&[7; 100])).1.as_ptr());
        assert!(
            again.collect::<Vec<_>>().contains(&place.wrapping_add(0)),
            "its memory comes round"
        );
    }

    #[test]
    fn spare_buffers_are_bounded() {
        (0..2 * SPARE_MAX).map(|_| vec![0; RECORDS]).for_each(give);
        give(vec![0; 3]);
        assert_eq!(SPARE.with_borrow(Vec::len), SPARE_MAX);
        assert_eq!(take().len(), RECORDS);
    }
}
