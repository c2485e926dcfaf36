//! The interop suite: other implementations as peers. See `tests/interop/`.
