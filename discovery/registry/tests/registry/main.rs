//! The registry as its owner sees it: resources in, worlds out.

mod compile;
mod incremental;
mod scale;
mod support;
