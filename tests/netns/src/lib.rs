//! The netns suite: real programs on real kernels, one network namespace per host. See `tests/netns/`.
