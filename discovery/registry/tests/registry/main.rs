//! The registry as its owner sees it: resources in, worlds out.

mod compile;
mod corpus;
mod exports;
mod incremental;
mod networks;
mod scale;
mod support;
