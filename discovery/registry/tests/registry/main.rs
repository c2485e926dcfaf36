//! The registry as its owner sees it: resources in, worlds out.

mod compile;
mod corpus;
mod exports;
mod imported;
mod incremental;
mod networks;
mod policies;
mod scale;
mod support;
