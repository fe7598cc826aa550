//! Entry points of the fuzz targets, which tests replay; no part of the interface.
//!
//! All take any bytes at all. They panic if the crate panics, or breaks one of
//! the promises checked here. Hashes that anybody can make are mended before a
//! decoder sees the bytes: a fuzzer cannot guess them, an attacker need not.

mod mend;
mod objects;
mod whole;

pub use objects::{index, key, manifest, pack};
pub use whole::{repository, seeds};
