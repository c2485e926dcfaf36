//! What needs a real kernel and a real boot, and takes minutes where there is no KVM: `make test-slow`.
//!
//! Needs root, the release build, and what `packaging/setup.sh` and `packaging/box/setup.sh --vagrant` install.

mod mesh;
mod vagrant;
mod virtual_machine;
